"""Bundles with an int8 key/value cache: PyTorch's greedy tokens, alone and in batches, in a quarter of the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from jpq_export.compress.decoder import KVCache
from jpq_export.compress.student import dequantized
from jpq_export.errors import BundleError, CapacityError
from jpq_export.format.spec import INT8_CACHE
from jpq_export.lower.export import export_onnx
from jpq_export.runtime.batching import Batcher, Sequence
from jpq_export.runtime.bundle import load
from jpq_export.runtime.cache import GrowingCache, PassedCache
from jpq_export.runtime.generate import generate
from jpq_export.runtime.sampling import Sampling
from jpq_export.runtime.session import OrtModel

PROMPTS = [[3, 4, 5], [9], [8, 7, 6, 5, 4, 3, 2], [11, 12]]


@pytest.fixture(scope="module")
def tiny(conftest_of: Any) -> Any:
    return conftest_of("runtime")


@pytest.fixture(scope="module")
def int8_folder(tiny: Any, tmp_path_factory: Any) -> Path:
    return tiny.write_bundle(tmp_path_factory.mktemp("int8") / "tiny", replace(tiny.SPEC, kv_cache=INT8_CACHE))


@pytest.fixture(scope="module", params=["growing", "body", "standard"])
def int8(request: Any, tiny: Any, int8_folder: Path, tmp_path_factory: Any) -> OrtModel:
    """With our kernels where there are any, without them, and in the older layout, passed in and out."""
    path = int8_folder / "model.onnx"
    if request.param == "standard":
        path = tmp_path_factory.mktemp("older") / "model.onnx"
        export_onnx(tiny.random_model(replace(tiny.SPEC, kv_cache=INT8_CACHE)), path, form="custom_op", plain=True)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "body":
            patch.setenv("JPQ_KERNELS", "off")
        model = OrtModel(path, threads=1)
    assert isinstance(model.new_cache(), PassedCache if request.param == "standard" else GrowingCache)
    return model


def greedy_in_pytorch(decoder: Any, prompt: list[int], steps: int) -> list[int]:
    cache, ids, tokens = KVCache(), torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(int(decoder(ids, cache=cache)[0, -1].argmax()))
            ids = torch.tensor([tokens[-1:]])
    return tokens


def test_greedy_tokens_are_pytorchs(tiny: Any, int8: OrtModel, int8_folder: Path) -> None:
    decoder = dequantized(tiny.random_model(int8.spec))
    expected = [greedy_in_pytorch(decoder, prompt, 16) for prompt in PROMPTS]
    assert [list(generate(int8, prompt, max_new_tokens=16, stop_ids=[])) for prompt in PROMPTS] == expected
    bundle = load(int8_folder, threads=1)
    texts = bundle.generate(
        [" ".join(tiny.WORDS[i] for i in prompt) for prompt in PROMPTS], max_new_tokens=16, stop_ids=()
    )
    assert [text.strip() for text in texts] == [bundle.tokenizer.decode(tokens) for tokens in expected]
    decoder.stored = lambda _layer, key, value: (key * 1.2, value.flip(-1))  # the twin
    assert [greedy_in_pytorch(decoder, prompt, 16) for prompt in PROMPTS] != expected


@pytest.mark.parametrize("slots", [1, 3])
def test_sequences_in_one_pass_get_what_they_get_alone(int8: OrtModel, slots: int) -> None:
    batcher = Batcher(int8, slots=slots, capacity=24)
    rows = [Sequence(prompt, Sampling(max_new_tokens=4 + 3 * i, stop_ids=())) for i, prompt in enumerate(PROMPTS)]
    for row in rows:
        batcher.add(row)
    while batcher.busy:
        batcher.step()
    expected = [list(generate(int8, p, max_new_tokens=4 + 3 * i, stop_ids=[])) for i, p in enumerate(PROMPTS)]
    assert [row.tokens for row in rows] == expected


def test_memory_is_reported_and_smaller(int8: OrtModel, model: OrtModel) -> None:
    assert model.cache_bytes_per_token == model.spec.cache_bytes_per_token == 2 * 2 * 16 * 4
    assert int8.cache_bytes_per_token == int8.spec.cache_bytes_per_token == 2 * 2 * (16 + 4)
    past = int8.forward(np.array([[3, 4, 5]])).past
    assert sum(value.nbytes for value in past.values()) == 3 * int8.cache_bytes_per_token
    assert Batcher(int8, slots=5, capacity=20).most_cache_bytes == 5 * 20 * int8.cache_bytes_per_token


def test_beyond_the_capacity_is_refused(int8: OrtModel, int8_folder: Path) -> None:
    decoding = int8.start()
    decoding.step(range(24))
    with pytest.raises(CapacityError, match="position 24 is beyond the model's 24 positions"):
        decoding.step([1])
    with pytest.raises(CapacityError, match="capacity of 8 tokens"):
        load(int8_folder, capacity=8).generate("w1 w2 w3", max_new_tokens=6)


def test_a_kind_of_cache_from_the_future_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.write_bundle(tmp_path / "own", replace(tiny.SPEC, kv_cache=INT8_CACHE))
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    entry = next(entry for entry in graph.metadata_props if entry.key == "jpq.spec")
    entry.value = entry.value.replace('"kv_cache": "int8"', '"kv_cache": "int2"')
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(BundleError, match="expected one of float, int8, got 'int2'"):
        load(folder)
