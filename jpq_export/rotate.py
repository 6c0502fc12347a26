"""The first stage after loading: whether the residual stream gets another basis, by a trial on held-out text."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from jpq_export.compress.parallel import once
from jpq_export.errors import BudgetError, UsageError
from jpq_export.format.plan import Plan
from jpq_export.format.spec import ModelSpec
from jpq_export.progress import Stages
from jpq_export.request import Request, Texts
from jpq_export.revision import PRICING, revision
from jpq_export.workspace import write_atomic

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel

logger = logging.getLogger(__name__)

ROTATED = "rotated-"  # before the sha256 of a model whose weights are made for another basis: plans and caches differ


def original_sha256(loaded: LoadedModel) -> str:
    """Of the model as it was loaded, whatever its basis is by now."""
    return loaded.sha256.removeprefix(ROTATED)


def settle_rotation(
    loaded: LoadedModel,
    texts: Texts,
    request: Request,
    given: Plan | None,
    stages: Stages,
    check: Callable[[ModelSpec], None],
) -> LoadedModel:
    """The model with a rotated stream where that makes it easier to round, otherwise the model as it is.

    Published methods and plain rounding keep the model they were made for, and a given plan the basis it was made in.
    `check` raises BudgetError where the budget cannot be met any more, with the rotation's own bytes.
    """
    from jpq_export.compress.decoder import Decoder
    from jpq_export.compress.rotated import can_rotate, rotated

    sha256 = ROTATED + loaded.sha256
    if given is not None and given.model_sha256 != sha256:
        return loaded
    if given is not None and not request.rotate:
        raise UsageError(f"--no-rotate: {request.plan} was made for a rotated model; leave it out or make a new plan")
    wanted = given is not None or (request.method == "jpq" and request.rotate)
    if not wanted or not isinstance(loaded.spec, ModelSpec) or not can_rotate(loaded.spec):
        return loaded
    assert isinstance(loaded.model, Decoder)
    with stages.stage("rotate", "rotating the residual stream, and trying it"):
        model = rotated(loaded.model, seed=request.seed)
        plain, turned = (0.0, 0.0) if given is not None else once(_trial, loaded, model, texts, request)
    if given is None:
        better = turned < plain and _fits(model.spec, check)
        verdict = "rotated" if better else "left in its basis"
        stages.told(f"residual stream {verdict}: KL at 3 bits, to nearest, {plain:.4f}, rotated {turned:.4f}")
        if not better:
            return loaded
    return replace(loaded, model=model, spec=model.spec, sha256=sha256)


def _fits(spec: ModelSpec, check: Callable[[ModelSpec], None]) -> bool:
    try:
        check(spec)
    except BudgetError:
        return False
    return True


def _trial(loaded: LoadedModel, model: object, texts: Texts, request: Request) -> tuple[float, float]:
    """Held-out KL of both models, rounded to nearest; remembered, as prices are."""
    from jpq_export.compress.decoder import Decoder
    from jpq_export.compress.prepared import check_cache, prepared_folder
    from jpq_export.compress.rotated import trial_error
    from jpq_export.compress.teaching import SharedHeldout

    facts = {"model": loaded.sha256, "texts": texts.sha256, "seed": request.seed, "revision": revision(PRICING)}
    folder = prepared_folder(kind="rotation", device=request.device, **facts)
    file = folder.with_suffix(".json")
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return float(found["plain"]), float(found["rotated"])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: damaged (%s); making it again", file, error)
    check_cache(folder)
    assert isinstance(loaded.model, Decoder)
    assert isinstance(model, Decoder)
    heldout = SharedHeldout(loaded.model, texts.heldout)
    plain, turned = (trial_error(heldout, each) for each in (loaded.model, model))
    write_atomic(file, json.dumps({"plain": plain, "rotated": turned}) + "\n")
    return plain, turned
