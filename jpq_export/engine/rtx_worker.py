"""Builds one TensorRT-RTX engine in a process of its own: job.json in, engine and result.json out.

A process, because a failed check inside the library ends it without a Python error. Nothing is ever deserialised: the
library's Runtime needs a GPU and ends the process without one.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from jpq_export.engine.builder import DECODE, PREFILL, profile_shapes
from jpq_export.engine.settings import Settings
from jpq_export.format.spec import ModelSpec


def build(trt: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Parse, configure, build, write; returns what happened: {"error": ...} or {"seconds": ..., "bytes": ...}."""
    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # always strongly typed
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        return {"error": "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "no reason given"}
    allow_decomposition(trt, network)
    config = configure(trt, builder, network, job)
    content = builder.build_serialized_network(network, config)
    if content is None:
        return {"error": "no engine was built; its messages stand above"}
    view = memoryview(content)
    Path(job["out"]).write_bytes(view)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": round(time.perf_counter() - start, 1), "bytes": view.nbytes, "peak_rss_bytes": peak}


def allow_decomposition(trt: Any, network: Any) -> None:
    """Attention of a shape without a kernel of its own (odd head counts) becomes separate products.

    Otherwise it is an error. A layer comes as its base class: TensorRT's way down is to set the class.
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def configure(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    """The GPU generation, and a decode and a prefill profile."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job['sm']}"), 0)
    spec = ModelSpec.from_json(job["spec"])
    out = Path(job["out"])
    settings = Settings(out.parent, out, max_prompt=job["max_prompt"], max_tokens=job["max_tokens"])
    for index in (DECODE, PREFILL):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            name = network.get_input(i).name
            profile.set_shape(name, *profile_shapes(name, spec, settings, profile=index))
        config.add_optimization_profile(profile)
    return config


def main(folder: Path) -> None:
    """Read folder/job.json, write folder/result.json."""
    import tensorrt_rtx  # pyright: ignore[reportMissingImports] the extra `rtx`

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result = {"version": tensorrt_rtx.__version__, **build(tensorrt_rtx, job)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
