"""The sentence encoder every stage computes with: a PyTorch module driven by `EncoderSpec`, any width per layer.

It equals transformers' BERT, RoBERTa, XLM-RoBERTa and MPNet (tests/compress/test_encoder.py) with the pooling of
sentence-transformers, and is the reference of every encoder's parity report. Layers have the same parts under the same
names as the decoder's, so that pruning, rounding and the search treat both alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress.decoder import Tap, fill, table_rows
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.numerics.reference import distance_bucket

SHORTEST = 1e-9  # a shorter embedding is not divided by its length, as in sentence-transformers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class EncoderContext:
    """What all layers of one pass share: which tokens are real, and the buckets of their distances.

    `mask`: bool [batch, seq]; `buckets`: int64 [seq, seq] or None.
    """

    def __init__(self, spec: EncoderSpec, mask: Tensor) -> None:
        self.mask = mask
        self.looks = mask[:, None, None, :]  # [batch, 1, 1, seq]
        self.buckets = None
        if spec.buckets:
            seq = mask.shape[1]
            table = [distance_bucket(d, spec.buckets) for d in range(1 - seq, seq)]
            at = torch.arange(seq)
            self.buckets = torch.tensor(table)[at[None] - at[:, None] + seq - 1].to(mask.device)


class EncoderAttention(nn.Module):
    """Bidirectional attention with biases, and MPNet's relative position bias."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    def __init__(self, spec: EncoderSpec, index: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = spec.layers[index].kv_heads, spec.head_dim, spec.attention_scale
        shapes = spec.linear_shapes(index)
        for part in ("q", "k", "v", "o"):
            rows, columns = shapes[f"attn.{part}"]
            setattr(self, part, nn.Linear(columns, rows))
        self.distance = nn.Parameter(torch.zeros(self.heads * spec.buckets)) if spec.buckets else None

    def forward(self, x: Tensor, context: EncoderContext) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        batch, seq, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, seq, -1, self.head_dim).transpose(1, 2)  # [batch, heads, seq, head_dim]

        query, key, value = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        mask = context.looks
        if self.distance is not None and context.buckets is not None:
            bias = self.distance.view(self.heads, -1)[:, context.buckets].to(query.dtype)  # [heads, seq, seq]
            mask = bias[None].masked_fill(~context.looks, -math.inf)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return self.o(out.transpose(1, 2).reshape(batch, seq, -1))


class EncoderMLP(nn.Module):
    """Plain feed-forward: down(act(up(x)))."""

    up: nn.Linear
    down: nn.Linear

    def __init__(self, spec: EncoderSpec, index: int) -> None:
        super().__init__()
        shapes = spec.linear_shapes(index)
        for part in ("up", "down"):
            rows, columns = shapes[f"mlp.{part}"]
            setattr(self, part, nn.Linear(columns, rows))
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down(self.core(x))

    def core(self, x: Tensor) -> Tensor:
        """Up to the input of the down projection: [..., hidden] -> [..., ffn]."""
        return self.activation(self.up(x))


class EncoderLayer(nn.Module):
    """Two sub-layers with a norm after each; without its sub-layer a norm still scales the stream."""

    def __init__(self, spec: EncoderSpec, index: int) -> None:
        super().__init__()
        layer = spec.layers[index]
        self.attn = EncoderAttention(spec, index) if layer.kv_heads else None
        self.attn_norm = nn.LayerNorm(spec.hidden, spec.norm_eps)
        self.mlp = EncoderMLP(spec, index) if layer.ffn else None
        self.mlp_norm = nn.LayerNorm(spec.hidden, spec.norm_eps)

    def attention_in(self, x: Tensor) -> Tensor:
        """What q, k and v read."""
        return x

    def attention_join(self, x: Tensor, core: Tensor) -> Tensor:
        """The stream after the attention sub-layer, from the input of its output projection."""
        assert self.attn is not None
        return self.attn_norm(x + self.attn.o(core))

    def attention_part(self, x: Tensor, context: EncoderContext) -> Tensor:
        """The stream after the attention sub-layer."""
        return self.attn_norm(x if self.attn is None else x + self.attn(x, context))

    def mlp_in(self, x: Tensor) -> Tensor:
        """What up reads."""
        return x

    def mlp_join(self, x: Tensor, core: Tensor) -> Tensor:
        """The stream after the MLP sub-layer, from the input of its down projection."""
        assert self.mlp is not None
        return self.mlp_norm(x + self.mlp.down(core))

    def mlp_part(self, x: Tensor) -> Tensor:
        """The stream after the MLP sub-layer."""
        return self.mlp_norm(x if self.mlp is None else x + self.mlp(x))

    def forward(self, x: Tensor, context: EncoderContext) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.mlp_part(self.attention_part(x, context))


class Encoder(nn.Module):
    """The whole model; parameters carry the canonical names of `EncoderSpec`."""

    layers: Sequence[EncoderLayer]  # an nn.ModuleList, which has no element type

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab, spec.hidden)
        self.positions = nn.Embedding(spec.max_positions, spec.hidden)
        self.embed_norm = nn.LayerNorm(spec.hidden, spec.norm_eps)
        layers = nn.ModuleList(EncoderLayer(spec, i) for i in range(len(spec.layers)))
        self.layers = layers  # pyright: ignore[reportAttributeAccessIssue] see the annotation above

    def context(self, ids: Tensor, attention_mask: Tensor | None = None) -> EncoderContext:
        """The shared state of one pass over `ids` [batch, seq]; without a mask, what is not `pad_id` is real."""
        return EncoderContext(self.spec, ids != self.spec.pad_id if attention_mask is None else attention_mask.bool())

    def embed_sum(self, ids: Tensor) -> Tensor:
        """Words and positions before the first norm: [batch, seq] -> [batch, seq, hidden]."""
        at = torch.arange(ids.shape[1], device=ids.device)
        return table_rows(self.embed, ids) + table_rows(self.positions, at)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, hidden]."""
        return self.embed_norm(self.embed_sum(ids))

    def hidden(self, ids: Tensor, context: EncoderContext, tap: Tap | None = None) -> Tensor:
        """Token states [batch, seq, hidden]; `tap(name, value)` sees the stream after each sub-layer."""
        x = self.embed_tokens(ids)
        if tap:
            tap("embed", x)
        for i, layer in enumerate(self.layers):
            x = layer.attention_part(x, context)
            if tap:
                tap(f"layers.{i}.attn", x)
            x = layer.mlp_part(x)
            if tap:
                tap(f"layers.{i}.mlp", x)
        return x

    def pool(self, hidden: Tensor, context: EncoderContext) -> Tensor:
        """One embedding a text from its token states: [batch, seq, hidden] -> [batch, hidden]."""
        if self.spec.pooling == "cls":
            out = hidden[:, 0]
        else:
            real = context.mask[..., None].to(hidden.dtype)
            out = (hidden * real).sum(1) / real.sum(1).clamp(min=SHORTEST)
        return F.normalize(out, dim=-1, eps=SHORTEST) if self.spec.normalize else out

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, tap: Tap | None = None) -> Tensor:
        """`ids` int64 [batch, seq] -> embeddings [batch, hidden]."""
        context = self.context(ids, attention_mask)
        return self.pool(self.hidden(ids, context, tap), context)


def build_encoder(spec: EncoderSpec, weights: Mapping[str, Tensor]) -> Encoder:
    """A frozen encoder holding `weights` by canonical name (not copied); ValueError names a wrong or missing one."""
    with torch.device("meta"):
        model = Encoder(spec)
    return fill(model, weights)
