"""Recorded stand-ins: a GPU's memory in the host's, and an engine that keeps tokens in its KV cache. NOT CUDA."""

from types import SimpleNamespace
from typing import Any

import numpy as np


class FakeCuda:
    """What engine/cuda.py's Cuda does, with a dict in the place of the GPU's memory; new memory is NaN."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}

    def open(self) -> int:
        return 1

    def allocate(self, size: int) -> int:
        address = 4096 * (len(self.memory) + 1)
        self.memory[address] = np.full(max(size, 4) // 4, np.nan, np.float32).view(np.uint8)
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        assert len(raw) <= len(self.memory[address]), "written past the end of a buffer"
        self.memory[address][: len(raw)] = raw

    upload = write

    def read(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= len(self.memory[address]), "read past the end of a buffer"
        return self.memory[address][:size].copy().view(dtype).reshape(shape)

    def download(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.read(address, shape, np.float32)


class FakeContext:
    """An execution context: logits of the tokens it finds in the cache it was given the address of."""

    def __init__(self, engine: "FakeEngine") -> None:
        self._engine, self._shapes, self._at = engine, {}, {}
        self.profile = -1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == 1
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        self._at[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        engine, cuda = self._engine, self._engine.cuda
        ids = cuda.read(self._at["input_ids"], self._shapes["input_ids"], np.int64)[0]
        mask = cuda.read(self._at["attention_mask"], self._shapes["attention_mask"], np.int64)[0]
        engine.used.append((self.profile, len(ids), len(mask) - len(ids)))
        for name, shape in self._shapes.items():
            if name.startswith("past."):
                past = cuda.read(self._at[name], shape, np.float32)
                assert np.isfinite(past).all(), "a cache that nobody wrote"
                new = np.broadcast_to(ids[None, None, :, None], (1, shape[1], len(ids), shape[3])).astype(np.float32)
                present = np.concatenate([past, new], axis=2)
                cuda.write(self._at["present." + name.removeprefix("past.")], present)
                tokens = present[0, 0, :, 0]
        rows = [
            engine.logits_of(tokens[:end][mask[:end] == 1]) for end in range(len(mask) - len(ids) + 1, len(mask) + 1)
        ]
        if "logits_at" in self._at:
            rows = [rows[i] for i in cuda.read(self._at["logits_at"], self._shapes["logits_at"], np.int64)]
        engine.rows.append(len(rows))
        cuda.write(self._at["logits"], np.stack(rows) * np.float32(engine.factor))
        return True


class FakeEngine:
    """ICudaEngine; `used`: (profile, new tokens, past tokens) of each execution, `rows`: of its logits."""

    def __init__(self, cuda: FakeCuda, logits_of: Any, names: tuple[str, ...], factor: float = 1.0) -> None:
        self.cuda, self.logits_of, self.names, self.factor = cuda, logits_of, names, factor
        self.num_io_tensors = len(names)
        self.used: list[tuple[int, int, int]] = []
        self.rows: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> int:
        return 2 if name == "logits" or name.startswith("present.") else 1

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


def runtime_for(engine: Any) -> Any:
    """What `trt.Runtime` is, always giving `engine`."""
    return lambda _logger: SimpleNamespace(deserialize_cuda_engine=lambda _content: engine)
