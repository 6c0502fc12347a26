"""What stages do to the process: freed memory stays with it while they run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jpq_export import progress

FAULTS = """
import resource, sys, torch
from jpq_export import progress
if "kept" in sys.argv:
    progress.keep_freed_memory()
x = torch.zeros(64 << 18)
x + 1, x + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*kinds: str) -> int:
    """Page faults of 20 sums of 64 MB each."""
    done = subprocess.run([sys.executable, "-c", FAULTS, *kinds], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_large_tensors_are_not_mapped_anew() -> None:
    assert faults("kept") < 0.5 * faults()


@pytest.mark.parametrize("takes_it", [True, False])
def test_trim_threshold_only_with_mmap_threshold(takes_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older glibc refuses a threshold of 1 GB; the trim threshold alone would end its own, growing ones."""
    asked: list[int] = []

    def mallopt(what: int, size: int) -> int:
        asked.append(what)
        return int(takes_it)

    monkeypatch.setattr(progress, "_of_libc", lambda name: mallopt)
    progress.keep_freed_memory()
    assert asked == [progress.MMAP_THRESHOLD, progress.TRIM_THRESHOLD][: 1 + takes_it]
