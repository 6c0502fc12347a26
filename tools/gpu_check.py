"""Check the GPU kernels on the CUDA GPU that is here: correct first, then how fast; one command, one report.

    python tools/gpu_check.py --out FOLDER [--only STEP] [--quick] [--bundle BUNDLE]

Every step runs in a process of its own with a time limit, so that a crash loses only its own results; the report is
written anew after each. A step that cannot run says why. Exit code 0 when nothing is wrong, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # tools/ is there already: this file's folder

from gpu_steps import report  # noqa: E402 the repository is on the path from here on
from gpu_steps.outcome import FAILED, NOT_RUN, PASSED, CannotRun, Outcome, Settings  # noqa: E402

# Step -> (its module and function, seconds it may take).
STEPS = {
    "environment": ("gpu_steps.environment:run", 120),
    "cuda": ("gpu_steps.cuda_set:run", 900),
    "triton": ("gpu_steps.triton_set:run", 1500),
    "sanitizer": ("gpu_steps.sanitizer:run", 1500),
    "bandwidth": ("gpu_steps.speed:run_decode", 1200),
    "gemm": ("gpu_steps.speed:run_prefill", 1200),
    "decode": ("gpu_steps.decode:run", 900),
}
FORMAT = "jpq-gpu-check/1"
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the steps asked for and write the report; the exit code."""
    options = parse(arguments)
    settings = Settings(options.quick, options.rehearse, options.bundle, str(options.out / "scratch"))
    if options.step:
        return run_here(options.step, settings, options.result)
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    (options.out / "scratch").mkdir(exist_ok=True)
    record: Record = {
        "format": FORMAT,
        "rehearsal": options.rehearse,
        "command": command_line(),
        "machine": {},
        "steps": {},
    }
    for name in ["environment", *(name for name in options.only or STEPS if name != "environment")]:
        step = run_apart(name, options)
        record["steps"][name] = step
        if name == "environment":
            if step["status"] != PASSED:
                say(f"gpu_check: {step['reason']}")
                return 1
            record["machine"] = step["facts"]
        report.write(options.out, record)
        say(f"{name}: {step['status']} ({step['seconds']:.0f} s){': ' + step['reason'] if step['reason'] else ''}")
    say(f"report: {options.out / 'gpu_check.md'}")
    return int(any(step["status"] == FAILED for step in record["steps"].values()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for report, logs and compiled kernels")
    parser.add_argument("--only", action="append", choices=list(STEPS), help="only this step; may be given again")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and widths")
    parser.add_argument("--bundle", help="a bundle written by jpq-export, for the step decode")
    parser.add_argument("--timeout", type=float, help="seconds a step may take, instead of its own limit")
    parser.add_argument(
        "--rehearse", action="store_true", help="no GPU: interpreter and host shim on tiny shapes, to try the script"
    )
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def run_apart(name: str, options: argparse.Namespace) -> Record:
    """One step in a process of its own; whatever happens there, a result with a reason."""
    result, log = options.out / "scratch" / f"{name}.json", options.out / "logs" / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out), "--step", name]
    command += ["--result", str(result), *(["--quick"] if options.quick else [])]
    command += [
        *(["--rehearse"] if options.rehearse else []),
        *(["--bundle", options.bundle] if options.bundle else []),
    ]
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if options.rehearse else {})
    limit, start = options.timeout or STEPS[name][1], time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            ended = f"ended with exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"no end after {limit:.0f} s"
    return finished(result, log, ended) | {"seconds": round(time.monotonic() - start, 1)}


def finished(result: Path, log: Path, ended: str) -> Record:
    """What the step wrote; when it wrote nothing, how it ended and the last line of its log."""
    try:
        return json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        told = f"; last line: {lines[-1][:300]}" if lines else ""
        return asdict(Outcome(FAILED, f"{ended}, no result{told}; see logs/{log.name}"))


def run_here(name: str, settings: Settings, result: Path) -> int:
    """The step itself, in this process."""
    module, function = STEPS[name][0].split(":")
    try:
        outcome = getattr(importlib.import_module(module), function)(settings)
    except CannotRun as reason:
        outcome = Outcome(NOT_RUN, str(reason))
    except Exception as error:  # the report must say what went wrong, whatever it was; the log has the rest
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        outcome = Outcome(FAILED, f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}")
    scratch = result.with_suffix(".part")
    scratch.write_text(json.dumps(outcome.to_json()), encoding="utf-8")
    scratch.replace(result)
    return int(outcome.status == FAILED)


def command_line() -> str:
    """As it was typed, without this machine's folders."""
    return shlex.join(["python", "tools/gpu_check.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])])


def say(text: str) -> None:
    """One line for who waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
