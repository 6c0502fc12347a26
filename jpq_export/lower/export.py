"""`export_onnx`: a compressed model as model.onnx and model.onnx.data, checked after it is written."""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from jpq_export.errors import BundleError, StorageError, TargetError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.format.spec import FLOAT_ACTIVATIONS, FLOAT_CACHE, LOGITS_AT, LOGITS_FROM
from jpq_export.lower import chain
from jpq_export.lower.decoder import DecoderGraph, Dialect
from jpq_export.lower.encoder import EncoderGraph
from jpq_export.lower.functions import DOMAIN
from jpq_export.lower.weights import Form

FORMAT = "jpq-onnx/2"  # 2: time comes first in the cache
RTX = Dialect(functions=False, half=True)
SPEC_KEY, FORMAT_KEY = "jpq.spec", "jpq.format"
DEFAULT_BYTES = 8  # one int64
UNFUSED_KEY = "jpq.unfused"  # matrices onnxruntime unpacks to fp32 at load
CHAINED_KEY = "jpq.chained"  # there where the graph has operators that only our library for a CPU knows


def export_onnx(
    model: CompressedModel,
    path: Path,
    *,
    form: Form,
    tensorrt: str | None = None,
    plain: bool = False,
    taps: bool = False,
    chained: bool = False,
) -> None:
    """Write `path` and `path.name + ".data"` (all weights), then check the file.

    `form`: "custom_op" stores every matrix packed for `jpq::LowBitMatMul`; "qdq" stores 4 and 8 bits as standard
    DequantizeLinear, other widths and a tied embedding as custom operators; "signed" stores INT4 and INT8 around zero
    and computes products and attention in fp16, for TensorRT-RTX; "fp32" stores plain matrices, to measure against.
    `tensorrt`: version the file must parse in. `plain`: with onnxruntime's own attention, to measure against.
    `taps`: add graph outputs "embed", "layers.{i}.attn", "layers.{i}.mlp", "norm". `chained`: what lies between two
    attentions is one operator, `jpq::LowBitChain`, for onnxruntime on a CPU.

    Raises:
        TargetError: `tensorrt` is no version number, or a graph for TensorRT or TensorRT-RTX should keep int8 or
            multiply int8 activations.
        StorageError: the files cannot be written.
        BundleError: the written graph does not pass the ONNX checker.
    """
    dialect = RTX if form == "signed" else dialect_for(tensorrt)
    if getattr(model.spec, "kv_cache", FLOAT_CACHE) != FLOAT_CACHE and (form == "signed" or tensorrt is not None):
        raise TargetError(f"{path.name}: TensorRT's graphs keep a float cache; export with --kv-cache {FLOAT_CACHE}")
    if getattr(model.spec, "activations", FLOAT_ACTIVATIONS) != FLOAT_ACTIVATIONS:
        _check_integers(model, path, form=form, tensorrt=tensorrt)
    growing = tensorrt is None and form != "signed" and not plain
    asked = LOGITS_FROM if growing or plain else LOGITS_AT
    dialect = replace(dialect, growing=growing, chained=growing and chained, asked=asked)
    encoder = isinstance(model.spec, EncoderSpec)
    graph = (EncoderGraph if encoder else DecoderGraph)(model, form, dialect)
    result = graph.build()
    tokens = "wanted" if asked == LOGITS_AT else "seq"
    shape = ["batch", model.spec.hidden] if encoder else ["batch", tokens, model.spec.vocab]
    result.shape, result.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    outputs = [result, *graph.presents]
    if taps:
        outputs += _typed(graph.taps, model.spec.hidden)
    elif isinstance(graph, DecoderGraph):
        graph.hide_sums()
    save(_assemble(graph, outputs, dialect), path)
    check_graph(path)


