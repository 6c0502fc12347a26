"""HQQ (Badri and Shaji, 2023): half-quadratic fit of scales and zeros to the weights alone, no calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from jpq_export.peers.worker import Job


def quantize(job: Job) -> dict[str, Tensor]:
    """Every linear as HQQ computes with it: (code - zero) * scale, both of fp16 as stored."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports] an extra

    out = {}
    for name in job.linears():
        codes, meta = Quantizer.quantize(
            job.weights[name],
            nbits=job.bits,
            group_size=job.group_of(name),
            axis=1,
            optimize=True,
            bitpack=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        out[name] = ((codes.float() - zero) * scale).reshape(job.weights[name].shape)
    return out
