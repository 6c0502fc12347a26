"""What rounding activations costs: the same compressed model on the same text, with and without."""

from __future__ import annotations

from typing import Any

import numpy as np

from jpq_export.evaluate.text_quality import Progress, evaluate_text
from jpq_export.format.compressed import CompressedModel


def activations_quality(
    teacher: Any,
    compressed: CompressedModel,
    bits: float,
    calibration: np.ndarray,
    sequences: np.ndarray,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """{"bits", "kl_mean", "perplexity", "top1_agreement", "without": the same without rounding}.

    `calibration`, `sequences`: int64 [windows, context]; the former only says which channels of A3.2 are precise.
    """
    from jpq_export.compress.activations import rounded_inputs, rounding_for
    from jpq_export.compress.student import dequantized

    student = dequantized(compressed).to(teacher.embed.weight.device)
    without = evaluate_text(student, teacher, sequences, progress=progress)
    with rounded_inputs(student, rounding_for(student, bits, calibration)):
        rounded = evaluate_text(student, teacher, sequences, progress=progress)
    names = ("kl_mean", "perplexity", "top1_agreement")
    plain, found = ({name: getattr(each, name) for name in names} for each in (without, rounded))
    return {"bits": bits, **found, "without": plain}
