"""What a sentence encoder is measured against: the original in fp32, and as onnxruntime quantizes that to int8.

With random weights when only speed is asked for (no product looks at values), with the original's for its quality.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from jpq_export.bench.baselines import random_model
from jpq_export.errors import UsageError
from jpq_export.format.encoder_spec import EncoderSpec

FP32, INT8 = "onnxruntime-fp32", "onnxruntime-int8"


def original_weights(source: str, spec: EncoderSpec) -> dict[str, np.ndarray]:
    """The original model's weights by canonical name, float32; UsageError when `source` is no such encoder now."""
    from jpq_export.compress.load import load_model

    loaded = load_model(source)
    if not isinstance(loaded.spec, EncoderSpec) or loaded.spec.matrices() != spec.matrices():
        raise UsageError(f"{source}: no longer the model the bundle was made of; leave --pairs or the baselines out")
    return {name.removesuffix(".weight"): p.detach().numpy() for name, p in loaded.model.named_parameters()}


def write_encoder_baselines(
    spec: EncoderSpec, folder: Path, *, weights: dict[str, np.ndarray] | None = None
) -> dict[str, Path]:
    """Graphs by the names the results carry; `weights` by canonical name, random ones without."""
    from jpq_export.lower.export import export_onnx

    out = {name: folder / name / "model.onnx" for name in (FP32, INT8)}
    for path in out.values():
        path.parent.mkdir()
    export_onnx(random_model(spec, bits=8), out[FP32], form="fp32")
    if weights is not None:
        put_weights(out[FP32], weights)
    quantize_int8(out[FP32], out[INT8])
    return out


def put_weights(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Replace every weight of a graph of the form "fp32"; KeyError for one that `weights` lacks."""
    import onnx

    proto = onnx.load(str(path))
    for tensor in proto.graph.initializer:
        name, _, kind = tensor.name.rpartition(".")
        value = weights[name if kind in ("transposed", "rows", "weight") else tensor.name]
        value = np.ascontiguousarray(value.T if kind == "transposed" else value)
        if list(value.shape) != list(tensor.dims):
            raise ValueError(f"{tensor.name}: expected {list(tensor.dims)}, got {list(value.shape)}")
        tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), tensor.name))
    data = path.with_name(f"{path.name}.data")
    data.unlink()  # onnx appends to what is there
    onnx.save(proto, str(path), save_as_external_data=True, location=data.name, size_threshold=0)


def quantize_int8(source: Path, path: Path) -> None:
    """As onnxruntime quantizes dynamically: int8 weights, tables too, activations to 8 bits as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a pre-processing that changes nothing here
    try:
        quantize_dynamic(source, path, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(level)
    facts = onnx.load(str(source), load_external_data=False).metadata_props
    proto = onnx.load(str(path))
    if not proto.metadata_props:  # what tells the runtime the most tokens of a text
        proto.metadata_props.extend(facts)
        onnx.save(proto, str(path))
