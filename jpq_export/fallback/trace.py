"""torch.onnx.export of a model whose matrices are our operators: an ONNX graph with a KV cache, still without codes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from jpq_export.fallback.cache import cache_argument, cache_of, past_tensors
from jpq_export.fallback.load import TracedModel, refusal
from jpq_export.fallback.quiet import quiet
from jpq_export.fallback.stored import stored
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import Scheme
from jpq_export.parity.compare import relative_rms
from jpq_export.parity.tolerance import LOGITS_REL_RMS

OPSET = 23
HELD = "traced."  # what names of the model's own parameters start with in the graph: where the wrapper holds it
BATCH, SEQ, PAST = 2, 3, 5  # traced with: no 0 and no 1, which torch.export would take for constants


class WithCache(nn.Module):
    """The model with its cache as flat tensors."""

    def __init__(self, model: Any) -> None:
        """Look up what the model takes: one with alibi reads the mask instead of position_ids."""
        super().__init__()
        self.traced, self.cache = model, str(cache_argument(model))
        self.positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> Any:
        """Logits, then keys and values of every layer with the new tokens behind the old ones."""
        given: dict[str, Any] = {self.cache: cache_of(past), "use_cache": True}
        given |= {"position_ids": position_ids} if self.positions else {}
        out = self.traced(input_ids=input_ids, attention_mask=attention_mask, **given)
        return out.logits, *past_tensors(getattr(out, self.cache))


def empty_past(spec: ModelSpec, batch: int) -> list[Tensor]:
    """The cache before the first token, flat."""
    return [torch.zeros(batch, layer.kv_heads, 0, spec.head_dim) for layer in spec.layers for _ in range(2)]


def check_cache(loaded: TracedModel) -> None:
    """Whether a text read in two parts gives what it gives at once; ModelError otherwise.

    Parity compares two sides that both read through `cache_of`. This compares that with transformers' own pass.
    """
    spec, model = loaded.spec, loaded.model
    windows = [layer.window for layer in spec.layers if layer.window]
    length = min(max(windows, default=0) + 16, spec.max_positions, 4096)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, spec.vocab, (1, length)))
    half = length // 2
    wrapped = WithCache(model)
    past = empty_past(spec, 1)
    mask, positions = torch.ones(1, length, dtype=torch.long), torch.arange(length)[None]
    try:
        with torch.no_grad(), quiet():
            whole = model(ids, use_cache=False).logits[:, half:]
            _, *past = wrapped(ids[:, :half], mask[:, :half], positions[:, :half], past)
            parts, *_ = wrapped(ids[:, half:], mask, positions[:, half:], past)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise refusal(loaded.where, loaded.architecture, f"its cache cannot be continued ({error!r})") from error
    error = relative_rms(whole.numpy(), parts.numpy())
    if error > LOGITS_REL_RMS:
        raise refusal(
            loaded.where, loaded.architecture, f"through its cache it computes something else (error {error:.1e})"
        )


def trace(loaded: TracedModel, schemes: Mapping[str, Scheme]) -> ir.Model:
    """The graph as torch.onnx.export writes it, inputs and outputs in `names_of`'s order; ModelError when it cannot."""
    spec, model = loaded.spec, loaded.model
    past = [torch.zeros(BATCH, layer.kv_heads, PAST, spec.head_dim) for layer in spec.layers for _ in range(2)]
    ids = torch.ones(BATCH, SEQ, dtype=torch.int64)
    mask, positions = torch.ones(BATCH, PAST + SEQ, dtype=torch.int64), torch.arange(PAST, PAST + SEQ).repeat(BATCH, 1)
    free = torch.export.Dim.DYNAMIC
    wrapped = WithCache(model).eval()
    try:
        with torch.no_grad(), quiet(), stored(model, loaded.owners, schemes):
            program = torch.onnx.export(
                wrapped,
                (ids, mask, positions, past),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                dynamic_shapes=(*[{0: free, 1: free}] * 3, [{0: free, 2: free}] * len(past)),
            )
    except MemoryError:
        raise
    except Exception as error:  # the exporter's own, and whatever the model's code raises under it
        raise refusal(loaded.where, loaded.architecture, _reason(error)) from error
    if program is None:
        raise refusal(loaded.where, loaded.architecture, "it returned no program")
    return program.model


def _reason(error: BaseException) -> str:
    """The innermost cause: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"  # torch often starts with a heading
