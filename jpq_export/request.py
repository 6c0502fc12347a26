"""What one run is asked for, the text it works with, and the names of its cached results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jpq_export.format.spec import FLOAT_CACHE
from jpq_export.format.target import Target
from jpq_export.revision import PRICING, revision

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel
    from jpq_export.compress.plan import BudgetRequest

QUALITY_SEQUENCES = 4  # of the effort's length; nothing is chosen by them


@dataclass(frozen=True, slots=True)
class Request:
    """Everything an export depends on."""

    model: str | None
    target: Target
    out: Path
    budget: BudgetRequest
    method: str = "jpq"
    effort: str = "standard"
    calibration: Path | None = None
    context: int = 2048
    plan: Path | None = None
    until: str | None = None
    seed: int = 0
    device: str = "cpu"
    prune: bool = True
    rotate: bool = True
    widths: tuple[float, ...] | None = None
    kv_cache: str = FLOAT_CACHE
    adapters: int = 0
    activation_bits: float = 16.0
    group_size: int | None = None
    force: bool = False

    def key(self, model_sha256: str, calibration_sha256: str, *, code: str | None = None) -> str:
        """Hash of what determines the bytes of the bundle; `code`: its digest, by default that of this code."""
        raw = {k: v for k, v in asdict(self).items() if k not in ("out", "force", "until", "plan", "calibration")}
        for younger, default in (("rotate", True), ("group_size", None)):  # than the keys of results that are kept
            if raw[younger] == default:
                del raw[younger]
        plan = self.plan.read_text(encoding="utf-8") if self.plan else None
        raw |= {"model": model_sha256, "calibration": calibration_sha256, "plan": plan}
        raw["revision"] = revision() if code is None else code
        return sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Texts:
    """Token sequences [n, length]: for statistics and tuning; held out for choices; and for the reported quality."""

    calibration: np.ndarray
    heldout: np.ndarray
    quality: np.ndarray

    @property
    def sha256(self) -> str:
        """Of the tokens."""
        return sha256(self.calibration.tobytes() + self.heldout.tobytes()).hexdigest()


def prepared_for(request: Request, loaded: LoadedModel, texts: Texts) -> Path:
    """Where this model's price list lives."""
    from jpq_export.compress.effort import EFFORTS
    from jpq_export.compress.prepare import group_size_for
    from jpq_export.compress.prepared import prepared_folder
    from jpq_export.compress.prices import narrow_widths

    effort, narrow = EFFORTS[request.effort], narrow_widths(request.widths or ())
    return prepared_folder(
        **({"narrow": narrow} if narrow else {}),
        **({"normal": normal} if (normal := request.target.normal_bits) else {}),
        model=loaded.sha256,
        texts=texts.sha256,
        sequences=effort.sequences,
        seed=request.seed,
        device=request.device,
        group_size=group_size_for(request.target, loaded.spec, request.group_size),
        revision=revision(PRICING),
    )
