"""What a bundle is measured against: the original model in fp32, in onnxruntime's 4-bit kernel, in ours at one width.

The weights are random: no product here looks at values, so its speed does not depend on them, and the original model,
which may be gone, is not needed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec, Spec
from jpq_export.format.plan import Plan
from jpq_export.format.spec import FLOAT_ACTIVATIONS, FLOAT_CACHE, ModelSpec
from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.numerics.levels import NORMAL_WIDTHS, normal_bytes
from jpq_export.numerics.row_blocks import StoredWeight
from jpq_export.numerics.scheme import Scheme, choose_group_size, wide_group_size

SomeSpec = TypeVar("SomeSpec", ModelSpec, EncoderSpec)
BITS = 4
GROUP_SIZE = 64  # bytes a weight as in our own format; onnxruntime's fast path takes 32, 64 and 128


def original_spec(pruned: SomeSpec, plan: Plan) -> SomeSpec:
    """The model before pruning, from what the plan says each layer was made of; nothing of it was int8 or rotated."""
    pairs = zip(pruned.layers, plan.layers, strict=True)
    whole = pruned.with_layers(tuple(replace(old, kv_heads=p.kv_heads_of, ffn=p.ffn_of) for old, p in pairs))
    plain = {"kv_cache": FLOAT_CACHE, "activations": FLOAT_ACTIVATIONS, "rotated": False}
    return replace(whole, **plain) if isinstance(whole, ModelSpec) else whole


def random_model(
    spec: Spec,
    *,
    bits: float = BITS,
    symmetric: bool = False,
    normal: bool = False,
    wide: int | None = None,
    seed: int = 0,
) -> CompressedModel:
    """Every matrix at one width; by default as onnxruntime's own kernel is fastest: 4 bits with integer zero points.

    `wide`: groups of at least so many weights, as plans have them, instead of some 64.
    """
    rng = np.random.default_rng(seed)
    quantized: dict[str, StoredWeight] = {}
    for name, (n, k) in spec.matrices().items():
        size = wide_group_size(k, wide) if wide else choose_group_size(k, GROUP_SIZE)
        quantized[name] = _random(rng, n, k, Scheme(bits, size, symmetric, normal=normal))
    return CompressedModel(spec, quantized, {name: np.ones(n, np.float32) for name, n in spec.vectors().items()})


def _random(rng: np.random.Generator, n: int, k: int, scheme: Scheme) -> QuantizedWeight:
    groups = scheme.groups(k)
    codes = rng.integers(0, scheme.max_code + 1, (n, k), np.uint8)
    zeros = np.full((n, groups), (scheme.max_code + 1) // 2, np.uint8)  # 8 at 4 bits
    points = normal_bytes(scheme.bits) if scheme.normal else np.arange(scheme.max_code + 1, dtype=np.uint8)
    scales = np.full((n, groups), 3 * k**-0.5 / (int(points[-1]) - int(points[0])), np.float16)
    return store(points[codes], scales, None if scheme.symmetric else zeros, scheme)


def write_baselines(spec: ModelSpec, folder: Path) -> dict[str, Path]:
    """fp32 and 4-bit graphs of the original model by the names the results carry."""
    from jpq_export.lower.export import export_onnx

    model, out = random_model(spec), {}
    forms: dict[str, Literal["fp32", "qdq"]] = {"onnxruntime-fp32": "fp32", "matmulnbits-4bit": "qdq"}
    for name, form in forms.items():
        out[name] = folder / name / "model.onnx"
        out[name].parent.mkdir()
        export_onnx(model, out[name], form=form, plain=True)
    return out


def write_uniform(spec: ModelSpec, plan: Plan, folder: Path, widths: tuple[float, ...]) -> dict[str, Path]:
    """Our operators over the original model, every matrix at one width, embedding and head too: "jpq-3bit", ...

    Groups are as wide as the widest of `plan`, levels normal where it has any such.
    """
    from jpq_export.lower.export import export_onnx

    out, wide = {}, max((choice.group_size for choice in plan.choices), default=GROUP_SIZE)
    normal = any(choice.normal for choice in plan.choices)
    for bits in widths:
        kind = {"symmetric": True, "normal": normal and bits in NORMAL_WIDTHS, "wide": wide}
        name = f"jpq-{bits:g}bit"
        out[name] = folder / name / "model.onnx"
        out[name].parent.mkdir()
        export_onnx(random_model(spec, bits=bits, **kind), out[name], form="custom_op", chained=True)
    return out
