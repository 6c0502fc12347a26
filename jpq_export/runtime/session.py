"""A decoder in onnxruntime: one forward pass, and steps that feed the cache back without copying it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jpq_export.errors import BundleError, CapacityError, UsageError
from jpq_export.format.spec import LOGITS_AT, LOGITS_FROM, ModelSpec
from jpq_export.runtime import native, native_cuda
from jpq_export.runtime.cache import Cache, CacheLayout, GrowingCache, PassedCache

logger = logging.getLogger(__name__)

SPEC_KEY, UNFUSED_KEY, CHAINED_KEY = "jpq.spec", "jpq.unfused", "jpq.chained"
CHAINED = "the graph was written for a CPU; export it for a target with a GPU"
Kernels: TypeAlias = native.Library | native_cuda.CudaLibrary | None


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One pass: `logits` float32 [batch, seq, vocab]; `past`, the cache to go on with; `values`, other outputs by name.

    The cache is {"0.key": [past, batch, kv_heads, head_dim], "0.value": ..., ...} in float32, or int8 codes beside
    float32 scales {"0.key_scale": [past, batch, kv_heads, 1], ...}; `CacheLayout.rows` also reads that of older graphs.
    """

    logits: np.ndarray
    past: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


class OrtModel:
    """`spec`: the model's facts; `path`: what computes the matrix products, for the reader of a report.

    The products run in our own kernels (see `native`), or in onnxruntime's where there is no C compiler.
    `exact` keeps activations in fp32. Otherwise our kernels round them to 16 bits where that is faster (8 with
    JPQ_FAST_BITS=8), and onnxruntime's to 8, which is what makes those fast (error of a product 1e-2 instead of 1e-6).
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
        self._inputs |= {value.name for value in self.session.get_overridable_initializers()}
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        self.cache = CacheLayout.of(self.session)
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
        before = self.cache.length(past) if past else 0
        if attention_mask is not None:
            before = attention_mask.shape[1] - ids.shape[1]
        feeds = self._token_feeds(np.asarray(ids, np.int64), attention_mask, position_ids, before)
        past = past or self.cache.none(len(ids))
        feeds |= {LOGITS_AT: np.arange(ids.shape[1])} | {f"past.{name}": value for name, value in past.items()}
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

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes the keys and values of one token take, in all layers."""
        return self.cache.bytes_per_token

    def start(self) -> Decoding:
        """A new sequence of one row."""
        return Decoding(self)

    def new_cache(self, rows: Mapping[str, np.ndarray] | None = None) -> Cache:
        """For one empty sequence, or for `rows` {"0.key": [batch, past, heads, width], ...}."""
        tensors = self.cache.none(1) if rows is None else {name: self.cache.rows(value) for name, value in rows.items()}
        if self.cache.time_first and self.device == "cpu":
            return GrowingCache(self.session, self.cache, tensors)
        return PassedCache(self.session, self.cache, tensors, device=self.device)

    def step(self, ids: np.ndarray, cache: Cache, *, mask: np.ndarray | None = None) -> np.ndarray:
        """As `forward`, with a cache that is never copied and grows: logits of the last token [batch, vocab]."""
        feeds = self._token_feeds(ids, mask, None, cache.length)
        total = feeds["attention_mask"].shape[1]
        feeds[LOGITS_FROM] = feeds[LOGITS_AT] = np.array([ids.shape[1] - 1])  # the graph takes one of them, or neither
        return cache.run({name: value for name, value in feeds.items() if name in self._inputs}, total)[:, -1]


class Decoding:
    """One growing sequence and its cache."""

    def __init__(self, model: OrtModel) -> None:
        """Start empty."""
        self._model, self.cache = model, model.new_cache()

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.cache.length

    def step(self, ids: Iterable[int]) -> np.ndarray:
        """Append tokens; logits of the last one: float32 [vocab]. CapacityError beyond the model's positions."""
        row = np.asarray(list(ids), np.int64)[None]
        if not row.size:
            raise UsageError("the prompt has no tokens; give some text")
        return self._model.step(row, self.cache)[0]


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
    kernels = native.register(options, native.FP32 if exact else native.fast_activations())
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
    # Waiting threads spin, or waking them costs more than they give (two threads: 7.8 ms a token, now 5.8). They stop
    # with the pass, or they would burn whole cores between the tokens of a stream.
    options.add_session_config_entry("session.force_spinning_stop", "1")
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
            chained = session.get_modelmeta().custom_metadata_map.get(CHAINED_KEY)
            if native_cuda.PROVIDER in session.get_providers() and not chained:
                return session, library
            reason = (
                CHAINED
                if chained
                else "onnxruntime's CUDA provider does not start; it needs CUDA's libraries and cuDNN"
            )
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
            "fp32" if exact else f"{native.fast_activations().removeprefix('int')} bits"
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
