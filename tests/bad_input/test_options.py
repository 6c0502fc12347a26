"""Bad options through the command line: targets, plans, budgets, places to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from spoil import Case, check_case, edit_json, export, write

BOARD = """title = "a board"
kind = "cpu"
memory_gb = 8
bandwidth_gb_s = 50.0
fp16_tflops = 1.0
op_overhead_us = 1.0
default_bits = 4.0
graph = "qdq"
"""
BAD: dict[str, Case] = {
    # The command line itself
    "no target": ("export m", 2, ("--target", "export --help"), None),
    "unknown option": (export("--bitz 3"), 2, ("--bitz", "--bits", "export --help"), None),
    "unknown option of a command": ("verify b --fast", 2, ("--fast", "verify --help"), None),
    "missing argument": ("verify", 2, ("BUNDLE", "verify --help"), None),
    "too many arguments": (export("other"), 2, ("other", "export --help"), None),
    "unknown method": (export("--method awq"), 2, ("--method", "awq", "gptq"), None),
    "unknown effort": (export("--effort heroic"), 2, ("--effort", "heroic", "standard"), None),
    "unknown stage": (export("--until lunch"), 2, ("--until", "lunch", "onnx"), None),
    "two budgets": (export("--size 1MB --bits 3"), 2, ("--size and --bits", "one of them"), None),
    "all budgets": (export("--size 1MB --bits 3 --ratio 0.2 --latency 1ms"), 2, ("--latency", "one of them"), None),
    "bits 0": (export("--bits 0"), 2, ("--bits 0", "such as 3.0"), None),
    "bits negative": (export("--bits -2"), 2, ("--bits -2", "above 0"), None),
    "bits 99": (export("--bits 99"), 2, ("--bits 99", "up to 16"), None),
    "bits nan": (export("--bits nan"), 2, ("--bits nan", "such as 3.0"), None),
    "bits a word": (export("--bits few"), 2, ("--bits", "few"), None),
    "size a word": (export("--size abc"), 2, ("--size 'abc'", "60MB"), None),
    "size negative": (export("--size -3MB"), 2, ("--size '-3MB'", "60MB"), None),
    "size 0": (export("--size 0MB"), 2, ("--size '0MB'", "positive"), None),
    "size in parsecs": (export("--size 3pc"), 2, ("--size '3pc'", "60MB"), None),
    "size endless": (export(f"--size {'9' * 400}GB"), 2, ("--size", "60MB"), None),
    "ratio 2": (export("--ratio 2"), 2, ("--ratio 2", "fraction", "such as 0.2"), None),
    "latency a word": (export("--latency fast"), 2, ("--latency 'fast'", "8ms"), None),
    "latency 0": (export("--latency 0ms"), 2, ("--latency '0ms'", "8ms"), None),
    "gptq by latency": (export("--method gptq --latency 1ms"), 2, ("--method gptq", "--latency", "--bits"), None),
    "context 0": (export("--context 0"), 2, ("--context 0", "at least 1"), None),
    "seed negative": (export("--seed -1"), 2, ("--seed -1", "expected 0 to"), None),
    "seed too large": (export(f"--seed {2**70}"), 2, ("--seed", str(2**70), "expected 0 to"), None),
    "cuda without a GPU": (export("--device cuda"), 2, ("--device cuda", "--device cpu"), None),
    # Targets
    "unknown target": (export(target="jetsn"), 2, ("'jetsn'", "did you mean jetson?", "my-board.toml"), None),
    "target file missing": (export(target="no.toml"), 2, ("no.toml", "not a file", "jetson"), None),
    "target not TOML": (export(target="t.toml"), 2, ("t.toml", "not valid TOML", "line 1"), write("t.toml", "= 3")),
    "target not text": (export(target="t.toml"), 2, ("t.toml", "not UTF-8"), write("t.toml", b"\xff\xfe")),
    "target without keys": (
        export(target="t.toml"), 2, ("t.toml", "memory_gb", "missing", "inherit"), write("t.toml", 'title = "b"'),
    ),
    "target with a negative number": (
        export(target="t.toml"), 2, ("t.toml", "memory_gb", "-8", "above 0"),
        write("t.toml", BOARD.replace("memory_gb = 8", "memory_gb = -8")),
    ),
    "target with a misspelt key": (
        export(target="t.toml"), 2, ("t.toml", "'memory_gbs'", "did you mean memory_gb?"),
        write("t.toml", BOARD.replace("memory_gb ", "memory_gbs ")),
    ),
    "target inherits itself": (
        export(target="t.toml"), 2, ("t.toml", "inherit", "circle"), write("t.toml", 'inherit = "t.toml"'),
    ),
    # Plans and budgets
    "plan missing": (export("--plan no.json"), 1, ("no.json", "cannot be read"), None),
    "plan not JSON": (export("--plan plan.json"), 1, ("plan.json", "not JSON", "again"), write("plan.json", "{")),
    "plan of another kind": (export("--plan b/parity.json"), 1, ("parity.json", "jpq-plan/1"), None),
    "plan without choices": (
        export("--plan plan.json"), 1, ("plan.json", "choices", "again"),
        edit_json("plan.json", lambda raw: raw.pop("choices")),
    ),
    "plan of another model": (
        export("--plan plan.json"), 1, ("plan.json", "sha256", "another"),
        edit_json("plan.json", lambda raw: raw["model"].update(sha256="another" * 9)),
    ),
    "plan with an unknown width": (
        export("--plan plan.json"), 1, ("plan.json", "bits 9", "again"),
        edit_json("plan.json", lambda raw: raw["choices"][0].update(bits=9)),
    ),
    "plan with wrong bytes": (
        export("--plan plan.json"), 1, ("plan.json", "bytes 1 ", "again"),
        edit_json("plan.json", lambda raw: raw["choices"][0].update(bytes=1)),
    ),
    "plan lacks a matrix": (
        export("--plan plan.json"), 1, ("no choice for", "again"),
        edit_json("plan.json", lambda raw: raw["choices"].pop(1)),
    ),
    "plan lacks a layer": (
        export("--plan plan.json"), 1, ("1 layers", "m has 2"), edit_json("plan.json", lambda raw: raw["layers"].pop()),
    ),
    "plan keeps heads that are not there": (
        export("--plan plan.json"), 1, ("layers.0", "kv_heads", "below 2"),
        edit_json("plan.json", lambda raw: raw["layers"][0].update(kv_heads=[0, 7])),
    ),
    "plan of another method": (
        export("--plan plan.json"), 1, ("plan.json", "'magic'", "jpq, gptq, rtn"),
        edit_json("plan.json", lambda raw: raw.update(method="magic")),
    ),
    "plan with a head of a half": (
        export("--plan plan.json"), 1, ("plan.json", "layers[1]", "whole numbers"),
        edit_json("plan.json", lambda raw: raw["layers"][1].update(kv_heads=[0.5])),
    ),
    "plan narrows without saying what stays": (
        export("--plan plan.json"), 1, ("plan.json", "layers[0]", "keeps 32 of 96", "which"),
        edit_json("plan.json", lambda raw: raw["layers"][0].update(ffn=32, channels=None)),
    ),
    "plan beside a budget": (export("--plan plan.json --bits 3"), 2, ("--bits", "plan.json", "one of"), None),
    "plan against a method": (export("--plan plan.json --method rtn"), 2, ("--method rtn", "made for jpq"), None),
    "budget too small": (export("--size 1KB"), 1, ("cannot be met", "smallest possible", "MB", "at least"), None),
    "latency too small": (export("--latency 1us"), 1, ("cannot be met", "smallest possible", "ms", "at least"), None),
    "budget too small for gptq": (
        export("--method gptq --size 1KB"), 1, ("cannot be met", "--method gptq needs", "at least"), None,
    ),
    "a board too small": (
        export(target="small.toml"), 1, ("do not fit", "small", "--context"),
        write("small.toml", 'title = "A small board"\ninherit = "jetson"\nmemory_gb = 0.00001\n'),
    ),
    # Places to write
    "out exists": (export().replace("--out out", "--out b"), 2, ("--out b", "already exists", "--force"), None),
    "out is no bundle": (export("--force").replace("--out out", "--out m"), 2, ("--out m", "--force will not"), None),
    "out below a file": (export().replace("--out out", "--out plan.json/out"), 1, ("plan.json/out", "writable"), None),
    "out has a stranger's partial": (
        export(), 2, ("--out out", "out.partial", "move"),
        lambda: (Path("out.partial").mkdir(), Path("out.partial/mine.txt").write_text("precious", encoding="utf-8")),
    ),
    "out is a stranger's site": (
        export("--force"), 2, ("--out out", "--force will not"),
        lambda: (Path("out").mkdir(), Path("out/manifest.json").write_text('{"name": "site"}', encoding="utf-8")),
    ),
    "out has a stranger's plan beside it": (
        export(), 2, ("--out out", "out.partial", "move"),
        lambda: (Path("out.partial").mkdir(), Path("out.partial/plan.json").write_text('{"a": 1}', encoding="utf-8")),
    ),
    "out with a name too long": (export().replace("--out out", f"--out {'o' * 300}"), 1, ("too long", "another"), None),
    "out with a name too long for its partial": (
        export().replace("--out out", f"--out {'o' * 250}"), 1, ("too long",), None,
    ),
    "model of nobody's home": (export(model="~nobodyatall/x"), 1, ("~nobodyatall/x", "no such file or folder"), None),
    "model with a name too long": (export(model="m" * 300), 1, ("too long", "another"), None),
    # Comparison
    "compare at no number": (
        "compare m --target jetson --budgets 3,x --text plan.json", 2, ("--budgets '3,x'", "numbers"), None,
    ),
    "compare an unknown method": (
        "compare m --target jetson --methods joint,magic --text plan.json", 2, ("'magic'", "joint"), None,
    ),
    "widths that are no numbers": (
        f"{export('--bits 3')} --widths 2,x", 2, ("--widths '2,x'", "'x' is not one of 1, 1.6, 2", "by commas"), None,
    ),
    "a width there is none of": (f"{export('--bits 3')} --widths 7,8", 2, ("'7' is not one of", "1.6"), None),
    "no widths at all": (f"{export('--bits 3')} --widths ''", 2, ("--widths ''", "by commas"), None),
    "widths with a plan": (
        f"{export('--plan plan.json')} --widths 2,3", 2, ("--widths", "plan.json has its widths already"), None,
    ),
    "groups of nothing": (f"{export('--bits 3')} --group-size 7", 2, ("--group-size 7", "32, 64, 128"), None),
    "groups of another method": (
        export("--bits 3 --method gptq --group-size 64"), 2, ("--group-size", "--method gptq", "leave"), None,
    ),
    "groups no engine takes": (
        "m --target rtx-4090 --bits 3 --group-size 128 --out out", 2, ("--group-size 128", "rtx-4090", "64"), None,
    ),
    "groups with a plan": (
        f"{export('--plan plan.json')} --group-size 64", 2, ("--group-size", "plan.json has its groups already"), None,
    ),
    "compare beyond all widths": (
        "compare m --target jetson --budgets 9 --text plan.json", 2, ("--budgets '9'", "up to 8"), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str, bench: Path) -> None:
    check_case(bench, BAD[case])
