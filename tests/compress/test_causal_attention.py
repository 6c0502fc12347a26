"""Attention in bf16 by blocks of queries against torch's, forward and backward, and where it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jpq_export.compress import decoder
from jpq_export.compress.causal_attention import BLOCK, causal_attention, pays
from jpq_export.compress.decoder import build_decoder
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec

# bf16 keeps 8 bits: each rounding is off by up to 2⁻⁹, and a gradient has passed six (scaled query, scores,
# probabilities, their gradient, the scores', the result).
BOUND = 6 * 2**-9


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (2, length, 3, 16)  # laid out as a decoder's: heads inside tokens
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for _ in range(4)]


def gradients(function, parts: list[Tensor], upstream: Tensor) -> list[Tensor]:
    parts = [part.detach().clone().requires_grad_(True) for part in parts]
    out = function(*parts)
    out.backward(upstream.to(out.dtype))
    found = [part.grad for part in parts]
    assert all(gradient is not None for gradient in found)
    return [out.detach(), *found]  # pyright: ignore[reportReturnType] asserted


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float = 0.3, *, causal: bool = True) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 7])
def test_blocks_of_queries_compute_what_torch_does(length: int) -> None:
    *parts, upstream = inputs(length)
    wide = [part.float() for part in parts]
    found = gradients(lambda q, k, v: causal_attention(q, k, v, 0.3), parts, upstream)
    wanted = gradients(exact, wide, upstream.float())
    assert all(distance(a, b) < BOUND for a, b in zip(found, wanted, strict=True))
    for twin in (lambda q, k, v: exact(q, k, v, causal=False), lambda q, k, v: exact(q, k, v, 0.35)):
        other = gradients(twin, wide, upstream.float())
        assert all(distance(a, b) > 3 * BOUND for a, b in zip(found[:3], other[:3], strict=True))


def test_a_token_does_not_see_later_ones() -> None:
    query, key, value, _ = inputs(2 * BLOCK)
    changed = key.clone()
    changed[:, :, -1] += 5
    before, after = (causal_attention(query, k, value, 0.3) for k in (key, changed))
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.equal(before[:, :, -1], after[:, :, -1])


def test_it_is_taken_for_whole_causal_texts_in_bf16_only() -> None:
    query, key, value, _ = inputs(BLOCK)
    assert pays(query, key, value, None)
    assert not pays(query.float(), key.float(), value.float(), None)  # parity and gates
    assert not pays(query, key.float(), value, None)
    assert not pays(query[:, :, :-1], key[:, :, :-1], value[:, :, :-1], None)
    assert not pays(query[:, :, :1], key, value, None)  # with a cache
    assert not pays(query, key, value, torch.ones(1, 1, BLOCK, BLOCK, dtype=torch.bool))


def test_a_decoder_takes_it_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(
        name="tiny", family="llama", vocab=64, hidden=32, head_dim=16, heads_per_group=2, layers=(LayerSpec(1, 32),),
        ropes=(RopeSpec(tuple(float(10000 ** (-i / 8)) for i in range(8))),), norm_eps=1e-5, activation="silu",
        tied=True, attention_scale=0.25, bos_id=1, eos_ids=(2,),
    )  # fmt: skip
    generator, taken = torch.Generator().manual_seed(0), []
    weights = {n: torch.randn(s, generator=generator) * 0.2 for n, s in spec.matrices().items()}
    model = build_decoder(spec, weights | {n: torch.ones(k) for n, k in spec.vectors().items()})
    ids = torch.randint(0, 64, (2, BLOCK + 3), generator=generator)
    monkeypatch.setattr(decoder, "causal_attention", lambda *asked: taken.append(1) or causal_attention(*asked))
    wanted = model.hidden(ids, model.context(ids))
    assert not taken
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.hidden(ids, model.context(ids))
    assert taken
    assert distance(found, wanted) < 2 * BOUND
