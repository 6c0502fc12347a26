"""How much work each effort does: tokens, trials and steps."""

from __future__ import annotations

from dataclasses import dataclass

from jpq_export.compress.refine import TRIALS


@dataclass(frozen=True, slots=True)
class Effort:
    """`sequences` of `length` tokens for statistics and rounding, `heldout` for gates, `tune_*` for recovery.

    `tune_measured`: steps between the held-out errors by which recovery stops early, 0 for none. `finalists`: how many
    plans are rounded before one is chosen; they differ in whether they prune and, `finalists_by_bits`, in whether they
    use 2 bits, and score at most `finalists_within` times the best: rounding changes the order by up to a tenth, but a
    second one takes as long as the first (2 minutes of `standard` on SmolLM2-135M, where at 4.0 bits scores 1.066 apart
    came out 1.035 apart, in the same order).
    """

    name: str
    sequences: int
    heldout: int
    length: int
    passes: int
    tune_sequences: int
    tune_steps: int
    trials: tuple[tuple[str, tuple[float, ...]], ...]
    finalists: int = 1
    finalists_by_bits: bool = False
    finalists_within: float = 1.05
    tune_measured: int = 0

    @property
    def calibration_sequences(self) -> int:
        """Sequences needed in all, apart from the held-out ones."""
        return max(self.sequences, self.tune_sequences)


EFFORTS = {
    "quick": Effort(
        "quick",
        8,
        2,
        512,
        1,
        60,
        30,
        (("removal", (float("inf"), 2.0)), ("two_bit", (float("inf"),)), ("table", (0.6,))),
    ),
    "standard": Effort("standard", 24, 4, 512, 2, 240, 90, TRIALS, finalists=2),
    "max": Effort(
        "max",
        sequences=96,
        heldout=8,
        length=512,
        passes=3,
        tune_sequences=240,
        tune_steps=1000,
        trials=TRIALS,
        finalists=3,
        finalists_by_bits=True,
        finalists_within=1.15,
        tune_measured=100,
    ),
}
