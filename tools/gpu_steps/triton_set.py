"""The Triton kernels of kernels/jpq_kernels as a set to check and to time."""

from __future__ import annotations

import torch
from jpq_kernels import low_bit_gather, low_bit_matmul
from jpq_kernels.weight import DeviceWeight

from gpu_steps.cases import CUT, DTYPES, FP32_SUMS, HALF, Rounding, Shape, Stored
from gpu_steps.correctness import check_all
from gpu_steps.outcome import Outcome, Settings


def device_weight(weight: Stored) -> DeviceWeight:
    """The same tensors, as the kernels take them."""
    return DeviceWeight(weight.bits, weight.group_size, weight.shape, weight.packed, weight.scales, weight.zeros)


class TritonKernels:
    """`low_bit_matmul` and `low_bit_gather`; their workspace starts as NaN as well."""

    def matmul(self, x: torch.Tensor, weight: Stored, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """See `Kernels`."""
        on_device = device_weight(weight)
        count = low_bit_matmul.count_multiprocessors(x.device)
        size = low_bit_matmul.plan(len(x), on_device, x.dtype, count).workspace_size(len(x), weight.shape[0])
        workspace = torch.full((size,), float("nan"), device=x.device)
        low_bit_matmul.low_bit_matmul(x, on_device, bias, out=out, workspace=workspace)

    def gather(self, indices: torch.Tensor, weight: Stored, out: torch.Tensor) -> None:
        """See `Kernels`."""
        low_bit_gather.low_bit_gather(indices, device_weight(weight), dtype=out.dtype, out=out)

    def rounding(self, shape: Shape) -> Rounding:
        """Many rows: X becomes fp16, sums of groups run on tensor cores."""
        many = shape.rows > low_bit_matmul.MOST_FEW_ROWS or (
            DTYPES[shape.dtype] == torch.float16 and shape.rows >= low_bit_matmul.FP16_DOT_FROM
        )
        if not many:
            return FP32_SUMS
        return Rounding(0.0 if shape.dtype == "fp16" else HALF, shape.group_size / 16 * CUT)


def run(settings: Settings) -> Outcome:
    """The step `triton`."""
    return check_all(TritonKernels(), settings)
