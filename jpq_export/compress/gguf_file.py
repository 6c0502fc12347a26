"""A GGUF file (llama.cpp's format) opened as a checkpoint: header, configuration, tensors.

The header is parsed here: the `gguf` package takes 13 s over a vocabulary of 262,144 tokens, this 0.3 s. Dequantizing
is the package's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jpq_export.compress.checkpoint import Checkpoint
from jpq_export.compress.families import Family, gguf_family, parse_config, spec_of
from jpq_export.compress.gguf_tokenizer import gguf_tokenizer
from jpq_export.compress.stored_layout import Read, split_fused
from jpq_export.errors import ModelError
from jpq_export.format.spec import ModelSpec, RopeSpec

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ROWS_AT_ONCE = 4096  # the package needs several times a block's fp32 bytes while it dequantizes
TENSORS = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_qkv": "attn.qkv",
    "attn_output": "attn.o",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "post_ffw_norm": "mlp_post_norm",
}
TOP = {
    "token_embd.weight": "embed",
    "position_embd.weight": "positions",
    "output_norm.weight": "norm",
    "output_norm.bias": "norm.bias",
    "output.weight": "head",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` outermost first, `type` a GGML type number, `start` in the file."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class GGUF:
    """A parsed header; `data` is the memory-mapped file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.memmap


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.at + length
        if end > len(self.data):
            raise ValueError(f"a string of {length} bytes runs past the end of the file")
        text = bytes(self.data[self.at : end]).decode("utf-8", "replace")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data):
            raise ValueError(f"an array of {count} entries runs past the end of the file")
        if item in (STRING, ARRAY):
            return [self.value(item) for _ in range(count)]
        code = f"<{count}{SCALARS[item]}"
        values = list(struct.unpack_from(code, self.data, self.at))
        self.at += struct.calcsize(code)
        return values


def parse_gguf(path: Path) -> GGUF:
    """The header of `path`; ModelError when it is damaged or cut short."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        return _parse(path, data)
    except (OSError, ValueError, KeyError, struct.error) as error:
        reason = f"unknown type {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"{path}: not a complete GGUF file ({reason}); download it again") from error


def _parse(path: Path, data: np.memmap) -> GGUF:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data.data)
    magic, version = bytes(data[:4]), struct.unpack_from("<I", data.data, 4)[0]
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"starts with {magic!r} version {version}, expected b'GGUF' version 2 or 3")
    cursor.at = 8
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    fields = {}
    for _ in range(field_count):
        key = cursor.string()
        fields[key] = cursor.value(cursor.scalar("I"))
    infos = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.string(), cursor.scalar("I")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]  # GGUF writes the innermost first
        infos[name] = TensorInfo(shape, cursor.scalar("I"), cursor.scalar("Q"))
    align = int(fields.get("general.alignment", 32))
    base = -(-cursor.at // align) * align
    tensors = {name: replace(info, start=base + info.start) for name, info in infos.items()}
    for name, info in tensors.items():
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(info.type)]
        if info.start + math.prod(info.shape) // block * size > len(data):
            raise ValueError(f"tensor {name} runs past the end of the file")
    return GGUF(path, fields, tensors, data)


def read_tensor(file: GGUF, name: str) -> np.ndarray:
    """Dequantized to float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    info = file.tensors[name]
    kind = GGMLQuantizationType(info.type)
    block, size = GGML_QUANT_SIZES[kind]
    columns = info.shape[-1]
    row_bytes, rows = columns // block * size, math.prod(info.shape[:-1])
    raw = file.data[info.start : info.start + rows * row_bytes].reshape(rows, row_bytes)
    out = np.empty((rows, columns), dtype=np.float32)
    plain = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}.get(kind)
    try:
        for at in range(0, rows, ROWS_AT_ONCE):
            part = raw[at : at + ROWS_AT_ONCE]
            out[at : at + ROWS_AT_ONCE] = part.view(plain) if plain else dequantize(part, kind)
    except NotImplementedError as error:
        raise ModelError(f"{file.path}: {name} is {kind.name}, which cannot be read; use another GGUF file") from error
    return out.reshape(info.shape)


