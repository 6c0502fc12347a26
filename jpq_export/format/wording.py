"""What the error that everything is chosen by is called: KL for a language model, a distance for a sentence encoder."""

from __future__ import annotations

from dataclasses import dataclass

from jpq_export.format.encoder_spec import EncoderSpec, Spec


@dataclass(frozen=True, slots=True)
class Wording:
    """`error` in `amount` an `item`; `latency` of one item at run time."""

    error: str
    amount: str
    item: str
    latency: str


DECODER = Wording("KL", "nats", "token", "decode latency")
ENCODER = Wording("distance", "(1 - cosine)", "text", "latency")


def wording(spec: Spec) -> Wording:
    """The words for this kind of model."""
    return ENCODER if isinstance(spec, EncoderSpec) else DECODER
