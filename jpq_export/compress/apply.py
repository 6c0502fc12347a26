"""A plan becomes a compressed model: layer by layer, inputs from the compressed prefix, targets from the teacher.

For each linear the teacher's output y = W x is refit on the compressed inputs x̂ that will really arrive (and, where
channels were pruned, on those that remain):

    W' = W_kept + W D (Ĥ + λI)⁻¹,   Ĥ = Σ x̂ x̂ᵀ,  D = Σ (x - x̂) x̂ᵀ

with zeros in x̂ for what is pruned, every text of an encoder weighing the same, and W' is then rounded under Ĥ. This
sees and corrects propagated error and pruning with one formula (the asymmetric calibration of GPTAQ, Li et al., 2025).
Linears that read the same share Ĥ and D, which is why tokens do not weigh by the Fisher information of each linear: it
did not lower the KL either (docs/ablation).
Under torchrun every process holds the activations of its share of the sequences, and rounds its share of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq_export.compress import parallel
from jpq_export.compress.decoder import Layer, canonical_name, named_weights
from jpq_export.compress.grid import Grid, grid_of
from jpq_export.compress.model import AnyContext, AnyLayer, Model, build_model
from jpq_export.compress.quant_linear import QuantEmbedding, QuantLinear
from jpq_export.compress.rounding import Rounded, quantize_rows
from jpq_export.compress.statistics import Progress, Statistics
from jpq_export.compress.two_sided import kept_blocks, two_sided
from jpq_export.format.encoder_spec import EncoderSpec, Spec, is_table
from jpq_export.numerics.row_blocks import RowLayout
from jpq_export.numerics.scheme import Scheme

Stream = list[Tensor]  # activations of all calibration tokens, in parts of [batch, seq, features]

# SmolLM2 at 3 bits, 12k shipped tokens, mean KL on three neutral texts (essays, fortunes, a manual): 0.484; without the
# refit 0.498. Ridge 0.1 was worse than no refit on held-out Jargon File text: 1.05 against 0.84.
REFIT_RIDGE = 1.0
ROWS_TOGETHER = 16384  # of a large vocabulary, rounded at once


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What is kept of one layer: key/value heads, sorted, and MLP channels in the order they are stored in."""

    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build a compressed model: structure, how each matrix is stored, rounding method ("jpq", "gptq", "rtn")."""

    layers: tuple[LayerChoice, ...]
    schemes: dict[str, Scheme | RowLayout]
    method: str = "jpq"
    passes: int = 2


def all_kept(spec: Spec) -> tuple[LayerChoice, ...]:
    """Nothing removed."""
    return tuple(LayerChoice(tuple(range(layer.kv_heads)), tuple(range(layer.ffn))) for layer in spec.layers)


def prune(model: Model, layers: tuple[LayerChoice, ...]) -> Any:
    """The model, of the same kind, with only the kept heads and channels, weights shared or sliced, no refit."""
    weights = {name: value for name, value in named_weights(model).items() if not name.startswith("layers.")}
    narrow = []
    for i, choice in enumerate(layers):
        old = model.spec.layers[i]
        narrow.append(type(old)(len(choice.kv_heads), len(choice.channels), old.window, old.rope))
        weights |= {f"layers.{i}.{part}": value for part, value in pruned_weights(model, i, choice).items()}
    return build_model(model.spec.with_layers(tuple(narrow)), weights)


def prune_layer(model: Model, index: int, choice: LayerChoice) -> AnyLayer:
    """One layer of `prune`, 30 times faster than making the whole model for it."""
    old = model.spec.layers[index]
    narrow = type(old)(len(choice.kv_heads), len(choice.channels), old.window, old.rope)
    layers = (*model.spec.layers[:index], narrow, *model.spec.layers[index + 1 :])
    with torch.device("meta"):
        layer: AnyLayer = type(model.layers[index])(model.spec.with_layers(layers), index)  # pyright: ignore[reportArgumentType] of one kind
    weights = pruned_weights(model, index, choice)
    layer.load_state_dict({key: weights[canonical_name(key)] for key in layer.state_dict()}, assign=True)
    if isinstance(layer, Layer) and isinstance(whole := model.layers[index], Layer):
        layer.turn = whole.turn
    return layer.eval().requires_grad_(False)


def pruned_weights(model: Model, index: int, choice: LayerChoice) -> dict[str, Tensor]:
    """Weights of one layer by name inside the layer ("attn.q", ...), sliced to what is kept."""
    rows, out, kept = kept_rows(model, index, choice), {}, {"attn": choice.kv_heads, "mlp": choice.channels}
    for key, value in model.layers[index].state_dict().items():
        part = canonical_name(key)
        if "norm" in part or kept[part.split(".")[0]]:  # an encoder's norm stays without its sub-layer
            out[part] = _slice(value, part, rows)
    return out


def kept_rows(model: Model, index: int, choice: LayerChoice) -> dict[str, Tensor | None]:
    """Kept query rows, key/value rows and channels of a layer; None when all are kept, in their order."""
    spec, layer = model.spec, model.spec.layers[index]
    kv = torch.tensor(choice.kv_heads, dtype=torch.long)
    per_group = spec.heads_per_group * spec.head_dim
    whole_heads = len(kv) == layer.kv_heads
    buckets = spec.buckets if isinstance(spec, EncoderSpec) else 0
    return {
        "heads": None if whole_heads else (kv[:, None] * buckets + torch.arange(buckets)).flatten(),
        "q": None if whole_heads else (kv[:, None] * per_group + torch.arange(per_group)).flatten(),
        "kv": None if whole_heads else (kv[:, None] * spec.head_dim + torch.arange(spec.head_dim)).flatten(),
        "ffn": None if choice.channels == tuple(range(layer.ffn)) else torch.tensor(choice.channels, dtype=torch.long),
    }


ROWS_OF = {"attn.q": "q", "attn.k": "kv", "attn.v": "kv", "mlp.gate": "ffn", "mlp.up": "ffn", "attn.distance": "heads"}
COLUMNS_OF = {"attn.o": "q", "mlp.down": "ffn"}


def _slice(value: Tensor, part: str, rows: dict[str, Tensor | None]) -> Tensor:
    base = part.removesuffix(".bias")
    if (index := rows.get(ROWS_OF.get(base, ""))) is not None:
        return value[index]
    if part in COLUMNS_OF and (index := rows[COLUMNS_OF[part]]) is not None:
        return value[:, index]
    return value


class Compressor:
    """Walks teacher and compressed model side by side, one layer at a time."""

    def __init__(self, teacher: Model, recipe: Recipe, stats: Statistics, sequences: np.ndarray) -> None:
        self.teacher, self.recipe, self.stats = teacher, recipe, stats
        self.student = prune(teacher, recipe.layers)
        mine, length = parallel.share(len(sequences)), sequences.shape[1]
        ids = torch.from_numpy(sequences[mine]).to(teacher.embed.weight.device)
        self.ids = ids.split(max(1, 2048 // length))
        counted = stats.token_weights.to(ids.device)
        assert len(counted) == sequences.size
        self.tokens, self.token_weights = float(counted.sum()), counted[mine.start * length : mine.stop * length]
        self.refits = recipe.method == "jpq"

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> Any:
        """The student, of the teacher's kind, every matrix quantized."""
        student, count = self.student, len(self.student.layers)
        self._round_tables()
        student_stream = [student.embed_tokens(ids) for ids in self.ids]
        # Plain methods round the student's own weights: for them nothing of the teacher is computed.
        teacher_stream = [self.teacher.embed_tokens(ids) for ids in self.ids] if self.refits else []
        contexts = [self.teacher.context(ids) for ids in self.ids]
        for i in range(count):
            self._attention(i, teacher_stream, student_stream, contexts)
            self._mlp(i, teacher_stream, student_stream)
            if progress:
                progress(i + 1, count)
        return student

    def _round_tables(self) -> None:
        for name in filter(is_table, self.student.spec.matrices()):
            W, scheme = getattr(self.student, name).weight, self.recipe.schemes[name]
            mine = parallel.share(len(W))
            rounded = self._round(W[mine], self.stats.hessians[name], scheme, grid_of(scheme, len(W), W.device)[mine])
            setattr(self.student, name, (QuantLinear if name == "head" else QuantEmbedding)(rounded, None))

    def _round(self, W: Tensor, H: Tensor, scheme: Scheme | RowLayout, grid: Grid) -> Rounded:
        """All rows rounded, of which this rank has W [n, K] and their grid."""
        one = _kind(scheme)
        kind = {"method": self.recipe.method, "passes": self.recipe.passes}
        kind |= {"symmetric": one.symmetric, "integer_zero": one.integer_zero}
        chunks = zip(W.split(ROWS_TOGETHER), grid.split(ROWS_TOGETHER), strict=True)
        parts = [quantize_rows(rows, H, points, one.group_size, **kind) for rows, points in chunks]
        fields = ("codes", "scales", "zeros")
        return Rounded(*(parallel.joined(torch.cat([getattr(part, field) for part in parts])) for field in fields))

    def _attention(self, i: int, teacher_stream: Stream, student_stream: Stream, contexts: list[AnyContext]) -> None:
        old, new = self.teacher.layers[i], self.student.layers[i]
        if old.attn is None:
            return
        old_in = _map(old.attention_in, teacher_stream)
        old_core = [attention_core(old, x, c) for x, c in zip(old_in, contexts[: len(old_in)], strict=True)]
        _join(teacher_stream, old.attention_join, old_core)
        if new.attn is None:
            student_stream[:] = [new.attention_part(x, contexts[0]) for x in student_stream]  # pyright: ignore[reportArgumentType] of one kind
            return
        new_in = _map(new.attention_in, student_stream)
        self._linears(i, ("attn.q", "attn.k", "attn.v"), old_in, new_in)
        new_core = [attention_core(new, x, c) for x, c in zip(new_in, contexts, strict=True)]
        self._linears(i, ("attn.o",), old_core, new_core)
        _join(student_stream, new.attention_join, new_core)

    def _mlp(self, i: int, teacher_stream: Stream, student_stream: Stream) -> None:
        old, new = self.teacher.layers[i], self.student.layers[i]
        if old.mlp is None:
            return
        old_in = _map(old.mlp_in, teacher_stream)
        old_core = _map(old.mlp.core, old_in)
        _join(teacher_stream, old.mlp_join, old_core)
        if new.mlp is None:
            student_stream[:] = _map(new.mlp_part, student_stream)
            return
        new_in = _map(new.mlp_in, student_stream)
        self._linears(i, ("mlp.gate", "mlp.up") if hasattr(new.mlp, "gate") else ("mlp.up",), old_in, new_in)
        new_core = _map(new.mlp.core, new_in)
        self._linears(i, ("mlp.down",), old_core, new_core)
        _join(student_stream, new.mlp_join, new_core)

    def _linears(self, i: int, parts: tuple[str, ...], old_in: Stream, new_in: Stream) -> None:
        """Refit and round linears of the student that read the same: old_in, new_in of [batch, seq, K].

        By pruning old_in may be wider. Rows of linears that are stored alike are rounded together.
        """
        kept, H = kept_rows(self.teacher, i, self.recipe.layers[i]), self._moment(new_in, new_in)
        modules = {part: _linear(self.student, i, part) for part in parts}
        weights = {part: module.weight for part, module in modules.items()}
        if self.refits:
            columns = kept.get(COLUMNS_OF.get(parts[0], ""))
            D = self._moment(_differences(old_in, new_in, columns), new_in)
            level = REFIT_RIDGE * H.diagonal().mean().clamp(min=1e-30)
            factor = torch.linalg.cholesky(H + level * torch.eye(H.shape[0], device=H.device))
            for part in parts:
                full, rows = _linear(self.teacher, i, part).weight, kept.get(ROWS_OF.get(part, ""))
                error = (full if rows is None else full[rows]) @ D
                weights[part] = weights[part] + torch.cholesky_solve(error.T, factor).T
        for alike in self._stored_alike(i, parts):
            stack = torch.cat([weights[part] for part in alike])
            schemes = [self.recipe.schemes[f"layers.{i}.{part}"] for part in alike]
            sizes = [len(weights[part]) for part in alike]
            grid = Grid.joined([grid_of(s, n, stack.device) for s, n in zip(schemes, sizes, strict=True)])
            mine = parallel.share(len(stack))
            rounded = self._round(stack[mine], H, schemes[0], grid[mine])
            start = 0
            for part, size in zip(alike, sizes, strict=True):
                rows = slice(start, start + size)
                done = self._two_sided(i, part, weights[part], H, rounded.rows(rows), grid[rows])
                sublayer, short = part.split(".")
                owner = getattr(self.student.layers[i], sublayer)
                setattr(owner, short, QuantLinear(done, modules[part].bias))
                start += size

    def _stored_alike(self, i: int, parts: tuple[str, ...]) -> list[list[str]]:
        """Parts by group size and kind of codes."""
        found: dict[tuple, list[str]] = {}
        for part in parts:
            one = _kind(self.recipe.schemes[f"layers.{i}.{part}"])
            found.setdefault((one.group_size, one.symmetric, one.integer_zero), []).append(part)
        return list(found.values())

    def _two_sided(self, i: int, part: str, W: Tensor, H: Tensor, rounded: Rounded, grid: Grid) -> Rounded:
        """With the moments of the outputs' gradients, where there are any."""
        if (outputs := self.stats.outputs.get(f"layers.{i}.{part}")) is None:
            return rounded
        rows = kept_rows(self.teacher, i, self.recipe.layers[i]).get(ROWS_OF.get(part, ""))
        full = _linear(self.teacher, i, part).weight
        done = two_sided(W, H, kept_blocks(outputs, rows, len(full)), rounded, grid)
        return Rounded(parallel.from_rank(0, done.codes), done.scales, done.zeros)

    def _moment(self, left: Iterable[Tensor], right: Stream) -> Tensor:
        """Mean of left rightᵀ over the tokens of all ranks that count, [K_left, K_right]."""
        total, start = None, 0
        for a, b in zip(left, right, strict=True):
            x, y = a.flatten(0, 1), b.flatten(0, 1)
            x = x * self.token_weights[start : start + len(x), None]
            part = x.T @ y
            total, start = part if total is None else total.add_(part), start + len(x)
        assert total is not None
        return parallel.add_up(total) / self.tokens


