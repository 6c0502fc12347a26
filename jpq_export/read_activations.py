"""`--activation-bits` in an export: the stage that measures what rounding costs, and the spec that is lowered."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jpq_export.format.encoder_spec import Spec
from jpq_export.format.spec import INT8_ACTIVATIONS, ModelSpec
from jpq_export.progress import Stages
from jpq_export.request import Request, Texts
from jpq_export.workspace import Workspace, write_atomic

if TYPE_CHECKING:
    from jpq_export.format.compressed import CompressedModel

FLOAT_BITS, INT8_BITS = 16.0, 8.0  # as computed, and the only width with integer kernels
ACTIVATIONS = "activations.json"


def measure_activations(
    request: Request,
    work: Workspace,
    stages: Stages,
    *,
    teacher: Any,
    texts: Texts,
    compressed: CompressedModel,
) -> dict[str, Any] | None:
    """activations.json: quality with rounded activations and without; None when they stay as they are."""
    bits, path = request.activation_bits, work.path(ACTIVATIONS)
    if bits == FLOAT_BITS:
        return None
    if path.exists():
        stages.resumed("activations", f"activations in {bits:g} bits")
    else:
        from jpq_export.evaluate.activations import activations_quality

        with stages.stage("activations", f"activations in {bits:g} bits, on held-out text") as report:
            found = activations_quality(teacher, compressed, bits, texts.calibration, texts.quality, progress=report)
        write_atomic(path, json.dumps(found, indent=1))
    return json.loads(path.read_text(encoding="utf-8"))


def with_activations(spec: Spec, request: Request) -> Spec:
    """The spec as it is lowered; rounding to other than 8 bits is measured only."""
    if request.activation_bits == INT8_BITS and isinstance(spec, ModelSpec):
        return replace(spec, activations=INT8_ACTIVATIONS)
    return spec
