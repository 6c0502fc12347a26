"""A compressed model: its spec, its packed weights and its plain vectors, and the safetensors file that holds them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jpq_export.errors import BundleError
from jpq_export.format.encoder_spec import Spec, spec_from_json
from jpq_export.format.tensor_file import save_tensors
from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.row_blocks import RowBlocks, StoredWeight
from jpq_export.numerics.scheme import Scheme

FORMAT = "jpq-compressed/1"
COMPRESSED = "compressed.safetensors"  # its file in the folder of an export that stopped before the bundle
DOWN, UP = ".adapter.down", ".adapter.up"  # after the name of the linear that has the branch


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A low-rank branch beside a linear y = x Wᵀ: + (x down) up; float16 [K, rank] and [rank, N]."""

    down: np.ndarray
    up: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.down.nbytes + self.up.nbytes

    def product(self) -> np.ndarray:
        """What it adds to the weight: float32 [N, K]."""
        return (self.down.astype(np.float32) @ self.up.astype(np.float32)).T


@dataclass(frozen=True, slots=True, eq=False)
class CompressedModel:
    """`quantized`: every matrix of `spec.matrices()`; `vectors`: every vector of `spec.vectors()`, float32.

    `adapters`: low-rank branches of the linears that have one.
    """

    spec: Spec
    quantized: dict[str, StoredWeight]
    vectors: dict[str, np.ndarray]
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check: shapes that do not fit the spec are a ValueError."""
        for name, shape in self.spec.matrices().items():
            got = self.quantized[name].shape if name in self.quantized else None
            if got != shape:
                raise ValueError(f"{name}: expected a matrix {shape}, got {got}")
        for name, length in self.spec.vectors().items():
            got = self.vectors[name].shape if name in self.vectors else None
            if got != (length,):
                raise ValueError(f"{name}: expected a vector ({length},), got {got}")
        for name, adapter in self.adapters.items():
            n, k = self.quantized[name].shape
            rank = adapter.up.shape[0]
            if (adapter.down.shape, adapter.up.shape) != ((k, rank), (rank, n)):
                raise ValueError(f"{name}: expected a branch of {k} inputs and {n} outputs, got {adapter.down.shape}")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as stored: codes, scales, zero points, norms and biases (float32), low-rank branches."""
        parts = (*self.quantized.values(), *self.vectors.values(), *self.adapters.values())
        return sum(part.nbytes for part in parts)

    def weight(self, name: str) -> np.ndarray:
        """What a matrix multiplies by, its low-rank branch added: float32 [N, K]."""
        whole = self.quantized[name].dequantize()
        return whole + self.adapters[name].product() if name in self.adapters else whole

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = dict(self.vectors)
        schemes = {}
        for name, weight in self.quantized.items():
            for part, block in stored_blocks(name, weight):
                tensors[f"{part}.packed"], tensors[f"{part}.scales"] = block.packed, block.scales
                if block.zeros is not None:
                    tensors[f"{part}.zeros"] = block.zeros
                schemes[part] = {**asdict(block.scheme), "shape": block.shape}
            if isinstance(weight, RowBlocks) and weight.positions is not None:
                tensors[f"{name}.positions"] = weight.positions
        for name, adapter in self.adapters.items():
            tensors[f"{name}{DOWN}"], tensors[f"{name}{UP}"] = adapter.down, adapter.up
        save_tensors(path, tensors, meta={"format": FORMAT, "spec": self.spec.to_json(), "schemes": schemes})

    @staticmethod
    def load(path: Path) -> CompressedModel:
        """Read it back; BundleError when the file is damaged."""
        try:
            with safe_open(path, framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["jpq"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            spec = spec_from_json(meta["spec"])
            blocks = {}
            for name, raw in meta["schemes"].items():
                scheme = Scheme(
                    raw["bits"],
                    raw["group_size"],
                    raw["symmetric"],
                    raw.get("integer_zero", False),
                    raw.get("normal", False),
                )
                packed, scales = tensors.pop(f"{name}.packed"), tensors.pop(f"{name}.scales")
                zeros = tensors.pop(f"{name}.zeros", None)
                blocks[name] = QuantizedWeight(scheme, tuple(raw["shape"]), packed, scales, zeros)
            owners = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
            adapters = {name: Adapter(tensors.pop(f"{name}{DOWN}"), tensors.pop(f"{name}{UP}")) for name in owners}
            return CompressedModel(spec, _joined(blocks, tensors), tensors, adapters)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise BundleError(f"{path}: not a readable compressed model ({error}); export it again") from error


def stored_blocks(name: str, weight: StoredWeight) -> list[tuple[str, QuantizedWeight]]:
    """What is stored of a weight by name: itself, or "<name>.block0", "<name>.block1", ..."""
    if isinstance(weight, QuantizedWeight):
        return [(name, weight)]
    return [(f"{name}.block{i}", block) for i, block in enumerate(weight.blocks)]


def _joined(blocks: dict[str, QuantizedWeight], tensors: dict[str, np.ndarray]) -> dict[str, StoredWeight]:
    """Undo `stored_blocks` for all weights; takes their positions out of `tensors`."""
    out: dict[str, StoredWeight] = {}
    parts: dict[str, list[QuantizedWeight]] = {}
    for name, block in blocks.items():  # as they were saved: block0, block1, ...
        owner, _, last = name.rpartition(".")
        if last.startswith("block"):
            parts.setdefault(owner, []).append(block)
        else:
            out[name] = block
    rows = {name: RowBlocks(tuple(part), tensors.pop(f"{name}.positions", None)) for name, part in parts.items()}
    return out | rows