def _check_integers(model: CompressedModel, path: Path, *, form: Form, tensorrt: str | None) -> None:
    """TargetError where linears that round their inputs to 8 bits cannot be written."""
    if form == "signed" or tensorrt is not None:
        raise TargetError(f"{path.name}: TensorRT's graphs multiply fp16 activations; export with --activation-bits 16")
    if model.adapters:
        raise TargetError(f"{path.name}: low-rank branches read unrounded activations; export without --adapters")


def dialect_for(tensorrt: str | None) -> Dialect:
    """What a TensorRT version reads; onnxruntime (None) reads all of opset 23.

    Up to 10.6 a model-local function is preferred to a plugin of the same name, and functions are told apart by name
    only, so such a file carries none. RMSNormalization and RotaryEmbedding are parsed from 10.15.
    """
    if tensorrt is None:
        return Dialect()
    try:
        version = tuple(int(part) for part in tensorrt.split("."))[:2]
    except ValueError as error:
        raise TargetError(
            f'tensorrt: got {tensorrt!r}, expected a version such as "10.3"; correct the target'
        ) from error
    if version >= (10, 15):
        return Dialect()
    if version >= (10, 7):
        return Dialect(opset=21, fused=False)  # bodies need blocked DequantizeLinear, from opset 21
    return Dialect(opset=20, fused=False, functions=False)


def _typed(values: list[ir.Value], width: int) -> list[ir.Value]:
    for value in values:
        value.shape, value.type = ir.Shape(["batch", "seq", width]), ir.TensorType(ir.DataType.FLOAT)
    return values


def _assemble(graph: DecoderGraph | EncoderGraph, outputs: list[ir.Value], dialect: Dialect) -> ir.Model:
    opsets = {"": dialect.opset, DOMAIN: 1}
    body = ir.Graph(
        graph.inputs,
        outputs,
        nodes=graph.nodes.nodes,
        initializers=sorted(graph.nodes.initializers.values(), key=place_in_file),
        opset_imports=opsets,
        name="encoder" if isinstance(graph, EncoderGraph) else "decoder",
    )
    return ir.Model(
        body,
        ir_version=dialect.ir_version,
        producer_name="jpq-export",
        functions=graph.functions() if dialect.functions else (),
        metadata_props={
            FORMAT_KEY: FORMAT,
            SPEC_KEY: graph.spec.to_json(),
            UNFUSED_KEY: json.dumps(sorted(graph.weights.unfused)),
        }
        | ({CHAINED_KEY: "1"} if any(node.op_type == chain.OP_TYPE for node in body) else {}),
    )


def place_in_file(value: ir.Value) -> tuple[float, str]:
    """Widest elements first: packed without gaps, every tensor is aligned, and the file is as large as the weights."""
    assert value.dtype is not None
    return (-value.dtype.itemsize, value.name or "")


def save(model: ir.Model, path: Path) -> None:
    """Write the graph and beside it all its weights; StorageError when that fails.

    The default of an input, LOGITS_FROM, stays in the graph: graphs with and without it share one data file.
    """
    try:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=DEFAULT_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"{path}: cannot write ({reason}); free some space or choose another --out") from error


def share_data(path: Path, other: Path) -> bool:
    """Let `path` read its weights from `other`'s data file when the bytes are equal; True when its own went."""
    import onnx

    mine, theirs = path.with_name(f"{path.name}.data"), other.with_name(f"{other.name}.data")
    if not filecmp.cmp(mine, theirs, shallow=False):
        return False
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = theirs.name
    path.write_bytes(proto.SerializeToString(deterministic=True))
    mine.unlink()
    return True


def check_graph(path: Path) -> None:
    """Run the ONNX checker with strict shape inference, functions included; BundleError says what is wrong."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(f"{path}: not a valid ONNX graph ({reason}); export it again") from error


def weight_bytes(path: Path) -> int:
    """Bytes of all weights stored in an ONNX file written here: every initializer but the default of an input."""
    graph: Any = ir.load(path).graph
    weights = [value for name, value in graph.initializers.items() if name != LOGITS_FROM]
    return sum(-(-prod(v.shape) * v.dtype.bitwidth // 8) for v in weights)
