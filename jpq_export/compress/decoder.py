"""The decoder every stage computes with: one small PyTorch module driven by `ModelSpec`, any width per layer.

It equals transformers' Llama, Mistral, Qwen2, Qwen3, Gemma-3, Phi-3 and GPT-2 (tests/compress/test_decoder.py) and is
the reference of every parity report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress.activations import Rounding, round_inputs
from jpq_export.compress.causal_attention import causal_attention, pays
from jpq_export.compress.int8_cache import Stored, stored_int8
from jpq_export.compress.rotation import Rotation
from jpq_export.format.spec import INT8_ACTIVATIONS, INT8_CACHE, LayerSpec, ModelSpec

Tap = Callable[[str, Tensor], None]
M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class TableLookUp(Protocol):
    """A quantized embedding: `look_up` reads rows, calling it multiplies as the tied head."""

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the table: ids [...] -> [..., hidden]."""
        ...


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


Norm = RMSNorm | nn.LayerNorm


def make_norm(spec: ModelSpec) -> Norm:
    """The norm of the residual stream, of the model's kind."""
    return (nn.LayerNorm if spec.layer_norm else RMSNorm)(spec.hidden, spec.norm_eps)


class KVCache:
    """Keys and values of all layers so far: per layer [batch, kv_heads, past, head_dim]; grows by concatenation."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def past(self) -> int:
        """Tokens held."""
        return next(iter(self.layers.values()))[0].shape[2] if self.layers else 0

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, new, head_dim] to layer `index` and return all of it."""
        if index in self.layers:
            old_key, old_value = self.layers[index]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        self.layers[index] = (key, value)
        return key, value


class Context:
    """What all layers of one forward pass share: positions, rotary tables, attention masks, the cache.

    `stored`, when there is one, gives keys and values of new tokens as attention will read them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        positions: Tensor,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        past: int,
        stored: Stored | None = None,
    ) -> None:
        self.cache, self.stored, self.positions = cache, stored, positions
        self._mask, self._past, self._seq = attention_mask, past, positions.shape[-1]
        self._device = positions.device
        self.rotary = []
        for rope in spec.ropes:
            freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions.device)
            angle = positions[..., None].float() * freq  # [batch, seq, head_dim/2]
            angle = torch.cat([angle, angle], -1)[:, None]  # [batch, 1, seq, head_dim]
            self.rotary.append((angle.cos() * rope.scaling, angle.sin() * rope.scaling))
        self._masks: dict[int | None, Tensor | None] = {}

    def mask(self, window: int | None) -> Tensor | None:
        """Boolean mask [batch or 1, 1, seq, past + seq], True = may look; None when plain causal is enough."""
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def _build(self, window: int | None) -> Tensor | None:
        total = self._past + self._seq
        if self._mask is None and self._past == 0 and (window is None or window >= total):
            return None
        query = torch.arange(self._past, total, device=self._device)[:, None]
        key = torch.arange(total, device=self._device)[None]
        allowed = key <= query
        if window is not None:
            allowed &= key > query - window
        allowed = allowed[None, None]
        if self._mask is not None:
            allowed = allowed & self._mask[:, None, None, :].bool()
            # A padding position sees only itself: its softmax stays finite, and nobody reads its result.
            allowed = allowed | (key == query)[None, None]
        return allowed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form (Su et al., 2021): x [batch, heads, seq, head_dim]."""
    low, high = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with optional rotation, q/k norm, biases, sliding window."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        layer, self.index = spec.layers[index], index
        self.kv_heads, self.per_group, self.head_dim = layer.kv_heads, spec.heads_per_group, spec.head_dim
        self.window, self.rope, self.scale = layer.window, layer.rope, spec.attention_scale
        shapes = spec.linear_shapes(index)
        for part in ("q", "k", "v", "o"):
            rows, columns = shapes[f"attn.{part}"]
            setattr(self, part, nn.Linear(columns, rows, bias=spec.o_bias if part == "o" else spec.qkv_bias))
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        batch, seq, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, seq, -1, self.head_dim).transpose(1, 2)  # [batch, heads, seq, head_dim]

        query, key, value = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        query, key = self.q_norm(query), self.k_norm(key)
        if context.rotary:
            cos, sin = context.rotary[self.rope]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if context.stored is not None:
            key, value = context.stored(self.index, key, value)
        if context.cache is not None:
            key, value = context.cache.extend(self.index, key, value)
        mask = context.mask(self.window)
        key, value = (t.repeat_interleave(self.per_group, 1) for t in (key, value))
        if pays(query, key, value, mask):
            out = causal_attention(query, key, value, self.scale)
        else:
            kind = {"attn_mask": mask, "is_causal": mask is None, "scale": self.scale}
            out = F.scaled_dot_product_attention(query, key, value, **kind)
        return self.o(out.transpose(1, 2).reshape(batch, seq, -1))


