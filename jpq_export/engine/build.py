"""`jpq-export build`, step by step: preflight, plugin, engine, recorded vectors, report. Only here do they meet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export import __version__
from jpq_export.engine.aot import as_plugin, read_kernels, register
from jpq_export.engine.builder import DECODE, PREFILL, EngineError, build_engine, load_plugin
from jpq_export.engine.builder import profile_shapes as shapes
from jpq_export.engine.cuda import Cuda
from jpq_export.engine.device import Device, import_tensorrt, read_device
from jpq_export.engine.plugin import Plugin, PluginError, build_commands, choose, compile_plugin
from jpq_export.engine.preflight import Check, preflight
from jpq_export.engine.report import DeviceReport, measure_speed, write_report
from jpq_export.engine.session import EngineSession
from jpq_export.engine.settings import Settings, device_section, size_text, spec_of
from jpq_export.engine.vectors import check_vectors, read_vectors
from jpq_export.format.bundle import Manifest, hash_file, read_manifest
from jpq_export.format.spec import ModelSpec

Say = Callable[[str], None]
VECTORS = "vectors.safetensors"


@dataclass(frozen=True, slots=True)
class Job:
    """One bundle on one board, and what the preflight found."""

    settings: Settings
    manifest: Manifest
    spec: ModelSpec
    device: Device
    checks: tuple[Check, ...]


def prepare(settings: Settings, device: Device | None = None) -> Job:
    """Read the bundle and the board and check them; BundleError when it is no bundle at all."""
    manifest = read_manifest(settings.bundle)
    device = device or read_device(settings.out)
    spec = spec_of(manifest, settings.bundle)
    return Job(settings, manifest, spec, device, tuple(preflight(manifest, device, settings)))


def describe(job: Job) -> list[str]:
    """What `run` would do, for --dry-run."""
    settings, section = job.settings, device_section(job.manifest)
    plugin = _plugin(job)
    lines = [f"plugin: {plugin.origin} ({plugin.path})"] if plugin else ["plugin: compile the bundle's sources"]
    if not plugin:
        lines += ["  $ " + " ".join(command) for command in build_commands(settings, job.device.tools, job.device.sm)]
    lines.append(f"engine: {section.get('graph')} -> {settings.out}, workspace {size_text(settings.workspace_bytes)}")
    for index, name in ((DECODE, "decode"), (PREFILL, "prefill")):
        low, best, high = shapes("attention_mask", job.spec, settings, profile=index)
        seq = [shape[1] for shape in shapes("input_ids", job.spec, settings, profile=index)]
        lines.append(f"  {name}: {seq[0]}..{seq[2]} new tokens, {low[1]}..{high[1]} in all, tuned for {best[1]}")
    return [*lines, f"vectors: {VECTORS}, logits within {section.get('bounds', {}).get('logits')} relative RMS"]


def run(job: Job, say: Say) -> DeviceReport:
    """Build, check, report. The engine gets its name only when it computes what was recorded."""
    settings, seconds = job.settings, {}
    settings.home.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    plugin = _plugin(job) or _compile(job, say)
    seconds["plugin"] = round(time.perf_counter() - start, 1)
    trt, missing = import_tensorrt()
    if trt is None:  # the preflight said it at length
        raise EngineError(f"no Python module tensorrt ({missing}); it comes with JetPack")
    logger = trt.Logger(trt.Logger.WARNING)
    _load(job, trt, plugin, logger)
    part = settings.out.with_name(f".{settings.out.name}.part")
    start = time.perf_counter()
    say("building the engine; on a small board this takes minutes")
    graph = settings.bundle / device_section(job.manifest)["graph"]
    build_engine(trt, graph, part, spec=job.spec, settings=settings, logger=logger, say=say)
    seconds["engine"] = round(time.perf_counter() - start, 1)
    report = _check(job, trt, part, plugin, logger, seconds, say)
    os.replace(part, settings.out if report.passed else failed_path(settings.out))
    write_report(report, settings.home)
    return report


def failed_path(out: Path) -> Path:
    """Where an engine goes that computes something else: nobody loads it by accident."""
    return out.with_name(f"{out.name}.failed")


def _load(job: Job, trt: Any, plugin: Plugin, logger: Any) -> None:
    """The library's operators, or those of kernels compiled ahead of time, into TensorRT's registry."""
    if not job.settings.aot:
        load_plugin(trt, plugin, logger)
        return
    trtp, missing = import_tensorrt("tensorrt.plugin")
    if trtp is None or job.device.sm is None:
        raise PluginError(f"--plugin aot: no Python module tensorrt.plugin ({missing}); use --plugin library")
    register(trt, trtp, read_kernels(job.settings.bundle), job.device.sm)


def _plugin(job: Job) -> Plugin | None:
    if job.settings.aot:
        return as_plugin(read_kernels(job.settings.bundle), job.device.machine)
    section = device_section(job.manifest)
    device = job.device
    return choose(
        job.settings, section, sm=device.sm, machine=device.machine, tensorrt=device.tensorrt, cuda=device.cuda
    )


def _compile(job: Job, say: Say) -> Plugin:
    if job.device.sm is None:
        raise PluginError("plugin: cannot be compiled for an unknown GPU; run this on the board")
    return compile_plugin(job.settings, job.device.tools, sm=job.device.sm, machine=job.device.machine, say=say)


def _check(
    job: Job, trt: Any, engine: Path, plugin: Plugin, logger: Any, seconds: dict[str, float], say: Say
) -> DeviceReport:
    """Run the recorded vectors and the clock through the engine."""
    settings, vectors = job.settings, job.settings.bundle / VECTORS
    say("running the recorded vectors")
    session = EngineSession(trt, engine, spec=job.spec, settings=settings, logger=logger, cuda=Cuda())
    parity = check_vectors(session, vectors, bounds=device_section(job.manifest)["bounds"], progress=say)
    speed = measure_speed(session, np.asarray(read_vectors(vectors)[0]["ids.prefill"][0], np.int64))
    entry = hash_file(engine)
    device = job.device
    return DeviceReport(
        device=device.to_dict(),
        versions={"jpq-export": __version__, "python": device.python, "tensorrt": device.tensorrt, "cuda": device.cuda},
        settings={k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        checks=job.checks,
        plugin={"file": plugin.path.name, "origin": plugin.origin, "sha256": plugin.sha256, "sms": list(plugin.sms)},
        engine={"file": settings.out.name, "sha256": entry.sha256, "bytes": entry.bytes},
        seconds=seconds,
        parity=parity,
        speed=speed,
    )
