"""The machine, as a report must name it: GPU, driver, versions, date, commit."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gpu_steps.outcome import CannotRun, Outcome, Settings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("plugins/core", "plugins/onnxruntime", "kernels/jpq_kernels", "tools/gpu_steps")
PACKAGES = ("torch", "triton", "numpy", "onnxruntime-gpu", "onnxruntime")


def run(settings: Settings) -> Outcome:
    """The step `environment`; CannotRun without a GPU."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "sources sha256": sources_digest(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: version for name in PACKAGES if (version := installed(name))},
        "nvcc": nvcc_version(),
    }
    if settings.rehearse:
        return Outcome("passed", "", {"gpu": "none: a rehearsal on the CPU, nothing here ran on a GPU"} | facts)
    return Outcome("passed", "", gpu() | facts)


def gpu() -> dict[str, Any]:
    """Facts of the first CUDA GPU; CannotRun where torch sees none."""
    try:
        import torch
    except ImportError as error:
        raise CannotRun(
            f"no CUDA GPU can be used: torch is missing ({error}); install a CUDA build of torch"
        ) from error
    if not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "is a build without CUDA"
        raise CannotRun(f"no CUDA GPU: torch {torch.__version__} {why}; run this where nvidia-smi lists one")
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "compute capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory GiB": round(facts.total_memory / 2**30, 1),
        "L2 MiB": round(facts.L2_cache_size / 2**20, 1),
        "driver": driver(),
        "CUDA of torch": torch.version.cuda,
    }


def driver() -> str:
    """The driver's version, from nvidia-smi or the kernel."""
    if found := shutil.which("nvidia-smi"):
        command = [found, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    numbers = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return numbers[0] if numbers else "unknown"


def nvcc_version() -> str:
    """Release of nvcc, or that there is none."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        return "none"
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=60)
    release = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return release[1] if release else "unknown"


def installed(name: str) -> str | None:
    """Version of a package that is here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown: not a git checkout"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def sources_digest() -> str:
    """Changes with any kernel or step, whatever the commit says."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
