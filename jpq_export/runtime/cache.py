"""Keys and values of what a model has read: how a graph wants them, and how they go from one pass to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
FIRST_ROOM = 256  # tokens


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The cache tensors of a graph: `parts`, name ("0.key") -> element type, heads and numbers a head has.

    They are [past, batch, heads, width] when `time_first`, otherwise [batch, heads, past, width]. The first kind may
    have room behind its rows, and then grows in place (see lower/growing.py).
    """

    parts: dict[str, tuple[Any, int, int]]
    time_first: bool

    @staticmethod
    def of(session: Any) -> CacheLayout:
        """What the inputs of an onnxruntime session say."""
        inputs = {v.name.removeprefix("past."): v for v in session.get_inputs() if v.name.startswith("past.")}
        first = all(v.shape[0] == "past" for v in inputs.values())
        at = 2 if first else 1
        return CacheLayout({name: (ELEMENTS[v.type], v.shape[at], v.shape[3]) for name, v in inputs.items()}, first)

    @property
    def bytes_per_token(self) -> int:
        """Bytes the keys and values of one token take, in all layers."""
        return sum(heads * width * np.dtype(kind).itemsize for kind, heads, width in self.parts.values())

    def empty(self, name: str, batch: int, length: int) -> np.ndarray:
        """A tensor for `length` tokens of `batch` sequences, of unknown content."""
        kind, heads, width = self.parts[name]
        return np.empty((length, batch, heads, width) if self.time_first else (batch, heads, length, width), kind)

    def none(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token."""
        return {name: self.empty(name, batch, 0) for name in self.parts}

    def length(self, cache: Mapping[str, np.ndarray]) -> int:
        """Tokens in a cache without room; 0 for a graph without one."""
        first = next(iter(cache.values()), None)
        return 0 if first is None else first.shape[0 if self.time_first else 2]

    def rows(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the cache seen as [batch, past, heads, width]."""
        return tensor.swapaxes(0, 1) if self.time_first else tensor.swapaxes(1, 2)


class GrowingCache:
    """A cache with room, bound to a session's inputs and outputs: new tokens are written behind the others.

    `length`: tokens it holds.
    """

    def __init__(self, session: Any, layout: CacheLayout, tensors: Mapping[str, np.ndarray]) -> None:
        """Start with `tensors`, in the graph's order of dimensions, all of them in use."""
        self._session, self._layout = session, layout
        self._tensors, self.length = dict(tensors), layout.length(tensors)
        self._room = 0
        self._binding = session.io_binding()
        self._binding.bind_output("logits")  # the first output: `get_outputs` gives them in the order of binding

    def rows(self, name: str) -> np.ndarray:
        """[batch, length, heads, width]."""
        return self._layout.rows(self._tensors[name])[:, : self.length]

    def run(self, feeds: Mapping[str, np.ndarray], total: int) -> np.ndarray:
        """One pass after which the cache holds `total` tokens; its logits."""
        from onnxruntime import OrtValue

        if total > self._room:
            self._grow(max(total, FIRST_ROOM, 2 * self._room))
        for name, value in feeds.items():  # not `bind_cpu_input`, which knows no input with a default
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        self.length = total
        return self._binding.get_outputs()[0].numpy()

    def _grow(self, room: int) -> None:
        from onnxruntime import OrtValue

        for name, old in self._tensors.items():
            new = self._layout.empty(name, old.shape[1], room)
            new[: self.length] = old[: self.length]
            self._tensors[name] = new
            value = OrtValue.ortvalue_from_numpy(new)  # the array's own memory
            self._binding.bind_ortvalue_input(f"past.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._room = room


class PassedCache:
    """A cache that the graph gives back longer; on a GPU it stays there. `length`: tokens it holds."""

    def __init__(self, session: Any, layout: CacheLayout, tensors: Mapping[str, np.ndarray], *, device: str) -> None:
        """Start with `tensors`, in the graph's order of dimensions."""
        from onnxruntime import OrtValue

        self._session, self._layout, self._device = session, layout, device
        self._values = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
        self.length = layout.length(tensors)

    def rows(self, name: str) -> np.ndarray:
        """[batch, length, heads, width]."""
        return self._layout.rows(self._values[name].numpy())

    def run(self, feeds: Mapping[str, np.ndarray], total: int) -> np.ndarray:
        """One pass after which the cache holds `total` tokens; its logits."""
        from onnxruntime import OrtValue

        values = {name: OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        values |= {f"past.{name}": value for name, value in self._values.items()}
        names = ["logits", *(f"present.{name}" for name in self._values)]
        logits, *present = _bound(self._session, names, values, self._device)
        self._values, self.length = dict(zip(self._values, present, strict=True)), total
        return logits.numpy()


def _bound(session: Any, names: list[str], values: dict[str, Any], device: str) -> list[Any]:
    """Outputs stay on the device, but for the first; `run_with_ort_values` would bring the cache back from a GPU."""
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for i, name in enumerate(names):
        binding.bind_output(name, device if i else "cpu")
    session.run_with_iobinding(binding)
    return binding.get_outputs()


Cache = GrowingCache | PassedCache
