"""Tiny random models of every family, quantized by rounding, and the PyTorch decoder they are compared with."""

from dataclasses import replace

import numpy as np
import pytest

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.numerics.levels import normal_bytes
from jpq_export.numerics.scheme import TERNARY, Scheme

VOCAB, HIDDEN, HEAD_DIM = 96, 64, 16


def inverse_frequencies(base):
    return tuple(float(f) for f in base ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))


LLAMA = ModelSpec(
    name="tiny",
    family="llama",
    vocab=VOCAB,
    hidden=HIDDEN,
    head_dim=HEAD_DIM,
    heads_per_group=2,
    layers=(LayerSpec(2, 96), LayerSpec(2, 96)),
    ropes=(RopeSpec(inverse_frequencies(1e4)),),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=HEAD_DIM**-0.5,
    max_positions=128,
)
SPECS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, tied=False, heads_per_group=4),
    "gemma3": replace(
        LLAMA,
        family="gemma3",
        layers=(LayerSpec(1, 96, window=4, rope=0), LayerSpec(1, 96, rope=1), LayerSpec(1, 96, window=4)),
        ropes=(RopeSpec(inverse_frequencies(1e4)), RopeSpec(inverse_frequencies(1e6), 0.7)),
        activation="gelu_tanh",
        heads_per_group=4,
        qk_norm=True,
        post_norms=True,
        embed_scale=8.0,
        attention_scale=0.3,
    ),
    "gpt2": replace(
        LLAMA,
        family="gpt2",
        vocab=97,  # as GPT-2's own, not a multiple of anything
        heads_per_group=1,
        ropes=(),
        activation="gelu_tanh",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        layer_norm=True,
        gated=False,
        learned_positions=True,
    ),
    "biases": replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, tied=False),
    "pruned": replace(
        LLAMA,
        layers=(LayerSpec(2, 32), LayerSpec(0, 96), LayerSpec(1, 0), LayerSpec(0, 0), LayerSpec(3, 80)),
        tied=False,
    ),
}


def round_to_nearest(matrix: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    """The nearest code of every weight of a matrix [N, K]; scales span each group."""
    grouped = matrix.reshape(len(matrix), -1, scheme.group_size)
    low, high = grouped.min(-1), grouped.max(-1)
    if scheme.symmetric:
        low, high = -np.abs(grouped).max(-1), np.abs(grouped).max(-1)
    levels = normal_bytes(scheme.bits) if scheme.normal else np.arange(scheme.max_code + 1)
    scales = ((high - low) / (int(levels[-1]) - int(levels[0])) + 1e-3).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.full_like(wide, scheme.centre) if scheme.symmetric else np.clip(np.rint(-low / wide), 0, scheme.max_code)
    places = grouped / wide[..., None] + zeros[..., None]
    codes = np.clip(np.rint(places), 0, scheme.max_code)
    if scheme.normal:
        codes = levels[np.abs(places[..., None] - levels).argmin(-1)]
    return store(codes.reshape(matrix.shape).astype(np.uint8), scales, zeros.astype(np.uint8), scheme)


def mixed(name: str, index: int) -> Scheme:
    """All widths in one model, both kinds of zero."""
    del name
    return Scheme((4, 3, 8, 2, 5, TERNARY, 6, 1)[index % 8], 16, symmetric=index % 3 < 2)


def random_model(spec: ModelSpec, scheme_of=mixed, seed: int = 0) -> CompressedModel:
    rng = np.random.default_rng(seed)
    quantized = {}
    for index, (name, shape) in enumerate(spec.matrices().items()):
        matrix = rng.normal(size=shape) * (0.3 if name == "embed" else shape[1] ** -0.5)
        quantized[name] = round_to_nearest(matrix.astype(np.float32), scheme_of(name, index))
    vectors = {
        name: (rng.normal(size=n) * 0.3 + ("norm" in name)).astype(np.float32) for name, n in spec.vectors().items()
    }
    return CompressedModel(spec, quantized, vectors)


def torch_decoder(model: CompressedModel):
    torch = pytest.importorskip("torch")
    from jpq_export.compress.decoder import build_decoder

    weights = {name: torch.from_numpy(weight.dequantize()) for name, weight in model.quantized.items()}
    return build_decoder(model.spec, weights | {name: torch.from_numpy(v) for name, v in model.vectors.items()})


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


class Tiny:
    """What the tests of this folder share."""

    specs = SPECS
    model = staticmethod(random_model)
    decoder = staticmethod(torch_decoder)
    round = staticmethod(round_to_nearest)
    relative_rms = staticmethod(relative_rms)


@pytest.fixture(scope="session")
def tiny():
    return Tiny
