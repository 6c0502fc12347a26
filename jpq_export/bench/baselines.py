"""What a bundle is measured against: the original model's shapes in fp32 and in onnxruntime's own 4-bit kernel.

The weights are random: no product here looks at values, so its speed does not depend on them, and the original model,
which may be gone, is not needed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Plan
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.scheme import Scheme, choose_group_size, row_bytes

BITS = 4
GROUP_SIZE = 64  # bytes a weight as in our own format; onnxruntime's fast path takes 32, 64 and 128


def original_spec(pruned: ModelSpec, plan: Plan) -> ModelSpec:
    """The model before pruning, from what the plan says each layer was made of."""
    pairs = zip(pruned.layers, plan.layers, strict=True)
    return pruned.with_layers(tuple(replace(old, kv_heads=p.kv_heads_of, ffn=p.ffn_of) for old, p in pairs))


def random_model(spec: ModelSpec, *, seed: int = 0) -> CompressedModel:
    """Every matrix 4 bits with integer zero points, the form onnxruntime's kernel is fastest in."""
    rng = np.random.default_rng(seed)
    quantized = {name: _random(rng, *shape) for name, shape in spec.matrices().items()}
    return CompressedModel(spec, quantized, {name: np.ones(n, np.float32) for name, n in spec.vectors().items()})


def _random(rng: np.random.Generator, n: int, k: int) -> QuantizedWeight:
    scheme = Scheme(BITS, choose_group_size(k, GROUP_SIZE), symmetric=False)
    groups = scheme.groups(k)
    packed = rng.integers(0, 256, (n, row_bytes(k, BITS)), np.uint8)
    zeros = np.full((n, row_bytes(groups, BITS)), 0x88, np.uint8)
    if groups % 2:
        zeros[:, -1] = 0x08  # a row ends with zero bits
    return QuantizedWeight(scheme, (n, k), packed, np.full((n, groups), 0.2 * k**-0.5, np.float16), zeros)


def write_baselines(spec: ModelSpec, folder: Path) -> dict[str, Path]:
    """fp32 and 4-bit graphs of the original model by the names the results carry."""
    from jpq_export.lower.export import export_onnx

    model, out = random_model(spec), {}
    forms: dict[str, Literal["fp32", "qdq"]] = {"onnxruntime-fp32": "fp32", "matmulnbits-4bit": "qdq"}
    for name, form in forms.items():
        out[name] = folder / name / "model.onnx"
        out[name].parent.mkdir()
        export_onnx(model, out[name], form=form)
    return out
