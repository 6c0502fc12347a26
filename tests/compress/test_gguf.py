"""GGUF files: the same model as its safetensors folder, real tokenizer rules, and one line for every damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from jpq_export.compress.decoder import named_weights
from jpq_export.compress.gguf_file import TENSORS, TOP, parse_gguf, rotate_half_order
from jpq_export.compress.gguf_tokenizer import gguf_tokenizer, score_merges
from jpq_export.compress.load import LoadedModel, load_model
from jpq_export.errors import ModelError

Folder = Callable[..., Path]
ARCHITECTURES = {"llama": "llama", "llama_tied": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}
ARCHITECTURES |= {"phi3": "phi3", "gpt2": "gpt2"}
ROTARY_PAIRS = 8  # of the llama fixtures: head_dim 16


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion of a q or k projection, as its converter writes it."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    folder: Path,
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any] = lambda fields, tensors: None,
) -> LoadedModel:
    """Write the tiny model of `folder` as llama.cpp's converter would; returns it as loaded from the folder."""
    model = load_model(str(folder))
    spec, architecture = model.spec, ARCHITECTURES[folder.name]
    layer = spec.layers[0]
    heads = layer.kv_heads * spec.heads_per_group
    fields: dict[str, Any] = {
        f"{architecture}.embedding_length": spec.hidden,
        f"{architecture}.block_count": len(spec.layers),
        f"{architecture}.feed_forward_length": layer.ffn,
        f"{architecture}.context_length": spec.max_positions,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": layer.kv_heads,
        f"{architecture}.attention.key_length": spec.head_dim,
        f"{architecture}.attention.layer_norm_{'' if spec.layer_norm else 'rms_'}epsilon": spec.norm_eps,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    }
    if layer.window:
        fields[f"{architecture}.attention.sliding_window"] = layer.window
    stored = {canonical: name for name, canonical in TENSORS.items()}
    top = {canonical: name for name, canonical in TOP.items()}
    tensors = {}
    for name, values in fused(named_weights(model.model), folder.name).items():
        part = name.removesuffix(".bias").split(".")[-1]
        if architecture == "llama" and ".attn." in name and part in ("q", "k"):
            values = paired(values, heads if part == "q" else layer.kv_heads)
        if name in top:
            tensors[top[name]] = values
        else:
            _, index, *rest = name.removesuffix(".bias").split(".")
            ending = "bias" if name.endswith(".bias") else "weight"
            tensors[f"blk.{index}.{stored['.'.join(rest)]}.{ending}"] = values
    if folder.name == "llama_tied":
        plain = 1 / 10000.0 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
        tensors["rope_freqs.weight"] = (plain / np.array(spec.ropes[0].inv_freq)).astype(np.float32)
    change(fields, tensors)
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    add_tiny_tokenizer(writer, folder)
    for name, values in tensors.items():
        if values.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def fused(weights: dict[str, torch.Tensor], model: str) -> dict[str, np.ndarray]:
    """Weights by canonical name as the model's GGUF file holds them: Phi-3 and GPT-2 keep q, k and v in one."""
    out = {name: value.numpy() for name, value in weights.items()}
    parts = {"phi3": {"attn.qkv": "qkv", "mlp.up": ("gate", "up")}, "gpt2": {"attn.qkv": "qkv"}}.get(model, {})
    for whole, shorts in parts.items():
        stem = whole.split(".")[0]
        for name in [name for name in out if f"{stem}.{shorts[0]}" in name and "norm" not in name]:
            at, ending = name.split(f"{stem}.{shorts[0]}")
            out[f"{at}{whole}{ending}"] = np.concatenate([out.pop(f"{at}{stem}.{short}{ending}") for short in shorts])
    return out


def add_tiny_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if 256 <= i < 259 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_chat_template("{{ messages }}")


def largest_difference(a: LoadedModel, b: LoadedModel) -> float:
    one, other = named_weights(a.model), named_weights(b.model)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "phi3", "gpt2"])
