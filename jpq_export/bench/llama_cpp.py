"""llama.cpp's own `llama-bench` as one more runtime that takes its turn, where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from jpq_export.errors import JpqError, UsageError

PROGRAM = "llama-bench"


class LlamaError(JpqError):
    """llama-bench failed."""


class LlamaBench:
    """The same questions as a `Worker` answers; every one starts `llama-bench` anew, its warm-up is its own."""

    def __init__(self, gguf: Path, threads: int) -> None:
        """UsageError when the file or the program is missing."""
        if not gguf.is_file():
            raise UsageError(f"--gguf {gguf}: no such file; give a .gguf of a size near the bundle's")
        program = shutil.which(PROGRAM)
        if program is None:
            raise UsageError(f"--gguf {gguf}: {PROGRAM} is not on the PATH; install llama.cpp or leave --gguf out")
        self.command = [program, "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json"]
        self.name, self.file_bytes = gguf.name, gguf.stat().st_size
        self.peak_rss_bytes = 0

    def ask(self, **job: Any) -> Any:
        """`prefill`, `decode` or `memory`, as in `worker`."""
        if "memory" in job:
            return {"peak_rss_bytes": self.peak_rss_bytes, "runs": f"llama.cpp, {self.name}"}
        prompt, new = job.get("prefill", 0), job.get("decode", 0)
        rate = self._run("-p", str(prompt), "-n", str(new))
        return {"seconds": prompt / rate if prompt else [1 / rate] * new}

    def _run(self, *options: str) -> float:
        """Tokens per second of one test."""
        process = subprocess.Popen(
            [*self.command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout
        with process.stdout:
            told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise LlamaError(
                f"{PROGRAM}: ended with code {process.returncode}; try `{' '.join([*self.command, *options])}`"
            )
        self.peak_rss_bytes = max(self.peak_rss_bytes, usage.ru_maxrss * 1024)
        try:
            return float(json.loads(told)[0]["avg_ts"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise LlamaError(
                f"{PROGRAM}: its JSON has no avg_ts ({error!r}); a version of 2024 or later has"
            ) from error
