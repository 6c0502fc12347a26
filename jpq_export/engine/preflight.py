"""Everything that can be known before a long build fails: each check one line with got, needed and remedy."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from jpq_export.engine import aot
from jpq_export.engine.device import Device
from jpq_export.engine.plugin import ABI, PluginError, can_compile, choose, recorded
from jpq_export.engine.settings import Settings, device_section, disk_needed, memory_terms, size_text, spec_of
from jpq_export.format.bundle import Manifest, check_hashes

# A graph written for a TensorRT version is one of three dialects (lower/export.py `dialect_for`), each readable from a
# first version on: plain without functions; with functions, which 10.6 and earlier prefer to a plugin; fused Attention,
# RMSNormalization and RotaryEmbedding.
DIALECTS = ((10, 3), (10, 7), (10, 15))
TENSORRT_REMEDY = (
    "it comes with JetPack: sudo apt install nvidia-jetpack, or python3-libnvinfer alone; in a virtual environment use "
    "python3 -m venv --system-site-packages; on a desktop: pip install tensorrt"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One line. `remedy` is empty when it passed."""

    name: str
    passed: bool
    got: str
    needed: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """For people."""
        text = f"{'ok  ' if self.passed else 'FAIL'} {self.name}: got {self.got}; needed {self.needed}"
        return text if self.passed else f"{text}; {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def preflight(manifest: Manifest, device: Device, settings: Settings) -> list[Check]:
    """All checks, in the order a build would meet them; none stops the others."""
    return [
        bundle_files(manifest, settings),
        graph_file(manifest),
        tensorrt_version(manifest, device),
        gpu(manifest, device),
        plugin(manifest, device, settings),
        profiles(manifest, settings),
        memory(manifest, device, settings),
        disk(manifest, device, settings),
    ]


def bundle_files(manifest: Manifest, settings: Settings) -> Check:
    """Every file is as exported."""
    problems = check_hashes(settings.bundle, manifest)
    needed = f"{len(manifest.files)} files as exported"
    if not problems:
        return Check("bundle", True, needed, needed)
    got = ", ".join(f"{problem.place} ({problem.message})" for problem in problems[:3])
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Check("bundle", False, got + more, needed, "copy the bundle again, or export it again")


def graph_file(manifest: Manifest) -> Check:
    """The bundle holds a graph for TensorRT."""
    name = device_section(manifest).get("graph")
    if name in manifest.files:
        return Check("graph", True, name, "a graph for TensorRT")
    remedy = "export again with --target jetson, or with a target file that has a tensorrt version"
    return Check("graph", False, "none in this bundle", "a graph for TensorRT", remedy)


def version_of(text: str) -> tuple[int, int]:
    """'10.3.0.30' -> (10, 3); ValueError for another form."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if not match:
        raise ValueError(f"got {text!r}, expected a version such as 10.3")
    return int(match[1]), int(match[2])


def dialect_start(written_for: str) -> tuple[int, int]:
    """The first TensorRT version that reads a graph written for `written_for`."""
    version = version_of(written_for)
    return max((start for start in DIALECTS if start <= version), default=DIALECTS[0])


def tensorrt_version(manifest: Manifest, device: Device) -> Check:
    """TensorRT is there and reads this graph."""
    written = str(device_section(manifest).get("tensorrt") or manifest.target.get("tensorrt") or "10.3")
    first = dialect_start(written)
    needed = f"{first[0]}.{first[1]} or later (the graph was written for {written})"
    if device.tensorrt is None:
        got = f"no Python module tensorrt ({device.tensorrt_missing})"
        return Check("tensorrt", False, got, needed, TENSORRT_REMEDY)
    if version_of(device.tensorrt) >= first:
        return Check("tensorrt", True, device.tensorrt, needed)
    here = ".".join(map(str, version_of(device.tensorrt)))
    remedy = f'update JetPack, or export again with a target file that has tensorrt = "{here}"'
    if version_of(device.tensorrt) < DIALECTS[0]:
        remedy = "update JetPack to 6.1 or later"
    return Check("tensorrt", False, device.tensorrt, needed, remedy)


def gpu(manifest: Manifest, device: Device) -> Check:
    """A CUDA GPU answers. Another GPU than the target's passes: the plugin check says whether there is code for it."""
    planned = manifest.target.get("sm")
    needed = f"a CUDA GPU (the plan was made for sm_{planned})"
    if device.sm is None:
        remedy = "run this on the board itself, where the driver is installed"
        return Check("gpu", False, device.gpu_missing or "none", needed, remedy)
    return Check("gpu", True, f"{device.gpu}, sm_{device.sm}, CUDA {device.cuda}", needed)