def _kind(scheme: Scheme | RowLayout) -> Scheme:
    return scheme.kind if isinstance(scheme, RowLayout) else scheme


def _linear(model: Model, i: int, part: str) -> nn.Linear:
    """A linear of layer i by its short name, such as "attn.q"."""
    sublayer, short = part.split(".")
    return getattr(getattr(model.layers[i], sublayer), short)


def _differences(old: Stream, new: Stream, columns: Tensor | None) -> Iterator[Tensor]:
    """What the teacher's linear reads less what the student's does, [batch, seq, K_old]; `columns`: those that stay."""
    for theirs, mine in zip(old, new, strict=True):
        if columns is None:
            yield theirs - mine
        else:
            out = theirs.clone()
            out[..., columns] -= mine
            yield out


def _map(function: Callable[[Tensor], Tensor], stream: Stream) -> Stream:
    return [function(part) for part in stream]


def _join(stream: Stream, function: Callable[[Tensor, Tensor], Tensor], inner: Stream) -> None:
    """The residual stream after a sub-layer, part by part in place of the one before."""
    for index, core in enumerate(inner):
        stream[index] = function(stream[index], core)


def attention_core(layer: AnyLayer, x: Tensor, context: AnyContext) -> Tensor:
    """Attention up to the input of the output projection."""
    attn = layer.attn
    assert attn is not None
    out: list[Tensor] = []
    handle = attn.o.register_forward_pre_hook(lambda _m, inputs: out.append(inputs[0]))
    try:
        attn(x, context)  # pyright: ignore[reportArgumentType] of the same kind
    finally:
        handle.remove()
    return out[0]
