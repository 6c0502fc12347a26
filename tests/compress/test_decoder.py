"""Our decoder is transformers' model: prefill, decode through the cache, left-padded batches; and small faults show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jpq_export.compress.decoder import Decoder, KVCache, build_decoder, named_weights
from jpq_export.compress.load import load_model
from jpq_export.format.spec import ModelSpec, RopeSpec

# fp32 against fp32 with another order of sums
BOUND = 1e-5
# A wrong formula is not a rounding error.
FAULT = 1e-3
NAMES = ("llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")
Folder = Callable[..., Path]
Model = Callable[..., Any]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def loaded(name: str, tiny_folder: Folder) -> Decoder:
    return load_model(str(tiny_folder(name))).model


@pytest.mark.parametrize("name", NAMES)
def test_prefill_equals_transformers(name: str, tiny_folder: Folder, tiny_model: Model) -> None:
    ids = tokens(2, 24)
    expected = tiny_model(name)(ids).logits
    assert relative_rms(loaded(name, tiny_folder)(ids), expected) < BOUND
    assert relative_rms(tiny_model(name, seed=1)(ids).logits, expected) > FAULT


@pytest.mark.parametrize("name", NAMES)
def test_decoding_through_the_cache_equals_transformers(name: str, tiny_folder: Folder, tiny_model: Model) -> None:
    ids, model, cache = tokens(2, 20), loaded(name, tiny_folder), KVCache()
    expected = tiny_model(name)(ids).logits
    got = torch.cat([model(chunk, cache=cache) for chunk in ids.split([9, 1, 1, 4, 1, 1, 3], 1)], 1)
    assert cache.past == 20
    assert relative_rms(got, expected) < BOUND
    forgetful = torch.cat([model(chunk, cache=KVCache()) for chunk in ids.split([9, 11], 1)], 1)
    assert relative_rms(forgetful, expected) > FAULT


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_equals_transformers(name: str, tiny_folder: Folder, tiny_model: Model) -> None:
    ids, mask, model = tokens(3, 16), torch.ones(3, 16, dtype=torch.long), loaded(name, tiny_folder)
    mask[1, :3], mask[2, :9] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    real = mask.bool()
    expected = tiny_model(name)(ids, attention_mask=mask, position_ids=positions).logits
    assert relative_rms(model(ids, attention_mask=mask)[real], expected[real]) < BOUND
    alone = model(ids[2:, 9:])
    assert relative_rms(model(ids, attention_mask=mask)[2:, 9:], alone) < BOUND  # padding changes nothing
    assert relative_rms(model(ids)[real], expected[real]) > FAULT

    cache = KVCache()
    parts = [model(ids[:, :12], attention_mask=mask[:, :12], cache=cache)]
    parts += [model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache) for i in range(12, 16)]
    assert relative_rms(torch.cat(parts, 1)[real], expected[real]) < BOUND


def swapped_heads(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    key = weights["layers.0.attn.k"].view(2, spec.head_dim, -1)
    return weights | {"layers.0.attn.k": key.flip(0).reshape(-1, spec.hidden)}


def other_theta(spec: ModelSpec) -> ModelSpec:
    ropes = tuple(RopeSpec(tuple(f**1.01 for f in rope.inv_freq), rope.scaling) for rope in spec.ropes)
    return replace(spec, ropes=ropes)


def wider_window(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(replace(x, window=x.window and x.window + 1) for x in spec.layers))


SPEC_FAULTS: list[tuple[str, Callable[[ModelSpec], ModelSpec]]] = [
    ("llama", other_theta),
    ("llama_tied", other_theta),
    ("llama_biased", lambda s: replace(s, ropes=(replace(s.ropes[0], scaling=1.0),))),
    ("mistral", wider_window),
    ("qwen2", wider_window),
    ("qwen3", lambda s: replace(s, norm_eps=1e-2)),
    ("gemma3", wider_window),
    ("gemma3", lambda s: replace(s, embed_scale=1.0)),
    ("gemma3", lambda s: replace(s, attention_scale=s.head_dim**-0.5)),
    ("gemma3", lambda s: replace(s, activation="silu")),
    ("gemma3", lambda s: replace(s, layers=tuple(replace(x, rope=0) for x in s.layers))),
]


@pytest.mark.parametrize(("name", "fault"), SPEC_FAULTS)
def test_a_wrong_fact_shows(
    name: str, fault: Callable[[ModelSpec], ModelSpec], tiny_folder: Folder, tiny_model: Model
) -> None:
    model, ids = loaded(name, tiny_folder), tokens(2, 24)
    wrong = build_decoder(fault(model.spec), named_weights(model))
    assert relative_rms(wrong(ids), tiny_model(name)(ids).logits) > FAULT


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_swapped_key_heads_show(name: str, tiny_folder: Folder, tiny_model: Model) -> None:
    model, ids = loaded(name, tiny_folder), tokens(2, 24)
    wrong = build_decoder(model.spec, swapped_heads(model.spec, named_weights(model)))
    assert relative_rms(wrong(ids), tiny_model(name)(ids).logits) > FAULT


@pytest.mark.parametrize("name", ["llama_biased", "qwen2"])
def test_a_lost_bias_shows(name: str, tiny_folder: Folder, tiny_model: Model) -> None:
    model, ids = loaded(name, tiny_folder), tokens(2, 24)
    weights = named_weights(model)
    zeroed = build_decoder(model.spec, weights | {"layers.1.attn.v.bias": weights["layers.1.attn.v.bias"] * 0})
    assert relative_rms(zeroed(ids), tiny_model(name)(ids).logits) > FAULT


def test_removed_parts_leave_the_residual_stream_alone(tiny_folder: Folder) -> None:
    model, ids = loaded("llama", tiny_folder), tokens(1, 8)
    layers = (replace(model.spec.layers[0], kv_heads=0), replace(model.spec.layers[1], ffn=0))
    pruned = build_decoder(model.spec.with_layers(layers), named_weights(model))
    silent = named_weights(model)
    silent |= {name: silent[name] * 0 for name in ("layers.0.attn.o", "layers.1.mlp.down")}
    expected = build_decoder(model.spec, silent)(ids)
    assert relative_rms(pruned(ids), expected) < BOUND
    assert relative_rms(model(ids), expected) > FAULT
    cache = KVCache()
    pruned(ids, cache=cache)
    assert list(cache.layers) == [1]


def test_taps_show_the_residual_stream(tiny_folder: Folder) -> None:
    model, ids, seen = loaded("gemma3", tiny_folder), tokens(1, 8), {}
    model(ids, tap=seen.__setitem__)
    expected = ["embed", *(f"layers.{i}.{part}" for i in range(3) for part in ("attn", "mlp")), "norm"]
    assert list(seen) == expected
    assert torch.equal(seen["norm"], model.norm(seen["layers.2.mlp"]))


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_build_decoder_names_the_wrong_weight(damage: str, tiny_folder: Folder) -> None:
    model = loaded("llama", tiny_folder)
    weights = named_weights(model)
    weights["layers.1.mlp.up"] = weights["layers.1.mlp.up"][1:]
    if damage == "missing":
        del weights["layers.1.mlp.up"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up: expected \(96, 64\)"):
        build_decoder(model.spec, weights)
