"""From the traced graph to model.onnx: names as in every bundle, the codes, the function bodies, our metadata."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path

import onnx_ir as ir
from torch import nn

from jpq_export.fallback.load import TracedModel, refusal
from jpq_export.fallback.stored import PREFIX
from jpq_export.fallback.trace import HELD, OPSET
from jpq_export.format.spec import ModelSpec
from jpq_export.lower import functions
from jpq_export.lower.export import FORMAT, FORMAT_KEY, SPEC_KEY, UNFUSED_KEY, check_graph, place_in_file, save
from jpq_export.lower.functions import DOMAIN, Variant
from jpq_export.numerics.affine import QuantizedWeight

IR_VERSION = 10  # opset 23 needs no more; onnxruntime 1.31 takes up to 13
MOST_CONSTANT = 64  # elements of a constant inside the graph; more are a table
INT64, FLOAT = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.FLOAT)


def finish(model: ir.Model, loaded: TracedModel, schemes: Mapping[str, object]) -> None:
    """Rename, tell the operators apart by overload and drop what torch left; all in place.

    Raises:
        ModelError: a matrix that was to be stored packed is still multiplied as it was.
    """
    graph = model.graph
    _name_ends(graph, loaded.spec)
    used = _name_products(graph, loaded)
    _sort_initializers(graph, schemes)
    left = sorted(name for name in graph.initializers if name.removesuffix(".weight") in schemes)
    if left:
        raise refusal(loaded.where, loaded.architecture, f"{left[0]} is read by code outside its layer")
    if missing := sorted(schemes.keys() - used):
        raise refusal(loaded.where, loaded.architecture, f"{missing[0]} is not in the traced graph")
    _strip(model)


def write(model: ir.Model, loaded: TracedModel, quantized: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Put the codes in, and write `path` with `path.name + ".data"`; the ONNX checker reads it afterwards."""
    graph, variants, unfused = model.graph, {}, set()
    for name, weight in quantized.items():
        parts = {"packed": weight.packed, "scales": weight.scales, "zeros": weight.zeros}
        for part, array in parts.items():
            if array is not None:
                value = graph.initializers[f"{name}.{part}"]
                value.const_value = ir.tensor(array, name=value.name)
    for node in graph:
        if node.domain != DOMAIN:
            continue
        weight = quantized[_weight_of(node)]
        bias = len(node.inputs) > 3 + (not weight.scheme.symmetric)
        variant = Variant.of(node.op_type, weight.scheme, weight.shape[1], bias=bias)
        node.overload, variants[node.op_type, variant.overload] = variant.overload, variant
        if node.op_type == "LowBitMatMul" and not variant.fused:
            unfused.add(_weight_of(node))
    for key in sorted(variants):
        body = functions.function(variants[key], OPSET)
        model.functions[body.identifier()] = body
    ordered = sorted(graph.initializers.values(), key=place_in_file)
    graph.initializers.clear()
    graph.initializers.update({str(value.name): value for value in ordered})
    model.metadata_props.update(
        {FORMAT_KEY: FORMAT, SPEC_KEY: loaded.spec.to_json(), UNFUSED_KEY: json.dumps(sorted(unfused))}
    )
    save(model, path)
    check_graph(path)


def _name_ends(graph: ir.Graph, spec: ModelSpec) -> None:
    """Inputs and outputs as runtime/session.py binds them, the cache [batch, kv_heads, tokens, head_dim]."""
    kept = [(f"{i}.{part}", layer.kv_heads) for i, layer in enumerate(spec.layers) for part in ("key", "value")]
    tokens = {"input_ids": ["batch", "seq"], "attention_mask": ["batch", "total"], "position_ids": ["batch", "seq"]}
    takes = [(name, INT64, shape) for name, shape in tokens.items()]
    takes += [(f"past.{name}", FLOAT, ["batch", heads, "past", spec.head_dim]) for name, heads in kept]
    gives = [("logits", FLOAT, ["batch", "seq", spec.vocab])]
    gives += [(f"present.{name}", FLOAT, ["batch", heads, "total", spec.head_dim]) for name, heads in kept]
    for values, wanted in ((graph.inputs, takes), (graph.outputs, gives)):
        for value, (name, kind, shape) in zip(values, wanted, strict=True):
            value.name, value.type, value.shape = name, kind, ir.Shape(shape)


def _name_products(graph: ir.Graph, loaded: TracedModel) -> set[str]:
    """Codes and outputs of our operators called after their matrix; the matrices that were found."""
    used: set[str] = set()
    for node in graph:
        if node.domain != DOMAIN:
            continue
        path = str(node.inputs[1].name).removeprefix(HELD).rpartition(f".{PREFIX}")[0]  # pyright: ignore[reportOptionalMemberAccess] ours has it
        if path not in loaded.owners:  # renamed already: a matrix that several nodes share
            path = _weight_of(node)
        owner = loaded.owners[path]
        for index, value in enumerate(node.inputs[1:], 1):
            part = str(value.name if value else "").rpartition(f".{PREFIX}")[2]
            if value is not None and part in ("packed", "scales", "zeros"):
                node.replace_input_with(index, _shared(graph, value, f"{owner}.{part}"))
        first = owner not in used
        whole = type(loaded.model.get_submodule(owner)) is nn.Embedding or node.op_type == "LowBitMatMul"
        if first and whole and not node.outputs[0].is_graph_output():  # what the module gives, so a point of parity
            node.outputs[0].name = owner
        node.name = owner if first else f"{owner}.{len(used)}.again"
        used.add(owner)
    return used


def _shared(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The initializer called `name`: `value` itself, renamed, or of a tied matrix the first one."""
    if name in graph.initializers:
        return graph.initializers[name]
    del graph.initializers[str(value.name)]
    value.name = name
    graph.initializers[name] = value
    return value


def _weight_of(node: ir.Node) -> str:
    codes = node.inputs[1]
    assert codes is not None
    return str(codes.name).removesuffix(".packed")


def _sort_initializers(graph: ir.Graph, schemes: Container[str]) -> None:
    """Drop what nothing reads: the weights whose place the codes took; call the others as the model does.

    Shapes and axes become Constant nodes, as in every bundle: the checker reads no values from a data file.
    """
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
        elif name.startswith(HELD):
            del graph.initializers[name]
            value.name = name.removeprefix(HELD)
            graph.initializers[str(value.name)] = value
        elif name.rpartition(".")[0] not in schemes and _is_small(value):
            node = ir.node("Constant", [], attributes={"value": value.const_value})
            ir.convenience.replace_all_uses_with(value, node.outputs[0])
            del graph.initializers[name]
            node.name = node.outputs[0].name = name
            graph.insert_before(first, node)


def _is_small(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size <= MOST_CONSTANT


def _strip(model: ir.Model) -> None:
    """Stack traces with this machine's paths, and shapes under torch's symbols: the checker infers them again."""
    graph, ends = model.graph, {*model.graph.inputs, *model.graph.outputs}
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "jpq-export", None
    model.doc_string = graph.doc_string = None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "decoder"
    graph.opset_imports.clear()
    graph.opset_imports.update({"": OPSET, DOMAIN: 1})
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        node.metadata_props.clear()
        node.doc_string, node.version = None, None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in ends:
                value.shape = value.type = None
