"""Which code made a cached result: a digest of the sources, so that a changed algorithm never meets old numbers."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent
PRICING = ("compress", "numerics")  # what statistics, rounded weights and prices depend on


@cache
def revision(parts: tuple[str, ...] = ("",)) -> str:
    """sha256 over the .py files below these folders of the package; by default all of it."""
    digest = sha256()
    for path in sorted(path for part in parts for path in (ROOT / part).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
