"""`write_report`: parity.html, one self-contained page from manifest.json, plan.json and parity.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from jpq_export.errors import BundleError, StorageError
from jpq_export.format.bundle import Manifest, hash_file, read_manifest, write_manifest
from jpq_export.format.encoder_spec import KIND
from jpq_export.parity import grid, pictures, report_encoder, tolerance
from jpq_export.parity.pictures import number, size

NAME = "parity.html"
TARGET_UNITS = {
    "sm": ("CUDA compute capability", lambda v: f"{v // 10}.{v % 10}"),
    "memory_bytes": ("memory", lambda v: f"{v / 2**30:.1f} GiB"),
    "bandwidth_gb_s": ("memory bandwidth", lambda v: f"{v:g} GB/s"),
    "fp16_tflops": ("fp16 arithmetic", lambda v: f"{v:g} TFLOP/s"),
    "op_overhead_us": ("cost of one launched operator", lambda v: f"{v:g} µs"),
    "default_bits": ("default budget", lambda v: f"{v:g} bits per weight"),
    "tensorrt": ("TensorRT", str),
    "cuda": ("CUDA", str),
    "jetpack": ("JetPack", str),
    "power_mode": ("power mode", str),
    "graph": ("graph form", str),
    "engine": ("engine built by the export", str),
    "stored_bits": ("widths that engine stores", lambda v: " and ".join(map(str, v)) if v else "every one"),
}


WORDS = {
    "short": "KL",
    "unit": "KL, nats",
    "cost": "KL {} nats",
    "embed": "embedding, also the output head (tied)",
    "long": "predicted KL, nats a token",
    "time": "predicted time of one token",
    "stages": "KL to the original model on held-out text after every stage, nats a token",
}


def write_report(folder: Path) -> Path:
    """Write `folder`/parity.html and its hash into the manifest; a stage that was not run is said to be missing."""
    manifest = read_manifest(folder)
    page = render(manifest, plan=_optional(folder / "plan.json"), parity=_optional(folder / "parity.json"))
    path = folder / NAME
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot write ({error.strerror}); free space or choose another --out") from error
    files = dict(sorted({**manifest.files, NAME: hash_file(path)}.items()))
    write_manifest(folder, replace(manifest, files=files))
    return path


def render(manifest: Manifest, *, plan: Mapping[str, Any] | None, parity: Mapping[str, Any] | None) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("jpq_export.parity", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "number": number}
    encoder = manifest.kind == KIND
    words = report_encoder.WORDS if encoder else WORDS
    parity = report_encoder.as_decoders(parity) if encoder and parity else parity
    template = environment.get_template("report.html.j2")
    return template.render(
        manifest=manifest,
        plan=plan,
        parity=parity,
        encoder=encoder,
        words=words,
        on_device=report_encoder.on_device(manifest) if encoder else (),
        tiles=_tiles(manifest, parity),
        verdict=_verdict(parity),
        error_plots=[
            (r, pictures.layer_errors(r, _as_run(parity) if not i else None))
            for i, r in enumerate(_runtimes(parity))
            if r["layers"]
        ],
        as_run=_as_run(parity),
        small_effect=tolerance.SMALL_EFFECT,
        widths=_picture(partial(grid.widths, words=words), plan, "layers"),
        shades=sorted({grid.shade(choice) for choice in plan["choices"]}) if plan else [],
        front=_picture(partial(pictures.front, words=words), plan, "front"),
        staircase=pictures.staircase(manifest.staircase, words["short"]) if manifest.staircase else None,
        dearest=_dearest(plan),
        target=_target_rows(manifest.target),
        longest=max((stage["seconds"] for stage in manifest.stages), default=0) or 1,
        files=[(name, entry) for name, entry in manifest.files.items() if name != NAME],
        hatch=grid.hatch(),
    )


def _optional(path: Path) -> dict[str, Any] | None:
    """The parsed file, or None when the bundle has none; BundleError when it is not JSON."""
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}, expected an object")
        return raw
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable JSON ({error}); export the bundle again") from error


def _runtimes(parity: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    return parity["runtimes"] if parity else ()


def _as_run(parity: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return parity.get("as_run") if parity else None


def _picture(draw: Any, plan: Mapping[str, Any] | None, needed: str) -> Markup | None:
    return draw(plan) if plan and plan.get(needed) else None


def _verdict(parity: Mapping[str, Any] | None) -> dict[str, str]:
    """Class, word and sentence of the headline."""
    if not parity:
        return {
            "look": "unknown",
            "word": "not checked",
            "line": "This bundle holds no parity.json: parity was not run.",
        }
    if parity["passed"]:
        first = parity["runtimes"][0]
        if "logits" not in first:
            return {"look": "good", "word": "passed", "line": report_encoder.passed_line(parity)}
        line = (
            f"{first['name']} {first['version']} computes what {parity['reference']} computes: logits differ by "
            f"{number(first['logits']['rel_rms'], 2)} of their size, {first['greedy']['equal']} of "
            f"{first['greedy']['steps']} greedy tokens are equal."
        )
        return {"look": "good", "word": "passed", "line": line}
    every = [*parity["runtimes"], *([parity["as_run"]] if parity.get("as_run") else [])]
    bad = next(runtime for runtime in every if not runtime["passed"])
    where = bad["divergence"]
    line = f"{bad['name']} does not compute what {parity['reference']} computes."
    if where:
        line += f" First wrong value: {where['place']} (sub-layer {where['sublayer']}, node {where['node']})."
    return {"look": "bad", "word": "failed", "line": line}


def _tiles(manifest: Manifest, parity: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The headline numbers: title, value, note."""
    share = manifest.weight_bytes / manifest.original_bytes if manifest.original_bytes else 0.0
    tiles = [
        _tile("weights", size(manifest.weight_bytes), f"{share:.1%} of {size(manifest.original_bytes)} in fp16"),
        _tile("bits per weight", f"{manifest.bits_per_weight:.3f}", "whole model: embedding, head, scales"),
    ]
    quality = manifest.quality or {}
    if "distance_mean" in quality:
        tiles += [_tile(*tile) for tile in report_encoder.quality_tiles(quality)]
    elif quality:
        tiles += _quality_tiles(quality)
    else:
        tiles.append(_tile("quality", "–", "not measured in this run"))
    for runtime in _runtimes(parity)[:1]:
        if "logits" not in runtime:
            tiles.append(_tile(*report_encoder.error_tile(runtime)))
            continue
        greedy = runtime["greedy"]
        note = f"{greedy['equal']} of {greedy['steps']} greedy tokens equal"
        tiles.append(_tile("runtime error of logits", number(runtime["logits"]["rel_rms"], 2), note))
    return tiles


