"""Tensors as checkpoints lay them out -> as the decoder wants them: fused matrices split, transposed ones turned.

Both happen when a tensor is read: nothing but the part that was asked for is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from jpq_export.errors import ModelError
from jpq_export.format.spec import ModelSpec

Read = Callable[[], torch.Tensor]
# A fused matrix -> what its rows are, in order.
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}


def split_fused(tensors: Mapping[str, Read], spec: ModelSpec, where: str) -> dict[str, Read]:
    """Readers by canonical name, where fused matrices and biases are replaced by one reader for each part."""
    out: dict[str, Read] = {}
    for name, read in tensors.items():
        matrix = name.removesuffix(".bias")
        layer, _, part = matrix.partition(".")[2].partition(".")
        if part not in FUSED or int(layer) >= len(spec.layers):  # a layer too many is refused under its stored name
            out[name] = read
            continue
        shapes = spec.linear_shapes(int(layer))
        ends = [0]
        for short in FUSED[part]:
            ends.append(ends[-1] + shapes[short][0])
            rows = slice(ends[-2], ends[-1])
            total = sum(shapes[other][0] for other in FUSED[part])
            out[f"layers.{layer}.{short}{name[len(matrix) :]}"] = _rows(read, rows, total, name, where)
    return out


def _rows(read: Read, rows: slice, total: int, name: str, where: str) -> Read:
    def part() -> torch.Tensor:
        whole = read()
        if len(whole) != total:
            raise ModelError(
                f"{where}: {name} has {len(whole)} rows, expected {total}; configuration and weights do not belong "
                "together"
            )
        return whole[rows].clone()

    return part


def turned(tensors: Mapping[str, Read]) -> dict[str, Read]:
    """Matrices of the layers [in, out] -> [out, in]; tables, norms and biases as they are."""
    return {name: _transposed(read) if name.startswith("layers.") else read for name, read in tensors.items()}


def _transposed(read: Read) -> Read:
    def matrix() -> torch.Tensor:
        tensor = read()
        return tensor.T.contiguous() if tensor.dim() == 2 else tensor

    return matrix
