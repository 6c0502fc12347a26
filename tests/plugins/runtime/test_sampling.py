"""The C runtime's sampler against Python's: one seed chooses the same tokens, with every filter and with ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jpq_export.runtime.sampling import choose

DRAWS, VOCAB = 300, 500
RULES = [(0, 1.0), (0, 0.7), (7, 1.0), (40, 0.8), (1, 1.0), (VOCAB, 1.0), (VOCAB + 5, 0.9)]


def smooth() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(DRAWS, VOCAB)).astype(np.float32) * 3


def tied() -> np.ndarray:
    """Few values: whatever is cut off, equals stand on both sides."""
    return np.random.default_rng(5).integers(-2, 3, (DRAWS, VOCAB)).astype(np.float32)


def in_python(logits: np.ndarray, seed: int, **rule: Any) -> list[int]:
    rng = np.random.default_rng(seed)
    return [choose(row, rng, **rule) for row in logits]


def in_c(harness: Any, logits: np.ndarray, seed: int, *, temperature: float, top_k: int, top_p: float) -> list[int]:
    given = (temperature, top_k, top_p, VOCAB)
    done = harness("choose", "none", str(seed), *given, input=logits.tobytes())
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("temperature", [0.4, 1.5])
@pytest.mark.parametrize(("top_k", "top_p"), RULES)
@pytest.mark.parametrize("make", [smooth, tied])
def test_a_seed_chooses_as_in_python(harness: Any, make: Any, top_k: int, top_p: float, temperature: float) -> None:
    logits, rule = make(), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = in_python(logits, 11, **rule)
    assert in_c(harness, logits, 11, **rule) == expected
    if top_k != 1:  # the twin: another seed
        assert in_c(harness, logits, 12, **rule) != expected
    if make is tied:  # and equals taken from the other end
        assert in_python(logits[:, ::-1].copy(), 11, **rule) != [VOCAB - 1 - token for token in expected]


def test_top_p_counts_what_top_k_left(harness: Any) -> None:
    """Of 0.4, 0.3, 0.2, 0.1 the first two are 0.57 and 0.43 of what they hold: 0.6 keeps both, 0.5 one."""
    logits = np.full((DRAWS, VOCAB), -50, np.float32)
    logits[:, [9, 3, 7, 1]] = np.log([0.4, 0.3, 0.2, 0.1])
    for top_p, kept in ((0.6, {9, 3}), (0.5, {9})):
        rule = {"temperature": 1.0, "top_k": 2, "top_p": top_p}
        assert set(in_c(harness, logits, 3, **rule)) == set(in_python(logits, 3, **rule)) == kept
    assert set(in_python(logits, 3, temperature=1.0, top_p=0.5)) == {9, 3}  # the twin: without top_k 0.4 is too little


def test_of_equals_the_lower_ids_are_kept(harness: Any) -> None:
    logits = np.zeros((DRAWS, VOCAB), np.float32)
    rule = {"temperature": 1.0, "top_k": 3, "top_p": 1.0}
    assert set(in_c(harness, logits, 3, **rule)) == set(in_python(logits, 3, **rule)) == {0, 1, 2}
