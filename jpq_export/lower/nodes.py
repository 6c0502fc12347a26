"""A thin writer of ONNX nodes: values named after what they hold, small constants stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Nodes:
    """Collects the nodes of one graph or function body. Constants are Constant nodes, initializers weights.

    One initializer is no weight: the default of an input (`DecoderGraph`).
    Every value gets a name: the one asked for, or `<scope>/<op_type>_<count>`. Nodes are named after their first
    output, so node names are unique too (TensorRT needs that).
    """

    def __init__(self) -> None:
        """Start with no node."""
        self.scope = ""
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._counts: dict[str, int] = {}

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, name: str | None = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output and return it."""
        return self.many(op_type, *inputs, names=[name], domain=domain, **attributes)[0]

    def many(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        names: Sequence[str | None],
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Append a node with `len(names)` outputs."""
        outputs = [ir.Value(name=name or self._fresh(op_type)) for name in names]
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node(domain, op_type, inputs, attrs, overload=overload, outputs=outputs, name=outputs[0].name)
        self.nodes.append(node)
        return tuple(outputs)

    def const(self, value: Any, dtype: Any) -> ir.Value:
        """A small constant; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self("Constant", name=name, value=ir.tensor(array, name=name))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector: shapes, axes, starts and ends."""
        return self.const(values, np.int64)

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A stored tensor; ValueError when the name is taken."""
        if name in self.initializers:
            raise ValueError(f"two initializers are named {name!r}")
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        self.initializers[name] = value
        return value

    def _fresh(self, op_type: str) -> str:
        stem = f"{self.scope}/{op_type}" if self.scope else op_type
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return f"{stem}_{self._counts[stem]}"
