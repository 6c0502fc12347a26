"""`eval --pairs`: a sentence encoder, or its bundle, on pairs of texts with scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import UsageError
from jpq_export.evaluate.embeddings import closeness, evaluate_embeddings, read_pairs
from jpq_export.format.bundle import read_manifest
from jpq_export.format.compressed import COMPRESSED, CompressedModel
from jpq_export.format.encoder_spec import KIND, EncoderSpec
from jpq_export.progress import Stages

TEXTS = 32  # embedded at once


def evaluate_encoder(model: str | None, *, pairs: Path, teacher: str | None = None) -> dict[str, Any]:
    """A sentence encoder or its bundle on a file of pairs, as JSON values; see `EmbeddingQuality`.

    `teacher`: a model or another bundle to compare with, see `Closeness`; its tokenizer serves an export that stopped
    before the bundle.
    """
    stages, rows = Stages(), read_pairs(pairs)
    embed, name = _open(model, teacher, stages)
    theirs, other = _open(teacher, None, stages) if teacher is not None else (None, None)
    with stages.stage("evaluate", f"{len(rows.first)} pairs"):
        result = asdict(evaluate_embeddings(embed, rows))
    about = {"model": name, "pairs_file": rows.name, "pairs_sha256": rows.sha256}
    if theirs is not None:
        with stages.stage("compare", f"{len(rows.first)} pairs, against {other}"):
            result |= {"teacher": other} | asdict(closeness(embed, theirs, rows))
    return about | {key: value for key, value in result.items() if value is not None}


def _open(model: str | None, teacher: str | None, stages: Stages) -> tuple[Any, str]:
    """What embeds texts, and its name."""
    folder = Path(model) if model else None
    with stages.stage("load", f"loading {model or 'the default model'}") as report:
        if folder and (folder / "manifest.json").is_file():
            return _bundle_embed(folder)
        if folder and (folder / COMPRESSED).is_file():
            return _stopped_embed(folder, teacher, report)
        return _model_embed(model, report)


def _model_embed(source: str | None, report: Any) -> tuple[Any, str]:
    from jpq_export.compress.load import load_model

    loaded = load_model(source, progress=report)
    spec = _encoder_spec(loaded.spec, loaded.name)
    return _torch_embed(loaded.model, loaded.tokenizer, spec), loaded.name


def _stopped_embed(folder: Path, teacher: str | None, report: Any) -> tuple[Any, str]:
    """The compressed model in PyTorch, of an export that stopped before the bundle (`--until compress`)."""
    from jpq_export.compress.load import load_model
    from jpq_export.compress.student import dequantized

    compressed = CompressedModel.load(folder / COMPRESSED)
    spec = _encoder_spec(compressed.spec, str(folder))
    if teacher is None:
        raise UsageError(f"{folder}: a compressed model without a tokenizer; name its original with --teacher")
    tokenizer = load_model(teacher, progress=report).tokenizer
    return _torch_embed(dequantized(compressed), tokenizer, spec), str(folder)


def _encoder_spec(spec: Any, name: str) -> EncoderSpec:
    if not isinstance(spec, EncoderSpec):
        raise UsageError(f"--pairs: {name} is no sentence encoder; give --text for a language model")
    return spec


def _torch_embed(model: Any, tokenizer: Any, spec: EncoderSpec) -> Any:
    import torch

    @torch.no_grad()
    def vectors(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return _in_batches(vectors, tokenizer, spec.pad_id)


def _bundle_embed(folder: Path) -> tuple[Any, str]:
    """On onnxruntime, in our kernels where they can be compiled, activations in fp32."""
    from tokenizers import Tokenizer

    from jpq_export.parity.encoder import OUTPUT, run
    from jpq_export.parity.runners import OrtRunner
    from jpq_export.runtime import native
    from jpq_export.runtime.bundle import check_files

    manifest = read_manifest(folder)
    if manifest.kind != KIND:
        raise UsageError(f"--pairs: {folder} is no sentence encoder; give --text for a language model")
    check_files(folder, manifest)
    runner = OrtRunner(folder / "model.onnx", kernels=native.available())
    assert isinstance(runner.spec, EncoderSpec)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _in_batches(lambda ids, mask: run(runner, ids, mask)[OUTPUT], tokenizer, runner.spec.pad_id), str(folder)


def _in_batches(vectors: Callable[[np.ndarray, np.ndarray], np.ndarray], tokenizer: Any, pad_id: int) -> Any:
    """Texts -> embeddings; texts of like length go together, so that little is computed for padding."""

    def embed(texts: list[str]) -> np.ndarray:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        order, parts = sorted(range(len(rows)), key=lambda i: len(rows[i])), []
        for start in range(0, len(rows), TEXTS):
            batch = [rows[i] for i in order[start : start + TEXTS]]
            ids = np.full((len(batch), max(map(len, batch))), pad_id, np.int64)
            mask = np.zeros_like(ids)
            for row, text in enumerate(batch):
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
            parts.append(vectors(ids, mask))
        return np.concatenate(parts)[np.argsort(order)]

    return embed
