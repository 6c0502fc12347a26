"""Which arithmetic to compute in: bf16 matrix products where the hardware makes them fast, else fp32.

Statistics, search and tuning tolerate bf16; rounding, held-out gates that compare small KLs, and parity run in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

from jpq_export.compress.decoder import Decoder
from jpq_export.revision import processor


@cache
def fast_bf16(device_type: str) -> bool:
    """True when bf16 products are much faster than fp32 ones: CUDA from Ampere on, CPUs with AMX, AMD's from Zen 4 on.

    With AMX 5 to 10 times (Sapphire Rapids), AVX-512-BF16 2.1 times on Zen 4 and no faster on Sapphire Rapids.
    """
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    amd = processor().startswith("AMD")
    return bool(torch.cpu._is_amx_tile_supported()) or (amd and bool(torch.cpu._is_avx512_bf16_supported()))


def autocast(device: torch.device | str) -> AbstractContextManager:
    """bf16 autocast where it pays, otherwise nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast_bf16(kind))


def head_table(model: Decoder) -> Tensor:
    """The head's weight in the fast type, converted once: autocast would convert a fifth of the model at every call."""
    table = model.embed.weight if model.head is None else model.head.weight
    return table.to(torch.bfloat16) if fast_bf16(table.device.type) else table
