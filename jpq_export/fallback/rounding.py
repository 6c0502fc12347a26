"""One layer after the other: moments of its inputs from what is rounded already, then GPTQ as everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq_export.compress.rounding import Rounded, quantize, stored
from jpq_export.fallback.load import TracedModel
from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.scheme import Scheme

ROWS = 16384  # of a table rounded at once: bounds the memory of a large vocabulary
Progress = Callable[[int, int], None]


class _Enough(Exception):
    """Every wanted module has been called: nobody needs the rest of the pass."""


@torch.no_grad()
def round_model(
    loaded: TracedModel,
    schemes: Mapping[str, Scheme],
    sequences: np.ndarray,
    *,
    method: str,
    passes: int,
    progress: Progress | None = None,
) -> dict[str, QuantizedWeight]:
    """Round every matrix of `schemes`, and leave what was stored in the model's own weights.

    `sequences` int64 [n, length]; `method`, `passes` as `compress.rounding.quantize`'s, all matrices of one layer see
    the same inputs. A table that is only looked up has none and is rounded to nearest.
    """
    out: dict[str, QuantizedWeight] = {}
    for names in layers_of(schemes, loaded):
        moments = {} if method == "rtn" else input_moments(loaded, names, sequences)
        for name in names:
            H = moments.get(name)
            how = "rtn" if H is None else method
            W = loaded.matrix(name).contiguous()
            rounded = _round(W, torch.eye(W.shape[1]) if H is None else H, schemes[name], method=how, passes=passes)
            kept = stored(rounded, schemes[name])
            assert isinstance(kept, QuantizedWeight)  # row blocks come from row layouts only
            out[name] = kept
            loaded.matrix(name).copy_(torch.from_numpy(kept.dequantize()))
            if progress:
                progress(len(out), len(schemes))
    return {name: out[name] for name in schemes}


def layers_of(names: Iterable[str], loaded: TracedModel) -> list[list[str]]:
    """Matrices that are rounded together: those of one layer; tables first, for all else reads what they give."""
    tables = [name for name in names if isinstance(loaded.model.get_submodule(name), nn.Embedding)]
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in tables:
            numbered = re.match(r".*?\.\d+(?=\.)", name)
            groups.setdefault(numbered[0] if numbered else name, []).append(name)
    return [[name] for name in tables] + list(groups.values())


def input_moments(loaded: TracedModel, names: Sequence[str], sequences: np.ndarray) -> dict[str, Tensor]:
    """Mean over the tokens of x xᵀ, [K, K], of every matrix that is multiplied with; a tied one has its head's."""
    model, total, count = loaded.model, {}, {}
    paths = [path for path, owner in loaded.owners.items() if owner in names]
    waiting = {path for path in paths if not isinstance(model.get_submodule(path), nn.Embedding)}
    if not waiting:
        return {}
    left: set[str] = set()

    def add(path: str, x: Tensor) -> None:
        name, flat = loaded.owners[path], x.detach().flatten(0, -2)
        total[name] = total.get(name, 0) + flat.T @ flat
        count[name] = count.get(name, 0) + len(flat)
        left.discard(path)

    def done(path: str) -> None:
        if not left:
            raise _Enough(path)

    hooks = []
    for path in waiting:
        module: Any = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(lambda _m, x, path=path: add(path, x[0])))
        hooks.append(module.register_forward_hook(lambda _m, _x, _y, path=path: done(path)))
    try:
        for row in torch.from_numpy(sequences):
            left.update(waiting)
            try:
                model(row[None], use_cache=False)
            except _Enough:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return {name: H / count[name] for name, H in total.items()}


def _round(W: Tensor, H: Tensor, scheme: Scheme, *, method: str, passes: int) -> Rounded:
    parts = [quantize(rows, H, scheme, method=method, passes=passes) for rows in W.split(ROWS)]
    return Rounded(*(torch.cat([getattr(part, of) for part in parts]) for of in ("codes", "scales", "zeros")))
