"""The CPU kernels of `plugins/`: compiled on first use, kept in the cache, loaded only when nobody touched the file."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpq_export.cache import cache_root
from jpq_export.errors import JpqError, UsageError

logger = logging.getLogger(__name__)

FOLDERS = ("core", "onnxruntime")  # of plugins/, all .c files of which make the library
# Nothing is contracted: clang would fuse a * b + c where it is written so, and round otherwise than gcc.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
LIBRARIES = ("-lm",)
FP32, INT16, INT8 = "fp32", "int16", "int8"
FAST_BITS = {"16": INT16, "8": INT8}
COMPILERS = ("cc", "gcc", "clang")
LIBRARY = "libjpq_cpu.dylib" if sys.platform == "darwin" else "libjpq_cpu.so"
RECORD = "build.json"
TIMEOUT_SECONDS = 600


class NativeError(JpqError):
    """The CPU kernels cannot be compiled or loaded; onnxruntime's own operators still run every bundle."""


@dataclass(frozen=True, slots=True)
class Library:
    """A compiled library; `implementations`: what this processor runs of it, best first ("avx512-vnni", "scalar")."""

    path: Path
    implementations: tuple[str, ...]


def cpu_library() -> Library:
    """The library for `SessionOptions.register_custom_ops_library`, compiled if it is not in the cache yet.

    A cached file whose sha256 is not the one recorded when it was built is not loaded but built again.

    Raises:
        NativeError: no compiler, it fails, or the cache cannot be written.
    """
    folder = sources_folder()
    compiler = _compiler()
    home = cache_root() / "native" / _key(folder, compiler)
    path = home / LIBRARY
    if not untouched(home, LIBRARY):
        if path.exists():
            logger.warning("%s: not the file that was built (sha256 differs); building it again", path)
        _build(folder, compiler, home)
    return Library(path, _implementations(path))


def available() -> bool:
    """Whether `register` will find kernels; says why not in a warning."""
    import onnxruntime

    return register(onnxruntime.SessionOptions(), FP32) is not None


def fast_activations() -> str:
    """What the kernels round activations to, where that may be: INT16, or INT8 when JPQ_FAST_BITS is 8.

    16 bits: a hundred times less error than 8, 6% fewer tokens a second on Sapphire Rapids, 12% on Zen 4.

    Raises:
        UsageError: JPQ_FAST_BITS is neither.
    """
    asked = os.environ.get("JPQ_FAST_BITS", "16")
    if asked not in FAST_BITS:
        raise UsageError(f"JPQ_FAST_BITS={asked}: expected {' or '.join(FAST_BITS)}; correct it or unset it")
    return FAST_BITS[asked]


def register(options: Any, activations: str) -> Library | None:
    """Put the kernels into onnxruntime's session `options`; None, with a warning, when there are none to be had.

    `activations`: FP32, INT16 or INT8, to which they are rounded where that is faster. JPQ_KERNELS=off leaves the
    kernels out: onnxruntime's own operators then compute everything.
    """
    if os.environ.get("JPQ_KERNELS") == "off":
        return None
    try:
        library = cpu_library()
        options.add_session_config_entry("jpq.activations", activations)  # read when the library registers
        options.register_custom_ops_library(str(library.path))
    except NativeError as error:
        logger.warning("%s; onnxruntime's own operators compute instead, more slowly", error)
        return None
    return library


def sources_folder() -> Path:
    """`plugins/` of a checkout, or as shipped inside the installed package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_plugins", package.parent / "plugins"):
        if (folder / "core" / "low_bit.h").is_file():
            return folder
    raise NativeError(f"CPU kernels: their sources are neither in {package / '_plugins'} nor beside it; reinstall")


def _compiler() -> str:
    asked = os.environ.get("CC")
    names = (asked,) if asked else COMPILERS
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    looked = f"CC={asked}" if asked else ", ".join(COMPILERS)
    raise NativeError(f"CPU kernels: no C compiler ({looked} not found); install gcc or clang, or set CC")


def _sources(folder: Path) -> list[Path]:
    """Everything the library is made of, headers included, in a fixed order."""
    kinds = (".c", ".h", ".inc")
    return [path for part in FOLDERS for path in sorted((folder / part).iterdir()) if path.suffix in kinds]


def _key(folder: Path, compiler: str) -> str:
    """Changes with any source, the compiler or its version, or the flags."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=TIMEOUT_SECONDS).stdout
    digest = hashlib.sha256(json.dumps([compiler, FLAGS, LIBRARIES, LIBRARY]).encode() + version)
    for path in _sources(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:24]


def untouched(home: Path, library: str) -> bool:
    """Whether the library is in `home`, with the sha256 recorded at its build."""
    try:
        recorded = json.loads((home / RECORD).read_text())["sha256"]
        return hashlib.sha256((home / library).read_bytes()).hexdigest() == recorded
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(folder: Path, compiler: str, home: Path) -> None:
    logger.warning("compiling the CPU kernels with %s, once (some seconds to half a minute)", compiler)
    keep(home, LIBRARY, lambda out: _compile(folder, compiler, out), {"compiler": compiler, "flags": FLAGS + LIBRARIES})


def keep(home: Path, library: str, make: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Let `make` write the library beside `home`, then rename: nobody sees half a file, and of two either wins."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=home) as scratch:
            built = Path(scratch) / library
            make(built)
            record = {"sha256": hashlib.sha256(built.read_bytes()).hexdigest(), **facts}
            (Path(scratch) / RECORD).write_text(json.dumps(record, indent=1))
            os.replace(built, home / library)
            os.replace(Path(scratch) / RECORD, home / RECORD)
    except OSError as error:
        raise NativeError(
            f"{home}: cannot store the compiled kernels ({error.strerror or error}); free some space or set JPQ_CACHE "
            "to a writable folder"
        ) from error


def _compile(folder: Path, compiler: str, out: Path) -> None:
    """Every source by itself, as many at a time as there are cores, largest first; then the library of them."""
    sources = [path for path in _sources(folder) if path.suffix == ".c"]
    objects = {path: out.with_name(f"{path.parent.name}-{path.stem}.o") for path in sources}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        by_size = sorted(sources, key=lambda path: -path.stat().st_size)
        for _ in pool.map(lambda path: _call(compiler, *FLAGS, "-c", "-o", objects[path], path), by_size):
            pass
    _call(compiler, *FLAGS, "-shared", "-o", out, *objects.values(), *LIBRARIES)


def _call(compiler: str, *arguments: str | Path) -> None:
    command = [compiler, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NativeError(
            f"CPU kernels: {compiler} took more than {TIMEOUT_SECONDS} s; try again, or set CC"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NativeError(
            f"CPU kernels: {compiler} fails ({lines[0].strip()}); install gcc 9 or clang 9 or later, or set CC"
        )


def _implementations(path: Path) -> tuple[str, ...]:
    try:
        name = ctypes.CDLL(str(path)).jpq_implementation_name
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path}: cannot be loaded ({error}); delete its folder") from error
    name.argtypes, name.restype = [ctypes.c_int], ctypes.c_char_p
    found = []
    while text := name(len(found)):
        found.append(text.decode())
    return tuple(found)
