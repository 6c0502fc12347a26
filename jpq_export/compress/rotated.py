"""The residual stream in another basis, in which no channel stands out: the same function, easier to round.

Every layer of a model with RMS norms reads x / rms(x) * g and adds to x. For an orthogonal R the stream may be x R all
along: rms(x R) = rms(x), what reads it gets W diag(g) R, what adds to it Rᵀ W, and the norm inside a layer keeps ones
(QuaRot, Ashkboos et al., 2024). Massive channels of x, which make a few columns of every W matter more than all others,
are spread over all of them. Embedding and head are made for the new basis too: SmolLM2's table alone costs a held-out
KL of 0.106 instead of 0.201 nats at 3 bits, 0.419 instead of 0.910 at 2. Only the last norm's g stays, between the
stream and a head that may be tied to the embedding: the stream is turned back before that norm, and what it gives is
turned again.

Where what is added has a norm of its own (Gemma-3), g stands between a sub-layer and the stream, which may besides hold
a channel thousands of times as large as others, kept from linears by a small g. There the stream stays as it is, and
what linears and head read is turned, behind their norms.

So R is applied twice a token, or that often and before every sub-layer, and has to be cheap: R = A ⊗ B, with B
Sylvester's Hadamard matrix times random signs, as large as a power of two up to 128 divides the hidden size, and A a
random orthogonal matrix for the rest.

Two more freedoms cost nothing at run time. Attention mixes tokens, not channels, so the values of a head may have
another basis too, which the columns of `o` undo. And where an MLP is gated, a channel of `up` may be scaled and the
column of `down` that reads it scaled back (Nagel et al., 2019): rounding `up`, whose rows have scales of their own,
sees nothing of it, and columns of equal norm use a grid that they share better. GPTQ's error of `o` falls by up to 4%,
that of `down` by 2 to 10% (SmolLM2-135M, three layers, `tools/input_bases.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from jpq_export.compress.decoder import Decoder, build_decoder, named_weights
from jpq_export.compress.rotation import make_rotation
from jpq_export.compress.rounding import quantize
from jpq_export.compress.teaching import SharedHeldout
from jpq_export.format.spec import ModelSpec, rotation_sizes
from jpq_export.numerics.scheme import Scheme, choose_group_size

READ_BY = {"attn_norm": ("attn.q", "attn.k", "attn.v"), "mlp_norm": ("mlp.gate", "mlp.up")}
ADDED_BY = ("attn.o", "mlp.down")
MOST_SCALING = 4  # of a channel of `up`: what `down` reads must fit fp16 where an engine computes in it
LEAST_INNER = 16  # channels that a Hadamard matrix mixes; below, a rotation is mostly A, which is not cheap
TRIAL_BITS, TRIAL_GROUP = 3, 64


def can_rotate(spec: ModelSpec) -> bool:
    """Whether the stream, or what is read of it, may have another basis: RMS norms, and no positions in it."""
    plain = not (spec.layer_norm or spec.learned_positions or spec.traced or spec.rotated)
    return plain and rotation_sizes(spec.hidden)[1] >= LEAST_INNER


def rotated(model: Decoder, *, seed: int) -> Decoder:
    """A decoder that computes the same logits from a rotated stream; see `can_rotate`."""
    device = model.embed.weight.device
    outer, inner = (torch.from_numpy(part).to(device) for part in make_rotation(model.spec.hidden, seed))
    R = torch.kron(outer.contiguous(), inner.contiguous())  # float64, as are all products here
    weights, reads = dict(named_weights(model)), model.spec.post_norms
    for i in range(len(model.spec.layers)):
        for norm, readers in READ_BY.items():
            if (scale := weights.get(f"layers.{i}.{norm}")) is None:
                continue
            for reader in readers:
                if (name := f"layers.{i}.{reader}") in weights:
                    folded = weights[name].double() * (1 if reads else scale.double())
                    weights[name] = (folded @ R).float()
            weights[f"layers.{i}.{norm}"] = scale if reads else torch.ones_like(scale)
        for name in (f"layers.{i}.{part}" for part in ADDED_BY if not reads):
            if name in weights:
                weights[name] = (R.T @ weights[name].double()).float()
            if (bias := weights.get(f"{name}.bias")) is not None:
                weights[f"{name}.bias"] = (bias.double() @ R).float()
        _turn_values(weights, i, model.spec, seed)
        _even_columns(weights, i, model.spec)
    for name in {"embed", "head"} & weights.keys():
        weights[name] = (weights[name].double() @ R).float()
    weights |= {"rotation.outer": outer.flatten().float(), "rotation.inner": inner.flatten().float()}
    return build_decoder(replace(model.spec, rotated=True), weights)


def _turn_values(weights: dict[str, Tensor], layer: int, spec: ModelSpec, seed: int) -> None:
    """Another basis for the values of every head, the same for all: several query heads read those of one."""
    v, o = (f"layers.{layer}.attn.{part}" for part in "vo")
    if v not in weights:
        return
    H = torch.kron(*(torch.from_numpy(part).contiguous() for part in make_rotation(spec.head_dim, seed)))
    H = H.to(weights[v].device)
    weights[v] = (H.T @ weights[v].double().unflatten(0, (-1, spec.head_dim))).flatten(0, 1).float()
    weights[o] = (weights[o].double().unflatten(1, (-1, spec.head_dim)) @ H).flatten(1).float()
    if (bias := weights.get(f"{v}.bias")) is not None:
        weights[f"{v}.bias"] = (bias.double().unflatten(0, (-1, spec.head_dim)) @ H).flatten().float()


def _even_columns(weights: dict[str, Tensor], layer: int, spec: ModelSpec) -> None:
    """Columns of `down` that have one norm, their mean, but for those far from it; `up` has what they had."""
    up, down = (f"layers.{layer}.mlp.{part}" for part in ("up", "down"))
    if down not in weights or not spec.gated:
        return
    norm = weights[down].double().norm(dim=0)
    factor = (norm / norm.mean()).clamp(1 / MOST_SCALING, MOST_SCALING) if norm.any() else torch.ones_like(norm)
    weights[down] = (weights[down].double() / factor).float()
    weights[up] = (weights[up].double() * factor[:, None]).float()
    if (bias := weights.get(f"{up}.bias")) is not None:
        weights[f"{up}.bias"] = (bias.double() * factor).float()


def trial_error(heldout: SharedHeldout, model: Decoder) -> float:
    """Held-out KL (nats a token) when every linear of `model` is rounded to nearest.

    Three bits in groups of 64, tables as they are: what a basis does to rounding, in the time of a forward pass.
    """
    weights = dict(named_weights(model))
    for name, (_, columns) in model.spec.matrices().items():
        if name.startswith("layers."):
            even, scheme = torch.eye(columns), Scheme(TRIAL_BITS, choose_group_size(columns, TRIAL_GROUP))
            weights[name] = quantize(weights[name], even.to(weights[name]), scheme, method="rtn").dequantize()
    return heldout.kl_of(build_decoder(model.spec, weights))