def test_a_gguf_file_is_the_same_model_as_its_folder(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    changes = {"use_sliding_window": False} if name == "qwen2" else {}
    expected = write_gguf(tiny_folder(name, **changes), tmp_path / "m.gguf")
    got = load_model(str(tmp_path / "m.gguf"))
    assert largest_difference(got, expected) == 0
    ids = torch.arange(32)[None]
    difference = (got.model(ids) - expected.model(ids)).square().mean().sqrt()
    assert float(difference / expected.model(ids).square().mean().sqrt()) < 1e-5
    assert (got.spec.tied, got.spec.qkv_bias, got.spec.qk_norm, got.spec.eos_ids, got.spec.norm_eps) == (
        *(expected.spec.tied, expected.spec.qkv_bias, expected.spec.qk_norm, (257,)),
        expected.spec.norm_eps,
    )
    assert got.encode("the theory 12") == expected.encode("the theory 12")
    assert json.loads(got.tokenizer_config)["chat_template"] == "{{ messages }}"


def test_gemma_norms_in_gguf_already_hold_the_one(tiny_folder: Folder, tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    folder = tiny_folder(
        "gemma3", num_hidden_layers=6, layer_types=kinds, rope_parameters=ropes, query_pre_attn_scalar=32
    )
    expected = write_gguf(folder, tmp_path / "m.gguf")
    got = load_model(str(tmp_path / "m.gguf"))
    assert largest_difference(got, expected) == 0
    assert got.spec.layers == expected.spec.layers
    assert (got.spec.ropes, got.spec.attention_scale) == (expected.spec.ropes, expected.spec.attention_scale)
    assert (got.spec.embed_scale, got.spec.activation) == (8.0, "gelu_tanh")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_in_the_header(kind: str, tiny_folder: Folder, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    fields = {"scaling.type": kind, "scaling.factor": 4.0, "scaling.original_context_length": 64}
    expected = write_gguf(
        tiny_folder("llama", rope_parameters=rope),
        tmp_path / "m.gguf",
        change=lambda f, t: f.update({f"llama.rope.{key}": value for key, value in fields.items()}),
    )
    assert load_model(str(tmp_path / "m.gguf")).spec.ropes == expected.spec.ropes
    assert load_model(str(tiny_folder("llama"))).spec.ropes != expected.spec.ropes


def test_quantized_tensors_are_dequantized(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    expected = write_gguf(folder, tmp_path / "q8.gguf", kind=GGMLQuantizationType.Q8_0)
    write_gguf(folder, tmp_path / "q4.gguf", kind=GGMLQuantizationType.Q4_1)
    write_gguf(folder, tmp_path / "f16.gguf", kind=GGMLQuantizationType.F16)
    step = 1.0 / 127  # the largest weights are below 1
    assert 0 < largest_difference(load_model(str(tmp_path / "f16.gguf")), expected) < 1e-3
    assert largest_difference(load_model(str(tmp_path / "q8.gguf")), expected) < step
    assert largest_difference(load_model(str(tmp_path / "q4.gguf")), expected) > step


def test_the_rotary_order_is_undone() -> None:
    rows = np.arange(32.0).reshape(32, 1)
    assert np.array_equal(rotate_half_order(paired(rows, 2), 2), rows)
    assert not np.array_equal(rotate_half_order(paired(rows, 2), 4), rows)
    assert paired(rows, 2)[:4, 0].tolist() == [0, ROTARY_PAIRS, 1, ROTARY_PAIRS + 1]


FAULTS: list[tuple[Callable[[dict[str, Any], dict[str, np.ndarray]], Any], str]] = [
    (lambda f, t: t["blk.1.ffn_up.weight"].__setitem__((0, 0), np.nan), "layers.1.mlp.up has 1 NaN"),
    (lambda f, t: t.pop("output_norm.weight"), "1 missing tensor (norm)"),
    (lambda f, t: t.update({"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}), "unexpected tensor"),
    (lambda f, t: f.pop("llama.block_count"), "the header lacks 'llama.block_count'"),
    (lambda f, t: f.update({"llama.expert_count": 4}), "a mixture of 4 experts is not supported"),
    (lambda f, t: f.update({"llama.feed_forward_length": [96, 64]}), "feed_forward_length differs by layer"),
    (lambda f, t: f.update({"split.count": 3}), "one of several files"),
    (lambda f, t: f.update({"llama.embedding_length": 32}), "has shape (320, 64), expected (320, 32)"),
    (
        lambda f, t: f.update({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
        "'rope_type'='longrope'",
    ),
]


@pytest.mark.parametrize(("change", "expected"), FAULTS)
def test_wrong_files_are_refused(change: Callable, expected: str, tiny_folder: Folder, tmp_path: Path) -> None:
    write_gguf(tiny_folder("llama"), tmp_path / "m.gguf", change=change)
    assert expected in refusal(tmp_path / "m.gguf")


def test_phi3_that_turns_a_part_of_each_head_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    path, folder = tmp_path / "m.gguf", tiny_folder("phi3")
    for rotated in (16, 12):
        write_gguf(folder, path, change=lambda f, t, n=rotated: f.update({"phi3.rope.dimension_count": n}))
        if rotated == 16:
            assert load_model(str(path)).spec.head_dim == 16
    assert "partial_rotary_factor 0.75 is not supported" in refusal(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 5000, -1])
def test_a_truncated_file_is_refused(keep: int, tiny_folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_folder("llama"), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a complete GGUF file" in refusal(path)


def test_other_files_and_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "starts with b'PK" in refusal(path)
    writer = GGUFWriter(path, "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "GGUF architecture 'falcon' is not supported; supported: gemma3, gpt2, llama, phi3, qwen2, qwen3" in refusal(
        path
    )
    assert parse_gguf(path).fields["general.architecture"] == "falcon"


# Tokenizers


def byte_level(pre: str) -> dict[str, Any]:
    tokens = [*"0123456789abc", "12", "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "a b"],
    }


def test_digits_are_split_where_the_rule_says_so() -> None:
    def ids(pre: str) -> list[int]:
        files = gguf_tokenizer(byte_level(pre), vocab=20, bos_id=None, where="x")
        return files.tokenizer.encode("ab12").ids

    assert ids("smollm") == [14, 1, 2]
    assert ids("gpt-2") == [14, 13]
    with pytest.raises(ModelError, match="pre-tokenizer 'tekken' is not known; known: gpt-2, smollm"):
        ids("tekken")


def sentencepiece() -> dict[str, Any]:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("\n\n", 0.0, 4), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
    letters = ["▁", "a", "b", "c", "\n"]
    pieces += [("bc", -1.0, 1), ("ab", -2.0, 1), ("▁a", -3.0, 1)]
    pieces += [(letter, -10.0 - i, 1) for i, letter in enumerate(letters)]
    tokens, scores, types = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    files = gguf_tokenizer(sentencepiece(), vocab=300, bos_id=1, where="x")

    def pieces(text: str) -> list[str]:
        return files.tokenizer.encode(text, add_special_tokens=False).tokens

    assert pieces("abc a") == ["a", "bc", "▁a"]  # bc scores above ab
    assert pieces("a\n\nb") == ["a", "\n\n", "b"]
    assert pieces("é") == ["<0xC3>", "<0xA9>"]
    assert files.add_bos
    assert files.tokenizer.encode("a").tokens == ["<s>", "a"]
    for text in ("abc a", "é\n\n a"):
        assert files.tokenizer.decode(files.tokenizer.encode(text).ids) == text
    with_prefix = gguf_tokenizer(
        sentencepiece() | {"tokenizer.ggml.add_space_prefix": True}, vocab=300, bos_id=1, where="x"
    )
    assert with_prefix.tokenizer.encode("a", add_special_tokens=False).tokens == ["▁a"]


def test_score_merges_use_ordinary_pieces_only() -> None:
    merges = score_merges(["a", "b", "ab", "aba", "<x>"], [1, 1, 1, 1, 3], [-5, -6, -2, -1, 0])
    assert merges == [["ab", "a"], ["a", "b"]]


@pytest.mark.parametrize(("changes", "expected"), [
    ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' is not supported"),
    ({"tokenizer.ggml.scores": [1.0]}, "1 token scores for 267 tokens"),
    ({"tokenizer.ggml.token_type": [1]}, "267 tokens, 1 token types"),
])  # fmt: skip
def test_wrong_vocabularies_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        gguf_tokenizer(sentencepiece() | changes, vocab=300, bos_id=1, where="x")
