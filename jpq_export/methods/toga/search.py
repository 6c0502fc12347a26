"""`--method toga`: train the hypernetwork once, keep it in the cache, answer every budget of its range from there."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from jpq_export.compress.activations import FLOAT_BITS
from jpq_export.compress.cost import CostModel
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import LoadedModel
from jpq_export.compress.prepared import check_cache, prepared_folder
from jpq_export.errors import TargetError, UsageError
from jpq_export.format.plan import Budget, Plan
from jpq_export.format.tensor_file import save_tensors
from jpq_export.methods.toga.choose import Frame, frame, plan_for
from jpq_export.methods.toga.hypernetwork import Hypernetwork
from jpq_export.methods.toga.supernet import MaskedDecoder, structures
from jpq_export.methods.toga.train import PUBLISHED_STEPS, Training, rate_for, train
from jpq_export.progress import Stages
from jpq_export.revision import revision

STEPS = {"quick": 30, "standard": 200}  # "max": as published. A step is 6 s on SmolLM2-135M and a busy core
TOKENS = 256  # of a training sequence
TRAINED, UNFINISHED = "hypernetwork.safetensors", "unfinished.pt"  # in the cache
ABOVE, BELOW = 1.02, 0.98  # a size at the very end of the range leaves the masks nothing to choose

logger = logging.getLogger(__name__)


def toga_plan(
    loaded: LoadedModel,
    calibration: np.ndarray,
    cost: CostModel,
    budget: Budget,
    *,
    effort: str,
    prune: bool,
    widths: tuple[float, ...] | None,
    seed: int,
    stages: Stages,
    activation_bits: float = FLOAT_BITS,
) -> Plan:
    """Structure and bits by the paper's masks; the network comes from the cache when it was trained before.

    Raises:
        UsageError: an encoder, other than two widths, or no byte budget.
        TargetError: the target's engine cannot store rows of several widths.
        BudgetError: no answer of the network is small enough.
    """
    check(loaded, cost, budget, widths)
    assert budget.bytes is not None
    found = frame(loaded.spec, cost.target, budget.bytes, widths)
    if not prune and found.low_bytes + found.rest_bytes > budget.bytes:
        why = f"--method toga without pruning, all rows at {found.widths.low:g} bits, needs"
        raise budget.too_small(found.low_bytes + found.rest_bytes, why, "ask for that or allow --prune")
    training = settings(found, effort, prune=prune)
    inputs: dict[str, Any] = {
        "method": "toga",
        "model": loaded.sha256,
        "texts": sha256(calibration.tobytes()).hexdigest(),
        "training": asdict(training),
        "widths": asdict(found.widths),
        "prune": prune,
        "seed": seed,
        "activation_bits": activation_bits,
        "target": cost.target.stored_bits,
        "revision": revision(("methods/toga", "compress", "numerics")),
    }
    folder = prepared_folder(**inputs)
    check_cache(folder)
    network = Hypernetwork(structures(loaded.spec, prune=prune), seed=seed).to(loaded.model.embed.weight.device)
    if _load(network, folder):
        stages.resumed("hypernetwork", "training the hypernetwork")
    else:
        assert isinstance(loaded.model, Decoder)
        with stages.stage("hypernetwork", f"training the hypernetwork, {training.steps} steps") as report:
            pieces = calibration[:, : calibration.shape[1] // TOKENS * TOKENS].reshape(-1, TOKENS)
            supernet = MaskedDecoder(loaded.model, pieces, found.widths, cost.target, activation_bits=activation_bits)
            unfinished = folder / UNFINISHED
            train(network, supernet, training, seed=seed, unfinished=unfinished, progress=report)
        _save(network, folder)
    search = {"steps": training.steps, "trained_fractions": list(training.fractions), "widths": asdict(found.widths)}
    search |= {} if activation_bits == FLOAT_BITS else {"activation_bits": activation_bits}
    return plan_for(network, cost, budget, found, sha256=loaded.sha256, search=search)


def check(loaded: LoadedModel, cost: CostModel, budget: Budget, widths: tuple[float, ...] | None) -> None:
    """What cannot be asked of this method, said before anything is computed."""
    if not isinstance(loaded.model, Decoder):
        raise UsageError("--method toga: an encoder has no next-token loss to train masks with; use --method jpq")
    if not loaded.model.spec.gated:
        raise UsageError(
            f"--method toga: {loaded.spec.name} has an MLP without a gate, whose channels its masks order by; "
            "use --method jpq"
        )
    if budget.bytes is None:
        raise UsageError("--method toga: its penalty is on bytes; give --size, --bits or --ratio")
    if widths is not None and len(widths) != 2:
        raise UsageError(f"--widths: --method toga has two precisions, got {len(widths)}; give two, such as 2,4")
    if cost.target.engine:
        raise TargetError(
            f"--method toga: {cost.target.name} cannot store rows of several widths in one matrix; use --method jpq"
        )


def settings(found: Frame, effort: str, *, prune: bool) -> Training:
    """Steps and rate of an effort, over all sizes these widths can have (and, with pruning, smaller ones)."""
    published = PUBLISHED_STEPS["joint" if prune else "bits"]
    steps = STEPS.get(effort, published)
    least = found.low_bytes / found.high_bytes
    low = 0.75 * least if prune else ABOVE * least
    return Training(steps, rate_for(steps, published=PUBLISHED_STEPS["bits"]), (low, BELOW))


def _load(network: Hypernetwork, folder: Path) -> bool:
    """Fill the network from the cache; False when it was not trained yet or its file is damaged."""
    path = folder / TRAINED
    if not path.exists():
        return False
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        logger.warning("%s: cannot be read (%s); training again", path, error)
        return False
    return True


def _save(network: Hypernetwork, folder: Path) -> None:
    """The file last gets its name: a killed run goes on with its training."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{TRAINED}-{os.getpid()}"
    save_tensors(temporary, {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()})
    os.replace(temporary, folder / TRAINED)
    (folder / UNFINISHED).unlink(missing_ok=True)
