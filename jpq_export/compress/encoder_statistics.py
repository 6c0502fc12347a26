"""Fisher statistics of a sentence encoder: the same sums as a decoder's, of a loss on the embedding.

The teacher's embedding e(x) is read as the mean of a Gaussian with unit covariance. A target drawn from it is e + ε,
and the gradient of its negative log-likelihood at the teacher is -ε; over draws of ε the squares add up to JᵀJ
(Martens, 2020). For embeddings of length one, ½|e' - e|² = 1 - cos(e', e), so this Fisher is the Hessian of exactly the
error that is reported. An embedding that is not normalised is compared by direction: the loss divides by its length.

Matrices are priced token by token, as a decoder's: what errors of two tokens of one text have in common is left out, so
a raw price is too low by up to the number of tokens. `measure_prices` scales every sub-layer to its measured error.

Units: all prices are 1 - cosine of a text's embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jpq_export.compress.encoder import Encoder, EncoderContext
from jpq_export.compress.precision import autocast
from jpq_export.compress.statistics import (
    Progress,
    Recorder,
    Statistics,
    add_moment,
    generators,
    shared_batches,
    sum_over_ranks,
)
from jpq_export.compress.two_sided import compact

BATCH = 16  # texts


def collect(
    model: Encoder,
    sequences: np.ndarray,
    *,
    seed: int,
    batch: int = BATCH,
    outputs: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of the teacher on texts: int64 [n, length], filled up with `pad_id`.

    `rows` holds how often each token occurs.
    """
    stats, device = Statistics(), model.embed.weight.device
    recorder = Recorder(model, stats, outputs=outputs, per_text=True)
    try:
        for rows in shared_batches(len(sequences), batch, progress):
            _one_batch(model, torch.from_numpy(sequences[rows]).to(device), stats, generators(seed, rows, device))
    finally:
        recorder.close()
    sum_over_ranks(stats)
    stats.token_weights = alike_by_text(model, sequences)
    stats.tokens, stats.sequences = sequences.size, len(sequences)
    stats.hessians["positions"] = stats.hessians["embed"].clone()  # both are summed into the same stream
    for table in (stats.hessians, stats.gates):
        for value in table.values():
            value /= stats.sequences
    stats.rows = token_shares(model, sequences)
    stats.outputs = {name: compact(moment) for name, moment in stats.outputs.items()}
    return stats


def _one_batch(model: Encoder, ids: Tensor, stats: Statistics, draws: list[torch.Generator]) -> None:
    context = model.context(ids)
    with autocast(ids.device), torch.enable_grad():
        start = model.embed_sum(ids).detach().requires_grad_(True)
        embedding = direction(model, run_layers(model, model.embed_norm(start), context), context)
    kind = {"device": ids.device, "dtype": embedding.dtype}
    embedding.backward(torch.stack([torch.randn(embedding.shape[1], generator=g, **kind) for g in draws]))
    assert start.grad is not None
    add_moment(stats.hessians, "embed", start.grad.flatten(0, 1).float())


def run_layers(model: Encoder, x: Tensor, context: EncoderContext) -> Tensor:
    """Token states from embedded tokens [batch, seq, hidden]."""
    for layer in model.layers:
        x = layer(x, context)
    return x


def direction(model: Encoder, hidden: Tensor, context: EncoderContext) -> Tensor:
    """Embeddings of length one, [batch, hidden], fp32."""
    return F.normalize(model.pool(hidden.float(), context), dim=-1)


def token_shares(model: Encoder, sequences: np.ndarray) -> Tensor:
    """Share of each token among the real ones, [vocab]; a token that never occurs counts as half an occurrence."""
    counts = torch.bincount(torch.from_numpy(sequences).flatten(), minlength=model.spec.vocab).float()
    counts[model.spec.pad_id] = 0
    counts = (counts + 0.5) / (counts + 0.5).sum()
    return counts.to(model.embed.weight.device)


def real_tokens(model: Encoder, sequences: np.ndarray) -> Tensor:
    """1 for every token, 0 for what fills up, [tokens]."""
    return torch.from_numpy(sequences != model.spec.pad_id).flatten().float().to(model.embed.weight.device)


def alike_by_text(model: Encoder, sequences: np.ndarray) -> Tensor:
    """Every text weighs the same, as in the error: its tokens 1 / their number, 0 for what fills up; [tokens]."""
    real = real_tokens(model, sequences).view(sequences.shape)
    return (real / real.sum(1, keepdim=True).clamp(min=1)).flatten()


@torch.no_grad()
def plain_statistics(model: Encoder, sequences: np.ndarray) -> Statistics:
    """What plain GPTQ knows: every real token weighs the same; tables are rounded to nearest."""
    stats, device = Statistics(), model.embed.weight.device
    for name in ("embed", "positions"):
        stats.hessians[name] = torch.eye(model.spec.hidden, device=device)
    stats.token_weights = real_tokens(model, sequences)
    stats.rows = token_shares(model, sequences)
    stats.tokens, stats.sequences = sequences.size, len(sequences)
    return stats
