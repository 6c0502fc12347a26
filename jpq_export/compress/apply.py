"""A plan becomes a compressed model: layer by layer, inputs from the compressed prefix, targets from the teacher.

For each linear the teacher's output y = W x is refit on the compressed inputs x̂ that will really arrive (and, where
channels were pruned, on those that remain):

    W' = W_kept + (B - W_kept Ĥ)(Ĥ + λI)⁻¹,   Ĥ = Σ w x̂ x̂ᵀ,  B = Σ w y x̂ᵀ

and W' is then rounded under Ĥ. This sees and corrects propagated error and pruning with one formula (the asymmetric
calibration of GPTAQ, Li et al., 2025; the weights w are the Fisher's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from jpq_export.compress.decoder import Context, Decoder, Layer, build_decoder, canonical_name, named_weights
from jpq_export.compress.quant_linear import QuantEmbedding, QuantLinear
from jpq_export.compress.rounding import Rounded, quantize
from jpq_export.compress.statistics import FISHER_POWER, Progress, Statistics
from jpq_export.compress.two_sided import kept_blocks, two_sided
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import Scheme

Stream = list[Tensor]  # activations of all calibration tokens, in parts of [batch, seq, features]

# SmolLM2 at 3 bits, 12k shipped tokens, mean KL on three neutral texts (essays, fortunes, a manual): 0.484; without the
# refit 0.498. Ridge 0.1 was worse than no refit on held-out Jargon File text: 1.05 against 0.84.
REFIT_RIDGE = 1.0


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What is kept of one layer, sorted: key/value heads and MLP channels."""

    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build a compressed model: structure, one scheme per matrix, rounding method ("jpq", "gptq", "rtn")."""

    layers: tuple[LayerChoice, ...]
    schemes: dict[str, Scheme]
    method: str = "jpq"
    passes: int = 2


def all_kept(spec: ModelSpec) -> tuple[LayerChoice, ...]:
    """Nothing removed."""
    return tuple(LayerChoice(tuple(range(layer.kv_heads)), tuple(range(layer.ffn))) for layer in spec.layers)


def prune(model: Decoder, layers: tuple[LayerChoice, ...]) -> Decoder:
    """The model with only the kept heads and channels, weights shared or sliced, no refit."""
    weights = {name: value for name, value in named_weights(model).items() if not name.startswith("layers.")}
    narrow = []
    for i, choice in enumerate(layers):
        old = model.spec.layers[i]
        narrow.append(type(old)(len(choice.kv_heads), len(choice.channels), old.window, old.rope))
        weights |= {f"layers.{i}.{part}": value for part, value in pruned_weights(model, i, choice).items()}
    return build_decoder(model.spec.with_layers(tuple(narrow)), weights)


def prune_layer(model: Decoder, index: int, choice: LayerChoice) -> Layer:
    """One layer of `prune`, 30 times faster than making the whole model for it."""
    old = model.spec.layers[index]
    narrow = type(old)(len(choice.kv_heads), len(choice.channels), old.window, old.rope)
    layers = (*model.spec.layers[:index], narrow, *model.spec.layers[index + 1 :])
    with torch.device("meta"):
        layer = Layer(model.spec.with_layers(layers), index)
    weights = pruned_weights(model, index, choice)
    layer.load_state_dict({key: weights[canonical_name(key)] for key in layer.state_dict()}, assign=True)
    return layer.eval().requires_grad_(False)


def pruned_weights(model: Decoder, index: int, choice: LayerChoice) -> dict[str, Tensor]:
    """Weights of one layer by name inside the layer ("attn.q", ...), sliced to what is kept."""
    rows, out = kept_rows(model, index, choice), {}
    for key, value in model.layers[index].state_dict().items():
        part = canonical_name(key)
        if (part.startswith("attn") and choice.kv_heads) or (part.startswith("mlp") and choice.channels):
            out[part] = _slice(value, part, rows)
    return out


def kept_rows(model: Decoder, index: int, choice: LayerChoice) -> dict[str, Tensor | None]:
    """Kept query rows, key/value rows and channels of a layer; None when all are kept."""
    spec, layer = model.spec, model.spec.layers[index]
    kv = torch.tensor(choice.kv_heads, dtype=torch.long)
    per_group = spec.heads_per_group * spec.head_dim
    whole_heads = len(kv) == layer.kv_heads
    return {
        "q": None if whole_heads else (kv[:, None] * per_group + torch.arange(per_group)).flatten(),
        "kv": None if whole_heads else (kv[:, None] * spec.head_dim + torch.arange(spec.head_dim)).flatten(),
        "ffn": None if len(choice.channels) == layer.ffn else torch.tensor(choice.channels, dtype=torch.long),
    }


ROWS_OF = {"attn.q": "q", "attn.k": "kv", "attn.v": "kv", "mlp.gate": "ffn", "mlp.up": "ffn"}
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

    def __init__(self, teacher: Decoder, recipe: Recipe, stats: Statistics, sequences: np.ndarray) -> None:
        self.teacher, self.recipe, self.stats = teacher, recipe, stats
        self.student = prune(teacher, recipe.layers)
        ids = torch.from_numpy(sequences).to(teacher.embed.weight.device)
        self.ids = ids.split(max(1, 2048 // ids.shape[1]))
        self.refits = recipe.method == "jpq"

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> Decoder:
        """The student, every matrix quantized."""
        student, count = self.student, len(self.student.layers)
        self._round_embedding()
        student_stream = [student.embed_tokens(ids) for ids in self.ids]
        # Plain methods round the student's own weights: for them nothing of the teacher is computed.
        teacher_stream = [self.teacher.embed_tokens(ids) for ids in self.ids] if self.refits else []
        context = self.teacher.context(self.ids[0][:1])
        for i in range(count):
            self._attention(i, teacher_stream, student_stream, context)
            self._mlp(i, teacher_stream, student_stream)
            if progress:
                progress(i + 1, count)
        return student

    def _round_embedding(self) -> None:
        student, stats = self.student, self.stats
        rounded = self._round(student.embed.weight, stats.hessians["embed"], self.recipe.schemes["embed"])
        student.embed = QuantEmbedding(rounded, None)  # pyright: ignore[reportAttributeAccessIssue] stands in for both uses
        if student.head is not None:
            rounded = self._round(student.head.weight, stats.hessians["head"], self.recipe.schemes["head"])
            student.head = QuantLinear(rounded, None)  # pyright: ignore[reportAttributeAccessIssue] same interface

    def _round(self, W: Tensor, H: Tensor, scheme: Scheme) -> Rounded:
        """Row chunks bound the memory of a large vocabulary."""
        parts = [
            quantize(chunk, H, scheme, method=self.recipe.method, passes=self.recipe.passes) for chunk in W.split(16384)
        ]
        return Rounded(
            torch.cat([p.codes for p in parts]),
            torch.cat([p.scales for p in parts]),
            torch.cat([p.zeros for p in parts]),
        )

    def _attention(self, i: int, teacher_stream: Stream, student_stream: Stream, context: Context) -> None:
        old, new = self.teacher.layers[i], self.student.layers[i]
        if old.attn is None or old.attn_norm is None:
            return
        if new.attn is not None and new.attn_norm is not None:
            old_in = _map(old.attn_norm, teacher_stream)
            new_in = _map(new.attn_norm, student_stream)
            for part in ("q", "k", "v"):
                self._linear(i, f"attn.{part}", old_in, new_in)
            old_core = _map(lambda x: attention_core(old, x, context), old_in)
            new_core = _map(lambda x: attention_core(new, x, context), new_in)
            self._linear(i, "attn.o", old_core, new_core)
            _add(student_stream, new.attention_out, new_core)
        else:
            old_in = _map(old.attn_norm, teacher_stream)
            old_core = _map(lambda x: attention_core(old, x, context), old_in)
        _add(teacher_stream, old.attention_out, old_core)

    def _mlp(self, i: int, teacher_stream: Stream, student_stream: Stream) -> None:
        old, new = self.teacher.layers[i], self.student.layers[i]
        if old.mlp is None or old.mlp_norm is None:
            return
        old_in = _map(old.mlp_norm, teacher_stream)
        old_core = _map(old.mlp.core, old_in)
        if new.mlp is not None and new.mlp_norm is not None:
            new_in = _map(new.mlp_norm, student_stream)
            for part in ("gate", "up"):
                self._linear(i, f"mlp.{part}", old_in, new_in)
            new_core = _map(new.mlp.core, new_in)
            self._linear(i, "mlp.down", old_core, new_core)
            _add(student_stream, new.mlp_out, new_core)
        _add(teacher_stream, old.mlp_out, old_core)

    def _linear(self, i: int, part: str, old_in: Stream, new_in: Stream) -> None:
        """Refit and round one linear of the student; old_in, new_in of [batch, seq, K] (K may differ by pruning)."""
        name = f"layers.{i}.{part}"
        sublayer, short = part.split(".")
        module: nn.Linear = getattr(getattr(self.student.layers[i], sublayer), short)
        full = getattr(getattr(self.teacher.layers[i], sublayer), short).weight
        root = self._root_weights(name)
        H = _moment(new_in, new_in, root)
        W = module.weight
        rows = kept_rows(self.teacher, i, self.recipe.layers[i]).get(ROWS_OF.get(part, ""))
        if self.refits:
            target = full if rows is None else full[rows]
            B = target @ _moment(old_in, new_in, root)
            level = REFIT_RIDGE * H.diagonal().mean().clamp(min=1e-30)
            system = H + level * torch.eye(H.shape[0], device=H.device)
            W = W + torch.linalg.solve(system, (B - W @ H).T).T
        module_bias = module.bias
        rounded = self._round(W, H, self.recipe.schemes[name])
        if name in self.stats.outputs:
            top = torch.full((len(W),), float(self.recipe.schemes[name].max_code), device=W.device)
            rounded = two_sided(W, H, kept_blocks(self.stats.outputs[name], rows, len(full)), rounded, top)
        setattr(getattr(self.student.layers[i], sublayer), short, QuantLinear(rounded, module_bias))

    def _root_weights(self, name: str) -> Tensor:
        """Square roots of the tempered token weights, [tokens]; their squares have a mean of one."""
        weight = self.stats.token_weights[name].to(self.ids[0].device)
        if not weight.any():  # a dead sub-layer, such as an all-zero output projection: nothing to weigh by
            return torch.ones_like(weight)
        weight = (weight / weight.mean()) ** (FISHER_POWER / 2)
        return weight / weight.square().mean().sqrt()


def _map(function: Callable[[Tensor], Tensor], stream: Stream) -> Stream:
    return [function(part) for part in stream]


def _add(stream: Stream, function: Callable[[Tensor], Tensor], inner: Stream) -> None:
    """The residual stream after a sub-layer, in place."""
    for part, core in zip(stream, inner, strict=True):
        part += function(core)


def _moment(left: Stream, right: Stream, root: Tensor) -> Tensor:
    """Mean over the tokens of root² left rightᵀ, [K_left, K_right]; only a part of the tokens is copied at a time."""
    total, start = torch.zeros(left[0].shape[-1], right[0].shape[-1], device=root.device), 0
    for a, b in zip(left, right, strict=True):
        x, y = a.flatten(0, 1), b.flatten(0, 1)
        factor = root[start : start + len(x), None].square()
        total.addmm_((x * factor).T, y)
        start += len(x)
    return total / start


def attention_core(layer: Layer, x: Tensor, context: Context) -> Tensor:
    """Attention up to the input of the output projection."""
    attn = layer.attn
    assert attn is not None
    out: list[Tensor] = []
    handle = attn.o.register_forward_pre_hook(lambda _m, inputs: out.append(inputs[0]))
    try:
        attn(x, context)
    finally:
        handle.remove()
    return out[0]
