"""`jpq-export eval`: a model or bundle on a text, alone or against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import ModelError
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.format.bundle import Manifest
from jpq_export.progress import Stages

CHUNK = 256  # tokens fed to onnxruntime at once: bounds the logits to 256 x vocabulary x 4 bytes


def evaluate_model(
    model: str | None, *, text: Path, windows: int, context: int, teacher: str | None, no_teacher: bool
) -> dict[str, Any]:
    """The result as JSON values; see `TextQuality` for the keys."""
    stages, content, manifest = Stages(), read_text(text), None
    bundle = Path(model) if model and (Path(model) / "manifest.json").is_file() else None
    if bundle is not None:
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
    bos_id = loaded.spec.bos_id if loaded.spec.add_bos else None
    return loaded.model, loaded.encode, bos_id, loaded.name


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
