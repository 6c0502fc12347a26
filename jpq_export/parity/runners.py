"""The two sides of a parity check, of one shape: `forward(ids, mask=, cache=)` gives logits, values and the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import BundleError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import Spec, spec_from_json
from jpq_export.format.spec import INT8_CACHE, LOGITS_AT, ModelSpec
from jpq_export.parity.points import points, present_in, show_sums
from jpq_export.runtime import native
from jpq_export.runtime.cache import CacheLayout

SPEC_KEY, UNFUSED_KEY = "jpq.spec", "jpq.unfused"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One pass: logits [batch, seq, vocab], the cache to go on with, values of points [batch, seq, features].

    With an int8 cache: `written`, the codes and scales of the new tokens by cache name; `exact`, from the reference,
    the keys and values [batch, kv_heads, seq, head_dim] they were made of.
    """

    logits: np.ndarray
    cache: Any
    values: dict[str, np.ndarray] = field(default_factory=dict)
    written: dict[str, np.ndarray] = field(default_factory=dict)
    exact: dict[str, np.ndarray] = field(default_factory=dict)


def position_ids(mask: np.ndarray, past: int) -> np.ndarray:
    """Positions of the tokens after `past`: mask [batch, past + seq], 0 = padding on the left -> int64 [batch, seq]."""
    return np.maximum(mask.cumsum(-1) - 1, 0)[:, past:].astype(np.int64)


