"""What stages do to the process: freed memory stays with it while they run."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from jpq_export import progress
if "old" in sys.argv:  # glibc that refuses so large a threshold
    of_libc = progress._of_libc
    progress._of_libc = lambda name: lambda what, size: 0 if what == -3 else of_libc(name)(what, size)
if "kept" in sys.argv:
    progress.keep_freed_memory()
def faults(megabytes):
    x = torch.zeros(megabytes << 18)
    x + 1, x + 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(16), faults(64))
"""


def faults(*kinds: str) -> list[int]:
    """Page faults of 20 sums of 16 MB and of 64 MB each."""
    done = subprocess.run([sys.executable, "-c", FAULTS, *kinds], capture_output=True, text=True, check=True)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_large_tensors_are_not_mapped_anew() -> None:
    assert faults("kept")[1] < 0.5 * faults()[1]
    assert faults("kept", "old")[0] <= 2 * max(faults()[0], 4096)  # no worse than it was
