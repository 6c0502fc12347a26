"""Mutual information between what a layer adds to the stream and what the model predicts (QPruner, arXiv 2412.11629).

Both are projected: a layer's output on its first principal components, the prediction on those of the logits. Estimated
between every pair of components and averaged, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from jpq_export.compress.decoder import Decoder
from jpq_export.compress.statistics import Progress

NEIGHBOURS = 3  # of Kraskov et al. (2004); more trade variance for bias
BINS_POWER = 0.4  # bins of each variable: n^0.4 is within 2% for Gaussians of correlation 0.5 to 0.9 and n = 20,000
LAYER_COMPONENTS, PREDICTION_COMPONENTS = 3, 2
TOKENS = 2048  # an estimate from that many is within a few percent (see the tests)
Estimate = Callable[[np.ndarray, np.ndarray], float]


def by_neighbours(x: np.ndarray, y: np.ndarray) -> float:
    """Nats between two variables, x and y [samples], by distances to nearest neighbours (Kraskov et al., 2004)."""
    from sklearn.feature_selection import mutual_info_regression

    return float(mutual_info_regression(x[:, None], y, n_neighbors=NEIGHBOURS, random_state=0)[0])


def by_histogram(x: np.ndarray, y: np.ndarray) -> float:
    """The same by counting in bins of equal numbers, less the bias of counting (Miller, 1955)."""
    from sklearn.metrics import mutual_info_score

    bins = max(2, round(len(x) ** BINS_POWER))
    table = np.zeros((bins, bins))
    np.add.at(table, (_bin(x, bins), _bin(y, bins)), 1)
    occupied = [int((table.sum(axis) > 0).sum()) for axis in (1, 0)]
    bias = (sum(occupied) - int((table > 0).sum()) - 1) / (2 * len(x))
    return max(0.0, float(mutual_info_score(None, None, contingency=table)) + bias)


def _bin(values: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each value; every bin holds as many."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[values.argsort(kind="stable")] = np.arange(len(values))
    return ranks * bins // len(values)


ESTIMATES: dict[str, Estimate] = {"neighbours": by_neighbours, "histogram": by_histogram}


def layer_information(
    model: Decoder, sequences: np.ndarray, *, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Mutual information of every layer, nats, by every estimate; `sequences` int64 [n, length]."""
    outputs, predictions = _observe(model, sequences)
    aims = predictions.T.numpy()
    found: dict[str, list[float]] = {name: [] for name in ESTIMATES}
    for i, output in enumerate(outputs):
        parts = principal(output, LAYER_COMPONENTS).T.numpy()
        for name, estimate in ESTIMATES.items():
            found[name].append(float(np.mean([estimate(part, aim) for part in parts for aim in aims])))
        if progress:
            progress(i + 1, len(outputs))
    return found


@torch.no_grad()
def _observe(model: Decoder, sequences: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """What every layer adds, [tokens, hidden] each, and the prediction's components [tokens, components].

    Without the first token of a sequence: attention sinks there and it outweighs all others.
    """
    streams: list[list[Tensor]] = [[] for _ in range(len(model.layers) + 1)]
    finals: list[Tensor] = []
    for row in sequences[: max(1, -(-TOKENS // sequences.shape[1]))]:
        ids = torch.from_numpy(row[None]).to(model.embed.weight.device)
        x, context = model.embed_tokens(ids), model.context(ids)
        streams[0].append(x[0, 1:])
        for layer, stream in zip(model.layers, streams[1:], strict=True):
            x = layer(x, context)
            stream.append(x[0, 1:])
        finals.append(model.finish(x)[0, 1:])
    joined = [torch.cat(parts).float().cpu()[:TOKENS] for parts in streams]
    outputs = [after - before for before, after in pairwise(joined)]
    table = (model.embed.weight if model.head is None else model.head.weight).float().cpu()
    metric = table.T @ table  # logits differ by dᵀ metric d for final states that differ by d
    ridge = 1e-6 * metric.diagonal().mean() * torch.eye(len(metric))
    final = torch.cat(finals).float().cpu()[:TOKENS]
    return outputs, principal(final @ torch.linalg.cholesky(metric + ridge), PREDICTION_COMPONENTS)


def principal(rows: Tensor, count: int) -> Tensor:
    """Coordinates of `rows` [samples, features] along the first principal components, float64 [samples, count]."""
    centred = rows.double() - rows.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # rising eigenvalues
    return centred @ axes[:, -count:].flip(-1)
