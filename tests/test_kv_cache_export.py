"""Whole exports with --kv-cache int8 on the command line: the bundle, its proof, its price; and who refuses it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from jpq_export.format.bundle import read_manifest

EXPORT = "export m --effort quick --context 64 --method rtn --bits 6"
PROMPT = "the man"


@pytest.fixture(scope="module")
def shelf(
    quick_shelf: Callable, save_tiny: Callable, save_encoder: Callable, run: Callable[..., str]
) -> Iterator[Path]:
    """A model m, an encoder e, its bundle `int8` and the one with a float cache, `float`."""
    with quick_shelf("kv-cache") as (folder, _):
        save_tiny(folder / "m", "qwen3", tie_word_embeddings=False)
        save_encoder(folder / "e", "bert")
        run(f"{EXPORT} --target cpu --kv-cache int8 --out int8")
        run(f"{EXPORT} --target cpu --out float")
        yield folder


def cache_of(bundle: Path) -> dict[str, Any]:
    cache = read_manifest(bundle).kv_cache
    assert cache is not None
    return cache


def test_the_bundle_says_what_its_cache_takes_and_costs(shelf: Path) -> None:
    cache, plain = cache_of(shelf / "int8"), cache_of(shelf / "float")
    # Two layers of two heads of 32: keys and values, and in int8 a scale for each.
    assert plain == {
        "type": "float",
        "bytes_per_token": 2 * 2 * 2 * 32 * 4,
        "float_bytes_per_token": 2 * 2 * 2 * 32 * 4,
    }
    assert cache["type"] == "int8"
    assert cache["bytes_per_token"] == 2 * 2 * 2 * (32 + 4)
    assert cache["float_bytes_per_token"] == plain["bytes_per_token"]
    assert 0 < cache["kl_to_float"] < 0.05
    quality = [read_manifest(shelf / name).quality for name in ("int8", "float")]
    assert quality[0] is not None
    assert quality[1] is not None
    assert cache["without"] == {key: quality[1][key] for key in ("kl_mean", "perplexity")}
    assert quality[0]["kl_mean"] != quality[1]["kl_mean"]
    page = (shelf / "int8" / "parity.html").read_text(encoding="utf-8")
    assert "KV cache: int8, 288 bytes a token instead of 1,024" in page
    assert "Codes it wrote into the int8 cache" in page
    other = (shelf / "float" / "parity.html").read_text(encoding="utf-8")
    assert "KV cache: float, 1,024 bytes a token." in other
    assert "int8 cache" not in other


def test_its_graph_keeps_codes_and_its_parity_passes(shelf: Path, run: Callable[..., str]) -> None:
    graph = onnx.load(shelf / "int8" / "model.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("past.")}
    parts = {"key": onnx.TensorProto.INT8, "value": onnx.TensorProto.INT8}
    parts |= {"key_scale": onnx.TensorProto.FLOAT, "value_scale": onnx.TensorProto.FLOAT}
    assert kinds == {f"past.{i}.{part}": kind for i in range(2) for part, kind in parts.items()}
    parity = json.loads((shelf / "int8" / "parity.json").read_text())
    assert parity["passed"]
    assert all(runtime["cache"]["passed"] for runtime in parity["runtimes"])
    run("verify int8")
    assert json.loads((shelf / "float" / "parity.json").read_text())["runtimes"][0]["cache"] is None


def test_it_runs_and_is_evaluated(shelf: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    assert run(f"run int8 {shlex.quote(PROMPT)} --max-new-tokens 8")
    (tmp_path / "t.txt").write_text("the other thing that they thought of, then " * 20)
    text = f"--text {tmp_path / 't.txt'} --windows 2 --context 64 --no-teacher"
    outputs = (run(f"eval {name} {text}") for name in ("int8", "float"))
    ours, plain = (json.loads(output[output.index("{") :]) for output in outputs)
    assert ours["perplexity"] != plain["perplexity"]
    assert ours["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (
            f"{EXPORT} --target jetson --kv-cache int8 --out x",
            2,
            "TensorRT, which jetson is for, reads a float cache only",
        ),
        (f"{EXPORT} --target rtx-4090 --kv-cache int8 --out x", 2, "TensorRT-RTX, which rtx-4090 is for"),
        (f"{EXPORT} --target cpu --kv-cache int4 --out x", 2, "'int4' is not one of 'float', 'int8'"),
        (
            "export e --target cpu --effort quick --kv-cache int8 --out x",
            2,
            "e is a sentence encoder, which keeps no keys",
        ),
    ],
)
def test_what_cannot_have_it_refuses_by_name(
    shelf: Path, command: str, code: int, said: str, run: Callable[..., str]
) -> None:
    output = run(command, expected=code)
    assert said in " ".join(output.split())
    assert not (shelf / "x").exists()
