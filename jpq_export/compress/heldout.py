"""True KL on held-out text: of whole candidates, and of the teacher with one layer changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress.apply import all_kept, prune_layer
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.model import AnyContext, Model
from jpq_export.compress.precision import autocast, fast_bf16, head_table
from jpq_export.compress.vocabulary import TOKENS, tokens_in_cache


class Heldout:
    """The teacher's distributions over held-out tokens, [tokens, vocab], against which candidates are measured."""

    @torch.no_grad()
    def __init__(self, teacher: Decoder, sequences: np.ndarray) -> None:
        self.ids = torch.from_numpy(sequences).to(teacher.embed.weight.device)
        self.finish = teacher.finish
        self.context, self.table = teacher.context(self.ids), head_table(teacher)
        with autocast(self.ids.device):
            final = teacher.hidden(self.ids, self.context).flatten(0, 1)
        self.probability = torch.empty(len(final), teacher.spec.vocab, device=final.device)
        # KL = Σ p log p - Σ p z + log Σ exp z: the first term is the teacher's own.
        self.negative_entropy = 0.0
        for logits, p in _logits(final, self.table, self.probability):
            p.copy_(F.softmax(logits, -1))
            self.negative_entropy += float(torch.special.xlogy(p, p).sum(dtype=torch.float64))

    @torch.no_grad()
    def kl_of(self, model: Decoder) -> float:
        """KL(teacher ‖ model), nats per token."""
        with autocast(self.ids.device):
            hidden = model.hidden(self.ids, model.context(self.ids)).flatten(0, 1)
        return self.final_kl(hidden, head_table(model))

    def stream_kl(self, stream: Tensor) -> float:
        """The same from the teacher's residual stream after its last layer, [batch, seq, hidden]."""
        return self.final_kl(self.finish(stream).flatten(0, 1), self.table)

    def final_kl(self, hidden: Tensor, table: Tensor) -> float:
        """The same from a model's final hidden states [tokens, hidden] and head [vocab, hidden]."""
        total = torch.tensor(self.negative_entropy, dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):  # which would compute Σ p z in bf16, 0.06 off at 15
            for logits, p in _logits(hidden, table, self.probability):
                cross = logits.logsumexp(-1) - torch.linalg.vecdot(p, logits)
                total += cross.sum(dtype=torch.float64)
        return float(total) / len(hidden)


class PartialForward:
    """The teacher's residual stream before every layer; re-runs the rest after one changed layer."""

    @torch.no_grad()
    def __init__(self, teacher: Model, heldout: Any) -> None:
        """`heldout`: what measures the teacher's kind of model (see `teaching`)."""
        self.heldout = heldout
        self.layers = fast_layers(teacher)
        self.streams: list[Tensor] = []
        with autocast(self.heldout.ids.device):
            x = teacher.embed_tokens(self.heldout.ids)
            for layer in self.layers:
                self.streams.append(x)
                x = layer(x, self.heldout.context)

    @torch.no_grad()
    def kl(self, index: int, changed: Callable[[Tensor, AnyContext], Tensor]) -> float:
        """KL per token when layer `index` is replaced by `changed(x, context)`."""
        heldout = self.heldout
        with autocast(heldout.ids.device):
            x = changed(self.streams[index], heldout.context)
            for layer in self.layers[index + 1 :]:
                x = layer(x, heldout.context)
            return heldout.stream_kl(x)


def _logits(hidden: Tensor, table: Tensor, probability: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(fp32 logits, rows of `probability`) of a few tokens at a time; hidden [tokens, hidden], head `table`."""
    few = tokens_in_cache(len(table), hidden.device)
    for states, rows in zip(hidden.split(TOKENS), probability.split(TOKENS), strict=True):
        together = states.to(table.dtype) @ table.T
        for logits, p in zip(together.split(few), rows.split(few), strict=True):
            yield logits.float(), p


def fast_layers(model: Model) -> list[Any]:
    """The layers with matrices in the fast type, norms as they are; the model's own layers where fp32 is as fast."""
    if not fast_bf16(model.embed.weight.device.type):
        return list(model.layers)
    copies = []
    for i in range(len(model.layers)):
        copy = prune_layer(model, i, all_kept(model.spec)[i])
        for module in copy.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        copies.append(copy)
    return copies
