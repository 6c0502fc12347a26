"""The TensorRT plugin: which library fits this board, its recorded hash, its build with cmake and nvcc."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jpq_export.engine.settings import Settings
from jpq_export.errors import JpqError
from jpq_export.format.bundle import hash_file

ABI = 1  # of what this package expects: operator names, attributes and input order of version 1
LIBRARY = "libjpq_tensorrt.so"
RECORD = "plugin.json"  # beside a library compiled here: its hash, its SM, the hash of its sources
LOG = "plugin-build.log"
BUILD_SECONDS = 3600


class PluginError(JpqError):
    """The plugin library cannot be found, trusted or compiled."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A library whose sha256 somebody recorded. `sms`: GPU generations it has code for; `origin`: for the reader.

    `tensorrt`, `cuda`: major versions a library from elsewhere was compiled for; None when it was compiled here.
    """

    path: Path
    sha256: str
    sms: tuple[int, ...]
    abi: int
    machine: str
    origin: str
    tensorrt: int | None = None
    cuda: int | None = None

    @property
    def untouched(self) -> bool:
        """Whether the file is still the recorded one."""
        return self.path.is_file() and hash_file(self.path).sha256 == self.sha256

    def reason_against(
        self, sm: int | None, machine: str, *, tensorrt: str | None = None, cuda: str | None = None
    ) -> str | None:
        """Why this library is not for this board; None when it is. `cuda`: what the driver knows, "12.6"."""
        if self.abi != ABI:
            return f"ABI {self.abi}"
        if self.machine != machine:
            return f"for {self.machine}"
        if sm not in self.sms:
            return "for " + ", ".join(f"sm_{value}" for value in self.sms)
        if self.tensorrt is not None and (tensorrt is None or int(tensorrt.split(".")[0]) != self.tensorrt):
            return f"for TensorRT {self.tensorrt}"
        if self.cuda is not None and (cuda is None or int(cuda.split(".")[0]) < self.cuda):
            return f"for CUDA {self.cuda}"  # its runtime refuses an older driver
        return None if self.untouched else "sha256 is not the recorded one"


def recorded(settings: Settings, section: dict[str, Any]) -> list[Plugin]:
    """Libraries with a recorded hash: prebuilt ones of the bundle, then the one compiled here from these sources."""
    out = [_prebuilt(settings.bundle, raw) for raw in section.get("binaries", ())]
    try:
        raw = json.loads((settings.home / RECORD).read_text(encoding="utf-8"))
        if raw["sources"] == sources_digest(settings.bundle):
            path = settings.home / LIBRARY
            out.append(Plugin(path, raw["sha256"], tuple(raw["sms"]), raw["abi"], raw["machine"], "compiled here"))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not compiled yet, or its record was touched: it is compiled again
    return out


def _prebuilt(bundle: Path, raw: dict[str, Any]) -> Plugin:
    return Plugin(
        *(bundle / raw["file"], raw["sha256"], tuple(raw["sms"]), raw["abi"], raw["machine"]),
        origin=f"prebuilt, {raw['file']}",
        tensorrt=raw.get("tensorrt"),
        cuda=raw.get("cuda"),
    )


def choose(
    settings: Settings,
    section: dict[str, Any],
    *,
    sm: int | None,
    machine: str,
    tensorrt: str | None = None,
    cuda: str | None = None,
) -> Plugin | None:
    """The first that fits this board; with --plugin only that file, and only with a recorded hash."""
    candidates = recorded(settings, section)
    if settings.plugin is not None:
        candidates = [_asked(settings.plugin, candidates)]
    fits = (p for p in candidates if p.reason_against(sm, machine, tensorrt=tensorrt, cuda=cuda) is None)
    return next(fits, None)


def _asked(path: Path, candidates: list[Plugin]) -> Plugin:
    """The record whose sha256 is that of `path`, pointing at `path`."""
    if not path.is_file():
        raise PluginError(f"--plugin {path}: no such file; give a library built from this bundle's plugins/")
    digest = hash_file(path).sha256
    for plugin in candidates:
        if plugin.sha256 == digest:
            return replace(plugin, path=path, origin=f"--plugin {path}")
    known = ", ".join(f"{plugin.sha256[:12]}…" for plugin in candidates) or "none"
    raise PluginError(
        f"--plugin {path}: sha256 {digest[:12]}… is in no record (recorded: {known}); it is not loaded; leave --plugin "
        "out to compile the bundle's own sources"
    )


def can_compile(section: dict[str, Any], tools: dict[str, str]) -> str | None:
    """None when the sources can be compiled here; otherwise what is missing."""
    if missing := section.get("missing"):
        return f"the bundle carries no sources of {', '.join(missing)}"
    if not section.get("parts"):
        return "the bundle carries no plugin sources"
    absent = [name for name in ("cmake", "nvcc") if name not in tools]
    return f"{' and '.join(absent)} not found" if absent else None


def build_commands(settings: Settings, tools: dict[str, str], sm: int | None) -> list[list[str]]:
    """What `compile_plugin` runs."""
    folder = settings.home / "plugin-build"
    configure = [tools.get("cmake", "cmake"), "-S", str(settings.bundle / "plugins" / "tensorrt"), "-B", str(folder)]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_ARCHITECTURES={sm or 'native'}"]
    configure.append(f"-DCMAKE_CUDA_COMPILER={tools.get('nvcc', 'nvcc')}")
    return [configure, [tools.get("cmake", "cmake"), "--build", str(folder), "--parallel"]]


def compile_plugin(
    settings: Settings, tools: dict[str, str], *, sm: int, machine: str, say: Callable[[str], None]
) -> Plugin:
    """Compile the bundle's sources for this GPU; the log stays beside the engine. PluginError names the log."""
    settings.home.mkdir(parents=True, exist_ok=True)
    log = settings.home / LOG
    with log.open("w", encoding="utf-8") as file:
        for command in build_commands(settings, tools, sm):
            say("$ " + " ".join(command))
            file.write("$ " + " ".join(command) + "\n")
            file.flush()
            _run(command, file, log)
    return _keep(settings, sm, machine)


def _run(command: list[str], file: Any, log: Path) -> None:
    try:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=BUILD_SECONDS)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise PluginError(f"plugin: {command[0]} did not finish ({error}); see {log}") from error
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        first = lines[0].strip() if lines else f"exit code {done.returncode}"
        raise PluginError(f"plugin: {Path(command[0]).name} fails ({first}); the whole log is {log}")


def _keep(settings: Settings, sm: int, machine: str) -> Plugin:
    """Move the library beside the engine and record its hash."""
    found = sorted((settings.home / "plugin-build").rglob(LIBRARY))
    if not found:
        raise PluginError(f"plugin: the build made no {LIBRARY}; see {settings.home / LOG}")
    path = settings.home / LIBRARY
    os.replace(found[0], path)
    digest = hash_file(path).sha256
    record = {"sha256": digest, "sms": [sm], "abi": ABI, "machine": machine, "sources": sources_digest(settings.bundle)}
    (settings.home / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Plugin(path, digest, (sm,), ABI, machine, "compiled here")


def sources_digest(bundle: Path) -> str:
    """Changes with any file below plugins/ of the bundle."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (bundle / "plugins").rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(bundle).as_posix()} {hash_file(path).sha256}\n".encode())
    return digest.hexdigest()
