"""What a choice costs on a target: stored bytes and decode latency.

Latency is one token at batch 1 with a full context: every weight and the key/value cache are read once (memory-bound),
each operator costs a fixed launch time, and the arithmetic is added where it exceeds the memory time. An estimate from
the target's data sheet, labelled so; it ranks plans, it does not promise milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from jpq_export.format.encoder_spec import EncoderSpec, Spec, is_table
from jpq_export.format.spec import ModelSpec
from jpq_export.format.target import Target
from jpq_export.numerics.scheme import Scheme

OPS_PER_ATTENTION = 10  # norm, q, k, v, two rotations, cache append, attention, output, add
OPS_PER_MLP = 5  # norm, gate, up, activation-multiply, down (add fused)
OPS_AROUND = 4  # look-up, last norm, head, and one to spare
OPS_PER_ROTATION = 2  # products; of the two reshapes around them nothing is launched
FP32 = 4
TEXT_TOKENS = 128  # a paragraph: what an encoder's latency is counted for


@dataclass(frozen=True, slots=True)
class CostModel:
    """Bytes and microseconds of the parts of a model on a target, at a context length in tokens."""

    spec: Spec
    target: Target
    context: int

    @property
    def tokens(self) -> int:
        """That a pass computes: one of a decoder, a whole text of an encoder."""
        return min(self.context, TEXT_TOKENS) if isinstance(self.spec, EncoderSpec) else 1

    def microseconds(self, stored_bytes: float, ops: int, macs: float) -> float:
        """Time of `ops` operators that read `stored_bytes` and do `macs` multiply-adds for one token."""
        memory = stored_bytes / (self.target.bandwidth_gb_s * 1e3)  # GB/s = 1e3 bytes per microsecond
        compute = 2 * macs / (self.target.fp16_tflops * 1e6)
        return max(memory, compute) + ops * self.target.op_overhead_us

    def matrix(self, rows: int, columns: int, scheme: Scheme) -> tuple[int, float]:
        """(bytes, microseconds without launches) of one matrix-vector product."""
        size = self.target.stored_bytes(self.target.fit(scheme), rows, columns)
        return size, self.microseconds(size, 0, rows * columns * self.tokens)

    def attention_rest(self, index: int, kv_heads: int) -> tuple[int, float]:
        """(bytes, microseconds) of an attention sub-layer beside its matrices: norms, biases, cache, launches."""
        if kv_heads == 0:
            return self._vector_bytes(index, "attn", 0, None), 0.0
        spec, window = self.spec, self.spec.layers[index].window
        tokens = min(self.context, window or self.context)
        size = self._vector_bytes(index, "attn", kv_heads, None)
        if isinstance(spec, EncoderSpec):
            return size, self.microseconds(size, OPS_PER_ATTENTION, 2 * kv_heads * spec.head_dim * self.tokens**2)
        cache_bytes = spec.cache_bytes(kv_heads, float_bytes=2) * tokens  # a float cache is fp16 on the device
        macs = 2 * kv_heads * spec.heads_per_group * spec.head_dim * tokens
        return size, self.microseconds(size + cache_bytes, OPS_PER_ATTENTION + self._turn_of_reads(), macs)

    def mlp_rest(self, index: int, channels: int) -> tuple[int, float]:
        """(bytes, microseconds) of an MLP sub-layer beside its matrices."""
        if channels == 0:
            return self._vector_bytes(index, "mlp", None, 0), 0.0
        size = self._vector_bytes(index, "mlp", None, channels)
        return size, self.microseconds(size, OPS_PER_MLP + self._turn_of_reads(), 0)

    def _turn_of_reads(self) -> int:
        return OPS_PER_ROTATION if isinstance(self.spec, ModelSpec) and self.spec.turned_reads else 0

    def fixed(self) -> tuple[int, float]:
        """(bytes, microseconds) of what no choice changes: last norm, rotations, look-up and head launches."""
        size = FP32 * sum(length for name, length in self.spec.vectors().items() if is_table(name))
        turns = 2 if isinstance(self.spec, ModelSpec) and self.spec.rotated else 0
        return size, self.microseconds(size, OPS_AROUND + turns * OPS_PER_ROTATION, 0)

    def table(self, name: str, scheme: Scheme) -> tuple[int, float]:
        """(bytes, microseconds) of a table; only the head and a tied embedding read more than one row a token."""
        size, time = self.matrix(*self.spec.matrices()[name], scheme)
        return size, time if name == "head" or (name == "embed" and self.spec.tied) else 0.0

    def _vector_bytes(self, index: int, sub: str, kv_heads: int | None, channels: int | None) -> int:
        layer = self.spec.layers[index]
        layer = type(layer)(
            layer.kv_heads if kv_heads is None else kv_heads, layer.ffn if channels is None else channels
        )
        layers = (*self.spec.layers[:index], layer, *self.spec.layers[index + 1 :])
        at = f"layers.{index}.{sub}"
        return FP32 * sum(n for name, n in self.spec.with_layers(layers).vectors().items() if name.startswith(at))
