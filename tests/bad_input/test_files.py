"""Bad files through the command line: models, calibration text, bundles, texts to evaluate on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from spoil import (
    WEIGHTS,
    Case,
    add_token,
    change_shape,
    check_case,
    cut,
    edit_json,
    edit_weights,
    export,
    flip,
    pickle_weights,
    put_nan,
    remove,
    write,
)

BAD: dict[str, Case] = {
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
    check_case(bench, BAD[case])
