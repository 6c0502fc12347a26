"""A model of either kind: what the stages of compression share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jpq_export.compress.decoder import Context, Decoder, Layer, build_decoder
from jpq_export.compress.encoder import Encoder, EncoderContext, EncoderLayer, build_encoder
from jpq_export.format.encoder_spec import EncoderSpec, Spec

Model = Decoder | Encoder
AnyLayer = Layer | EncoderLayer
AnyContext = Context | EncoderContext


def build_model(spec: Spec, weights: Mapping[str, Tensor]) -> Model:
    """A frozen model holding `weights` by canonical name; ValueError names a wrong or missing one."""
    return build_encoder(spec, weights) if isinstance(spec, EncoderSpec) else build_decoder(spec, weights)
