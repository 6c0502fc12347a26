"""A decoder in onnxruntime: one forward pass, and steps that feed the cache back without copying it."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jpq_export.errors import BundleError, CapacityError, UsageError
from jpq_export.format.spec import ModelSpec
from jpq_export.runtime import native, native_cuda

logger = logging.getLogger(__name__)

SPEC_KEY, UNFUSED_KEY = "jpq.spec", "jpq.unfused"
Kernels: TypeAlias = native.Library | native_cuda.CudaLibrary | None


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One pass: `logits` float32 [batch, seq, vocab]; `past`, the cache to go on with; `values`, other outputs by name.

    The cache is {"0.key": [batch, kv_heads, past, head_dim], "0.value": ..., ...}: float32, or int8 codes beside
    float32 scales {"0.key_scale": [batch, kv_heads, past, 1], "0.value_scale": ..., ...}.
    """

    logits: np.ndarray
    past: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


class OrtModel:
    """`spec`: the model's facts; `path`: what computes the matrix products, for the reader of a report.

    The products run in our own kernels (see `native`), or in onnxruntime's where there is no C compiler.
    `exact` keeps activations in fp32. Otherwise our kernels round them to 16 bits when there are few rows, and
    onnxruntime's to 8, which is what makes those fast (error of a product 1e-2 instead of 1e-6).
    `threads`: cores to use, by default onnxruntime's choice. `profile`: where `session.end_profiling()` writes.
    `device`: "cpu", "cuda", or "auto": the GPU where onnxruntime has its CUDA provider and the driver shows one, unless
    JPQ_KERNELS is "off" or "cpu". On a GPU everything is fp32.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        exact: bool = True,
        profile: Path | None = None,
        device: str = "auto",
        opened: tuple[Any, Kernels] | None = None,
    ) -> None:
        """Load the graph, or take what `open_session` `opened`; BundleError when that fails or it is none of ours.

        Raises:
            UsageError: `device` is "cuda" and the GPU cannot be used; says why.
        """
        opened = opened or open_session(Path(path), threads=threads, exact=exact, profile=profile, device=device)
        self.session, kernels = opened
        self.device = "cuda" if isinstance(kernels, native_cuda.CudaLibrary) else "cpu"
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.spec = ModelSpec.from_json(metadata[SPEC_KEY])
            unfused = json.loads(metadata[UNFUSED_KEY])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{path}: not written by jpq-export (metadata: {error!r}); export it again") from error
        self.path = _describe(unfused, exact, kernels)
        self._inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        self._cached = {
            value.name.removeprefix("past."): np.dtype(np.int8 if value.type == "tensor(int8)" else np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past.")
        }
        _return_freed_memory()

    def forward(
        self,
        ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        past: Mapping[str, np.ndarray] | None = None,
        outputs: Iterable[str] = (),
    ) -> Output:
        """One pass over `ids` int64 [batch, seq].

        `attention_mask`: int64 [batch, past + seq], 0 = padding on the left. `past`: an earlier output's. `outputs`:
        names of further graph outputs to return. CapacityError when positions run past the model's last one.
        """
        before = next(iter(past.values())).shape[2] if past else 0
        if attention_mask is not None:
            before = attention_mask.shape[1] - ids.shape[1]
        feeds = self._token_feeds(np.asarray(ids, np.int64), attention_mask, position_ids, before)
        past = past or self._empty(len(ids))
        feeds |= {f"past.{name}": value for name, value in past.items()}
        names = ["logits", *(f"present.{name}" for name in past), *outputs]
        got = self.session.run(names, {name: value for name, value in feeds.items() if name in self._inputs})
        found = dict(zip(names, got, strict=True))
        present = {name: found[f"present.{name}"] for name in past}
        return Output(found["logits"], present, {name: found[name] for name in outputs})

    def _token_feeds(
        self, ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None, past: int
    ) -> dict[str, np.ndarray]:
        if mask is None:
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        if positions is None:
            positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, past:]
        if positions.size and int(positions.max()) >= self.spec.max_positions:
            raise CapacityError(
                f"position {int(positions.max())} is beyond the model's {self.spec.max_positions} positions; "
                "shorten the prompt or ask for fewer new tokens"
            )
        return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "position_ids": positions.astype(np.int64)}

    def _empty(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token."""
        return {name: np.zeros((batch, *self._row(name, 0)), dtype) for name, dtype in self._cached.items()}

    def _row(self, name: str, tokens: int) -> tuple[int, int, int]:
        """Shape of one sequence's cache tensor: [kv_heads, tokens, head_dim], of scales [kv_heads, tokens, 1]."""
        layer = self.spec.layers[int(name.split(".")[0])]
        return layer.kv_heads, tokens, 1 if name.endswith("_scale") else self.spec.head_dim

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes the keys and values of one token take, in all layers."""
        return sum(math.prod(self._row(name, 1)) * dtype.itemsize for name, dtype in self._cached.items())

    def start(self) -> Decoding:
        """A new sequence of one row."""
        return Decoding(self)

    def step(
        self, ids: np.ndarray, past: Mapping[str, Any], *, mask: np.ndarray | None = None, before: int = 0
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `forward`, with a cache of OrtValues that is never copied: logits [batch, seq, vocab], the grown cache.

        `before`: tokens in the cache, when no `mask` int64 [batch, before + seq] says it.
        """
        from onnxruntime import OrtValue

        if mask is not None:
            before = mask.shape[1] - ids.shape[1]
        feeds = self._token_feeds(ids, mask, None, before)
        values = {name: OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items() if name in self._inputs}
        values |= {f"past.{name}": value for name, value in past.items()}
        names = ["logits", *(f"present.{name}" for name in past)]
        run = _run_bound if self.device == "cuda" else _run_values
        logits, *present = run(self.session, names, values, self.device)
        return logits.numpy(), dict(zip(past, present, strict=True))


