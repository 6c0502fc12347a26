"""What stands between the products, as operators of ours where onnxruntime has two each: residual sum and norm, gate.

`jpq::AddRMSNormalization` gives a + b and its norm; `jpq::SiluMul` and `jpq::GeluTanhMul` give gate(x) * factor. For
one token onnxruntime takes longer to call an operator than to compute it (SmolLM2-135M, one thread: 0.25 ms of 5.2 a
token go). The bodies are the two operators, for an onnxruntime without our library.
"""

from __future__ import annotations

import onnx_ir as ir

from jpq_export.format.spec import ModelSpec
from jpq_export.lower.functions import DOMAIN
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import ACTIVATIONS

ADD_NORM = "AddRMSNormalization"
GATES = {"silu": "SiluMul", "gelu_tanh": "GeluTanhMul"}


def add_norm(
    nodes: Nodes, x: ir.Value, y: ir.Value, weight: ir.Value, eps: float, names: tuple[str, str]
) -> tuple[ir.Value, ir.Value]:
    """(x + y, its norm), called `names`."""
    facts = {"domain": DOMAIN, "overload": _overload(eps), "epsilon": eps}
    total, normed = nodes.many(ADD_NORM, x, y, weight, names=names, **facts)
    return total, normed


def norm(nodes: Nodes, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """The norm of x over its last axis, in a body."""
    return nodes("RMSNormalization", x, weight, axis=-1, epsilon=eps)


def gated(nodes: Nodes, activation: str, x: ir.Value, factor: ir.Value, name: str) -> ir.Value:
    """activation(x) * factor."""
    return nodes(GATES[activation], x, factor, name=name, domain=DOMAIN)


def functions(spec: ModelSpec, opset: int) -> list[ir.Function]:
    """The ONNX functions a decoder needs, of which pruning may have left nothing to do."""
    sums = not spec.layer_norm and any(layer.kv_heads or layer.ffn for layer in spec.layers)
    gates = spec.gated and any(layer.ffn for layer in spec.layers)
    norm = [norm_function(spec.norm_eps, opset)] if sums else []
    return norm + ([gate_function(spec.activation, opset)] if gates else [])


def norm_function(eps: float, opset: int) -> ir.Function:
    """The body of `add_norm`."""
    nodes, (a, b, weight) = Nodes(), _values("a", "b", "weight")
    total = nodes("Add", a, b)
    normed = norm(nodes, total, weight, eps)
    epsilon = ir.Attr("epsilon", ir.AttributeType.FLOAT, None)
    return _function(ADD_NORM, _overload(eps), nodes, (a, b, weight), (total, normed), opset, epsilon)


def gate_function(activation: str, opset: int) -> ir.Function:
    """The body of `gated`."""
    nodes, (x, factor) = Nodes(), _values("x", "factor")
    product = nodes("Mul", ACTIVATIONS[activation](nodes, x), factor)
    return _function(GATES[activation], "", nodes, (x, factor), (product,), opset)


def _overload(eps: float) -> str:
    return f"e{eps:g}"


def _values(*names: str) -> tuple[ir.Value, ...]:
    return tuple(ir.Value(name=name) for name in names)


def _function(
    op_type: str,
    overload: str,
    nodes: Nodes,
    inputs: tuple[ir.Value, ...],
    outputs: tuple[ir.Value, ...],
    opset: int,
    *attributes: ir.Attr,
) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=nodes.nodes, opset_imports={"": opset}, name=op_type)
    return ir.Function(DOMAIN, op_type, overload, graph=graph, attributes=attributes)
