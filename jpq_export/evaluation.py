"""`jpq-export eval`: a model or bundle on a text, alone or against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import ModelError, UsageError
from jpq_export.evaluate.embeddings import evaluate_embeddings, read_pairs
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.format.bundle import Manifest, read_manifest
from jpq_export.format.encoder_spec import KIND, EncoderSpec
from jpq_export.progress import Stages

TEXTS = 32  # embedded at once
CHUNK = 256  # tokens fed to onnxruntime at once: bounds the logits to 256 x vocabulary x 4 bytes


def evaluate_model(
    model: str | None, *, text: Path, windows: int, context: int, teacher: str | None, no_teacher: bool
) -> dict[str, Any]:
    """The result as JSON values; see `TextQuality` for the keys."""
    stages, content, manifest = Stages(), read_text(text), None
    bundle = bundle_folder(model)
    if bundle is not None:
        if read_manifest(bundle).kind == KIND:
            raise UsageError(f"{bundle}: a sentence encoder has no perplexity; give --pairs instead of --text")
        student, encode, bos_id, name, manifest = _open_bundle(bundle, stages)
    else:
        student, encode, bos_id, name = _open_model(model, stages)
    sequences = token_windows(content, encode, windows=windows, context=context, bos_id=bos_id)
    against = None
    if not no_teacher and (teacher is not None or bundle is not None):
        against = _open_teacher(teacher, manifest, stages)
    with stages.stage("evaluate", f"{windows} windows of {context} tokens") as report:
        result = evaluate_text(student, against, sequences, progress=report)
    about = {"model": name, "text": content.name, "text_sha256": content.sha256}
    return about | {key: value for key, value in asdict(result).items() if value is not None}


def _open_teacher(source: str | None, manifest: Manifest | None, stages: Stages) -> Any:
    """The model named, or the one the bundle was made from: its weights must be the same ones then."""
    from jpq_export.compress.load import load_model

    named = source or (manifest.model["source"] if manifest else None)
    with stages.stage("load", f"loading {named or 'the default model'}") as report:
        loaded = load_model(named, progress=report)
    if source is None and manifest and loaded.sha256 != manifest.model["sha256"]:
        raise ModelError(
            f"{named}: has sha256 {loaded.sha256[:12]}…, the bundle was made from {manifest.model['sha256'][:12]}…; "
            "give the original with --teacher, or --no-teacher"
        )
    return loaded.model


def _open_model(source: str | None, stages: Stages) -> tuple[Any, Callable[[str], list[int]], int | None, str]:
    from jpq_export.compress.load import load_model

    with stages.stage("load", f"loading {source or 'the default model'}") as report:
        loaded = load_model(source, progress=report)
    if isinstance(loaded.spec, EncoderSpec):
        raise UsageError(f"{loaded.name}: a sentence encoder has no perplexity; give --pairs instead of --text")
    bos_id = loaded.spec.bos_id if loaded.spec.add_bos else None
    return loaded.model, loaded.encode, bos_id, loaded.name


def bundle_folder(model: str | None) -> Path | None:
    """The folder when `model` is a bundle's."""
    return Path(model) if model and (Path(model) / "manifest.json").is_file() else None


def evaluate_encoder(model: str | None, *, pairs: Path) -> dict[str, Any]:
    """A sentence encoder or its bundle on a file of pairs, as JSON values; see `EmbeddingQuality`."""
    stages, rows = Stages(), read_pairs(pairs)
    bundle = bundle_folder(model)
    with stages.stage("load", f"loading {model or 'the default model'}") as report:
        embed, name = _bundle_embed(bundle) if bundle else _model_embed(model, report)
    with stages.stage("evaluate", f"{len(rows.first)} pairs"):
        result = evaluate_embeddings(embed, rows)
    about = {"model": name, "pairs_file": rows.name, "pairs_sha256": rows.sha256}
    return about | {key: value for key, value in asdict(result).items() if value is not None}


def _model_embed(source: str | None, report: Any) -> tuple[Any, str]:
    import torch

    from jpq_export.compress.load import load_model

    loaded = load_model(source, progress=report)
    if not isinstance(loaded.spec, EncoderSpec):
        raise UsageError(f"--pairs: {loaded.name} is no sentence encoder; give --text for a language model")

    @torch.no_grad()
    def vectors(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return loaded.model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return _in_batches(vectors, loaded.tokenizer, loaded.spec.pad_id), loaded.name


def _bundle_embed(folder: Path) -> tuple[Any, str]:
    """On onnxruntime, in our kernels where they can be compiled, activations in fp32."""
    from tokenizers import Tokenizer

    from jpq_export.parity.encoder import OUTPUT, run
    from jpq_export.parity.runners import OrtRunner
    from jpq_export.runtime import native

    if read_manifest(folder).kind != KIND:
        raise UsageError(f"--pairs: {folder} is no sentence encoder; give --text for a language model")
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


def _open_bundle(folder: Path, stages: Stages) -> tuple[Any, Callable[[str], list[int]], int | None, str, Manifest]:
    """A bundle on onnxruntime, with its manifest."""
    from jpq_export.runtime.bundle import load

    with stages.stage("open", f"opening {folder}"):
        bundle = load(folder, exact=True)  # fp32 activations: the compressed model itself, not the fast kernels
    spec = bundle.model.spec

    def logits(ids: np.ndarray, _size: int) -> Iterator[np.ndarray]:
        past = None
        for start in range(0, len(ids), CHUNK):
            out = bundle.model.forward(ids[None, start : start + CHUNK], past=past)
            past = out.past
            yield out.logits[0]

    def encode(text: str) -> list[int]:
        return bundle.tokenizer.encode(text, add_special_tokens=False).ids

    return logits, encode, spec.bos_id if spec.add_bos else None, str(folder), bundle.manifest
