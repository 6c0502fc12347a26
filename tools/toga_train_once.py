"""Measure TOGA's "train once, get all": one training for a range of sizes against a training for each budget.

    python tools/toga_train_once.py [MODEL] --bits 2.8,3.3,3.8 --steps 30 --out FILE.json

Every network answers every budget with the plan that `--method toga` would make, in exact stored bytes; the plan's
masks are put back on the supernet, and KL to the teacher is taken on text that no training saw. Masks drawn at random
stand beside them (a network that is not better than chance has learned nothing), and so does the network trained for
another budget of the list, which says how much the range is needed at all. Roundings are the supernet's own (GPTQ from
the teacher's inputs, not the compressed prefix's; embedding and head as they are), the same for all.

An earlier form of this measured cross entropy instead of KL, widths only: SmolLM2-135M, 20 steps, 2 and 4 bits, 16
held-out sequences of 256 tokens, nats (all high 4.462, all low 6.398). At 0.65 of the bytes random 5.867, trained for
the range 5.421, for this size 5.445; at 0.80 random 5.139, range 4.737, this size 4.724.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# As in the command line: waiting threads that spin made a step four times as long on a busy machine. Before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from jpq_export.compress.calibration_text import calibration_and_heldout
from jpq_export.compress.cost import CostModel
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import LoadedModel, load_model
from jpq_export.compress.plan import BudgetRequest
from jpq_export.errors import UsageError
from jpq_export.format.plan import Budget
from jpq_export.format.spec import ModelSpec
from jpq_export.format.target import load_target
from jpq_export.methods.toga.choose import Frame, frame, masks_of, plan_for
from jpq_export.methods.toga.hypernetwork import BASE, Hypernetwork, Masks
from jpq_export.methods.toga.search import settings
from jpq_export.methods.toga.supernet import MaskedDecoder, structures
from jpq_export.methods.toga.train import PUBLISHED_STEPS, rate_for, train

HELDOUT = 16  # sequences


@torch.no_grad()
def heldout_kl(supernet: MaskedDecoder, masks: Masks, ids: Tensor) -> float:
    """KL(teacher ‖ masked model), nats a token, over ids [sequences, length]."""
    weights, total = supernet.weights(masks), 0.0
    for row in ids[:, None]:
        goal = F.log_softmax(supernet.model(row).float(), -1)
        mine = F.log_softmax(functional_call(supernet.model, weights, (row,)).float(), -1)
        total += float(F.kl_div(mine, goal, log_target=True, reduction="sum"))
    return total / ids.numel()


def frames_of(loaded: LoadedModel, cost: CostModel, budgets: list[Budget]) -> dict[Budget, Frame]:
    """Of every budget; UsageError where their widths are not the same, for then one training is not enough."""
    found = {budget: frame(loaded.spec, cost.target, budget.bytes or 0, None) for budget in budgets}
    pairs = sorted({f"{each.widths.low:g},{each.widths.high:g}" for each in found.values()})
    if len(pairs) > 1:
        raise UsageError(f"--bits: budgets of several pairs of widths ({' and '.join(pairs)}); ask for closer ones")
    return found


def measure(
    loaded: LoadedModel, cost: CostModel, budgets: list[Budget], *, steps: int, length: int, prune: bool, seed: int
) -> dict:
    """All trainings and their answers: {"frame", "training", "rows": [{"network", "bits", "bytes", "kl", ...}]}."""
    assert isinstance(loaded.model, Decoder)
    assert isinstance(loaded.spec, ModelSpec)
    frames = frames_of(loaded, cost, budgets)
    first = frames[budgets[0]]
    kind = {"calibration": max(4 * steps, 16), "heldout": HELDOUT, "length": length, "seed": seed}
    bos = loaded.spec.bos_id if loaded.spec.add_bos else None
    seen, unseen = calibration_and_heldout(None, loaded.encode, bos_id=bos, **kind)
    supernet = MaskedDecoder(loaded.model, seen, first.widths, cost.target)
    shapes, ids = structures(loaded.spec, prune=prune), torch.from_numpy(unseen).to(supernet.ids.device)
    rate = rate_for(steps, published=PUBLISHED_STEPS["bits"])
    whole = replace(settings(first, "quick", prune=prune), steps=steps, rate=rate)
    rows: list[dict] = []

    def trained(fractions: tuple[float, float]) -> tuple[Hypernetwork, float]:
        network, start = Hypernetwork(shapes, seed=seed).to(ids.device), time.monotonic()
        train(network, supernet, replace(whole, fractions=fractions), seed=seed, progress=_steps)
        return network, time.monotonic() - start

    def answer(name: str, network: Callable[[float], Masks], budget: Budget, seconds: float) -> None:
        start = time.monotonic()
        plan = plan_for(network, cost, budget, frames[budget], sha256=loaded.sha256, search={})  # pyright: ignore[reportArgumentType] called only
        taken = time.monotonic() - start
        kl = heldout_kl(supernet, masks_of(plan, loaded.spec, first.widths), ids)
        row = {"network": name, "bits": budget.value, "bytes": plan.predicted.bytes, "kl": kl}
        row |= {"sublayers_narrowed": len(plan.removed), "training_seconds": seconds, "answer_seconds": taken}
        rows.append(row)
        told = f"{plan.predicted.bytes / 1e6:9.3f} MB {kl:8.4f} nats, trained {seconds:5.0f} s, answered {taken:4.1f} s"
        print(f"{budget.value:5.2f} bits  {name:26} {told}", flush=True)  # noqa: T201

    for budget in budgets:
        answer("random", _random(shapes, seed), budget, 0.0)
    network, seconds = trained(whole.fractions)
    for budget in budgets:
        answer("trained for the range", network, budget, seconds)
    for own in budgets:
        fraction = frames[own].fraction(own.bytes or 0)
        network, seconds = trained((fraction, fraction))
        for budget in budgets:
            answer(f"trained for {own.value:g} bits", network, budget, seconds)
    about = {"steps": steps, "rate": rate, "range": list(whole.fractions), "prune": prune}
    return {"widths": [first.widths.low, first.widths.high], "training": about, "rows": rows}


def _steps(done: int, total: int) -> None:
    """One line on the error stream, written over."""
    print(f"\rstep {done} of {total}", end="" if done < total else "\n", file=sys.stderr, flush=True)  # noqa: T201


def _random(shapes: list[dict[str, int]], seed: int) -> Callable[[float], Masks]:
    """Logits drawn at random in place of a network's."""
    generator = torch.Generator().manual_seed(seed)
    logits = {name: torch.randn(n, generator=generator) - BASE for layer in shapes for name, n in layer.items()}
    return lambda fraction: logits


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--bits", default="2.8,3.3,3.8", help="budgets, in bits per weight of the whole file")
    parser.add_argument("--target", default="jetson")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--prune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    loaded = load_model(options.model)
    cost = CostModel(loaded.spec, load_target(options.target), 2048)
    budgets = [BudgetRequest("bits", float(part)).resolve(loaded.spec) for part in options.bits.split(",")]
    kind = {"steps": options.steps, "length": options.length, "prune": options.prune, "seed": options.seed}
    try:
        found = measure(loaded, cost, budgets, **kind)
    except UsageError as error:
        parser.error(str(error))
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
