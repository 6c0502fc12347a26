"""Between the compressed model in PyTorch (codes and trainable scales) and the record that is stored and lowered."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jpq_export.compress.decoder import Decoder, canonical_name
from jpq_export.compress.encoder import Encoder
from jpq_export.compress.model import Model, build_model
from jpq_export.compress.quant_linear import QuantEmbedding, QuantLinear
from jpq_export.compress.rounding import Rounded, stored
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec, is_table
from jpq_export.numerics.row_blocks import RowLayout, StoredWeight
from jpq_export.numerics.scheme import Scheme


def quantized_modules(model: Model) -> dict[str, QuantLinear]:
    """QuantLinears by canonical name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def to_compressed(model: Model, schemes: dict[str, Scheme | RowLayout]) -> CompressedModel:
    """The record of a student whose every matrix is quantized."""
    quantized = {name: stored(module.rounded(), schemes[name]) for name, module in quantized_modules(model).items()}
    vectors = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(".scales"):
            vectors[name.removesuffix(".weight")] = parameter.detach().float().cpu().numpy().copy()
    return CompressedModel(model.spec, quantized, vectors)


def to_rounded(weight: StoredWeight, device: str) -> Rounded:
    """A stored weight as tensors."""
    return Rounded(
        torch.from_numpy(weight.points()).to(device),
        torch.from_numpy(weight.scales.astype(np.float32)).to(device),
        torch.from_numpy(weight.zero_points()).to(device),
    )


def to_student(compressed: CompressedModel, *, device: str = "cpu") -> Any:
    """Undo `to_compressed`: a decoder or encoder with trainable scales over the stored codes."""
    with torch.device("meta"):
        spec = compressed.spec
        model = Encoder(spec) if isinstance(spec, EncoderSpec) else Decoder(spec)
    vectors = {name: torch.from_numpy(v.copy()).to(device) for name, v in compressed.vectors.items()}
    for name, weight in compressed.quantized.items():
        rounded = to_rounded(weight, device)
        if is_table(name):
            setattr(model, name, (QuantLinear if name == "head" else QuantEmbedding)(rounded, None))
            continue
        _, i, sub, part = name.split(".")
        linear = QuantLinear(rounded, vectors.get(f"{name}.bias"))
        if (branch := compressed.adapters.get(name)) is not None:
            down, up = (torch.from_numpy(part).to(device, torch.float32) for part in (branch.down, branch.up))
            linear.branch = down, up
        setattr(getattr(model.layers[int(i)], sub), part, linear)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(vectors[canonical_name(name)], requires_grad=False)
            setattr(model.get_submodule(owner), leaf, value)
    return model.eval().requires_grad_(False)


def dequantized(compressed: CompressedModel) -> Any:
    """A decoder or encoder, the plain PyTorch reference of parity: the same numbers as float32 matrices."""
    return build_model(compressed.spec, dequantized_weights(compressed))


def dequantized_weights(compressed: CompressedModel) -> dict[str, torch.Tensor]:
    """All weights as float32 tensors by canonical name."""
    weights = {name: torch.from_numpy(compressed.weight(name)) for name in compressed.quantized}
    return weights | {name: torch.from_numpy(v) for name, v in compressed.vectors.items()}
