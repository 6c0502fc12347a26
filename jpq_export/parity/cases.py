"""The inputs of a parity check and of the recorded vectors: cut from the caller's prompts, the same way every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jpq_export.format.encoder_spec import Spec

PREFILL_TOKENS = 48
PADDED_LENGTHS = (5, 11, 17)
PADDED_STEPS = 4
CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Cases:
    """`prefill` int64 [1, seq]; `padded` and `mask` int64 [3, seq], padding on the left; `long` [1, seq] or None.

    `padded` carries PADDED_STEPS more columns that are fed one by one through the cache. `long` exists when the model
    has sliding windows: long enough to leave one behind.
    """

    prefill: np.ndarray
    padded: np.ndarray
    mask: np.ndarray
    long: np.ndarray | None

    @property
    def padded_prefill(self) -> int:
        """Columns of `padded` that go in at once."""
        return self.padded.shape[1] - PADDED_STEPS

    def steps_within(self, spec: Spec, wanted: int) -> int:
        """Of the `wanted` tokens after the prefill those that the model has positions for."""
        return min(wanted, spec.max_positions - self.prefill.shape[1])


def make_cases(prompts: Sequence[Sequence[int]], spec: Spec) -> Cases:
    """Cut the cases from token ids; ValueError without a token or with an id outside the vocabulary."""
    stream = np.array([token for prompt in prompts for token in prompt], np.int64)
    if not stream.size or stream.min() < 0 or stream.max() >= spec.vocab:
        raise ValueError(f"prompts must hold token ids in 0..{spec.vocab - 1}")
    rows = max(PADDED_LENGTHS) + PADDED_STEPS
    padded, mask = np.zeros((len(PADDED_LENGTHS), rows), np.int64), np.zeros((len(PADDED_LENGTHS), rows), np.int64)
    for row, length in enumerate(PADDED_LENGTHS):
        own = np.array(prompts[row % len(prompts)], np.int64) if len(prompts) > row else np.roll(stream, -row)
        padded[row, -length - PADDED_STEPS :] = np.resize(own if own.size else stream, length + PADDED_STEPS)
        mask[row, -length - PADDED_STEPS :] = 1
    windows = [layer.window for layer in spec.layers if layer.window and layer.kv_heads]
    wanted = max(windows, default=0) + CHUNK
    long = np.resize(stream, (1, wanted)) if windows and wanted <= spec.max_positions else None
    return Cases(np.resize(stream, (1, min(PREFILL_TOKENS, spec.max_positions // 2))), padded, mask, long)
