"""One forward and one backward pass per calibration batch: what every later decision is priced with.

Targets are sampled from the teacher itself, so the squared gradients estimate the Fisher information, which at the
teacher is the Hessian of KL(teacher ‖ model) (Kunstner et al., 2019). Everything is summed as it streams; memory does
not grow with tokens. Under torchrun every process takes a share of the sequences; targets hang on seed and sequence, so
that the sums are those of one process.

Units: all prices are nats of KL per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress import parallel
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.model import Model
from jpq_export.compress.precision import autocast, fast_bf16, head_table
from jpq_export.compress.two_sided import add_output_moment, compact
from jpq_export.compress.vocabulary import TOKENS, tokens_in_cache

OUTPUT_POWER = 0.5  # of the Fisher's weights in the moments of gradients: raw ones span decades, few tokens would count

Progress = Callable[[int, int], None]


@dataclass(slots=True, eq=False)
class Statistics:
    """Sums over the calibration tokens, by canonical name.

    hessians: [K, K], mean over tokens of w_t x_t x_tᵀ with w_t = mean over outputs of the squared gradient, so that
        0.5 * tr(E H Eᵀ) predicts the KL of an error E. `embed` holds the head's inputs plus the input side's diagonal,
        `positions` the gradients' moment at the sum they go into.
    token_weights: [tokens], what each counts in rounding: 1; an encoder's 1 / its text's length, 0 for what fills up.
    rows: row weights of the embedding or head, [vocab], mean teacher probability of each token.
    outputs: [blocks, B, B] float16, mean over tokens of w_t^(p - 1) g_t g_tᵀ with g_t the gradient by the outputs and p
        the OUTPUT_POWER, up to a factor; empty unless asked for.
    gates: predicted KL of removing: layers.{i}.attn -> [1 + kv_heads] and layers.{i}.mlp -> [1 + ffn], the whole
        sub-layer first (squared per sequence), then each key/value group or channel (squared per token: thousands of
        samples instead of a few, so that picking the smallest does not pick luck).
    """

    hessians: dict[str, Tensor] = field(default_factory=dict)
    token_weights: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    gates: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0


class Recorder:
    """Hooks on every linear and sub-layer of the teacher; each backward pass adds to the statistics."""

    def __init__(self, model: Model, stats: Statistics, *, outputs: bool = False, per_text: bool = False) -> None:
        """`outputs`: moments of their gradients too; `per_text`: gates squared per sequence, for one target a text."""
        self.model, self.stats, self.handles = model, stats, []
        self.outputs, self.per_text = outputs, per_text
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "head":
                self.handles.append(module.register_forward_hook(self._linear(name)))
        for i, layer in enumerate(model.layers):
            if layer.attn is not None:
                self.handles.append(layer.attn.register_forward_hook(self._sublayer(f"layers.{i}.attn")))
                self.handles.append(layer.attn.o.register_forward_pre_hook(self._inner(f"layers.{i}.attn", i)))
            if layer.mlp is not None:
                self.handles.append(layer.mlp.register_forward_hook(self._sublayer(f"layers.{i}.mlp")))
                self.handles.append(layer.mlp.down.register_forward_pre_hook(self._inner(f"layers.{i}.mlp", i)))

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()

    def _linear(self, name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def on_gradient(gradient: Tensor) -> None:
                g = gradient.detach().flatten(0, -2).float()
                w = g.square().mean(-1)  # [tokens]
                add_moment(self.stats.hessians, name, x.float() * w.sqrt()[:, None])
                if self.outputs:
                    tempered = w.clamp(min=1e-30) ** ((OUTPUT_POWER - 1) / 2)
                    fast = fast_bf16(g.device.type)
                    add_output_moment(self.stats.outputs, name, g * tempered[:, None], fast=fast)

            output.register_hook(on_gradient)

        return hook

    def _sublayer(self, name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            value = output.detach()

            def on_gradient(gradient: Tensor) -> None:
                total = (value.float() * gradient.float()).sum((1, 2))  # [batch]
                self._gate(name, 0, total.square().sum()[None] / 2)

            output.register_hook(on_gradient)

        return hook

    def _inner(self, name: str, index: int) -> Callable:
        layer = self.model.spec.layers[index]
        groups = layer.kv_heads if name.endswith("attn") else layer.ffn

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            value = inputs[0]
            kept = value.detach()

            def on_gradient(gradient: Tensor) -> None:
                product = kept.float() * gradient.float()  # [batch, seq, features]
                per_token = product.view(*product.shape[:2], groups, -1).sum(-1)  # [batch, seq, groups]
                squared = per_token.sum(1).square().sum(0) if self.per_text else per_token.square().sum((0, 1))
                self._gate(name, 1, squared / 2)

            value.register_hook(on_gradient)

        return hook

    def _gate(self, name: str, start: int, values: Tensor) -> None:
        layer = self.model.spec.layers[int(name.split(".")[1])]
        size = 1 + (layer.kv_heads if name.endswith("attn") else layer.ffn)
        gates = self.stats.gates.setdefault(name, torch.zeros(size, device=values.device))
        gates[start : start + len(values)] += values


def add_moment(moments: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """moments[name] += rowsᵀ rows, fp32: bf16 products would cost positive definiteness."""
    if name in moments:
        moments[name].addmm_(rows.T, rows)
    else:
        moments[name] = rows.T @ rows


def collect(
    model: Decoder,
    sequences: np.ndarray,
    *,
    seed: int,
    batch: int = 2,
    outputs: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of the teacher on `sequences`: int64 [n, length]; `outputs`: also those of two-sided rounding."""
    stats, device = Statistics(), model.embed.weight.device
    stats.rows = torch.zeros(model.spec.vocab, device=device)
    recorder = Recorder(model, stats, outputs=outputs)
    try:
        for rows in shared_batches(len(sequences), batch, progress):
            ids = torch.from_numpy(sequences[rows]).to(device)
            _one_batch(model, ids, stats, generators(seed, rows, device))
    finally:
        recorder.close()
    sum_over_ranks(stats)
    parallel.add_up(stats.rows)
    stats.token_weights = torch.ones(sequences.size, device=device)
    stats.tokens, stats.sequences = sequences.size, len(sequences)
    for table in (stats.hessians, stats.gates):
        for value in table.values():
            value /= stats.tokens
    stats.rows /= stats.tokens
    stats.outputs = {name: compact(moment) for name, moment in stats.outputs.items()}
    return stats


