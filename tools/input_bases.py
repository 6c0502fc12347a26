"""What another basis of their input does to GPTQ's error of `o` and `down`, beside a rotated stream.

    python tools/input_bases.py smollm2-135m --layers 4,10,20 --bits 2,3,4

`o` as it is and with the values of every head turned; `down` as it is, with columns of one norm, and with a Hadamard
matrix before it, which a runtime would have to apply to every token. Errors are tr(E H Eᵀ), H the inputs' moment over
calibration text, as a multiple of "as it is" with as many bits; a row, or 512 columns, to a group.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from jpq_export.compress.calibration_text import calibration_and_heldout
from jpq_export.compress.decoder import Decoder, named_weights
from jpq_export.compress.load import load_model
from jpq_export.compress.permute import permuted
from jpq_export.compress.rotation import make_rotation
from jpq_export.compress.rounding import quantize
from jpq_export.numerics.scheme import Scheme, wide_group_size

SEQUENCES, LENGTH, BLOCK = 6, 512, 512


def moments(model: Decoder, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Name -> [K, K], the sum over tokens of xᵀx for the inputs x of these linears."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def add(_: object, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            x = inputs[0].float().flatten(0, -2)
            found[name] = found.get(name, 0) + x.T @ x

        return modules[name].register_forward_hook(add)

    handles = [hook(name) for name in names]
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    return found


def kron(size: int, seed: int) -> Tensor:
    """The orthogonal matrix of `make_rotation`, fp32 [size, size]."""
    return torch.kron(*(torch.from_numpy(part).contiguous() for part in make_rotation(size, seed))).float()


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix with random signs, fp32 [size, size]; size a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * matrix / size**0.5


def bases(name: str, W: Tensor, H: Tensor, head_dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Basis -> (W, H) there; the first is the one they have."""
    out = {"as it is": (W, H)}
    if name.endswith(".o"):
        turn = torch.block_diag(*[kron(head_dim, 0)] * (W.shape[1] // head_dim))
        return out | {"turned": (W @ turn, turn.T @ H @ turn)}
    norm = W.norm(dim=0)
    scale = norm.mean() / norm
    out["even columns"] = (W * scale, H / scale[:, None] / scale)
    if W.shape[1] % BLOCK == 0:
        mix = torch.block_diag(*[hadamard(BLOCK)] * (W.shape[1] // BLOCK))
        out["Hadamard"] = (W @ mix, mix.T @ H @ mix)
    return out


def error(W: Tensor, H: Tensor, bits: float) -> float:
    """tr(E H Eᵀ) of plain GPTQ."""
    scheme = Scheme(bits, wide_group_size(W.shape[1], BLOCK))
    E = quantize(W, H, scheme, method="gptq").dequantize() - W
    return float(((E @ H) * E).sum())


def main() -> None:
    """Print a line for every matrix, width and basis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder, GGUF file or a name that jpq-export knows")
    parser.add_argument("--layers", default="4,10,20")
    parser.add_argument("--bits", default="2,3,4")
    asked = parser.parse_args()
    loaded = load_model(asked.model)
    assert isinstance(loaded.model, Decoder), "a decoder"
    model, spec = permuted(loaded.model, seed=0), loaded.model.spec
    bos = spec.bos_id if spec.add_bos else None
    ids, _ = calibration_and_heldout(
        None, loaded.encode, bos_id=bos, calibration=SEQUENCES, heldout=2, length=LENGTH, seed=0
    )
    names = [f"layers.{i}.{part}" for i in asked.layers.split(",") for part in ("attn.o", "mlp.down")]
    weights, R = dict(named_weights(model)), kron(spec.hidden, 0)
    found = moments(model, names, torch.from_numpy(ids))
    for name in names:
        choices = bases(name, R.T @ weights[name].float(), found[name], spec.head_dim)
        for bits in map(float, asked.bits.split(",")):
            errors = {basis: error(*pair, bits) for basis, pair in choices.items()}
            ratios = ", ".join(f"{basis} {value / errors['as it is']:.3f}" for basis, value in errors.items())
            sys.stdout.write(f"{name}, {bits:g} bits: {ratios}\n")


if __name__ == "__main__":
    main()
