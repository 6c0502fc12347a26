"""The last stages of an export: parity, recorded vectors, quality, manifest, report, the final rename."""

from __future__ import annotations

import platform
from copy import copy
from dataclasses import asdict, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from jpq_export import __version__
from jpq_export.engine.contents import add_device_files, bundle_names
from jpq_export.engine.prebuilt import add_prebuilt
from jpq_export.engine.rtx import GRAPH, RtxEngine, try_build
from jpq_export.format.bundle import MANIFEST, Manifest, read_manifest, write_manifest
from jpq_export.format.encoder_spec import KIND, EncoderSpec
from jpq_export.format.plan import Plan
from jpq_export.format.spec import FLOAT_CACHE, ModelSpec
from jpq_export.rotate import original_sha256

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel
    from jpq_export.format.compressed import CompressedModel
    from jpq_export.pipeline import Export
    from jpq_export.request import Texts

VERSIONS = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "safetensors",
    "tensorrt_rtx",
)


def finish_bundle(
    export: Export, loaded: LoadedModel, texts: Texts, plan: Plan, compressed: CompressedModel
) -> dict[str, Any]:
    """Run the proof and write the bundle; the summary says whether parity passed."""
    if isinstance(compressed.spec, EncoderSpec):
        return _finish_encoder(export, loaded, texts, plan, compressed)
    from jpq_export.parity.check import check_parity
    from jpq_export.parity.recalled import Recalled
    from jpq_export.parity.report import write_report
    from jpq_export.parity.runners import TorchRunner
    from jpq_export.parity.vectors import record_vectors

    work, stages = export.work, export.stages
    prompts = [row[:64].tolist() for row in texts.heldout]
    while len(prompts) < 3:  # the padded batch wants three different prompts
        prompts.append(texts.calibration[len(prompts)][:64].tolist())
    with stages.stage("parity", "PyTorch against onnxruntime, every sub-layer") as report:
        reference = Recalled(TorchRunner(compressed))  # the vectors are of the same passes
        parity = check_parity(
            compressed,
            work.path("model.onnx"),
            prompts=prompts,
            steps=64,
            form=export.request.target.graph,
            half_path=work.path(GRAPH) if export.request.target.engine else None,
            reference=reference,
            progress=report,
        )
        work.path("parity.json").write_text(parity.to_json(), encoding="utf-8")
    with stages.stage("vectors", "recording vectors for the device"):
        record_vectors(compressed, work.path("vectors.safetensors"), prompts=prompts, runner=reference)
    del reference
    with stages.stage("quality", "quality on held-out text") as report:
        quality, kv_cache = _quality(loaded, texts, compressed, report)
    keep = {
        *("plan.json", "parity.json", "vectors.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *(path.name for path in work.folder.glob("model*.onnx*")),
    }
    engine = _engine(export, compressed) if export.request.target.engine else None
    keep |= {engine.file} if engine and engine.file else set()
    manifest = _manifest(export, loaded, plan, compressed, quality)
    facts = {"kv_cache": kv_cache, "activations": export.activations}
    manifest = replace(manifest, engine=engine.to_dict() if engine else None, **facts)
    if tensorrt := export.request.target.tensorrt:
        manifest = replace(manifest, device=_device_files(export, tensorrt))
        keep |= bundle_names(work.folder)
    write_manifest(work.folder, manifest.with_contents(work.folder, names=keep))
    write_report(work.folder)
    manifest = read_manifest(work.folder)
    # Only now goes what a killed run would need; `finish` knows the top level alone.
    work.finish(keep={MANIFEST, *(name.split("/")[0] for name in manifest.files)})
    return {"out": str(work.out), "plan": plan, "manifest": manifest, "parity": parity}


def _finish_encoder(
    export: Export, loaded: LoadedModel, texts: Texts, plan: Plan, compressed: CompressedModel
) -> dict[str, Any]:
    """The same for a sentence encoder."""
    from jpq_export.compress.student import dequantized
    from jpq_export.compress.teaching import teaching_of
    from jpq_export.parity.encoder import check_encoder, record_vectors
    from jpq_export.parity.report import write_report

    work, stages, rows = export.work, export.stages, texts.heldout.tolist()
    with stages.stage("parity", "PyTorch against onnxruntime, every sub-layer"):
        parity = check_encoder(compressed, work.path("model.onnx"), texts=rows, form=export.request.target.graph)
        work.path("parity.json").write_text(parity.to_json(), encoding="utf-8")
    with stages.stage("vectors", "recording vectors for the device"):
        record_vectors(compressed, work.path("vectors.safetensors"), texts=rows)
    with stages.stage("quality", "embeddings of held-out text"):
        student = dequantized(compressed).to(loaded.model.embed.weight.device)
        errors = teaching_of(loaded.model).errors(loaded.model, student, texts.quality).cpu().sort().values
    p99 = float(errors[min(len(errors) - 1, int(0.99 * len(errors)))])
    quality = {"texts": len(errors), "distance_mean": float(errors.mean()), "distance_p99": p99}
    keep = {"plan.json", "parity.json", "vectors.safetensors", "tokenizer.json", "tokenizer_config.json"}
    keep |= {path.name for path in work.folder.glob("model*.onnx*")}
    manifest = replace(_manifest(export, loaded, plan, compressed, quality), kind=KIND)
    write_manifest(work.folder, manifest.with_contents(work.folder, names=keep))
    write_report(work.folder)
    manifest = read_manifest(work.folder)
    work.finish(keep={MANIFEST, *manifest.files})
    return {"out": str(work.out), "plan": plan, "manifest": manifest, "parity": parity}


def _engine(export: Export, compressed: CompressedModel) -> RtxEngine:
    """Build the engine; what a killed run left is built again, for nothing says that it is whole."""
    from jpq_export.lower.export import weight_bytes

    assert isinstance(compressed.spec, ModelSpec)
    request, sm = export.request, export.request.target.sm
    assert sm is not None  # the target file was checked
    with export.stages.stage("engine", f"building the TensorRT-RTX engine for sm_{sm}"):
        size = weight_bytes(export.work.path(GRAPH))
        engine = try_build(export.work.folder, compressed.spec, sm=sm, context=request.context, weight_bytes=size)
    export.stages.note(engine.line)
    return engine


def _device_files(export: Export, tensorrt: str) -> dict[str, Any]:
    """Put into the bundle what the board needs to build an engine; the manifest's device section."""
    from jpq_export.parity import tolerance
    from jpq_export.parity.vectors import Vectors
    from jpq_export.runtime import native

    try:
        sources = native.sources_folder()
    except native.NativeError:
        sources = None  # the manifest lists what is missing, and `build` says it
    folder, target = export.work.folder, export.request.target
    recorded = Vectors.load(folder / "vectors.safetensors").tensors
    prompt = recorded["ids.prefill"].shape[1]
    section = add_device_files(
        folder,
        sources,
        tensorrt=tensorrt,
        bounds={"logits": tolerance.LOGITS_REL_RMS, "peak": tolerance.PEAK},
        prompt=max(prompt, recorded["ids.padded"].shape[1]),
        tokens=max(prompt + len(recorded["greedy"]), recorded["ids.padded"].shape[1]),
    )
    if target.kind != "jetson" or target.sm is None or section["missing"]:
        return section
    binaries = add_prebuilt(folder, sm=target.sm, tensorrt=tensorrt, cuda=target.cuda, say=export.stages.note)
    return {**section, "binaries": binaries}


def _quality(
    loaded: LoadedModel, texts: Texts, compressed: CompressedModel, report: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's `quality` and `kv_cache`, on held-out calibration text that decided nothing."""
    from jpq_export.compress.student import dequantized
    from jpq_export.evaluate.text_quality import evaluate_text

    spec = compressed.spec
    assert isinstance(spec, ModelSpec)
    student = dequantized(compressed).to(loaded.model.embed.weight.device)
    result = evaluate_text(student, loaded.model, texts.quality, progress=report)
    plain = replace(spec, kv_cache=FLOAT_CACHE)
    about = {"type": spec.kv_cache, "bytes_per_token": spec.cache_bytes_per_token}
    about |= {"float_bytes_per_token": plain.cache_bytes_per_token}
    if spec.kv_cache != FLOAT_CACHE:
        floating = copy(student)  # the same weights
        floating.stored = None
        without = evaluate_text(floating, loaded.model, texts.quality, progress=report)
        cost = evaluate_text(student, floating, texts.quality, progress=report)
        about["without"] = {"kl_mean": without.kl_mean, "perplexity": without.perplexity}
        about["kl_to_float"], about["top1_agreement"] = cost.kl_mean, cost.top1_agreement
    return asdict(result), about


def _manifest(
    export: Export, loaded: LoadedModel, plan: Plan, compressed: CompressedModel, quality: dict[str, Any]
) -> Manifest:
    import json

    request = export.request
    parameters = loaded.spec.parameters()
    return Manifest(
        model={
            "name": loaded.name,
            "source": loaded.source,
            "sha256": original_sha256(loaded),
            "parameters": parameters,
            "spec": json.loads(compressed.spec.to_json()),
        },
        target=asdict(request.target),
        method=plan.method,
        bits_per_weight=compressed.weight_bytes * 8 / parameters,
        weight_bytes=compressed.weight_bytes,
        original_bytes=loaded.original_bytes,
        effort=request.effort,
        seed=request.seed,
        budget=asdict(plan.budget),
        quality=quality,
        staircase=tuple(export.staircase),
        stages=tuple(record.to_dict() for record in export.stages.records),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of everything whose numbers matter."""
    found = {"jpq-export": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