def shared_batches(count: int, batch: int, progress: Progress | None) -> Iterator[slice]:
    """This rank's share of `count` sequences, in batches; `progress` tells of the share."""
    mine = parallel.share(count)
    for start in range(mine.start, mine.stop, batch):
        stop = min(start + batch, mine.stop)
        yield slice(start, stop)
        if progress:
            progress(stop - mine.start, mine.stop - mine.start)


def generators(seed: int, rows: slice, device: torch.device) -> list[torch.Generator]:
    """One of each sequence, whatever batch or rank it is in."""
    seeds = [
        np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)[0] for row in range(rows.start, rows.stop)
    ]
    return [torch.Generator(device=device).manual_seed(int(state)) for state in seeds]


def sum_over_ranks(stats: Statistics) -> None:
    """Sums over all ranks instead of this one's."""
    for sums in (stats.hessians, stats.gates, stats.outputs):
        for name in sorted(sums):  # one order on all ranks
            parallel.add_up(sums[name])


def _one_batch(model: Decoder, ids: Tensor, stats: Statistics, draws: list[torch.Generator]) -> None:
    with autocast(ids.device), torch.enable_grad():
        start = model.embed_tokens(ids).detach().requires_grad_(True)
        hidden = hidden_from(model, start, ids)
    final, table = hidden.detach(), head_table(model)
    gradient = torch.empty_like(final)
    for states, slopes, generator in zip(final, gradient, draws, strict=True):
        for some, out in zip(states.split(TOKENS), slopes.split(TOKENS), strict=True):
            out.copy_(_sampled_gradient(table, some, stats, generator))
    hidden.backward(gradient)
    add_moment(stats.hessians, "head" if model.head is not None else "embed", final.flatten(0, 1).float())
    if start.grad is not None:
        by_row = start.grad if not (model.rotation and model.spec.turned_reads) else model.rotation(start.grad)
        side = by_row.flatten(0, 1).float().square().sum(0) * model.spec.embed_scale**2  # [hidden]
        name = "embed"
        if name not in stats.hessians:
            stats.hessians[name] = torch.zeros(len(side), len(side), device=side.device)
        stats.hessians[name].diagonal().add_(side)
        if model.positions is not None:
            add_moment(stats.hessians, "positions", start.grad.flatten(0, 1).float())


def hidden_from(model: Decoder, embedded: Tensor, ids: Tensor) -> Tensor:
    """Final hidden states from embedded tokens [batch, seq, hidden]."""
    context = model.context(ids)
    x = embedded
    for layer in model.layers:
        x = layer(x, context)
    return model.finish(x)


def _sampled_gradient(table: Tensor, hidden: Tensor, stats: Statistics, generator: torch.Generator) -> Tensor:
    """d(-log p(t))/d hidden for t ~ p, [tokens, hidden]; adds mean probabilities to the row weights."""
    slopes = hidden.to(table.dtype) @ table.T  # first the logits
    for logits in slopes.split(tokens_in_cache(len(table), table.device)):
        probability = F.softmax(logits.float(), -1)
        stats.rows += probability.sum(0)
        target = sample(probability, generator)
        logits.copy_(probability.scatter_add_(1, target, torch.full_like(target, -1, dtype=probability.dtype)))
    return slopes @ table


def sample(probability: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row of `probability` [n, vocab] (sums of one), drawn by it: int64 [n, 1].

    On a CPU by the distribution function: `multinomial` draws a random number for every word, a fifth of this stage's
    time. On a GPU sums in a row are not the same in every run.
    """
    if probability.device.type != "cpu":
        return torch.multinomial(probability, 1, generator=generator)
    edges = probability.cumsum(-1)
    draw = torch.rand(len(edges), 1, generator=generator, device=edges.device) * edges[:, -1:]
    return torch.searchsorted(edges, draw, right=True).clamp_(max=edges.shape[1] - 1)


@torch.no_grad()
def plain_statistics(model: Decoder, sequences: np.ndarray) -> Statistics:
    """What plain GPTQ knows: every token weighs the same; the head's inputs for the embedding's Hessian."""
    stats, device = Statistics(), model.embed.weight.device
    for ids in (torch.from_numpy(row[None]).to(device) for row in sequences):
        name = "embed" if model.head is None else "head"
        with autocast(device):
            hidden = model.hidden(ids, model.context(ids))
        add_moment(stats.hessians, name, hidden.float().flatten(0, 1))
    for value in stats.hessians.values():
        value /= sequences.size
    if model.head is not None:
        stats.hessians["embed"] = torch.eye(model.spec.hidden, device=device)
    if model.positions is not None:
        stats.hessians["positions"] = torch.eye(model.spec.hidden, device=device)
    stats.token_weights = torch.ones(sequences.size, device=device)
    stats.rows = torch.full((model.spec.vocab,), 1 / model.spec.vocab, device=device)
    stats.tokens, stats.sequences = sequences.size, len(sequences)
    return stats
