"""How the next token is chosen: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np

from jpq_export.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a continuation is asked for; UsageError for a value out of range.

    `temperature`: 0 takes the likeliest token. `top_k`: 0 keeps all tokens. `stop`: texts that end the continuation and
    are not given. `stop_ids`: tokens that do, None for the model's own.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name, right, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", self.temperature >= 0 and isfinite(self.temperature), "0 or more"),
            ("top_k", self.top_k >= 0, "1 or more, or 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop", isinstance(self.stop, tuple) and all(self.stop), "texts of at least one character"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not right:
                raise UsageError(f"{name}: got {getattr(self, name)!r}, expected {expected}")


def choose(
    logits: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """One token from logits [vocab]; `top_p` keeps the likeliest that reach it (Holtzman et al., 2020)."""
    if temperature == 0:
        return int(logits.argmax())
    order = _likeliest(logits, top_k) if top_k else np.arange(len(logits))
    # Differences, bounded before they are divided: a tiny temperature would overflow the quotient.
    below = logits[order].astype(np.float64) - float(logits.max())
    weights = np.exp(np.maximum(below, -1e3 * temperature) / temperature)
    weights /= weights.sum()
    if top_p < 1:
        order, weights = _nucleus(order, weights, top_p)
    return int(rng.choice(order, p=weights))


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, falling, of equals the first; all of them as they stand.

    The order decides what a seed draws, so it must not be argpartition's, which nobody promises. Sorting 49k logits
    whole would take a third of a decode step.
    """
    if count >= len(logits):
        return np.arange(len(logits))
    enough = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    return enough[np.argsort(-logits[enough], kind="stable")][:count]


def _nucleus(order: np.ndarray, weights: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest tokens whose weights reach `top_p`, weighted anew."""
    # All tokens below this weigh less than 1 - top_p together, so the others reach it without them: few are sorted.
    enough = weights >= (1 - top_p) / len(weights)
    order, weights = order[enough], weights[enough]
    sort = np.argsort(-weights, kind="stable")
    keep = sort[: int(np.searchsorted(weights[sort].cumsum(), top_p)) + 1]
    return order[keep], weights[keep] / weights[keep].sum()
