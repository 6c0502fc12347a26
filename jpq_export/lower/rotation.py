"""The turn of a rotated stream around its last norm, or of what is read of a stream (see `compress/rotation.py`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from jpq_export.format.spec import rotation_sizes
from jpq_export.lower.nodes import Nodes


def rotated(
    x: ir.Value, nodes: Nodes, vectors: Mapping[str, np.ndarray], hidden: int, *, back: bool = False
) -> ir.Value:
    """X (A ⊗ B) or, `back`, x (A ⊗ B)ᵀ: as rows of [a, b], Aᵀ x B or A x Bᵀ; `vectors` hold A and B."""
    a, b = rotation_sizes(hidden)
    left, right = _factor(nodes, vectors, "outer", a), _factor(nodes, vectors, "inner", b)
    if back:
        right = nodes("Transpose", right, perm=[1, 0])
    else:
        left = nodes("Transpose", left, perm=[1, 0])
    split = nodes("Reshape", x, nodes.ints(0, 0, a, b))
    return nodes("Reshape", nodes("MatMul", left, nodes("MatMul", split, right)), nodes.ints(0, 0, -1))


def _factor(nodes: Nodes, vectors: Mapping[str, np.ndarray], part: str, size: int) -> ir.Value:
    name = f"rotation.{part}"
    return nodes.initializers.get(name) or nodes.initializer(name, ir.tensor(vectors[name].reshape(size, size)))
