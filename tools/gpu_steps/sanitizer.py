"""compute-sanitizer over every kernel: memcheck and racecheck find nothing, and find what is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_steps.cuda_set import compiled_for_the_cpu, compiled_for_this_gpu
from gpu_steps.outcome import FAILED, NOT_RUN, PASSED, CannotRun, Outcome, Settings

SOURCE = Path(__file__).with_name("edges.cu")
LAUNCHES = Path(__file__).with_name("launches.py")
FOUND = 9  # exit code asked of compute-sanitizer when it finds something
USUAL = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
SHORT_BUFFERS = ("packed", "scales", "zeros", "x", "y", "indices")
RUN_SECONDS = 500
REFUSALS = ("Device not supported", "No attachable process", "Unable to find injection library")


@dataclass(frozen=True, slots=True)
class Check:
    """A program under a tool; `clean`: nothing may be found, otherwise something must be."""

    name: str
    command: tuple[str, ...]
    clean: bool
    environment: dict[str, str]


def find_sanitizer() -> str:
    """The tool; CannotRun where there is none."""
    for found in (
        shutil.which("compute-sanitizer"),
        *(shutil.which(f"{folder}/compute-sanitizer") for folder in USUAL),
    ):
        if found:
            return found
    raise CannotRun("no compute-sanitizer: it comes with the CUDA toolkit")


def checks(settings: Settings) -> list[Check]:
    """On a GPU both tools over the CUDA kernels and memcheck over the Triton kernels; each with its twins."""
    program = Path(settings.scratch) / "edges"
    if settings.rehearse:
        flags = ("-g", "-O1", "-fsanitize=address", "-fno-sanitize-recover=all")
        edges = str(compiled_for_the_cpu(SOURCE, program, *flags))
        return [
            _edges((), "AddressSanitizer", edges, ""),
            *(_edges((), "AddressSanitizer", edges, b) for b in SHORT_BUFFERS),
        ]
    tool = find_sanitizer()
    edges = str(compiled_for_this_gpu(SOURCE, program))
    memory, races = ((tool, "--tool", name, "--error-exitcode", str(FOUND)) for name in ("memcheck", "racecheck"))
    # Torch's own allocator would hide an access beyond a tensor.
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    triton = [
        Check("memcheck, Triton kernels", (*memory, sys.executable, str(LAUNCHES)), True, plain),
        Check(
            "memcheck, Triton kernels, twin: Y one row short",
            (*memory, sys.executable, str(LAUNCHES), "y"),
            False,
            plain,
        ),
    ]
    short = SHORT_BUFFERS[:2] if settings.quick else SHORT_BUFFERS
    return [
        _edges(memory, "memcheck", edges, ""),
        *(_edges(memory, "memcheck", edges, name) for name in short),
        _edges(races, "racecheck", edges, ""),
        Check("racecheck, twin: a race", (*races, edges, "race"), False, {}),
        *triton,
    ]


def _edges(tool: tuple[str, ...], name: str, program: str, buffer: str) -> Check:
    twin = f", twin: {buffer} one element short" if buffer else ""
    return Check(f"{name}, CUDA kernels{twin}", (*tool, program, *([buffer] if buffer else [])), not buffer, {})


def judge(check: Check, code: int, output: str) -> tuple[str, str]:
    """(status, reason) of one check that ended with `code`."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    refused = next((line for line in lines if any(words in line for words in REFUSALS)), None)
    if refused:
        return NOT_RUN, refused
    if check.clean and code == 0:
        return PASSED, ""
    told = next(
        (line for line in lines if "ERROR:" in line or "rror" in line or "Invalid" in line or "hazard" in line),
        lines[-1] if lines else "",
    )
    if not check.clean:
        return (PASSED, told) if code else (FAILED, "the planted fault was not found")
    return FAILED, f"exit code {code}: {told}"


def run(settings: Settings) -> Outcome:
    """The step `sanitizer`."""
    rows = []
    for check in checks(settings):
        done = subprocess.run(
            check.command,
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_SECONDS,
            env=os.environ | check.environment,
        )
        status, reason = judge(check, done.returncode, done.stdout + done.stderr)
        rows.append({"check": check.name, "result": status, "says": reason})
    failed = [row for row in rows if row["result"] == FAILED]
    idle = [row for row in rows if row["result"] == NOT_RUN]
    if failed:
        return Outcome(FAILED, f"{failed[0]['check']}: {failed[0]['says']}", {}, rows)
    if idle:
        return Outcome(NOT_RUN, idle[0]["says"], {}, rows)
    return Outcome(PASSED, "", {"checks": len(rows)}, rows)