class Decoding:
    """One growing sequence; its cache, `past`, stays inside onnxruntime."""

    def __init__(self, model: OrtModel) -> None:
        """Start empty."""
        from onnxruntime import OrtValue

        self.length = 0
        self._model = model
        self.past: dict[str, Any] = {name: OrtValue.ortvalue_from_numpy(v) for name, v in model._empty(1).items()}

    def step(self, ids: Iterable[int]) -> np.ndarray:
        """Append tokens; logits of the last one: float32 [vocab]. CapacityError beyond the model's positions."""
        row = np.asarray(list(ids), np.int64)[None]
        if not row.size:
            raise UsageError("the prompt has no tokens; give some text")
        # With two buffers bound in turn (io_binding) the median step took as long: onnxruntime's arena gives the same
        # memory back anyway.
        logits, self.past = self._model.step(row, self.past, before=self.length)
        self.length += row.shape[1]
        return logits[0, -1]


def _run_values(session: Any, names: list[str], values: dict[str, Any], _device: str) -> list[Any]:
    """One pass on the CPU, outputs as onnxruntime's values."""
    return session.run_with_ort_values(names, values)


def _run_bound(session: Any, names: list[str], values: dict[str, Any], device: str) -> list[Any]:
    """One pass whose outputs stay on `device`, but for the first; `run_with_ort_values` would bring the cache back."""
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for i, name in enumerate(names):
        binding.bind_output(name, device if i else "cpu")
    session.run_with_iobinding(binding)
    return binding.get_outputs()


def open_session(
    path: Path, *, threads: int | None, exact: bool, profile: Path | None = None, device: str = "auto"
) -> tuple[Any, Kernels]:
    """An onnxruntime session and the library of our kernels in it; BundleError when the file is no graph."""
    import onnxruntime

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    wanted = device == "cuda" or (device == "auto" and os.environ.get("JPQ_KERNELS") not in ("off", "cpu"))
    if wanted and (found := _on_gpu(path, _options(threads, exact, profile), required=device == "cuda")):
        return found
    options = _options(threads, exact, profile)
    kernels = native.register(options, exact=exact)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), kernels
    except Exception as error:  # onnxruntime has its own classes, all of them outside any public base
        first_line = str(error).strip().splitlines()[0]
        raise BundleError(f"{path}: onnxruntime cannot load it ({first_line}); export the bundle again") from error


def _options(threads: int | None, exact: bool, profile: Path | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
    # Waiting threads would otherwise burn whole cores between the tokens of a stream.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if exact else "4")
    return options


def _on_gpu(path: Path, options: Any, *, required: bool) -> tuple[Any, native_cuda.CudaLibrary] | None:
    """A session on the GPU; None where there is none, and with a warning where it fails (an error when `required`)."""
    import onnxruntime

    reason = native_cuda.reason_against()
    if reason is None:
        # TensorFloat-32 would round what attention multiplies to 11 bits.
        providers = [(native_cuda.PROVIDER, {"use_tf32": "0"}), "CPUExecutionProvider"]
        try:
            library = native_cuda.register(options)
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            if native_cuda.PROVIDER in session.get_providers():
                return session, library
            reason = "onnxruntime's CUDA provider does not start; it needs CUDA's libraries and cuDNN"
        except native.NativeError as error:
            reason = str(error)
        except Exception as error:  # onnxruntime's own classes, as below
            reason = str(error).strip().splitlines()[0]
        if not required:
            logger.warning("%s; the CPU computes instead", reason)
    if required:
        raise UsageError(f"{path}: cannot run on a GPU: {reason}")
    return None


def _describe(unfused: list[str], exact: bool, kernels: Kernels) -> str:
    if isinstance(kernels, native_cuda.CudaLibrary):
        return f"onnxruntime CUDA, jpq kernels (sm_{kernels.sm}), activations in fp32"
    if kernels is not None:
        return f"onnxruntime CPU, jpq kernels ({kernels.implementations[0]}), activations in " + (
            "fp32" if exact else "16 bits for few rows"
        )
    text = "onnxruntime CPU, MatMulNBits, activations "
    text += "in fp32" if exact else "rounded to 8 bits"
    return text + (f"; {len(unfused)} matrices unpacked to fp32 at load" if unfused else "")


def _return_freed_memory() -> None:
    """Give back what unpacking at load left free: SmolLM2 holds 250 MB instead of 840 MB afterwards (glibc only)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
