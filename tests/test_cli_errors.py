"""Bad input through the command line: one line with what, where and the remedy, the exit code, and nothing left."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import jpq_export
from jpq_export.cli import main
from jpq_export.workspace import Workspace

Damage = Callable[[], object]
WEIGHTS = Path("m/model.safetensors")


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path], run: Callable[..., str]) -> Iterator[Path]:
    """Good things to spoil: a model m, its plan.json, its bundle b; and a cache that knows the model's prices."""
    with quick_shelf("shelf") as (folder, _):
        save_tiny(folder / "m", "llama")
        run(export("--bits 5").replace("--out out", "--out b"))
        shutil.copy("b/plan.json", "plan.json")
        yield folder


@pytest.fixture
def bench(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of one test: copies of m, b and plan.json, an empty folder for temporary files."""
    folder = tmp_path / "bench"
    for name in ("m", "b"):
        shutil.copytree(shelf / name, folder / name)
    shutil.copy(shelf / "plan.json", folder)
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.chdir(folder)
    return folder


def export(rest: str = "", *, model: str = "m", target: str = "jetson") -> str:
    return f"export {model} --target {target} --effort quick --context 64 --out out {rest}"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def message_of(result: Result) -> str:
    """The one line of a failed command; finished stages may stand before it."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("✓")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def check(bench: Path, command: str, code: int, says: tuple[str, ...]) -> None:
    before = contents(bench)
    result = CliRunner().invoke(main, shlex.split(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception  # shows where
    assert result.exit_code == code, result.output
    line = message_of(result)
    for part in says:
        assert part in line
    assert contents(bench) == before, "something was left behind or changed"
    assert not list((bench.parent.parent).rglob("cache/**/*partial*"))


def write(name: str, content: str | bytes) -> Damage:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(name: str, edit: Callable[[Any], object]) -> Damage:
    def damage() -> None:
        path = Path(name)
        raw = json.loads(path.read_text(encoding="utf-8"))
        edit(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")

    return damage


def edit_weights(edit: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage() -> None:
        tensors = load_file(WEIGHTS)
        edit(tensors)
        save_file(tensors, WEIGHTS, metadata={"format": "pt"})

    return damage


def cut(name: str, keep: float) -> Damage:
    def damage() -> None:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: int(len(content) * keep)])

    return damage


def flip(name: str) -> Damage:
    def damage() -> None:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return damage


def remove(name: str) -> Damage:
    return lambda: Path(name).unlink()


def put_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def change_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()


def pickle_weights() -> None:
    WEIGHTS.unlink()
    Path("m/pytorch_model.bin").write_bytes(b"\x80\x04.")


def add_token(raw: dict[str, Any]) -> None:
    raw["model"]["vocab"]["zz"] = 400


BOARD = """title = "a board"
kind = "cpu"
memory_gb = 8
bandwidth_gb_s = 50.0
fp16_tflops = 1.0
op_overhead_us = 1.0
default_bits = 4.0
graph = "qdq"
"""
# name -> (command, exit code, what the line must say, what to spoil first)
BAD: dict[str, tuple[str, int, tuple[str, ...], Damage | None]] = {
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
    # Models
    "model missing": (export(model="nowhere"), 1, ("'nowhere'", "no such file or folder", ".gguf"), None),
    "model nearly an alias": (export(model="smollm2-135"), 1, ("did you mean 'smollm2-135m'?",), None),
    "hub out of reach": (export(model="some/model"), 1, ("'some/model'", "hub", "local folder"), None),
    "folder without config": (export(), 1, ("m: no config.json", "save_pretrained"), remove("m/config.json")),
    "config cut short": (export(), 1, ("m/config.json", "JSON", "download it again"), cut("m/config.json", 0.5)),
    "config a list": (export(), 1, ("m/config.json", "list", "object"), write("m/config.json", "[]")),
    "architecture not supported": (
        export(), 1, ("m/config.json", "Mamba", "LlamaForCausalLM", "Gemma3ForCausalLM"),
        edit_json("m/config.json", lambda raw: raw.update(model_type="mamba", architectures=["MambaForCausalLM"])),
    ),
    "heads do not divide": (
        export(), 1, ("m/config.json", "download"),
        edit_json("m/config.json", lambda raw: raw.update(num_key_value_heads=3)),
    ),
    "layer count wrong": (
        export(), 1, ("m", "layers.1", "do not belong together"),
        edit_json("m/config.json", lambda raw: raw.update(num_hidden_layers=1)),
    ),
    "weights cut short": (export(), 1, ("model.safetensors", "not a complete", "again"), cut(str(WEIGHTS), 0.6)),
    "weights are noise": (export(), 1, ("model.safetensors", "not a complete"), write(str(WEIGHTS), b"\xff" * 99)),
    "weights empty": (export(), 1, ("model.safetensors", "not a complete"), write(str(WEIGHTS), b"")),
    "weights missing": (export(), 1, ("m: no model.safetensors",), remove(str(WEIGHTS))),
    "weights pickled": (export(), 1, ("pickled", "pytorch_model.bin", "save_pretrained"), pickle_weights),
    "NaN in the weights": (export(), 1, ("layers.1.mlp.up", "1 NaN", "download"), edit_weights(put_nan)),
    "a tensor missing": (
        export(), 1, ("1 missing tensor", "layers.0.attn.q"),
        edit_weights(lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight")),
    ),
    "a tensor too many": (
        export(), 1, ("'model.layers.0.extra'", "do not belong together"),
        edit_weights(lambda tensors: tensors.update({"model.layers.0.extra": np.zeros(3, np.float32)})),
    ),
    "a tensor of another shape": (export(), 1, ("norm", "(63,)", "(64,)", "together"), edit_weights(change_shape)),
    "GGUF of noise": (export(model="x.gguf"), 1, ("x.gguf", "GGUF", "again"), write("x.gguf", b"GGUF" + b"\xff" * 99)),
    "GGUF empty": (export(model="x.gguf"), 1, ("x.gguf", "GGUF", "again"), write("x.gguf", b"")),
    "GGUF of text": (export(model="x.gguf"), 1, ("x.gguf", "GGUF", "again"), write("x.gguf", "once upon a time")),
    "a model that is a text": (export(model="x.txt"), 1, ("x.txt", "not a model", ".gguf"), write("x.txt", "hello")),
    "tokenizer missing": (export(), 1, ("m: no tokenizer.json", "AutoTokenizer"), remove("m/tokenizer.json")),
    "tokenizer not JSON": (export(), 1, ("tokenizer", "download"), write("m/tokenizer.json", "{")),
    "tokenizer of another kind": (export(), 1, ("not a tokenizer",), write("m/tokenizer.json", "{}")),
    "tokenizer too large": (
        export(), 1, ("tokenizer.json", "400", "320 rows", "another model"), edit_json("m/tokenizer.json", add_token),
    ),
    # Calibration text
    "calibration missing": (export("--calibration no.txt"), 1, ("--calibration no.txt", "no such file"), None),
    "calibration empty": (export("--calibration c.txt"), 1, ("--calibration c.txt", "empty"), write("c.txt", "")),
    "calibration not UTF-8": (
        export("--calibration c.txt"), 1, ("--calibration c.txt", "not UTF-8", "byte 1"), write("c.txt", b"a\xff\xfe"),
    ),
    "calibration too short": (
        export("--calibration c.txt"), 1, ("--calibration c.txt", "tokens", "needed at least 320", "more text"),
        write("c.txt", "Only a few words."),
    ),
    "calibration folder without text": (export("--calibration tmp"), 1, ("--calibration tmp", ".jsonl"), None),
    "calibration of other lines": (
        export("--calibration c.jsonl"), 1, ("c.jsonl", "line 2", "text"),
        write("c.jsonl", '{"text": "a"}\n{"txt": "b"}'),
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
    # Bundles
    "verify no bundle": ("verify m", 1, ("m: not a bundle", "manifest.json"), None),
    "verify nothing": ("verify nowhere", 1, ("nowhere: not a bundle", "manifest.json"), None),
    "report no bundle": ("report m", 1, ("m: not a bundle", "manifest.json"), None),
    "report on damaged numbers": ("report b", 1, ("b/parity.json", "JSON", "again"), write("b/parity.json", "{")),
    "a misspelt command": ("verfy b", 2, ("no such command", "did you mean 'verify'"), None),
    "a misspelt command with a target": ("comapre m --target cpu", 2, ("no such command", "'compare'"), None),
    "an option is no command": ("--plan plan.json m", 2, ("Missing option '--target'",), None),
    "run no bundle": ("run m hello", 1, ("m: not a bundle", "manifest.json"), None),
    "run a bundle of tomorrow": (
        "run b hello", 1, ("b/manifest.json", "jpq-bundle/2", "this version"),
        edit_json("b/manifest.json", lambda raw: raw.update(format="jpq-bundle/2")),
    ),
    "run without a tokenizer": ("run b hello", 1, ("b/tokenizer.json", "missing"), remove("b/tokenizer.json")),
    "run a graph cut short": ("run b hello", 1, ("b/model.onnx", "again"), cut("b/model.onnx", 0.5)),
    "run without weights": ("run b hello", 1, ("b/model.onnx", "again"), remove("b/model.onnx.data")),
    "run changed weights": ("run b hello", 1, ("b: ", ".packed", "copy"), flip("b/model.onnx.data")),
    "eval changed weights": (
        "eval b --text plan.json --windows 1 --context 32", 1, ("b: ", ".packed", "copy"), flip("b/model.onnx.data"),
    ),
    "serve a changed tokenizer": ("serve b", 1, ("b/tokenizer.json", "sha256", "copy"), flip("b/tokenizer.json")),
    "run an empty prompt": ("run b ''", 2, ("prompt",), None),
    "run a prompt too long": (f"run b '{'a' * 300}'", 2, ("capacity", "shorten"), None),
    "run a chat without a template": ("run b hi --chat", 2, ("b", "chat template", "--chat"), None),
    "run too hot": ("run b hi --temperature -1", 2, ("--temperature", "-1"), None),
    "run with a bad seed": ("run b hi --seed -1", 2, ("--seed", "-1"), None),
    # Evaluation
    "eval without a text": ("eval b", 2, ("--text", "eval --help"), None),
    "eval text missing": ("eval b --text no.txt", 2, ("--text no.txt", "cannot be read"), None),
    "eval text empty": ("eval b --text e.txt", 2, ("--text e.txt", "empty"), write("e.txt", " \n")),
    "eval text too short": (
        "eval b --text e.txt --windows 3 --context 32", 2, ("e.txt", "needed 96", "--windows 1"),
        write("e.txt", "ab " * 20),
    ),
    "study no model": ("study nowhere --out out", 1, ("'nowhere'", "no such file or folder"), None),
    "latency of another method": (export("--method toga --latency 2ms"), 2, ("--latency", "toga", "--bits"), None),
    "eval no model": ("eval nowhere --text plan.json", 1, ("'nowhere'", "no such file or folder"), None),
    "eval without its teacher": (
        "eval b --text plan.json --windows 1 --context 32", 1, ("'gone'", "no such file or folder"),
        edit_json("b/manifest.json", lambda raw: raw["model"].update(source="gone")),
    ),
    "eval with a teacher that changed": (
        "eval b --text plan.json --windows 1 --context 32", 1, ("m: has sha256", "another", "--teacher"),
        edit_json("b/manifest.json", lambda raw: raw["model"].update(sha256="another" * 9)),
    ),
    "bench no bundle": ("bench m", 1, ("m: not a bundle", "manifest.json"), None),
    "bench result nowhere": ("bench b --json no/r.json", 2, ("--json no/r.json", "folder"), None),
    "bench without threads": ("bench b --threads 0", 2, ("--threads", "0"), None),
    "bench no such GGUF": ("bench b --no-baselines --gguf no.gguf", 2, ("--gguf no.gguf", "no such file"), None),
    "eval result nowhere": ("eval b --text plan.json --json no/r.json", 2, ("--json no/r.json", "folder"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str, bench: Path) -> None:
    command, code, says, damage = BAD[case]
    if damage:
        damage()
    check(bench, command, code, says)


def test_a_folder_that_cannot_be_written_is_named(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # the user root may write anywhere
    check(bench, export(), 1, ("--out out", "cannot write", "Permission denied", "writable folder"))


def test_a_cache_that_cannot_be_written_is_named(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPQ_CACHE", str(bench / "plan.json"))
    check(bench, export(), 1, ("plan.json/search", "Not a directory", "JPQ_CACHE"))


def test_a_refused_run_leaves_no_new_folder_above_its_own(bench: Path) -> None:
    check(bench, export("--size 1KB").replace("--out out", "--out new/deep/out"), 1, ("cannot be met",))


@pytest.mark.parametrize(
    ("option", "unit"),
    [
        ("--size 1KB", "MB"),
        ("--latency 1us", "ms"),
        ("--method gptq --size 1KB", "MB"),
        ("--no-prune --size 1KB", "MB"),
    ],
)
def test_the_smallest_budget_it_names_can_be_met(option: str, unit: str, bench: Path) -> None:
    said = message_of(CliRunner().invoke(main, shlex.split(export(option))))
    smallest = re.search(rf"needs (?:at least )?([0-9.]+) {unit}", said)
    assert smallest, said
    enough = f"{option.rpartition(' ')[0]} {smallest[1]}{unit} --until plan"
    done = CliRunner().invoke(main, shlex.split(export(enough)))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("command", "code"), [("verify nowhere", 1), ("export --target jetsn", 2), ("verify --fast", 2)]
)
def test_a_real_process_says_the_same(command: str, code: int, bench: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jpq_export", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(jpq_export.__file__).parents[1])},
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")


def test_twin_good_input_fails_the_check(bench: Path) -> None:
    with pytest.raises(AssertionError):
        check(bench, "verify b", 1, ())


def test_twin_what_is_left_behind_fails_the_check(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "leave", lambda _: None)
    with pytest.raises(AssertionError, match="left behind"):
        check(bench, export("--size 1KB"), 1, ("cannot be met",))
