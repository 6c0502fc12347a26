"""A built engine on the GPU: tokens in, logits out; the KV cache stays there, two buffers that take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.engine.builder import DECODE, PREFILL, EngineError, input_shape
from jpq_export.engine.cuda import Cuda
from jpq_export.engine.settings import Settings
from jpq_export.format.spec import LOGITS_AT, ModelSpec

INT64, FLOAT32 = 8, 4


class EngineSession:
    """One sequence. `cuda` is opened before TensorRT's runtime is made: without a GPU that one crashes the process."""

    def __init__(self, trt: Any, path: Path, *, spec: ModelSpec, settings: Settings, logger: Any, cuda: Cuda) -> None:
        """Load the engine and allocate every buffer at its largest; EngineError when TensorRT refuses the file."""
        self.spec, self._cuda, self._settings = spec, cuda, settings
        self._stream = cuda.open()
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(f"{path}: TensorRT {trt.__version__} cannot load it; build it again on this board")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._contexts = [self._context(profile) for profile in (DECODE, PREFILL)]
        self._buffers = {name: cuda.allocate(self._largest(name)) for name in names}
        self.length = 0

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError("TensorRT made no execution context; close other programs, memory may be short")
        return context

    def _largest(self, name: str) -> int:
        """Bytes of a tensor's largest shape."""
        tokens, prompt = self._settings.max_tokens, self._settings.max_prompt
        if name == "logits":
            return prompt * self.spec.vocab * FLOAT32
        if name.startswith(("past.", "present.")):
            layer = self.spec.layers[int(name.split(".")[1])]
            return layer.kv_heads * tokens * self.spec.head_dim * FLOAT32
        return tokens * INT64

    def reset(self) -> None:
        """Begin a new sequence."""
        self.length = 0

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append `ids` int64 [seq]; logits float32 [seq, vocab].

        `mask`: int64 [past + seq], 0 = padding on the left. EngineError beyond the profiles.
        """
        return self._append(ids, mask, np.arange(len(ids)))

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append `ids` int64 [seq]; logits float32 [vocab] of the last. EngineError beyond the profiles."""
        return self._append(ids, None, np.array([len(ids) - 1]))[-1]

    def _append(self, ids: np.ndarray, mask: np.ndarray | None, wanted: np.ndarray) -> np.ndarray:
        """Logits of the `wanted` new tokens; of all where the engine, of an older bundle, does not ask for whose."""
        seq, past = len(ids), self.length
        if past + seq > self._settings.max_tokens or seq > self._settings.max_prompt:
            raise EngineError(f"{seq} tokens after {past}: beyond this engine's profiles; build with more --max-tokens")
        mask = np.ones(past + seq, np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum() - 1, 0)[past:]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, LOGITS_AT: wanted}
        for name in self._inputs:
            if name in feeds:
                self._cuda.upload(self._buffers[name], feeds[name].astype(np.int64))
        self._execute(self._contexts[DECODE if seq == 1 and past else PREFILL], seq, past, len(wanted))
        rows = len(wanted) if LOGITS_AT in self._inputs else seq
        logits = self._cuda.download(self._buffers["logits"], (rows, self.spec.vocab))
        self._take_turns()
        self.length += seq
        return logits

    def _execute(self, context: Any, seq: int, past: int, wanted: int) -> None:
        for name in self._inputs:
            if not context.set_input_shape(name, input_shape(name, self.spec, seq=seq, past=past, wanted=wanted)):
                raise EngineError(f"{name}: TensorRT refuses the shape for {seq} tokens after {past}; build again")
        for name, address in self._buffers.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(self._stream):
            raise EngineError("TensorRT could not run the engine (its messages stand above)")

    def _take_turns(self) -> None:
        """What this step wrote is what the next one reads: present and past have one layout, so addresses swap."""
        for name in self._inputs:
            if name.startswith("past."):
                present = "present." + name.removeprefix("past.")
                self._buffers[name], self._buffers[present] = self._buffers[present], self._buffers[name]
