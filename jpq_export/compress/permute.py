"""The same function with hidden, MLP and value channels in another order.

Models that come from a GGUF file lie on its 4-bit grid in groups along the input; a quantizer whose groups happen to
match reads the codes back. Permuting changes no output beyond fp32 rounding and hides the grid, so comparisons of
methods use the permuted model as the teacher for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jpq_export.compress.decoder import Decoder, build_decoder, named_weights


def permuted(model: Decoder, *, seed: int) -> Decoder:
    """A decoder with permuted channels that computes the same logits."""
    generator = torch.Generator().manual_seed(seed)
    spec, weights = model.spec, dict(named_weights(model))
    hidden = torch.randperm(spec.hidden, generator=generator)
    for name, value in weights.items():
        weights[name] = _permute_hidden(name, value, hidden, spec.hidden)
    for i, layer in enumerate(spec.layers):
        if layer.ffn:
            order = torch.randperm(layer.ffn, generator=generator)
            for part in ("gate", "up") if spec.gated else ("up",):
                _permute_rows(weights, f"layers.{i}.mlp.{part}", order)
            weights[f"layers.{i}.mlp.down"] = weights[f"layers.{i}.mlp.down"][:, order].contiguous()
        if layer.kv_heads:
            within = torch.randperm(spec.head_dim, generator=generator)  # values may be mixed freely inside a head
            rows = (torch.arange(layer.kv_heads)[:, None] * spec.head_dim + within).flatten()
            columns = (torch.arange(layer.kv_heads * spec.heads_per_group)[:, None] * spec.head_dim + within).flatten()
            _permute_rows(weights, f"layers.{i}.attn.v", rows)
            weights[f"layers.{i}.attn.o"] = weights[f"layers.{i}.attn.o"][:, columns].contiguous()
    return build_decoder(spec, weights)


def _permute_hidden(name: str, value: Tensor, order: Tensor, hidden: int) -> Tensor:
    part = name.rsplit(".", 1)[-1]
    if name.endswith((".bias", "q_norm", "k_norm")):
        of_stream = name.endswith(("attn.o.bias", "mlp.down.bias", "norm.bias"))
        return value[order].contiguous() if of_stream else value
    if part in ("o", "down"):
        return value[order].contiguous()
    return value[..., order].contiguous() if value.shape[-1] == hidden else value


def _permute_rows(weights: dict[str, Tensor], name: str, rows: Tensor) -> None:
    weights[name] = weights[name][rows].contiguous()
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"][rows].contiguous()
