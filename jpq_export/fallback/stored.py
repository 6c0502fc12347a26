"""While a model is traced, its linears and tables are our operators: `with stored(...)`, and afterwards themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jpq_export.lower.functions import DOMAIN, stamp
from jpq_export.numerics.scheme import Scheme, row_bytes

PREFIX = "jpq_"  # of the buffers that stand for codes, scales and zero points
VERSION = 1


class StoredLinear(nn.Linear):
    """A linear that multiplies with stored codes: [..., K] -> [..., N]."""

    def forward(self, input: Tensor) -> Tensor:
        """One node `jpq::LowBitMatMul`."""
        facts: Any = getattr(self, f"{PREFIX}facts")
        x = input if input.dim() == 3 else input.reshape(1, -1, facts["K"])  # the body reads [batch, seq, K]
        inputs = [x, *_buffers(self), *([] if self.bias is None else [self.bias])]
        y = _node("LowBitMatMul", inputs, facts, (*x.shape[:-1], facts["N"]))
        return y if x is input else y.reshape(*input.shape[:-1], facts["N"])


class StoredEmbedding(nn.Embedding):
    """A table whose rows are read from stored codes: ids [...] -> [..., K]."""

    def forward(self, input: Tensor) -> Tensor:
        """One node `jpq::LowBitGather`."""
        facts: Any = getattr(self, f"{PREFIX}facts")
        ids = input if input.dim() == 2 else input.reshape(1, -1)  # the body reads [batch, seq]
        rows = _node("LowBitGather", [ids, *_buffers(self)], facts, (*ids.shape, facts["K"]))
        return rows if ids is input else rows.reshape(*input.shape, facts["K"])


def _node(op_type: str, inputs: list[Tensor], facts: Any, shape: tuple[Any, ...]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op_type}", inputs, facts, dtype=torch.float32, shape=shape, version=VERSION
    )


def _buffers(module: nn.Module) -> list[Tensor]:
    names = (f"{PREFIX}{part}" for part in ("packed", "scales", "zeros"))
    return [getattr(module, name) for name in names if hasattr(module, name)]


@contextmanager
def stored(model: nn.Module, owners: Mapping[str, str], schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Every module of `owners` computes with codes of its matrix's scheme; only their shapes matter yet."""
    before = {path: type(model.get_submodule(path)) for path in owners}
    try:
        for number, (path, owner) in enumerate(owners.items(), 1):
            _store(model.get_submodule(path), schemes[owner], number)
        yield
    finally:
        for path, kind in before.items():
            module = model.get_submodule(path)
            module.__class__ = kind
            for name in [name for name in module._buffers if name.startswith(PREFIX)]:
                delattr(module, name)
            module.__dict__.pop(f"{PREFIX}facts", None)


def _store(module: Any, scheme: Scheme, number: int) -> None:
    rows, columns = module.weight.shape
    groups, kind = scheme.groups(columns), type(module)
    parts = {"packed": (torch.uint8, row_bytes(columns, scheme.bits)), "scales": (torch.float16, groups)}
    if not scheme.symmetric:
        parts["zeros"] = (torch.uint8, row_bytes(groups, scheme.bits))
    for part, (dtype, width) in parts.items():
        module.register_buffer(PREFIX + part, _placeholder((int(rows), width), dtype, number))
    setattr(module, f"{PREFIX}facts", stamp(scheme, int(rows), int(columns)))
    if isinstance(module, nn.Embedding):
        # Behind the module's own class: what that does with the rows (an offset, a factor) stays.
        bases = (StoredEmbedding,) if kind is nn.Embedding else (kind, StoredEmbedding)
    else:
        # Before it: a linear's own forward only spells the product in another way; parity would show anything else.
        bases = (StoredLinear,) if kind is nn.Linear else (StoredLinear, kind)
    held: Any = module
    held.__class__ = type(kind.__name__, bases, {}) if len(bases) > 1 else bases[0]


def _placeholder(shape: tuple[int, int], dtype: torch.dtype, number: int) -> Tensor:
    """Zeros that hold `number` in their first bytes: the exporter would make one initializer of equal ones."""
    tensor = torch.zeros(shape, dtype=dtype)
    digits = [number >> 8 * place & 255 for place in range(4)]
    flat = tensor.view(torch.uint8).view(-1)
    flat[: len(digits)] = torch.tensor(digits, dtype=torch.uint8)[: len(flat)]
    return tensor
