"""AutoRound (Cheng et al., 2023): signed gradient descent on rounding and clipping, block by block; RTN at 0 steps.

Its own defaults but for the data: our calibration tokens, all of them. bf16 forward passes, as it chooses on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jpq_export.peers.transformer import names, transformers_model
from jpq_export.peers.worker import Job

BATCH = 8


class NoTokenizer:
    """It asks for one, and does not use it when it is given tokens."""


def quantize(job: Job) -> dict[str, Tensor]:
    """Every linear as its integer kernels compute with it, in fp32."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports] an extra

    model = transformers_model(job.spec, job.weights)
    ids = job.ids()
    mask = torch.ones_like(ids[0])
    loader = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": mask} for row in ids], batch_size=1)  # pyright: ignore[reportArgumentType] a list is a dataset
    foreign = {ours: theirs.removesuffix(".weight") for theirs, ours in names(job.spec).items()}
    linears = job.linears()
    own = {foreign[name]: {"bits": job.bits, "group_size": job.group_of(name)} for name in linears}
    rounder = AutoRound(
        model,
        tokenizer=NoTokenizer(),
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        layer_config=own,
        iters=job.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=loader,
        batch_size=min(BATCH, len(ids)),
        enable_torch_compile=False,
        device_map="cpu",
    )
    rounded = rounder.quantize()
    rounded = rounded[0] if isinstance(rounded, tuple) else rounded
    return {name: _exact(rounded.get_submodule(foreign[name]), job.bits) for name in linears}


def _exact(linear: Any, bits: int) -> Tensor:
    """It leaves bf16 weights behind; the codes they stand for times the scales, without that rounding."""
    weight, scale = linear.weight.detach().float(), linear.scale.float()
    zero = linear.zp.float() if isinstance(linear.zp, Tensor) else torch.full_like(scale, float(linear.zp))
    groups = weight.view(weight.shape[0], scale.shape[1], -1)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return ((codes - zero[..., None]) * scale[..., None]).view_as(weight)
