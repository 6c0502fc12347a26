"""Get a model in: any supported source becomes a frozen fp32 `Decoder`, its `ModelSpec` and its tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer

from jpq_export.compress import tokenizer as tokenizing
from jpq_export.compress.checkpoint import Checkpoint, open_folder, read_json
from jpq_export.compress.encoder_folder import is_encoder, open_encoder
from jpq_export.compress.gguf_file import open_gguf
from jpq_export.compress.model import Model, build_model
from jpq_export.compress.sources import Origin, Report, find
from jpq_export.errors import ModelError
from jpq_export.format.encoder_spec import Spec

logger = logging.getLogger(__name__)
# Times the fp32 weights. Loading and evaluating: the weights, one more copy, a forward pass (an estimate). An export:
# its highest stage stood at 3.9 GB for the default model's 0.54 GB of weights.
MEMORY_FACTOR = 2.5
EXPORT_FACTOR = 7.2
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """The teacher. `sha256`: see `weights_sha256`; `original_bytes`: of all parameters in fp16."""

    model: Model
    spec: Spec
    tokenizer: Tokenizer
    tokenizer_json: bytes
    tokenizer_config: bytes
    name: str
    source: str
    sha256: str
    original_bytes: int

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens; whoever feeds the model puts `spec.bos_id` first if `spec.add_bos`."""
        return tokenizing.encode(self.tokenizer, text)


def load_model(source: str | None, *, progress: Report | None = None, device: str = "cpu") -> LoadedModel:
    """Load `source` (folder, GGUF file, hub id, alias; None: the default). ModelError says what is wrong with it.

    `progress(done, total)` counts downloaded bytes first, then tensors read.
    """
    origin = find(source, progress=progress)
    checkpoint = open_origin(origin)
    check_memory(checkpoint.spec, checkpoint.where)
    checkpoint = settle_tying(checkpoint)
    weights = read_weights(checkpoint, progress)
    spec = checkpoint.spec
    digest = weights_sha256(spec, weights)
    model = build_model(spec, weights).to(device)
    logger.info("loaded %s: %s, %d layers, %d parameters", spec.name, spec.family, len(spec.layers), spec.parameters())
    files = checkpoint.tokenizer
    return LoadedModel(
        model=model,
        spec=spec,
        tokenizer=files.tokenizer,
        tokenizer_json=files.json,
        tokenizer_config=files.config,
        name=origin.name,
        source=origin.source,
        sha256=digest,
        original_bytes=2 * spec.parameters(),
    )


def open_origin(origin: Origin) -> Checkpoint:
    """By what lies there: a folder of safetensors or one GGUF file."""
    if origin.path.is_dir():
        config = origin.path / "config.json"
        if config.is_file() and is_encoder(raw := read_json(config)):
            return open_encoder(origin.path, raw, name=origin.name)
        return open_folder(origin.path, name=origin.name)
    if origin.path.suffix == ".gguf":
        return open_gguf(origin.path, name=origin.name)
    raise ModelError(f"{origin.path}: not a model; expected a folder with config.json and safetensors, or a .gguf file")


def available_bytes() -> int:
    """Memory this process may still use: the machine's, or less where a container's limit says so."""
    free = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):  # page cache, for instance of the model just downloaded
                used -= int(line.split()[1])
        return free if limit == "max" else min(free, int(limit) - used)
    except OSError:
        return free


def check_memory(spec: Spec, where: str, *, factor: float = MEMORY_FACTOR) -> None:
    """Refuse before starting what would not fit: `factor` times the fp32 weights."""
    needed = int(4 * spec.parameters() * factor)
    free = available_bytes()
    if needed > free:
        raise ModelError(
            f"{where}: {spec.parameters() / 1e6:.0f} million parameters need about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; close other programs, use a larger machine, or choose a smaller model"
        )


def settle_tying(checkpoint: Checkpoint) -> Checkpoint:
    """A tied model may also store its head: dropped when it equals the embedding, refused when it does not."""
    if not checkpoint.spec.tied or "head" not in checkpoint.tensors:
        return checkpoint
    if "embed" in checkpoint.tensors and not torch.equal(checkpoint.tensors["embed"](), checkpoint.tensors["head"]()):
        raise ModelError(
            f"{checkpoint.where}: the configuration ties head and embedding, but the stored head differs; set "
            "tie_word_embeddings to false if the head is meant"
        )
    return replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if k != "head"})


def read_weights(checkpoint: Checkpoint, progress: Report | None = None) -> dict[str, torch.Tensor]:
    """All weights of the spec, fp32, in sorted order; ModelError for a missing, extra, ill-shaped or non-finite one."""
    spec, where = checkpoint.spec, checkpoint.where
    expected = spec.matrices() | {name: (length,) for name, length in spec.vectors().items()}
    missing, extra = expected.keys() - checkpoint.tensors.keys(), checkpoint.tensors.keys() - expected.keys()
    if missing or extra:
        kind, names = ("missing", sorted(missing)) if missing else ("unexpected", sorted(extra))
        raise ModelError(
            f"{where}: {len(names)} {kind} tensor{'s'[: len(names) > 1]} ({names[0]}); expected {len(expected)}; "
            "configuration and weights do not belong together"
        )
    weights = {}
    for i, name in enumerate(sorted(expected)):
        weights[name] = _checked(checkpoint.tensors[name](), expected[name], name, where)
        if progress:
            progress(i + 1, len(expected))
    return weights


def _checked(tensor: torch.Tensor, shape: tuple[int, ...], name: str, where: str) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}; configuration and weights do not "
            "belong together"
        )
    if not all(bound.isfinite() for bound in torch.aminmax(tensor)):  # isfinite on it all would cost its bytes again
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(f"{where}: {name} has {bad} NaN or infinite values, expected none; download the model again")
    return tensor


def weights_sha256(spec: Spec, weights: Mapping[str, torch.Tensor]) -> str:
    """Identity of what the model computes: fp32 bytes by sorted name, and every fact of the spec but its name."""
    digest = hashlib.sha256(replace(spec, name="").to_json().encode())
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()
