"""Text generation token by token: greedy or sampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from jpq_export.errors import UsageError
from jpq_export.runtime.session import OrtModel


def generate(
    model: OrtModel,
    ids: Iterable[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
) -> Iterator[int]:
    """New tokens after the prompt `ids`, one by one; a stop token ends it and is not given.

    Temperature 0 takes the likeliest token. `stop_ids`: by default the model's own.

    Raises:
        UsageError: prompt and new tokens need more positions than the model has, or an option is out of range.
    """
    prompt = list(ids)
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p)
    stops = set(model.spec.eos_ids if stop_ids is None else stop_ids)
    return _tokens(model, prompt, max_new_tokens, temperature, top_k, top_p, np.random.default_rng(seed), stops)


def _tokens(
    model: OrtModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: np.random.Generator,
    stops: set[int],
) -> Iterator[int]:
    decoding, new = model.start(), prompt
    for _ in range(max_new_tokens):
        token = choose(decoding.step(new), rng, temperature=temperature, top_k=top_k, top_p=top_p)
        if token in stops:
            return
        yield token
        new = [token]


def choose(
    logits: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """One token from logits [vocab]; `top_p` keeps the likeliest that reach it (Holtzman et al., 2020)."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if top_p is not None:
        keep = int(np.searchsorted(weights.cumsum(), top_p)) + 1
        order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
    return int(rng.choice(order, p=weights))


def _check(
    model: OrtModel, prompt: list[int], new: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if not prompt:
        raise UsageError("the prompt has no tokens; give some text")
    wrong = [token for token in prompt if not 0 <= token < model.spec.vocab]
    if wrong:
        raise UsageError(
            f"token {wrong[0]} is not in the model's vocabulary of {model.spec.vocab}; use its own tokenizer"
        )
    if len(prompt) + new > model.spec.max_positions:
        raise UsageError(
            f"a prompt of {len(prompt)} tokens and {new} new ones need more than the model's "
            f"{model.spec.max_positions} positions; shorten the prompt or ask for fewer new tokens"
        )
    for name, value, right, expected in (
        ("max_new_tokens", new, new >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 0, "1 or more, or 0 for all"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not right:
            raise UsageError(f"{name}: got {value}, expected {expected}")
