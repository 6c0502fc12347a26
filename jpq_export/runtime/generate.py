"""New tokens after a prompt, one by one; text is made of them in bundle.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jpq_export.runtime.batching import Batcher, Sequence
from jpq_export.runtime.sampling import Sampling
from jpq_export.runtime.session import OrtModel


def generate(
    model: OrtModel, ids: Iterable[int], *, stop_ids: Iterable[int] | None = None, **sampling: Any
) -> Iterator[int]:
    """New tokens after the prompt `ids`; a stop token ends it and is not given. `sampling`: fields of `Sampling`.

    Raises:
        CapacityError: prompt and new tokens need more positions than the model has.
        UsageError: no or unknown tokens, or an option is out of range.
    """
    ask = Sampling(**sampling, stop_ids=None if stop_ids is None else tuple(stop_ids))
    batcher = Batcher(model, slots=1, capacity=model.spec.max_positions)
    sequence = Sequence(ids, ask)
    batcher.add(sequence)
    return _tokens(batcher, sequence)


def _tokens(batcher: Batcher, sequence: Sequence) -> Iterator[int]:
    given = 0
    while batcher.busy:
        batcher.step()
        yield from sequence.tokens[given:]
        given = len(sequence.tokens)
