"""A recorded stand-in for NVIDIA's `tensorrt` module: NOT TensorRT. It proves order and parameters of calls only.

Every call is appended to `calls` as (name, arguments). What a test wants to go wrong is named in `broken`.
"""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class FakeTensorRT:
    """Passed wherever the module would be."""

    __version__ = "10.3.0.30"

    class NetworkDefinitionCreationFlag(IntEnum):
        EXPLICIT_BATCH = 0
        STRONGLY_TYPED = 1

    class MemoryPoolType(IntEnum):
        WORKSPACE = 0

    class BuilderFlag(IntEnum):
        TF32 = 7

    class TensorIOMode(IntEnum):
        INPUT = 1
        OUTPUT = 2

    class IProgressMonitor:
        pass

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> None:
        self.inputs, self.outputs, self.broken = inputs, outputs, broken
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.monitor: Any = None
        self.Logger = SimpleNamespace(WARNING=1)

    def record(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        self.record("init_plugins", namespace)
        return True

    def get_plugin_registry(self) -> Any:
        def load(path: str) -> Any:
            self.record("load_library", path)
            return None if "plugin" in self.broken else object()

        return SimpleNamespace(load_library=load)

    def Builder(self, logger: Any) -> Any:
        self.record("Builder")
        return SimpleNamespace(
            create_network=self._network,
            create_builder_config=lambda: FakeConfig(self),
            create_optimization_profile=self._profile,
            build_serialized_network=self._build,
        )

    def _network(self, flags: int) -> Any:
        self.record("create_network", flags)
        tensors = [SimpleNamespace(name=name) for name in self.inputs]
        return SimpleNamespace(num_inputs=len(tensors), get_input=tensors.__getitem__)

    def _profile(self) -> Any:
        shapes: dict[str, Any] = {}
        self.record("create_profile", shapes)
        return SimpleNamespace(set_shape=lambda name, *three: shapes.__setitem__(name, three))

    def _build(self, network: Any, config: Any) -> bytes | None:
        self.record("build")
        if self.monitor is not None:
            self.monitor.phase_start("Building", None, 20)
            self.monitor.phase_start("inner", "Building", 900)
            for step in range(20):
                assert self.monitor.step_complete("Building", step)
            self.monitor.phase_finish("Building")
        return None if "build" in self.broken else b"engine"

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(path: str) -> bool:
            self.record("parse", path)
            return "parse" not in self.broken

        error = SimpleNamespace(desc=lambda: "no importer for op LowBitMatMul")
        return SimpleNamespace(parse_from_file=parse, num_errors=1, get_error=lambda _i: error)


class FakeConfig:
    """IBuilderConfig, as far as the builder uses it."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "progress_monitor":
            self._trt.monitor = value
        object.__setattr__(self, name, value)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._trt.record("workspace", pool, size)

    def clear_flag(self, flag: Any) -> None:
        self._trt.record("clear_flag", flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self._trt.record("add_profile")
        return 0

    def create_timing_cache(self, content: bytes) -> Any:
        self._trt.record("create_timing_cache", content)
        return SimpleNamespace(serialize=lambda: b"timings")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._trt.record("set_timing_cache", ignore_mismatch)
        return "cache" not in self._trt.broken or len(self._trt.arguments("set_timing_cache")) > 1
