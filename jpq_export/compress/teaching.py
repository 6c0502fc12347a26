"""What the teacher is asked: the one place where compressing a decoder and compressing an encoder differ.

A decoder's signal is its next-token distribution, errors are KL in nats a token; an encoder's is its embedding, errors
are 1 - cosine a text. Both Fishers are the Hessian of that error, so prices and plans mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jpq_export.compress import encoder_statistics, encoder_tune, statistics, tune
from jpq_export.compress.encoder import Encoder
from jpq_export.compress.encoder_heldout import EncoderHeldout, text_errors
from jpq_export.compress.heldout import Heldout
from jpq_export.compress.model import Model
from jpq_export.compress.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Teaching:
    """`collect`, `plain_statistics`: see `statistics`; `heldout`: see `Heldout`; `errors`: of every token or text."""

    collect: Callable[..., Statistics]
    plain_statistics: Callable[..., Statistics]
    heldout: Callable[..., Any]
    errors: Callable[..., Tensor]
    tune: Callable[..., list[float]]


DECODER = Teaching(statistics.collect, statistics.plain_statistics, Heldout, tune.token_kl, tune.tune)
ENCODER = Teaching(
    encoder_statistics.collect, encoder_statistics.plain_statistics, EncoderHeldout, text_errors, encoder_tune.tune
)


def teaching_of(model: Model) -> Teaching:
    """How this kind of model is taught from."""
    return ENCODER if isinstance(model, Encoder) else DECODER