class MLP(nn.Module):
    """Feed-forward: down(act(gate(x)) * up(x)) (Shazeer, 2020), or down(act(up(x))) in a model that is not gated."""

    gate: nn.Linear  # only if gated
    up: nn.Linear
    down: nn.Linear

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        shapes = spec.linear_shapes(index)
        for part in ("gate", "up", "down") if spec.gated else ("up", "down"):
            rows, columns = shapes[f"mlp.{part}"]
            setattr(self, part, nn.Linear(columns, rows, bias=spec.mlp_bias))
        self.activation, self.gated = ACTIVATIONS[spec.activation], spec.gated

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down(self.core(x))

    def core(self, x: Tensor) -> Tensor:
        """Up to the input of the down projection: [..., hidden] -> [..., ffn]."""
        return self.activation(self.gate(x)) * self.up(x) if self.gated else self.activation(self.up(x))


class Layer(nn.Module):
    """One decoder layer; a sub-layer of width zero does not exist."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        layer: LayerSpec = spec.layers[index]

        def norm(wanted: bool) -> Norm | None:
            return make_norm(spec) if wanted else None

        self.attn = Attention(spec, index) if layer.kv_heads else None
        self.attn_norm = norm(layer.kv_heads > 0)
        self.attn_post_norm = norm(layer.kv_heads > 0 and spec.post_norms)
        self.mlp = MLP(spec, index) if layer.ffn else None
        self.mlp_norm = norm(layer.ffn > 0)
        self.mlp_post_norm = norm(layer.ffn > 0 and spec.post_norms)
        self.turn: tuple[Rotation, ...] = ()  # the model's, where reads are turned; no module of this layer

    def attention_part(self, x: Tensor, context: Context) -> Tensor:
        """The stream plus the attention sub-layer."""
        if self.attn is None or self.attn_norm is None:
            return x
        y = self.attn(self.attention_in(x), context)
        return x + (y if self.attn_post_norm is None else self.attn_post_norm(y))

    def attention_in(self, x: Tensor) -> Tensor:
        """What q, k and v read."""
        return x if self.attn_norm is None else self._turned(self.attn_norm(x))

    def attention_join(self, x: Tensor, core: Tensor) -> Tensor:
        """The stream after the attention sub-layer, from the input of its output projection."""
        assert self.attn is not None
        y = self.attn.o(core)
        return x + (y if self.attn_post_norm is None else self.attn_post_norm(y))

    def mlp_in(self, x: Tensor) -> Tensor:
        """What gate and up read."""
        return x if self.mlp_norm is None else self._turned(self.mlp_norm(x))

    def mlp_join(self, x: Tensor, core: Tensor) -> Tensor:
        """The stream after the MLP sub-layer, from the input of its down projection."""
        assert self.mlp is not None
        y = self.mlp.down(core)
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))

    def mlp_part(self, x: Tensor) -> Tensor:
        """The stream plus the MLP sub-layer."""
        if self.mlp is None or self.mlp_norm is None:
            return x
        y = self.mlp(self.mlp_in(x))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))

    def _turned(self, x: Tensor) -> Tensor:
        for rotation in self.turn:
            x = rotation(x)
        return x

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.mlp_part(self.attention_part(x, context))


class Decoder(nn.Module):
    """The whole model; parameters carry the canonical names of `ModelSpec` (see `named_weights`)."""

    layers: Sequence[Layer]  # an nn.ModuleList, which has no element type

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab, spec.hidden)
        self.positions = nn.Embedding(spec.max_positions, spec.hidden) if spec.learned_positions else None
        layers = nn.ModuleList(Layer(spec, i) for i in range(len(spec.layers)))
        self.layers = layers  # pyright: ignore[reportAttributeAccessIssue] see the annotation above
        self.rotation = Rotation(spec.hidden) if spec.rotated else None
        if self.rotation and spec.turned_reads:
            for layer in self.layers:
                layer.turn = (self.rotation,)
        self.norm = make_norm(spec)
        self.stored: Stored | None = stored_int8 if spec.kv_cache == INT8_CACHE else None
        self.head = None if spec.tied else nn.Linear(spec.hidden, spec.vocab, bias=False)
        if spec.activations == INT8_ACTIVATIONS:
            round_inputs(self, Rounding(8))

    def context(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Context:
        """The shared state of one pass over `ids` [batch, seq]; `attention_mask` [batch, past + seq], 0 = padding."""
        past = cache.past if cache else 0
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            else:
                position_ids = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        return Context(self.spec, position_ids, attention_mask, cache, past, self.stored)

    def embed_tokens(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """[batch, seq] -> [batch, seq, hidden]; `positions` [batch or 1, seq], by default 0, 1, ..."""
        x = table_rows(self.embed, ids)
        if self.rotation and self.spec.turned_reads:
            x = self.rotation.back(x)
        x = x * self.spec.embed_scale
        if self.positions is None:
            return x
        at = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        return x + table_rows(self.positions, at)

    def hidden(self, ids: Tensor, context: Context, tap: Tap | None = None) -> Tensor:
        """Final hidden states, what the head reads; `tap(name, value)` sees the stream after each sub-layer."""
        x = self.embed_tokens(ids, context.positions)
        if tap:
            tap("embed", x)
        for i, layer in enumerate(self.layers):
            x = layer.attention_part(x, context)
            if tap:
                tap(f"layers.{i}.attn", x)
            x = layer.mlp_part(x)
            if tap:
                tap(f"layers.{i}.mlp", x)
        x = self._last_norm(x)
        if tap:
            tap("norm", x)
        return self._for_head(x)

    def finish(self, x: Tensor) -> Tensor:
        """Final hidden states from the stream after the last layer: [..., hidden] -> [..., hidden]."""
        return self._for_head(self._last_norm(x))

    def _last_norm(self, x: Tensor) -> Tensor:
        return self.norm(x if self.rotation is None or self.spec.turned_reads else self.rotation.back(x))

    def _for_head(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else self.rotation(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]."""
        if self.head is not None:
            return self.head(hidden)
        return self.embed(hidden) if isinstance(self.embed, TableLookUp) else F.linear(hidden, self.embed.weight)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """`ids` int64 [batch, seq] -> logits [batch, seq, vocab]."""
        context = self.context(ids, attention_mask, position_ids, cache)
        return self.logits(self.hidden(ids, context, tap))


def table_rows(table: nn.Module, ids: Tensor) -> Tensor:
    """Rows of an embedding, quantized or not: ids [...] -> [..., hidden]."""
    return table.look_up(ids) if isinstance(table, TableLookUp) else table(ids)


def canonical_name(parameter: str) -> str:
    """A parameter's canonical name: matrices and norms drop ".weight"."""
    return parameter.removesuffix(".weight")


def build_decoder(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Decoder:
    """A frozen decoder holding `weights` by canonical name (not copied); ValueError names a wrong or missing one."""
    with torch.device("meta"):
        model = Decoder(spec)
    return fill(model, weights)


def fill(model: M, weights: Mapping[str, Tensor]) -> M:
    """`model`, made on the meta device, frozen and holding `weights`; ValueError names a wrong or missing one."""
    state = {}
    for parameter, expected in model.state_dict().items():
        name = canonical_name(parameter)
        if name not in weights or weights[name].shape != expected.shape:
            got = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(f"{name}: expected {tuple(expected.shape)}, got {got}")
        state[parameter] = weights[name]
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights by canonical name."""
    return {canonical_name(name): value for name, value in model.state_dict().items()}
