"""Compile the CUDA kernels for every GPU we name and record registers, shared memory and spills of each.

Writes plugins/core/cuda_resources.json and .md; tests/plugins/test_cuda_resources.py holds them to the sources. Needs
nvcc 13 (for 11.0, Thor), takes about 15 s a GPU; no GPU is needed, and nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CORE = Path(__file__).resolve().parent.parent / "plugins" / "core"
RECORD = CORE / "cuda_resources.json"
TABLE = CORE / "cuda_resources.md"
ARCHITECTURES = {
    "sm_87": "Jetson Orin",
    "sm_89": "GeForce RTX 40, L4",
    "sm_90": "H100, H200",
    "sm_110": "Jetson Thor",
    "sm_120": "GeForce RTX 50",
}
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-cubin")
CHUNK, WARPS = 1024, 4  # as low_bit_matmul.cuh has them, for dynamic shared memory, which ptxas cannot know
NAME = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
FEW = re.compile(r"few_rowsILi(\d+)ELi(\d+)ELi(\d+)E")
MANY = re.compile(r"many_rowsILi(\d+)ELb(\d)E")
MANY_SHARED = 3 * 64 * 72 * 2 + 64 * 2 * 4


def find_nvcc() -> str | None:
    """Nvcc from PATH or the usual folder."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def release(nvcc: str) -> str:
    """'nvcc 13.0'."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    return f"nvcc {found[1] if found else '?'}"


def sources_sha256() -> str:
    """Digest of everything the kernels are made of."""
    digest = hashlib.sha256()
    headers = ("low_bit_cuda.h", "low_bit.h", "levels.h")
    for path in sorted(p for p in CORE.iterdir() if p.suffix in (".cu", ".cuh") or p.name in headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def width(bits: int) -> str:
    """A template's width for people."""
    return "ternary" if bits == 16 else f"{bits - 32} bits of normal levels" if bits > 32 else f"{bits} bits"


def describe(mangled: str) -> tuple[str, int]:
    """A kernel's name for people and its dynamic shared memory in bytes."""
    if found := FEW.search(mangled):
        bits, rows, warp_rows = map(int, found.groups())
        code = bits % 32
        staged = 0 if code & (code - 1) == 0 else WARPS * 32 * code * 4
        return f"few_rows<{width(bits)}, {rows} rows of X, {warp_rows} of W a warp>", rows * CHUNK * 4 + staged
    if found := MANY.search(mangled):
        return f"many_rows<{width(int(found[1]))}, {'fp32' if found[2] == '1' else 'fp16'} X>", MANY_SHARED
    return next((name for name in ("add_parts", "gather_rows") if name in mangled), mangled), 0


def parse(log: str) -> list[dict[str, int | str]]:
    """What ptxas said of each kernel, in order of its name."""
    out: list[dict[str, int | str]] = []
    name, spills = "", ("0", "0", "0")
    for line in log.splitlines():
        if found := NAME.search(line):
            name = found[1]
        elif found := SPILLS.search(line):
            spills = found.groups()
        elif name and (found := REGISTERS.search(line)):
            kernel, shared = describe(name)
            numbers = {"registers": int(found[1]), "shared_bytes": shared, "stack_bytes": int(spills[0])}
            out.append({"kernel": kernel, **numbers, "spill_bytes": int(spills[1]) + int(spills[2])})
            name = ""
    return sorted(out, key=lambda row: str(row["kernel"]))


def compile_for(nvcc: str, architecture: str, *, source: Path = CORE / "low_bit_cuda.cu") -> list[dict[str, int | str]]:
    """Resources of every kernel of `source` on one GPU; nvcc's own words when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [nvcc, *FLAGS, f"-arch={architecture}", f"-I{CORE}", "-o", f"{scratch}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nvcc {architecture}: {done.stderr.strip()}")
    return parse(done.stderr)


def table(record: dict) -> str:
    """The record as Markdown: one row a kernel, registers on every GPU."""
    gpus = record["architectures"]
    lines = [
        "# Registers, shared memory and spills of the CUDA kernels",
        "",
        f"Made by `tools/cuda_resources.py` with {record['nvcc']}. Compiled only: no kernel here has been timed.",
        "",
        "| kernel | shared bytes | "
        + " | ".join(f"{name} registers" for name in gpus)
        + " | spilled bytes, all GPUs |",
        "|---|---|" + "---|" * (len(gpus) + 1),
    ]
    for rows in zip(*(gpus[name] for name in gpus), strict=True):
        registers = " | ".join(str(row["registers"]) for row in rows)
        spilled = sum(row["spill_bytes"] for row in rows)
        lines.append(f"| `{rows[0]['kernel']}` | {rows[0]['shared_bytes']} | {registers} | {spilled} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile for every GPU, or those named, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES))
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc: install CUDA 13 or put nvcc on PATH")
    record = {"nvcc": release(nvcc), "sources_sha256": sources_sha256(), "architectures": {}}
    for name in parser.parse_args().architectures:
        sys.stderr.write(f"{name} ({ARCHITECTURES.get(name, '?')})\n")
        record["architectures"][name] = compile_for(nvcc, name)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    TABLE.write_text(table(record))


if __name__ == "__main__":
    main()
