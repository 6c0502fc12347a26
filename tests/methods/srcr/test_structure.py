"""The structural pattern: the share asked for, the cheapest units first, never a whole sub-layer."""

from __future__ import annotations

import pytest
import torch

from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.methods.srcr.structure import choose_structure, layer_weights

SPEC = ModelSpec(
    name="toy",
    family="llama",
    vocab=64,
    hidden=64,
    head_dim=16,
    heads_per_group=2,
    layers=(LayerSpec(4, 512), LayerSpec(4, 512)),
    ropes=(RopeSpec((1.0,) * 8),),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=0.25,
    eos_ids=(1,),
    bos_id=0,
    add_bos=False,
    max_positions=128,
)


def gates(*, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"layers.{i}.{sub}": n for i in range(2) for sub, n in (("attn", 5), ("mlp", 513))}
    return {name: torch.rand(n, generator=generator) for name, n in sizes.items()}


def removed(choices: tuple) -> int:
    head, channel = 2 * 64 * 16 * 3, 3 * 64
    return sum(head * (4 - len(c.kv_heads)) + channel * (512 - len(c.channels)) for c in choices)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_share_is_met_as_near_as_units_allow(share: float) -> None:
    choices = choose_structure(SPEC, gates(), share, group_size=64)
    assert removed(choices) / layer_weights(SPEC) == pytest.approx(share, abs=0.03)  # half a unit: 64 x 192 of 270k
    assert all(c.kv_heads and c.channels and len(c.channels) % 64 == 0 for c in choices)


def test_the_cheapest_go_first_and_the_last_unit_stays() -> None:
    prices = gates()
    prices["layers.0.mlp"][1:65] = 0
    prices["layers.1.attn"][:] = 0
    choices = choose_structure(SPEC, prices, 0.125, group_size=64)
    assert len(choices[1].kv_heads) == 1
    assert not set(range(64)) & set(choices[0].channels)
    other = choose_structure(SPEC, {name: price.flip(0) for name, price in prices.items()}, 0.125, group_size=64)
    assert other != choices  # twin: prices decide


def test_no_share_removes_nothing() -> None:
    assert removed(choose_structure(SPEC, gates(), 0.0, group_size=64)) == 0