def _quality_tiles(quality: Mapping[str, Any]) -> list[dict[str, str]]:
    """Tiles of what was measured on held-out text; without a teacher there is only perplexity."""
    tokens = f"on {quality['tokens']:,} held-out tokens"
    if quality.get("kl_mean") is None:
        return [_tile("perplexity", f"{quality['perplexity']:.2f}", tokens)]
    change = quality["perplexity"] / quality["teacher_perplexity"] - 1
    before = f"from {quality['teacher_perplexity']:.2f}: {change:+.1%}"
    return [
        _tile("KL to the original", f"{quality['kl_mean']:.4f} nats", f"99th percentile {quality['kl_p99']:.2f}"),
        _tile("perplexity", f"{quality['perplexity']:.2f}", before),
        _tile("same first choice", f"{quality['top1_agreement']:.1%}", tokens),
    ]


def _tile(title: str, value: str, note: str) -> dict[str, str]:
    return {"title": title, "value": value, "note": note}


def _dearest(plan: Mapping[str, Any] | None, count: int = 10) -> list[Mapping[str, Any]]:
    """The weights predicted to cost most."""
    choices = plan["choices"] if plan else []
    return sorted(choices, key=lambda c: (-(c.get("predicted_kl") or 0.0), c["name"]))[:count]


def _target_rows(target: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(fact, value with unit, source) of every known fact of the target."""
    sources = target.get("sources") or {}
    return [
        (title, show(target[key]), str(sources.get(key, "")))
        for key, (title, show) in TARGET_UNITS.items()
        if target.get(key) not in (None, [], ())
    ]
