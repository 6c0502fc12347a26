"""Whether torchrun started this process, and which of its processes it is: from the environment, without torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """True in a process of torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Which process of the run this is; 0 writes files and speaks."""
    return int(os.environ["RANK"]) if launched() else 0


def local_world() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
