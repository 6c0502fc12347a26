"""`jpq-export eval`: a model or bundle on a text, alone or against its teacher, and on zero-shot tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jpq_export.errors import ModelError, UncoveredError, UsageError
from jpq_export.evaluate.predictors import OrtPredictor, Predictor, TorchPredictor
from jpq_export.evaluate.task_data import TaskChoice
from jpq_export.evaluate.text_quality import LogitSource, evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.format.bundle import Manifest
from jpq_export.format.compressed import COMPRESSED, CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec, Spec
from jpq_export.format.spec import ModelSpec
from jpq_export.progress import Stages

if TYPE_CHECKING:
    from jpq_export.fallback.load import TracedModel

CHUNK = 256  # tokens fed to onnxruntime at once: bounds the logits to 256 x vocabulary x 4 bytes


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What is evaluated: `source`, see `LogitSource`; `predictor`, for tasks; `encode` adds no special tokens."""

    source: Any
    predictor: Predictor
    spec: ModelSpec
    encode: Callable[[str], list[int]]
    name: str
    manifest: Manifest | None = None

    @property
    def bos_id(self) -> int | None:
        """What every window starts with, if anything."""
        return self.spec.bos_id if self.spec.add_bos else None


def evaluate_model(
    model: str | None,
    *,
    text: Path | None,
    windows: int,
    context: int,
    teacher: str | None,
    no_teacher: bool,
    tasks: TaskChoice | None = None,
) -> dict[str, Any]:
    """The result as JSON values: keys of `TextQuality` with a text, `tasks` (see `run_tasks`) with tasks."""
    stages, content = Stages(), None if text is None else read_text(text)
    if tasks is not None:
        check_tasks(tasks)
    opened = _open(model, teacher, stages)
    about: dict[str, Any] = {"model": opened.name}
    if content is not None:
        check_window(context, opened.spec, "--context")
        sequences = token_windows(content, opened.encode, windows=windows, context=context, bos_id=opened.bos_id)
        against = None
        if not no_teacher and (teacher is not None or opened.manifest is not None):
            against = _open_teacher(teacher, opened.manifest, stages)
        with stages.stage("evaluate", f"{windows} windows of {context} tokens") as report:
            result = evaluate_text(opened.source, against, sequences, progress=report)
        about |= {"text": content.name, "text_sha256": content.sha256}
        about |= {key: value for key, value in asdict(result).items() if value is not None}
    if tasks is not None:
        about["tasks"] = evaluate_tasks(opened.predictor, opened.spec, opened.encode, tasks, stages)
        about["tasks_about"] = tasks.about()
    return about


def check_window(context: int, spec: Spec, option: str) -> None:
    """UsageError for windows longer than the model has positions: a table of them ends there."""
    if context > spec.max_positions:
        raise UsageError(
            f"{option} {context}: {spec.name} has {spec.max_positions} positions; give {spec.max_positions} or less"
        )


def check_tasks(tasks: TaskChoice) -> None:
    """A task that does not exist or has no data is said before a model is loaded."""
    from jpq_export.evaluate.harness import load_tasks

    load_tasks(tasks)


def evaluate_tasks(
    predictor: Predictor, spec: ModelSpec, encode: Callable[[str], list[int]], tasks: TaskChoice, stages: Stages
) -> dict[str, Any]:
    """Zero-shot results by task; see `run_tasks`."""
    from jpq_export.evaluate.harness import ScoredModel, run_tasks

    with stages.stage("tasks", ", ".join(tasks.names)) as report:
        return run_tasks(ScoredModel(predictor, spec, encode, progress=report), tasks)


def _open(model: str | None, teacher: str | None, stages: Stages) -> Opened:
    """A bundle, the folder of an export that stopped before it (`--until`), or any model."""
    folder = Path(model) if model else None
    if folder and (folder / "manifest.json").is_file():
        return _open_bundle(folder, stages)
    if folder and (folder / COMPRESSED).is_file():
        return _open_compressed(folder, teacher, stages)
    return _open_model(model, stages)


