"""The engine: TensorRT parses the graph with the plugin loaded, takes a decode and a prefill profile, and builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jpq_export.engine.plugin import Plugin, PluginError
from jpq_export.engine.settings import Settings
from jpq_export.errors import JpqError
from jpq_export.format.spec import LOGITS_AT, ModelSpec

Say = Callable[[str], None]
TIMING_CACHE = "timing.cache"
DECODE, PREFILL = 0, 1  # optimisation profiles by index, as added


class EngineError(JpqError):
    """TensorRT refuses the graph or cannot build the engine."""


def profile_shapes(name: str, spec: ModelSpec, settings: Settings, *, profile: int) -> tuple[tuple[int, ...], ...]:
    """Smallest, best-tuned and largest shape of the graph input `name`; batch is 1.

    In each of the three, total = past + seq: TensorRT evaluates the graph at all of them. Of a prompt the logits of one
    token are wanted, of all only to check them.
    """
    if name == LOGITS_AT:
        return ((1,), (1,), (1 if profile == DECODE else settings.max_prompt,))
    if profile == DECODE:
        lengths = [(1, past) for past in (1, settings.max_tokens // 2, settings.max_tokens - 1)]
    else:
        lengths = [(1, 0), (settings.max_prompt, 0), (settings.max_prompt, settings.max_tokens - settings.max_prompt)]
    return tuple(input_shape(name, spec, seq=seq, past=past) for seq, past in lengths)


def input_shape(name: str, spec: ModelSpec, *, seq: int, past: int, wanted: int = 1) -> tuple[int, ...]:
    """Shape of a graph input for `seq` new tokens after `past` others, `wanted`: how many logits are."""
    if name == LOGITS_AT:
        return (wanted,)
    if name in ("input_ids", "position_ids"):
        return (1, seq)
    if name == "attention_mask":
        return (1, past + seq)
    if name.startswith("past."):
        return (1, spec.layers[int(name.split(".")[1])].kv_heads, past, spec.head_dim)
    raise EngineError(f"graph input {name!r}: not one of a decoder written by jpq-export; export the bundle again")


def load_plugin(trt: Any, plugin: Plugin, logger: Any) -> None:
    """Register the plugin's creators; a file whose sha256 is not the recorded one is never loaded."""
    if not plugin.untouched:
        raise PluginError(f"{plugin.path}: sha256 is not the recorded {plugin.sha256[:12]}…; it is not loaded")
    trt.init_libnvinfer_plugins(logger, "")
    if trt.get_plugin_registry().load_library(str(plugin.path)) is None:
        raise PluginError(
            f"{plugin.path}: TensorRT {trt.__version__} cannot load it (its messages stand above); "
            "leave --plugin out to compile the bundle's own sources"
        )


def build_engine(
    trt: Any, graph: Path, out: Path, *, spec: ModelSpec, settings: Settings, logger: Any, say: Say
) -> None:
    """Write the engine of `graph` to `out`; the plugin must be loaded. EngineError with TensorRT's own words."""
    builder = trt.Builder(logger)
    network = builder.create_network(_strong_typing(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "no reason given"
        raise EngineError(f"{graph}: TensorRT {trt.__version__} cannot parse it ({said}); export the bundle again")
    config = _config(trt, builder, settings, say)
    for profile in (DECODE, PREFILL):
        config.add_optimization_profile(_profile(builder, network, spec, settings, profile))
    cache = _timing_cache(config, settings.home / TIMING_CACHE, trt)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise EngineError(
            f"{graph}: TensorRT {trt.__version__} built no engine (its messages stand above); lower --workspace, "
            "--max-prompt or --max-tokens when it says out of memory"
        )
    out.write_bytes(memoryview(content))
    (settings.home / TIMING_CACHE).write_bytes(memoryview(cache.serialize()))


def _strong_typing(trt: Any) -> int:
    """Types come from the graph; TensorRT 11 knows nothing else and may lack the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(trt: Any, builder: Any, settings: Settings, say: Say) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    tf32 = getattr(trt.BuilderFlag, "TF32", None)
    if tf32 is not None:
        config.clear_flag(tf32)  # 10 bits of mantissa: an error of 5e-4 a product, five times the promise for logits
    if hasattr(trt, "IProgressMonitor"):  # from 10.0 on
        config.progress_monitor = progress_monitor(trt, say)
    return config


def _profile(builder: Any, network: Any, spec: ModelSpec, settings: Settings, index: int) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        profile.set_shape(name, *profile_shapes(name, spec, settings, profile=index))
    return profile


def _timing_cache(config: Any, path: Path, trt: Any) -> Any:
    """The measurements of an earlier build on this board; TensorRT itself refuses those of another one."""
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        if not config.set_timing_cache(cache, False):
            raise EngineError(f"TensorRT {trt.__version__} accepts no timing cache; delete {path} and try again")
    return cache


def progress_monitor(trt: Any, say: Say) -> Any:
    """TensorRT's phases as lines: the outermost ones at their start, with steps in tenths."""

    class Monitor(trt.IProgressMonitor):
        """Called by TensorRT, from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Only phases without a parent: the others are hundreds."""
            if parent_phase is None:
                self._outer[phase_name] = num_steps
                say(f"  {phase_name}: {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            """True: go on."""
            steps = self._outer.get(phase_name, 0)
            if steps and (step + 1) * 10 // steps > step * 10 // steps:
                say(f"  {phase_name}: {step + 1} of {steps}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            """Forget it."""
            self._outer.pop(phase_name, None)

    return Monitor()