def plugin(manifest: Manifest, device: Device, settings: Settings) -> Check:
    """A trusted library for this GPU, or sources and tools to compile one; with --plugin aot kernels for it."""
    if settings.aot:
        return ahead_of_time(manifest, device, settings)
    section = device_section(manifest)
    board = f"sm_{device.sm}" if device.sm else "this board's GPU"
    needed = f"a library for {board}, {device.machine}, ABI {ABI}, with the recorded sha256"
    remedy = "install the compilers (sudo apt install cmake cuda-nvcc-12-6, or nvidia-jetpack)"
    try:
        versions = {"tensorrt": device.tensorrt, "cuda": device.cuda}
        found = choose(settings, section, sm=device.sm, machine=device.machine, **versions)
        reasons = [
            f"{plugin.origin}: {plugin.reason_against(device.sm, device.machine, **versions)}"
            for plugin in recorded(settings, section)
        ]
    except PluginError as error:
        return Check("plugin", False, str(error), needed, "leave --plugin out, or give an untouched library")
    if found:
        return Check("plugin", True, f"{found.origin}, sha256 {found.sha256[:12]}…", needed)
    if settings.plugin is not None:
        got = f"--plugin {settings.plugin}: for another board ({'; '.join(reasons)})"
        return Check("plugin", False, got, needed, "leave --plugin out to compile the bundle's own sources")
    if any("sha256" in reason for reason in reasons):  # somebody changed it: no way round that by compiling
        return Check("plugin", False, "; ".join(reasons), needed, "copy the bundle again; the library is not loaded")
    missing = can_compile(section, device.tools)
    if missing is None:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        return Check("plugin", True, f"sources, cmake and nvcc: compiled here first{why}", needed)
    if "carries no" in missing:
        remedy = "export again with a jpq-export that ships plugins/tensorrt, or give --plugin a prebuilt library"
    return Check("plugin", False, "; ".join([*reasons, missing]), needed, remedy)


def ahead_of_time(manifest: Manifest, device: Device, settings: Settings) -> Check:
    """Kernels of this graph for this GPU, and a TensorRT that takes them."""
    first = ".".join(map(str, aot.FIRST_TENSORRT))
    needed = f"kernels of this graph for sm_{device.sm or '?'} in {aot.FOLDER}/, TensorRT {first} or later"
    entry = manifest.files.get(str(device_section(manifest).get("graph")))
    version = version_of(device.tensorrt) if device.tensorrt else None
    try:
        kernels = aot.read_kernels(settings.bundle)
        reason = aot.reason_against(kernels, entry.sha256 if entry else "", device.sm, version)
    except PluginError as error:
        return Check("plugin", False, str(error), needed, "or build with --plugin library")
    if reason:
        return Check("plugin", False, reason, needed, "or build with --plugin library")
    return Check(
        "plugin", True, f"{len(kernels.kernels)} kernels compiled ahead of time, sha256 {kernels.sha256[:12]}…", needed
    )


def profiles(manifest: Manifest, settings: Settings) -> Check:
    """Prompt and cache lengths suit the model and the recorded vectors."""
    got = f"--max-prompt {settings.max_prompt}, --max-tokens {settings.max_tokens}"
    section = device_section(manifest)
    prompt, tokens = int(section.get("vectors_prompt", 1)), int(section.get("vectors_tokens", 1))
    most = spec_of(manifest, settings.bundle).max_positions
    needed = f"a prompt of {prompt} or more, {tokens} to {most} tokens (recorded vectors, positions of the model)"
    if prompt <= settings.max_prompt and tokens <= settings.max_tokens <= most:
        return Check("profiles", True, got, needed)
    return Check("profiles", False, got, needed, "change --max-prompt or --max-tokens")


def memory(manifest: Manifest, device: Device, settings: Settings) -> Check:
    """Free memory against the sum of `memory_terms`."""
    terms = memory_terms(manifest, spec_of(manifest, settings.bundle), settings)
    total = sum(terms.values())
    needed = f"{size_text(total)} = " + " + ".join(f"{name} {size_text(size)}" for name, size in terms.items())
    free = device.free_memory_bytes
    if free is None:
        return Check("memory", False, "unknown (/proc/meminfo has no MemAvailable)", needed, "run this on the board")
    remedy = "close other programs, or lower --max-tokens, --max-prompt or --workspace, or export a smaller --size"
    return Check("memory", free >= total, f"{size_text(free)} free", needed, "" if free >= total else remedy)


def disk(manifest: Manifest, device: Device, settings: Settings) -> Check:
    """Free space where the engine goes."""
    needed, free = disk_needed(manifest), device.free_disk_bytes
    got = f"{size_text(free)} free at {settings.home}"
    text = f"{size_text(needed)} (engine, compiled plugin)"
    remedy = "" if free >= needed else "free some space, or choose another place with --out"
    return Check("disk", free >= needed, got, text, remedy)


def failures(checks: list[Check]) -> str | None:
    """One line naming the failed checks; None when all passed."""
    failed = [check.name for check in checks if not check.passed]
    if not failed:
        return None
    return f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}); nothing was built; see the lines above"
