"""Every decoder family, pruned to other widths in every layer, from transformers' own model to the graph we write.

The weights lie on a grid that 4 bits hold exactly, so the only differences allowed are those of fp32 sums. What we
prune, transformers computes with zeros in its place, put there from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jpq_export.compress.apply import LayerChoice, prune
from jpq_export.compress.decoder import Decoder, KVCache, named_weights
from jpq_export.compress.load import load_model
from jpq_export.format.compressed import CompressedModel
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.affine import store
from jpq_export.numerics.scheme import Scheme
from jpq_export.runtime.session import OrtModel

BOUND = 1e-4  # the product's promise; 1e-6 was seen
FAULT = 1e-2  # what is wrong by far more than any rounding
STEP = 3 / 64  # exact in fp16, and so are its multiples
FAMILIES = ("llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")
PREFILL, STEPS = 9, 16


class Case(NamedTuple):
    """The same model three times: transformers' own with parts silenced, our decoder, and its graph."""

    theirs: Any
    decoder: Decoder
    graph: OrtModel


def choices(kv_heads: int) -> tuple[LayerChoice, ...]:
    """Three layers, none of them whole: fewer heads and channels, no attention, no MLP."""
    last = tuple(range(1, kv_heads))
    return (
        LayerChoice(last, tuple(range(5, 85))),
        LayerChoice((), tuple(range(0, 96, 2))),
        LayerChoice(tuple(range(kv_heads - 1)), ()),
    )


def sublayers(model: Any) -> list[tuple[nn.Module, nn.Module, nn.Module, nn.Module]]:
    """Of every layer: attention and its output projection, MLP and its output projection."""
    if hasattr(model, "transformer"):
        return [(x.attn, x.attn.c_proj, x.mlp, x.mlp.c_proj) for x in model.transformer.h]
    return [(x.self_attn, x.self_attn.o_proj, x.mlp, x.mlp.down_proj) for x in model.model.layers]


def silence(model: Any, kept: tuple[LayerChoice, ...], kv_heads: int) -> None:
    """Put zeros where we prune: what the output projections read, or the whole of a sub-layer."""
    for (attention, o, mlp, down), choice in zip(sublayers(model), kept, strict=True):
        for module, inner, units, count in (
            (attention, o, choice.kv_heads, kv_heads),
            (mlp, down, choice.channels, 96),
        ):
            if not units:
                module.register_forward_hook(nothing)
            mask = torch.zeros(count)
            mask[list(units)] = 1

            def masked(_module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor = mask) -> Tensor:
                return inputs[0] * mask.repeat_interleave(inputs[0].shape[-1] // len(mask))

            inner.register_forward_pre_hook(masked)


def nothing(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """The output of a sub-layer that adds nothing; attention gives a tuple."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def on_grid(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_((parameter / STEP).round().clamp(-8, 7) * STEP)
    return model


def exactly(decoder: Decoder) -> CompressedModel:
    """Matrices on the grid as 4-bit codes: nothing is lost."""
    weights = {name: value.numpy() for name, value in named_weights(decoder).items()}
    quantized = {}
    for name in decoder.spec.matrices():
        codes = weights.pop(name) / STEP + 8
        assert np.array_equal(codes, codes.astype(np.uint8))
        groups = (len(codes), codes.shape[1] // 16)
        scales, zeros = np.full(groups, STEP, np.float16), np.full(groups, 8, np.uint8)
        quantized[name] = store(codes.astype(np.uint8), scales, zeros, Scheme(4, 16, symmetric=False))
    return CompressedModel(decoder.spec, quantized, {name: value.copy() for name, value in weights.items()})


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable, tiny_model: Callable) -> Callable:
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        changes = {"num_hidden_layers": 3} | ({"num_key_value_heads": 2} if name == "gemma3" else {})
        folder = save_tiny(tmp_path_factory.mktemp(name), name, **changes)
        theirs = on_grid(tiny_model(name, **changes))
        theirs.save_pretrained(folder)
        teacher = load_model(str(folder)).model
        assert isinstance(teacher, Decoder)
        kv_heads = teacher.spec.layers[0].kv_heads
        decoder = prune(teacher, choices(kv_heads))
        export_onnx(exactly(decoder), folder / "model.onnx", form="custom_op")
        silence(theirs, choices(kv_heads), kv_heads)
        return Case(theirs, decoder, OrtModel(folder / "model.onnx", threads=1, exact=True))

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def graph_logits(graph: OrtModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of a prefill and then of single tokens through the cache."""
    whole = torch.ones_like(ids) if mask is None else mask
    out = graph.forward(ids[:, :PREFILL].numpy(), whole[:, :PREFILL].numpy())
    parts = [out.logits]
    for at in range(PREFILL, ids.shape[1]):
        out = graph.forward(ids[:, at : at + 1].numpy(), whole[:, : at + 1].numpy(), past=out.past)
        parts.append(out.logits)
    return torch.from_numpy(np.concatenate(parts, 1))


def decoder_logits(decoder: Decoder, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same of our decoder."""
    whole, cache = torch.ones_like(ids) if mask is None else mask, KVCache()
    cuts = [(0, PREFILL), *((at, at + 1) for at in range(PREFILL, ids.shape[1]))]
    parts = [decoder(ids[:, a:b], attention_mask=whole[:, :b], cache=cache) for a, b in cuts]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_sixteen_steps_equal_transformers(family: str, case_of: Callable[[str], Case]) -> None:
    case, ids = case_of(family), tokens(1, PREFILL + STEPS)
    expected = case.theirs(ids).logits
    assert relative_rms(case.decoder(ids), expected) < BOUND
    assert relative_rms(decoder_logits(case.decoder, ids), expected) < BOUND
    assert relative_rms(graph_logits(case.graph, ids), expected) < BOUND
    shifted = case.theirs(ids.roll(1, 1)).logits  # the twin: other tokens, other logits
    assert relative_rms(graph_logits(case.graph, ids), shifted) > FAULT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_of_three_equals_transformers(family: str, case_of: Callable[[str], Case]) -> None:
    case, ids = case_of(family), tokens(3, PREFILL + STEPS)
    mask = (torch.arange(PREFILL + STEPS) >= torch.tensor([[0], [3], [7]])).long()
    positions, real = (mask.cumsum(-1) - 1).clamp(min=0), mask.bool()
    expected = case.theirs(ids, attention_mask=mask, position_ids=positions).logits[real]
    assert relative_rms(decoder_logits(case.decoder, ids, mask)[real], expected) < BOUND
    assert relative_rms(graph_logits(case.graph, ids, mask)[real], expected) < BOUND
    assert relative_rms(graph_logits(case.graph, ids)[real], expected) > FAULT  # the twin: padding taken for text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_pruned_mattered(family: str, case_of: Callable[[str], Case], tiny_model: Callable) -> None:
    """The twin of both: the same weights with nothing silenced are another model."""
    case, ids = case_of(family), tokens(1, PREFILL)
    changes = {"num_hidden_layers": 3} | ({"num_key_value_heads": 2} if family == "gemma3" else {})
    whole = on_grid(tiny_model(family, **changes))(ids).logits
    assert relative_rms(case.decoder(ids), whole) > FAULT