def open_gguf(path: Path, *, name: str) -> Checkpoint:
    """A single-file GGUF model of a supported architecture; ModelError when its header makes no sense."""
    try:
        return _open(path, name)
    except (ValueError, IndexError, TypeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{path}: damaged header ({error}); download it again") from error


def _open(path: Path, name: str) -> Checkpoint:
    file, where = parse_gguf(path), str(path)
    architecture = str(file.fields.get("general.architecture"))
    family = gguf_family(architecture, where)
    if file.fields.get("split.count", 0) > 1:
        raise ModelError(f"{path}: one of several files; join them with llama.cpp's gguf-split --merge")
    try:
        config = parse_config(config_of(file, family), family, where)
    except KeyError as error:
        raise ModelError(f"{path}: the header lacks {error}; use another GGUF file") from error
    spec = with_rope_factors(spec_of(config, family, name=name, where=where), file)
    if "blk.0.attn_q.bias" in file.tensors:
        spec = replace(spec, qkv_bias=True)
    tokenizer = gguf_tokenizer(file.fields, vocab=spec.vocab, bos_id=spec.bos_id, where=where)
    spec = replace(spec, add_bos=tokenizer.add_bos)
    return Checkpoint(spec, split_fused(readers(file, spec, family), spec, where), tokenizer, where)


def config_of(file: GGUF, family: Family) -> dict[str, Any]:
    """The header's hyperparameters under config.json's names; KeyError for a missing one."""
    prefix = family.gguf

    def field(key: str) -> Any:
        return file.fields[f"{prefix}.{key}"]

    def optional(key: str, default: Any = None) -> Any:
        return file.fields.get(f"{prefix}.{key}", default)

    where = str(file.path)
    if optional("expert_count"):
        raise ModelError(
            f"{where}: a mixture of {optional('expert_count')} experts is not supported; give a dense model"
        )
    per_layer = [k for k in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
                 if isinstance(optional(k), list)]  # fmt: skip
    if per_layer:
        raise ModelError(f"{where}: {per_layer[0]} differs by layer, expected one width; give the unpruned model")
    heads, hidden = field("attention.head_count"), field("embedding_length")
    norm_eps = field("attention.layer_norm_epsilon" if family.layer_norm else "attention.layer_norm_rms_epsilon")
    config = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": optional("attention.key_length", hidden // heads),
        # float32 in the header; its shortest decimal is what was meant (1e-06, not 9.99999997e-07)
        "rms_norm_eps": float(str(np.float32(norm_eps))),
        "max_position_embeddings": field("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stop_ids(file.fields),
        "rope_theta": optional("rope.freq_base", 10000.0),
    }
    config |= rope_scaling(optional)
    if family.gguf == "phi3" and (rotated := optional("rope.dimension_count")):  # Phi-4-mini turns a part of each head
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    if optional("attention.sliding_window"):
        config["sliding_window"] = optional("attention.sliding_window")
    if family.scaled_embedding:  # Gemma-3: every sixth layer is global; 27B alone scales queries by hidden / heads
        config["sliding_window_pattern"] = 6
        config["rope_local_base_freq"] = optional("rope.freq_base_swa", 10000.0)
        config["query_pre_attn_scalar"] = hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"]
    return {family.fields.get(key, key): value for key, value in config.items()}


def stop_ids(fields: dict[str, Any]) -> list[int]:
    """End of text, then end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return list(dict.fromkeys(int(fields[key]) for key in keys if key in fields))


def rope_scaling(optional: Callable[..., Any]) -> dict[str, Any]:
    """rope_scaling of config.json, where the header states one."""
    kind = optional("rope.scaling.type", "none")
    if kind in ("none", ""):
        return {}
    scaling = {"rope_type": kind, "factor": optional("rope.scaling.factor", 1.0)}
    original = optional("rope.scaling.original_context_length")
    return {"rope_scaling": scaling | ({"original_max_position_embeddings": original} if original else {})}


def with_rope_factors(spec: ModelSpec, file: GGUF) -> ModelSpec:
    """Llama-3's frequency scaling comes as a tensor of divisors."""
    if "rope_freqs.weight" not in file.tensors:
        return spec
    factors = read_tensor(file, "rope_freqs.weight").reshape(-1)
    frequencies = np.asarray(spec.ropes[0].inv_freq, dtype=np.float32)
    if factors.shape != frequencies.shape:
        raise ModelError(f"{file.path}: rope_freqs has {factors.size} entries, expected {frequencies.size}")
    return replace(spec, ropes=(RopeSpec(tuple((frequencies / factors).tolist()), spec.ropes[0].scaling),))


def readers(file: GGUF, spec: ModelSpec, family: Family) -> dict[str, Read]:
    """Readers by canonical name."""
    out: dict[str, Read] = {}
    for stored in sorted(file.tensors):
        if stored == "rope_freqs.weight":
            continue
        name = canonical(stored, family)
        if name is None:
            raise ModelError(f"{file.path}: unexpected tensor {stored!r}; this variant of the model is not supported")
        out[name] = _reader(file, stored, _interleaved_heads(name, spec))
    return out


def canonical(stored: str, family: Family) -> str | None:
    """A GGUF tensor name -> canonical name; None when unknown."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if match is None or match[2] not in TENSORS:
        return TOP.get(stored)
    name = TENSORS[match[2]]
    if name == "mlp.up" and "mlp.gate_up" in family.names.values():
        name = "mlp.gate_up"  # GGUF calls both by one name
    return f"layers.{match[1]}.{name}{'.bias' if match[3] == 'bias' else ''}"


def _interleaved_heads(name: str, spec: ModelSpec) -> int:
    """How many heads of this tensor llama.cpp reordered for its rotary layout; 0 for none. Only its "llama" does."""
    part = name.removesuffix(".bias").rpartition(".")[2]
    if spec.family != "llama" or ".attn." not in name or part not in ("q", "k"):
        return 0
    return spec.layers[0].kv_heads * (spec.heads_per_group if part == "q" else 1)


def _reader(file: GGUF, stored: str, heads: int) -> Read:
    def read() -> torch.Tensor:
        values = read_tensor(file, stored)
        return torch.from_numpy(rotate_half_order(values, heads) if heads else values)

    return read


def rotate_half_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's pairing of rotary dimensions: rows 0, d/2, 1, d/2 + 1, ... of each head -> 0, 1, ..., d - 1."""
    if rows.shape[0] % (2 * heads):
        return rows  # the shape check that follows names it
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])  # [heads, d/2, 2, in]
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))
