"""The two sides of a parity check, of one shape: `forward(ids, mask=, cache=)` gives logits, values and the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import BundleError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import ModelSpec
from jpq_export.parity.points import locate, points

SPEC_KEY = "jpq.spec"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One pass: logits [batch, seq, vocab], the cache to go on with, values of points [batch, seq, features]."""

    logits: np.ndarray
    cache: Any
    values: dict[str, np.ndarray] = field(default_factory=dict)


def position_ids(mask: np.ndarray, past: int) -> np.ndarray:
    """Positions of the tokens after `past`: mask [batch, past + seq], 0 = padding on the left -> int64 [batch, seq]."""
    return np.maximum(mask.cumsum(-1) - 1, 0)[:, past:].astype(np.int64)


class TorchRunner:
    """The reference: the compressed model as a PyTorch decoder."""

    def __init__(self, model: CompressedModel) -> None:
        import torch

        from jpq_export.compress.decoder import build_decoder

        weights = {name: torch.from_numpy(weight.dequantize()) for name, weight in model.quantized.items()}
        weights |= {name: torch.from_numpy(vector) for name, vector in model.vectors.items()}
        self.spec = model.spec
        self.decoder = build_decoder(model.spec, weights)
        self.version = torch.__version__
        self._values: dict[str, np.ndarray] | None = None
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
                module.register_forward_pre_hook(lambda _m, x, read=read: self._keep(read, x[0]))

    def _keep(self, name: str, value: Any) -> None:
        if self._values is not None:
            self._values[name] = value.numpy()  # "embed": the tap comes after the module and includes embed_scale

    def forward(
        self, ids: np.ndarray, *, mask: np.ndarray | None = None, cache: Any = None, values: bool = False
    ) -> Outcome:
        """One pass: `ids` int64 [batch, seq]; `mask` int64 [batch, past + seq]; `cache` is changed in place.

        `values` asks for the values of all points.
        """
        import torch

        from jpq_export.compress.decoder import KVCache

        cache = KVCache() if cache is None else cache
        self._values = {} if values else None
        with torch.no_grad():
            logits = self.decoder(
                torch.from_numpy(ids),
                attention_mask=None if mask is None else torch.from_numpy(mask),
                cache=cache,
                tap=self._keep,
            ).numpy()
        kept, self._values = self._values, None
        return Outcome(logits, cache, {} if kept is None else {**kept, "logits": logits})


class OrtRunner:
    """An ONNX decoder in onnxruntime on the CPU; no torch.

    `exact` keeps activations in fp32 where onnxruntime would round them to 8 bits inside MatMulNBits.
    `with_points` adds graph outputs to a copy in memory; the file and its weights stay as they are.
    """

    def __init__(self, path: Path, *, exact: bool = True, with_points: bool = False) -> None:
        self.proto = _load(path)
        metadata = {entry.key: entry.value for entry in self.proto.metadata_props}
        if SPEC_KEY not in metadata:
            raise BundleError(f"{path}: the ONNX metadata has no {SPEC_KEY!r}; use a model.onnx written by jpq-export")
        self.spec = ModelSpec.from_json(metadata[SPEC_KEY])
        self.places = locate(self.proto.graph, self.spec) if with_points else {}
        self.session = self._session(path, exact)
        self.version = _onnxruntime_version()
        self._inputs = {value.name for value in self.session.get_inputs()}

    @staticmethod
    def rounds_activations(path: Path) -> bool:
        """Whether onnxruntime by itself would fuse this graph into kernels with 8-bit activations."""
        return any(node.op_type == "DequantizeLinear" for node in _load(path).graph.node)

    def _session(self, path: Path, exact: bool) -> Any:
        import onnxruntime

        existing = {value.name for value in self.proto.graph.output}
        for name in dict.fromkeys(self.places.values()):
            if name not in existing:
                self.proto.graph.output.add(name=name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        if exact:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            return onnxruntime.InferenceSession(
                self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has its own classes, all of them outside any public base
            first_line = str(error).strip().splitlines()[0]
            raise BundleError(f"{path}: onnxruntime cannot load it ({first_line}); export the bundle again") from error

    def _empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        spec = self.spec
        shapes = {i: (batch, layer.kv_heads, 0, spec.head_dim) for i, layer in enumerate(spec.layers) if layer.kv_heads}
        return {f"{i}.{part}": np.zeros(shape, np.float32) for i, shape in shapes.items() for part in ("key", "value")}

    def forward(
        self, ids: np.ndarray, *, mask: np.ndarray | None = None, cache: Any = None, values: bool = False
    ) -> Outcome:
        """As `TorchRunner.forward`; the cache is {"0.key": [batch, kv_heads, past, head_dim], ...}."""
        cache = self._empty_cache(len(ids)) if cache is None else cache
        past = next(iter(cache.values())).shape[2] if cache else (0 if mask is None else mask.shape[1] - ids.shape[1])
        if mask is None:
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask, past)}
        feeds |= {f"past.{name}": value for name, value in cache.items()}
        fetch = list(
            dict.fromkeys(["logits", *(f"present.{n}" for n in cache), *(self.places.values() if values else ())])
        )
        got = self.session.run(fetch, {name: value for name, value in feeds.items() if name in self._inputs})
        outputs = dict(zip(fetch, got, strict=True))
        present = {name: outputs[f"present.{name}"] for name in cache}
        found = {name: outputs[value] for name, value in self.places.items()} if values else {}
        return Outcome(outputs["logits"], present, found)


def _load(path: Path) -> Any:
    """The ONNX ModelProto without its external data."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path}: not a readable ONNX file ({error}); export the bundle again") from error


def _onnxruntime_version() -> str:
    import onnxruntime

    return onnxruntime.__version__
