"""Where downloads, price lists and compiled kernels are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$JPQ_CACHE or ~/.cache/jpq-export."""
    return Path(os.environ.get("JPQ_CACHE") or Path.home() / ".cache" / "jpq-export")
