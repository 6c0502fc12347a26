"""What parity.html says otherwise of a sentence encoder: embeddings instead of logits, distances instead of KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpq_export.format.bundle import Manifest
from jpq_export.parity.pictures import number, size

WORDS = {
    "short": "distance",
    "unit": "distance, 1 − cosine",
    "cost": "distance {}",
    "embed": "embedding",
    "long": "predicted distance, 1 − cosine a text",
    "time": "predicted time of one text",
    "stages": "Distance (1 − cosine) to the original model's embeddings of held-out text after every stage",
}


def as_decoders(parity: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's parity.json with the keys that pictures and verdict read in a decoder's."""
    as_run = parity.get("as_run")
    runtimes = [_runtime(runtime) for runtime in parity["runtimes"]]
    return {**parity, "runtimes": runtimes, "as_run": _runtime(as_run) if as_run else None}


def _runtime(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**raw, "divergence": raw["first_diverging"], "judged_by": "rounding"}


def passed_line(parity: Mapping[str, Any]) -> str:
    """The headline when all is right."""
    first = parity["runtimes"][0]
    texts = sum(case["texts"] for case in first["cases"])
    return (
        f"{first['name']} {first['version']} computes what {parity['reference']} computes: embeddings of {texts} texts "
        f"differ by {number(_worst(first, 'rel_rms'), 2)} of their length at most."
    )


def quality_tiles(quality: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, note) of the embeddings of held-out text."""
    note = f"1 − cosine, 99th percentile {quality['distance_p99']:.4f}"
    return [("distance to the original", f"{quality['distance_mean']:.4f}", f"{note}, {quality['texts']} texts")]


def error_tile(runtime: Mapping[str, Any]) -> tuple[str, str, str]:
    """(title, value, note) of the proof."""
    note = f"largest 1 − cosine {number(_worst(runtime, 'distance'), 2)}"
    return "runtime error of embeddings", number(_worst(runtime, "rel_rms"), 2), note


def _worst(runtime: Mapping[str, Any], key: str) -> float | None:
    """None, for not finite, wins."""
    values = [case[key] for case in runtime["cases"]]
    return None if None in values else max(values)


def on_device(manifest: Manifest) -> list[str]:
    """What runs where, a sentence or two a paragraph."""
    files, spec = manifest.files, manifest.model["spec"]
    entry = files.get("model.onnx.data")
    stored = size(entry.bytes) if entry else "its weights"
    lines = [
        f"Input: token ids and mask [batch, tokens] of up to {spec['max_positions']} tokens a text; the tokenizer runs "
        f"on the processor. Output: one embedding of {spec['hidden']} numbers a text; {spec['pooling']} pooling"
        + (" and division by the length are" if spec["normalize"] else " is")
        + " inside the graph.",
        f"The file holds {stored} of packed weights, and matrices stay packed in memory but for the widths its kernels "
        "do not know. With a C compiler onnxruntime runs our kernels, otherwise its own operators; activations are "
        "fp32 unless asked otherwise.",
    ]
    if "model.trt.onnx" in files:
        version = manifest.target.get("tensorrt")
        lines.append(
            f"model.trt.onnx is the same network for TensorRT {version} with the operators of the jpq plugin. It was "
            "written and checked, not run: no engine was built for it here, and the proof above is of model.onnx."
        )
    return lines
