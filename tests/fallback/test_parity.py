"""Bundles of other families against transformers: its own passes without a cache, its own generate, its own mask.

The weights are read back from model.onnx, so nothing of the export's own reference is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from jpq_export.format.plan import load_plan
from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.runtime.session import OrtModel

FAMILIES = ("gpt_neox", "opt", "stablelm")
BOUND, FAULT = 1e-4, 1e-2  # the promise; what is wrong by far more than any rounding
PREFILL, STEPS = 9, 16
LENGTHS = (5, 11, 17)


def initializers(bundle: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(bundle / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def rounded(model: Path, bundle: Path) -> Any:
    """transformers' model with the weights that the bundle stores."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval().requires_grad_(False)
    stored = initializers(bundle)
    for choice in load_plan(bundle).choices:
        parts = [stored.get(f"{choice.name}.{part}") for part in ("packed", "scales", "zeros")]
        weight = QuantizedWeight(choice.scheme, (choice.rows, choice.columns), *parts)
        theirs.get_submodule(choice.name).weight.copy_(torch.from_numpy(weight.dequantize()))
    return theirs


def relative_rms(reference: np.ndarray, value: np.ndarray) -> float:
    error = np.square(value - reference).mean(-1) / np.square(reference).mean(-1)
    return float(np.sqrt(error.mean()))


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows * length).integers(0, 256, (rows, length))


def through_the_cache(graph: OrtModel, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of a prefill and of single steps after it."""
    out, past, start = [], None, 0
    for end in (ids.shape[1] - STEPS, *range(ids.shape[1] - STEPS + 1, ids.shape[1] + 1)):
        step = graph.forward(ids[:, start:end], None if mask is None else mask[:, :end], past=past)
        out.append(step.logits)
        past, start = step.past, end
    return np.concatenate(out, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_are_one_pass_of_transformers(made: Callable[[str], Any], family: str) -> None:
    model, bundle, _ = made(family)
    ids = tokens(1, PREFILL + STEPS)
    expected = rounded(model, bundle)(torch.from_numpy(ids), use_cache=False).logits.numpy()
    assert relative_rms(expected, through_the_cache(OrtModel(bundle / "model.onnx", threads=1), ids)) < BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_each_text_alone(made: Callable[[str], Any], family: str) -> None:
    model, bundle, _ = made(family)
    theirs, longest = rounded(model, bundle), max(LENGTHS) + STEPS
    ids, mask = tokens(3, longest), np.zeros((3, longest), np.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, -length - STEPS :] = 1
    got = through_the_cache(OrtModel(bundle / "model.onnx", threads=1), ids, mask)
    unmasked = through_the_cache(OrtModel(bundle / "model.onnx", threads=1), ids)
    for row, length in enumerate(LENGTHS):
        alone = torch.from_numpy(ids[row : row + 1, -length - STEPS :])
        expected = theirs(alone, use_cache=False).logits[0].numpy()
        assert relative_rms(expected, got[row, -length - STEPS :]) < BOUND
        if length < max(LENGTHS):  # the twin: without the mask the padding is read
            assert relative_rms(expected, unmasked[row, -length - STEPS :]) > FAULT


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(made: Callable[[str], Any], family: str) -> None:
    model, bundle, _ = made(family)
    prompt = tokens(1, PREFILL)
    theirs = rounded(model, bundle)
    expected = theirs.generate(torch.from_numpy(prompt), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    graph = OrtModel(bundle / "model.onnx", threads=1)
    row, state, banned = prompt[0].tolist(), graph.start(), list(graph.spec.eos_ids)
    logits = state.step(row)
    for _ in range(STEPS):
        logits[banned] = -np.inf  # as min_new_tokens does
        row.append(int(logits.argmax()))
        logits = state.step(row[-1:])
    assert row == expected[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_twin_corrupted_weights_are_found(
    made: Callable[[str], Any], run: Callable[..., str], tmp_path: Path, family: str
) -> None:
    """A few codes of one matrix: logits leave the bound, and `verify` names it although all hashes are right again."""
    from dataclasses import replace

    from jpq_export.format.bundle import hash_files, read_manifest, write_manifest

    model, bundle, _ = made(family)
    spoiled = tmp_path / "spoiled"
    shutil.copytree(bundle, spoiled)
    name = load_plan(bundle).choices[-2].name  # of the last layer
    damage(spoiled / "model.onnx", f"{name}.packed")
    ids = tokens(1, PREFILL + STEPS)
    expected = rounded(model, bundle)(torch.from_numpy(ids), use_cache=False).logits.numpy()
    assert relative_rms(expected, through_the_cache(OrtModel(spoiled / "model.onnx", threads=1), ids)) > FAULT
    write_manifest(spoiled, replace(read_manifest(spoiled), files=hash_files(spoiled)))
    assert f"{name}: first value that differs from the recorded one" in run(f"verify {spoiled}", expected=1)
    assert "are as exported" in run(f"verify {bundle}")


def damage(path: Path, name: str) -> None:
    """Turn over all bits of 64 bytes of an initializer."""
    graph = onnx.load(path, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    data, start = path.with_name(where["location"]), int(where["offset"])
    content = bytearray(data.read_bytes())
    for at in range(start, start + 64):
        content[at] ^= 0xFF
    data.write_bytes(content)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_says_what_it_did(made: Callable[[str], Any], family: str) -> None:
    _, bundle, said = made(family)
    manifest, parity = (json.loads((bundle / f"{name}.json").read_text()) for name in ("manifest", "parity"))
    assert parity["passed"]
    assert {case["name"] for case in parity["runtimes"][0]["cases"]} == {"prefill", "padded batch", "decode"}
    assert manifest["fallback"]["architecture"].endswith("ForCausalLM")
    for place in (said, (bundle / "parity.html").read_text(encoding="utf-8")):
        assert "torch.onnx.export wrote its graph" in place
        assert "no pruning; no joint search" in place
    assert "fallback" in said
    assert manifest["bits_per_weight"] <= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_holds_no_matrix_but_packed_ones(made: Callable[[str], Any], family: str) -> None:
    """And nothing of the machine that traced it."""
    _, bundle, _ = made(family)
    proto = onnx.load(bundle / "model.onnx")
    assert proto.ir_version <= 13
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 23, "jpq": 1}
    codes = {".packed", ".scales", ".zeros"}
    for tensor in proto.graph.initializer:
        assert len(tensor.dims) < 2 or any(tensor.name.endswith(end) for end in codes), tensor.name
    used = {node.op_type for node in proto.graph.node if node.domain == "jpq"}
    assert used == {"LowBitMatMul", "LowBitGather"}
    assert "Gemm" not in {node.op_type for node in proto.graph.node}
    assert str(Path(torch.__file__).parent) not in (bundle / "model.onnx").read_bytes().decode("latin-1")
