"""Measure TOGA's "train once, get all": one training over a range of sizes against a training for each size.

    python tools/toga_train_once.py [MODEL] --steps 30 --fractions 0.65,0.8 --out FILE.json

Every network is asked for the same bytes of the linears; the masks are rounded and shifted until those bytes are met,
and the cross entropy of the masked model is taken on text that no training saw. Masks drawn at random, the whole model
in the high and in the low precision stand beside them: a network that is not better than chance has learned nothing.
Widths only, no pruning; roundings are the supernet's own (GPTQ from the teacher's inputs, not the compressed prefix's).

Measured on SmolLM2-135M, 20 steps, 2 and 4 bits, 16 held-out sequences of 256 tokens, nats (all high 4.462, all low
6.398): at 0.65 of the bytes random 5.867, trained for the range 5.421, for this size 5.445; at 0.80 random 5.139, range
4.737, this size 4.724. At so few steps one training for the range is as good as one for each size.
"""

from __future__ import annotations

import argparse
import json
import time
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from jpq_export.compress.calibration_text import calibration_and_heldout
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import load_model
from jpq_export.format.spec import ModelSpec
from jpq_export.format.target import load_target
from jpq_export.methods.toga.hypernetwork import Hypernetwork, Masks
from jpq_export.methods.toga.supernet import MaskedDecoder, Widths, structures
from jpq_export.methods.toga.train import PUBLISHED_STEPS, Training, rate_for, train

HELDOUT, BATCH = 16, 2


def hard_masks(logits: Masks, supernet: MaskedDecoder, fraction: float) -> Masks:
    """The rows with the highest logits, as many as the size allows."""
    low, high = (sign * max(float(v.abs().max()) for v in logits.values()) * 1.01 for sign in (-1, 1))
    for _ in range(40):
        middle = (low + high) / 2
        masks = {name: (value > middle).float() for name, value in logits.items()}
        low, high = (middle, high) if float(supernet.size(masks)) > fraction else (low, middle)
    return {name: (value > high).float() for name, value in logits.items()}


@torch.no_grad()
def heldout_loss(supernet: MaskedDecoder, masks: Masks, first: int) -> float:
    """Mean cross entropy (nats) of the held-out sequences, which follow the `first` ones."""
    steps = range(first // BATCH, (first + HELDOUT) // BATCH)
    return sum(float(supernet.loss(masks, step)) for step in steps) / len(steps)


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--fractions", default="0.65,0.8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = load_model(options.model)
    assert isinstance(loaded.model, Decoder)
    assert isinstance(loaded.spec, ModelSpec)
    asked = tuple(float(part) for part in options.fractions.split(","))
    kind = {"calibration": 4 * options.steps, "heldout": 2 * HELDOUT, "length": 256, "seed": options.seed}
    bos = loaded.spec.bos_id if loaded.spec.add_bos else None
    seen, unseen = calibration_and_heldout(None, loaded.encode, bos_id=bos, **kind)
    seen = seen[: len(seen) // BATCH * BATCH]
    widths, target = Widths(2, 4), load_target("jetson")
    supernet = MaskedDecoder(loaded.model, seen, widths, target, batch=BATCH)
    judge = copy(supernet)
    judge.ids = torch.from_numpy(unseen[:HELDOUT])
    shapes = structures(loaded.spec, prune=False)
    rate = rate_for(options.steps, published=PUBLISHED_STEPS["bits"])
    rows: list[dict] = []

    def trained(fractions: tuple[float, float]) -> tuple[Hypernetwork, float]:
        network, start = Hypernetwork(shapes, seed=options.seed), time.monotonic()
        train(network, supernet, Training(options.steps, rate, fractions), seed=options.seed)
        return network, time.monotonic() - start

    def record(name: str, fraction: float, logits: dict[str, Tensor], seconds: float) -> None:
        masks = hard_masks(logits, judge, fraction)
        loss, size = heldout_loss(judge, masks, 0), float(judge.size(masks))
        rows.append({"masks": name, "fraction": fraction, "size": size, "heldout_loss": loss, "seconds": seconds})
        options.out.write_text(json.dumps({"steps": options.steps, "rate": rate, "rows": rows}, indent=1))
        print(f"{name:24} {fraction:.2f} {size:.4f} {loss:8.4f} nats {seconds:6.0f} s", flush=True)  # noqa: T201

    for name, value in (("all rows high", 1.0), ("all rows low", 0.0)):
        flat = {part: torch.full((count,), value) for layer in shapes for part, count in layer.items()}
        loss, size = heldout_loss(judge, flat, 0), float(judge.size(flat))
        print(f"{name:24}      {size:.4f} {loss:8.4f} nats", flush=True)  # noqa: T201
        rows.append({"masks": name, "size": size, "heldout_loss": loss})
    generator = torch.Generator().manual_seed(options.seed)
    for fraction in asked:
        chance = {p: torch.randn(count, generator=generator) for layer in shapes for p, count in layer.items()}
        record("random", fraction, chance, 0.0)
    network, seconds = trained((min(asked), max(asked)))
    for fraction in asked:
        with torch.no_grad():
            record("trained for the range", fraction, network(fraction), seconds)
    for fraction in asked:
        network, seconds = trained((fraction, fraction))
        with torch.no_grad():
            record("trained for this size", fraction, network(fraction), seconds)


if __name__ == "__main__":
    main()
