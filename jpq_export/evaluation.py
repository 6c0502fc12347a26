"""`jpq-export eval`: a model or bundle on a text, alone or against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import UsageError
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.progress import Stages

CHUNK = 256  # tokens fed to onnxruntime at once: bounds the logits to 256 x vocabulary x 4 bytes


def evaluate_model(
    model: str | None, *, text: Path, windows: int, context: int, teacher: str | None, no_teacher: bool
) -> dict[str, Any]:
    """The result as JSON values; see `TextQuality` for the keys."""
    stages, content = Stages(), read_text(text)
    bundle = Path(model) if model and (Path(model) / "manifest.json").is_file() else None
    if bundle is not None:
        student, encode, bos_id, name, theirs = _open_bundle(bundle, stages)
        teacher = teacher or theirs
    else:
        student, encode, bos_id, name = _open_model(model, stages)
    sequences = token_windows(content, encode, windows=windows, context=context, bos_id=bos_id)
    against = None
    if not no_teacher and (teacher is not None or bundle is not None):
        if context > 2**20:
            raise UsageError(f"--context {context}: too long; give at most 1048576")
        against = _open_model(teacher, stages)[0]
    with stages.stage("evaluate", f"{windows} windows of {context} tokens") as report:
        result = evaluate_text(student, against, sequences, progress=report)
    about = {"model": name, "text": content.name, "text_sha256": content.sha256}
    return about | {key: value for key, value in asdict(result).items() if value is not None}


def _open_model(source: str | None, stages: Stages) -> tuple[Any, Callable[[str], list[int]], int | None, str]:
    from jpq_export.compress.load import load_model

    with stages.stage("load", f"loading {source or 'the default model'}") as report:
        loaded = load_model(source, progress=report)
    bos_id = loaded.spec.bos_id if loaded.spec.add_bos else None
    return loaded.model, loaded.encode, bos_id, loaded.name


def _open_bundle(folder: Path, stages: Stages) -> tuple[Any, Callable[[str], list[int]], int | None, str, str | None]:
    """A bundle on onnxruntime, with the source of its teacher (None = the default model)."""
    from jpq_export.runtime.bundle import load

    with stages.stage("open", f"opening {folder}"):
        bundle = load(folder, exact=True)  # fp32 activations: the compressed model itself, not the fast kernels
    spec, source = bundle.model.spec, bundle.manifest.model["source"]

    def logits(ids: np.ndarray, _size: int) -> Iterator[np.ndarray]:
        past = None
        for start in range(0, len(ids), CHUNK):
            out = bundle.model.forward(ids[None, start : start + CHUNK], past=past)
            past = out.past
            yield out.logits[0]

    def encode(text: str) -> list[int]:
        return bundle.tokenizer.encode(text, add_special_tokens=False).ids

    return logits, encode, spec.bos_id if spec.add_bos else None, str(folder), source
