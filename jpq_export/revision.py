"""Which code made a result, when, on what; a digest of the sources, so that changed code meets no old numbers."""

from __future__ import annotations

import os
import subprocess
from datetime import date
from functools import cache
from hashlib import sha256
from pathlib import Path

from jpq_export import __version__

ROOT = Path(__file__).parent
PRICING = ("compress", "numerics")  # what statistics, rounded weights and prices depend on


@cache
def revision(parts: tuple[str, ...] = ("",)) -> str:
    """sha256 over the .py files below these folders of the package; by default all of it."""
    digest = sha256()
    for path in sorted(path for part in parts for path in (ROOT / part).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """The checkout's commit, with '+' where the package's sources differ from it; the version outside a checkout."""
    # An installed package may lie inside somebody else's checkout: ours is one that tracks this file.
    tracked = ["ls-files", "--error-unmatch", Path(__file__).name]
    asked = (tracked, ["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "."])
    try:
        _, found, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return found + ("+" if changed else "")


def processor() -> str:
    """The processor's name where Linux tells it, and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def provenance() -> dict[str, str]:
    """What a measurement is kept with: by which code, when, on what."""
    return {"revision": revision(), "commit": commit(), "date": date.today().isoformat(), "machine": processor()}