def _open_teacher(source: str | None, manifest: Manifest | None, stages: Stages) -> Any:
    """The model named, or the one the bundle was made from: its weights must be the same ones then."""
    from jpq_export.compress.load import LoadedModel, load_model

    named = source or (manifest.model["source"] if manifest else None)
    try:
        with stages.stage("load", f"loading {named or 'the default model'}") as report:
            loaded = load_model(named, progress=report)
    except UncoveredError:
        loaded = _load_traced(named, stages)
    if source is None and manifest and loaded.sha256 != manifest.model["sha256"]:
        raise ModelError(
            f"{named}: has sha256 {loaded.sha256[:12]}…, the bundle was made from {manifest.model['sha256'][:12]}…; "
            "give the original with --teacher, or --no-teacher"
        )
    return loaded.model if isinstance(loaded, LoadedModel) else _traced_source(loaded)


def _load_traced(source: str | None, stages: Stages) -> TracedModel:
    """A model of a family that only the fallback takes."""
    from jpq_export.fallback.load import load_traced

    with stages.stage("load", f"loading {source} in transformers' own code") as report:
        return load_traced(source, progress=report)


def _traced_source(loaded: TracedModel) -> LogitSource:
    from jpq_export.fallback.reference import logit_source

    return logit_source(loaded)


def _open_traced(source: str | None, stages: Stages) -> Opened:
    from jpq_export.fallback.reference import TracedPredictor

    loaded = _load_traced(source, stages)
    return Opened(_traced_source(loaded), TracedPredictor(loaded), loaded.spec, loaded.encode, loaded.name)


def _open_model(source: str | None, stages: Stages) -> Opened:
    from jpq_export.compress.load import load_model

    try:
        with stages.stage("load", f"loading {source or 'the default model'}") as report:
            loaded = load_model(source, progress=report)
    except UncoveredError:
        return _open_traced(source, stages)
    spec = _decoder_spec(loaded.spec, loaded.name)
    return Opened(loaded.model, TorchPredictor(loaded.model), spec, loaded.encode, loaded.name)


def _decoder_spec(spec: Spec, name: str) -> ModelSpec:
    if isinstance(spec, EncoderSpec):
        raise UsageError(f"{name}: a sentence encoder has no perplexity; give --pairs instead of --text or --tasks")
    return spec


def _open_compressed(folder: Path, teacher: str | None, stages: Stages) -> Opened:
    """The compressed model in PyTorch; without a tokenizer beside it, the teacher's."""
    from jpq_export.compress.student import dequantized
    from jpq_export.compress.tokenizer import read_tokenizer

    with stages.stage("open", f"opening {folder}"):
        compressed = CompressedModel.load(folder / COMPRESSED)
        spec, model = _decoder_spec(compressed.spec, str(folder)), dequantized(compressed)
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder, vocab=spec.vocab, bos_id=spec.bos_id).tokenizer
        return Opened(model, TorchPredictor(model), spec, partial(_encode, tokenizer), str(folder))
    if teacher is None:
        raise UsageError(f"{folder}: a compressed model without a tokenizer; name its original with --teacher")
    return replace(
        _open_model(teacher, stages), source=model, predictor=TorchPredictor(model), spec=spec, name=str(folder)
    )


def _open_bundle(folder: Path, stages: Stages) -> Opened:
    """A bundle on onnxruntime, with its manifest."""
    from jpq_export.runtime.bundle import load

    with stages.stage("open", f"opening {folder}"):
        bundle = load(folder, exact=True, check=True)  # exact: the compressed model itself, in fp32

    def logits(ids: np.ndarray, _size: int) -> Iterator[np.ndarray]:
        past = None
        for start in range(0, len(ids), CHUNK):
            out = bundle.model.forward(ids[None, start : start + CHUNK], past=past)
            past = out.past
            yield out.logits[0]

    encode = partial(_encode, bundle.tokenizer)
    return Opened(logits, OrtPredictor(bundle.model), bundle.model.spec, encode, str(folder), bundle.manifest)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