class TorchRunner:
    """The reference: the compressed model in PyTorch, a decoder or an encoder."""

    def __init__(self, model: CompressedModel) -> None:
        import torch

        from jpq_export.compress.model import build_model

        weights = {name: torch.from_numpy(model.weight(name)) for name in model.quantized}
        weights |= {name: torch.from_numpy(vector) for name, vector in model.vectors.items()}
        self.spec = model.spec
        self.decoder: Any = build_model(model.spec, weights)
        self.version = torch.__version__
        self._values: dict[str, np.ndarray] | None = None
        self._given: Mapping[str, np.ndarray] | None = None
        self._written: dict[str, np.ndarray] = {}
        self._exact: dict[str, np.ndarray] = {}
        if isinstance(model.spec, ModelSpec) and model.spec.kv_cache == INT8_CACHE:
            self.decoder.stored = self._stored
        self._watch()

    def _watch(self) -> None:
        """Let every module hand over what it computes under the name of its point."""
        wanted = {point.name for point in points(self.spec)}
        for name, module in self.decoder.named_modules():
            if name in wanted and not name.endswith((".attn", ".mlp")):  # those two are taps of the residual stream
                module.register_forward_hook(lambda _m, _x, y, name=name: self._keep(name, y))
            source = {"o": "core", "down": "inner"}.get(name.rsplit(".", 1)[-1])
            if source and name.startswith("layers."):
                read = f"{name.rsplit('.', 1)[0]}.{source}"
                # First of all hooks: the value before activations are rounded, as in the graph.
                module.register_forward_pre_hook(lambda _m, x, read=read: self._keep(read, x[0]), prepend=True)

    def _keep(self, name: str, value: Any) -> None:
        if self._values is None:
            return
        if value.dim() == 4:  # q_norm and k_norm: [batch, heads, seq, head_dim]
            value = value.transpose(1, 2).flatten(2)
        self._values[name] = value.numpy()  # "embed": the tap comes after the module and includes embed_scale

    def _stored(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Keys and values as attention reads them: what was given for this pass, or through its own codes."""
        import torch

        from jpq_export.compress.int8_cache import from_codes, to_codes

        out = []
        for part, x in (("key", key), ("value", value)):
            name = f"{layer}.{part}"
            pair = to_codes(x)
            self._exact[name] = x.numpy()
            self._written |= {name: pair[0].numpy(), f"{name}_scale": pair[1].numpy()}
            if self._given is not None:
                codes, scale = self._given[name], self._given[f"{name}_scale"]
                pair = torch.from_numpy(codes.copy()), torch.from_numpy(scale.copy())
            out.append(from_codes(*pair))
        return out[0], out[1]

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """An encoder's pass over ids, mask int64 [batch, seq]: the values of all points, `embedding` among them."""
        import torch

        self._values = {}
        with torch.no_grad():
            out = self.decoder(torch.from_numpy(ids), torch.from_numpy(mask), tap=self._keep).numpy()
        kept, self._values = self._values, None
        return {**kept, "embedding": out}

    def forward(
        self,
        ids: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        cache: Any = None,
        values: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> Outcome:
        """One pass: `ids` int64 [batch, seq]; `mask` int64 [batch, past + seq]; `cache` is changed in place.

        `values` asks for the values of all points. `given`: codes and scales of an int8 cache to read for the new
        tokens instead of its own, as in `Outcome.written`.
        """
        import torch

        from jpq_export.compress.decoder import KVCache

        cache = KVCache() if cache is None else cache
        self._values = {} if values else None
        self._given, self._written, self._exact = given, {}, {}
        with torch.no_grad():
            logits = self.decoder(
                torch.from_numpy(ids),
                attention_mask=None if mask is None else torch.from_numpy(mask),
                cache=cache,
                tap=self._keep,
            ).numpy()
        kept, self._values = self._values, None
        found = {} if kept is None else {**kept, "logits": logits}
        return Outcome(logits, cache, found, self._written, self._exact)


class OrtRunner:
    """An ONNX decoder in onnxruntime on the CPU; no torch.

    `kernels` puts our CPU kernels in the place of the function bodies.
    `exact` keeps activations in fp32 where onnxruntime would round them to 8 bits inside MatMulNBits.
    `with_points` adds graph outputs to a copy in memory; the file and its weights stay as they are. `open_cache` does
    the same with an int8 cache, if there is one: `opened` names its tensors, and `forward` can be `given` what its new
    tokens are to be stored as.
    """

    def __init__(
        self,
        path: Path,
        *,
        exact: bool = True,
        kernels: bool = False,
        with_points: bool = False,
        open_cache: bool = False,
    ) -> None:
        import onnxruntime

        self.proto = load_proto(path)
        self.spec, _ = read_metadata(self.proto, path)
        if with_points:
            show_sums(self.proto.graph)
        self.points = present_in(self.proto.graph, self.spec) if with_points else ()
        existing = {value.name for value in self.proto.graph.output}
        for name in self.points:
            if name not in existing:
                self.proto.graph.output.add(name=name)
        self.opened = open_writes(self.proto.graph) if open_cache else {}
        self.session = self._session(path, exact, kernels)
        self.version = onnxruntime.__version__
        self._inputs = {value.name: value.type for value in self.session.get_inputs()}
        self._layout = CacheLayout.of(self.session)

    def _session(self, path: Path, exact: bool, kernels: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if exact else "4")
        if kernels:
            native.register(options, native.FP32 if exact else native.INT16)
        try:
            return onnxruntime.InferenceSession(
                self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has its own classes, all of them outside any public base
            first_line = str(error).strip().splitlines()[0]
            raise BundleError(f"{path}: onnxruntime cannot load it ({first_line}); export the bundle again") from error

    def forward(
        self,
        ids: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        cache: Any = None,
        values: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> Outcome:
        """As `TorchRunner.forward`; the cache is {"0.key": array, ...} in the order the graph wants."""
        cache = self._layout.none(len(ids)) if cache is None else cache
        past = self._layout.length(cache) if cache else (0 if mask is None else mask.shape[1] - ids.shape[1])
        if mask is None:
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask, past)}
        feeds |= {LOGITS_AT: np.arange(ids.shape[1])} | {f"past.{name}": value for name, value in cache.items()}
        order = (0, 2, 1, 3) if self._layout.time_first else (0, 1, 2, 3)  # of what is stored: where heads come
        feeds |= {f"written.{name}": value.transpose(order) for name, value in (given or {}).items()}
        names = ["logits", *(f"present.{name}" for name in cache), *(self.points if values else ())]
        names += self.opened.values()
        fetch = list(dict.fromkeys(names))
        got = self.session.run(fetch, {name: value for name, value in feeds.items() if name in self._inputs})
        outputs = dict(zip(fetch, got, strict=True))
        present = {name: outputs[f"present.{name}"] for name in cache}
        found = {name: outputs[name].reshape(*ids.shape, -1) for name in self.points} if values else {}
        written = {name: outputs[value].transpose(order) for name, value in self.opened.items()}
        if isinstance(self.spec, ModelSpec) and self.spec.kv_cache == INT8_CACHE and not written:
            written = {name: self._layout.rows(value)[:, past:].swapaxes(1, 2) for name, value in present.items()}
        return Outcome(outputs["logits"], present, found, written)


def open_writes(graph: Any) -> dict[str, str]:
    """Let the caller say what is stored: cache name -> the value that was stored until now, an output from now on.

    "written.{name}" becomes an input of the type of "past.{name}" for the new tokens: [batch, seq, kv_heads, ...] where
    time comes first in the cache, otherwise [batch, kv_heads, seq, ...].
    """
    past, computed = {value.name: value for value in graph.input}, {}
    codes = {name[5:-6] for name in past if name.startswith("past.") and name.endswith("_scale")}  # with an int8 cache
    for node in graph.node:
        if node.op_type == "Int8Attention":
            at = {present.removeprefix("present."): i for i, present in enumerate(node.output) if i}
        elif node.op_type == "Concat" and node.output[0].removeprefix("present.").removesuffix("_scale") in codes:
            at = {node.output[0].removeprefix("present."): 1}
        else:
            continue
        for name, i in at.items():
            computed[name], node.input[i] = node.input[i], f"written.{name}"
            graph.output.add(name=computed[name])
            opened = graph.input.add()
            opened.CopyFrom(past[f"past.{name}"])
            opened.name, dims = f"written.{name}", opened.type.tensor_type.shape.dim
            if node.op_type == "Concat":
                dims[2].dim_param = "seq"
            else:
                dims[0].dim_param, dims[1].dim_param = "batch", "seq"
    return computed


def load_proto(path: Path) -> Any:
    """The ONNX ModelProto without its external data; BundleError when it cannot be read."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path}: not a readable ONNX file ({error}); export the bundle again") from error


def read_metadata(proto: Any, path: Path) -> tuple[Spec, set[str]]:
    """The model's spec, and the matrices onnxruntime unpacks to fp32; BundleError when the file is none of ours."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        return spec_from_json(metadata[SPEC_KEY]), set(json.loads(metadata[UNFUSED_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: not written by jpq-export ({error!r} in its metadata); export it again") from error
