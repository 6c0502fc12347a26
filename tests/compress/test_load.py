"""Getting models in: facts, folders, GGUF files, tokenizers, packaged downloads; every wrong input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import jpq_export.compress.load as load_module
from jpq_export.compress.decoder import named_weights
from jpq_export.compress.load import LoadedModel, load_model
from jpq_export.errors import ModelError

Folder = Callable[..., Path]


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; None removes one."""
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(source: Path | str | None, kind: type[Exception] = ModelError) -> str:
    """The message a bad source gets; it is one line."""
    with pytest.raises(kind) as caught:
        load_model(None if source is None else str(source))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(a: LoadedModel, b: LoadedModel) -> bool:
    one, other = named_weights(a.model), named_weights(b.model)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Facts


def test_spec_holds_the_family_facts(tiny_folder: Folder) -> None:
    llama = load_model(str(tiny_folder("llama_biased"))).spec
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.tied) == (True, True, True, False)
    assert (llama.head_dim, llama.heads_per_group, llama.vocab, llama.max_positions) == (24, 2, 320, 256)
    assert llama.ropes[0].scaling > 1.1  # YaRN's attention factor
    assert (llama.bos_id, llama.eos_ids, llama.add_bos) == (256, (257,), False)
    qwen = load_model(str(tiny_folder("qwen2"))).spec
    assert (qwen.qkv_bias, qwen.o_bias, qwen.qk_norm) == (True, False, False)
    assert [layer.window for layer in qwen.layers] == [None, 6]
    gemma = load_model(str(tiny_folder("gemma3"))).spec
    assert (gemma.qk_norm, gemma.post_norms, gemma.tied, gemma.activation) == (True, True, True, "gelu_tanh")
    assert gemma.embed_scale == 8.0
    assert gemma.attention_scale == pytest.approx(24**-0.5)
    assert [layer.window for layer in gemma.layers] == [5, 5, None]
    full, local = (gemma.ropes[gemma.layers[i].rope].inv_freq for i in (2, 0))
    assert full[0] == 0.5
    assert local[0] == 1.0


def test_loaded_model_carries_identity_and_size(tiny_folder: Folder) -> None:
    folder = tiny_folder("qwen3", add_bos=True)
    model = load_model(str(folder))
    assert (model.name, model.source) == ("qwen3", str(folder))
    assert model.original_bytes == 2 * sum(p.numel() for p in model.model.parameters())
    assert not any(p.requires_grad for p in model.model.parameters())
    assert model.spec.add_bos
    assert model.encode("the") == [260]  # special tokens are the caller's
    assert json.loads(model.tokenizer_config)["eos_token"] == "</s>"
    assert json.loads(model.tokenizer_json)["model"]["type"] == "BPE"


def test_sha256_follows_weights_and_facts_but_not_the_folder(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    first = load_model(str(folder))
    renamed = folder.rename(tmp_path / "other")
    assert load_model(str(renamed)).sha256 == first.sha256
    edit_json(renamed / "config.json", rms_norm_eps=2e-6)
    assert load_model(str(renamed)).sha256 != first.sha256
    edit_json(renamed / "config.json", rms_norm_eps=1e-6)
    edit_weights(renamed, lambda tensors: tensors["model.norm.weight"][3].add_(1e-3))
    assert load_model(str(renamed)).sha256 != first.sha256


def test_progress_counts_tensors(tiny_folder: Folder) -> None:
    calls: list[tuple[int, int]] = []
    model = load_model(str(tiny_folder("llama")), progress=lambda done, total: calls.append((done, total)))
    count = len(named_weights(model.model))
    assert calls == [(i + 1, count) for i in range(count)]


# Folders


def test_shards_and_bfloat16_load_as_fp32(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    edit_weights(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    whole = load_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001.safetensors": names[:7], "model-00002.safetensors": names[7:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    sharded = load_model(str(folder))
    assert all(value.dtype == torch.float32 for value in named_weights(sharded.model).values())
    assert same_weights(whole, sharded)
    (folder / "model-00002.safetensors").unlink()
    assert "1 of 2 weight files missing (model-00002.safetensors)" in refusal(folder)


def test_a_stored_head_of_a_tied_model_must_equal_the_embedding(tiny_folder: Folder) -> None:
    folder = tiny_folder("qwen3")
    before = load_model(str(folder))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same_weights(load_model(str(folder)), before)
    edit_weights(folder, lambda t: t["lm_head.weight"][0, 0].add_(1))
    assert "the stored head differs" in refusal(folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma(prefix: str, tiny_folder: Folder) -> None:
    folder = tiny_folder("gemma3")
    before = load_model(str(folder))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {prefix + name.removeprefix("model."): tensors.pop(name) for name in list(tensors)}
        tensors.update(renamed | {"vision_tower.patch.weight": torch.zeros(2, 2)})

    edit_weights(folder, rename)
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(outer), encoding="utf-8")
    model = load_model(str(folder))
    assert same_weights(model, before)
    assert model.spec.layers == before.spec.layers


def test_stop_tokens_come_from_both_configurations(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 257]}', encoding="utf-8")
    assert load_model(str(folder)).spec.eos_ids == (257, 258)


CONFIG_FAULTS = [
    ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not supported; supported: LlamaForCausalLM"),
    ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba' is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    ({"hidden_size": "wide"}, "bad configuration"),
    ({"num_key_value_heads": 3}, "4 attention heads, 3 key/value heads"),
    ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5 is not",
    ),
    ({"hidden_size": 32}, "has shape (320, 64), expected (320, 32)"),
    ({"num_hidden_layers": 3}, "9 missing tensors (layers.2.attn.k)"),
    ({"num_hidden_layers": 1}, "9 unexpected tensors (layers.1.attn.k)"),
    ({"attention_bias": True}, "8 missing tensors (layers.0.attn.k.bias)"),
]


@pytest.mark.parametrize(("changes", "expected"), CONFIG_FAULTS)
def test_a_wrong_configuration_is_refused(changes: dict[str, Any], expected: str, tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    load_model(str(folder))
    edit_json(folder / "config.json", **changes)
    assert expected in refusal(folder)


def test_gemma_soft_capping_is_refused(tiny_folder: Folder) -> None:
    folder = tiny_folder("gemma3")
    edit_json(folder / "config.json", final_logit_softcapping=30.0)
    assert "final_logit_softcapping=30.0 is not supported" in refusal(folder)


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][5, 7].fill_(value)


WEIGHT_FAULTS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (poison(float("nan")), "layers.1.mlp.up has 1 NaN or infinite values"),
    (poison(float("inf")), "layers.1.mlp.up has 1 NaN or infinite values"),
    (lambda t: t.pop("model.norm.weight"), "1 missing tensor (norm)"),
    (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(1)}), "the weights are quantized"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}), "model.norm.weight is int8"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), "norm has shape (65,), expected (64,)"),
]


@pytest.mark.parametrize(("change", "expected"), WEIGHT_FAULTS)
def test_wrong_weights_are_refused(change: Callable, expected: str, tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    edit_weights(folder, change)
    assert expected in refusal(folder)


def test_a_truncated_file_is_refused(tiny_folder: Folder) -> None:
    path = tiny_folder("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a complete safetensors file" in refusal(path.parent)
    path.write_bytes(b"")
    assert "not a complete safetensors file" in refusal(path.parent)


def test_pickled_weights_are_refused_unopened(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled (pytorch_model.bin)" in refusal(folder)


def test_incomplete_folders_say_what_is_missing(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)
    (folder / "config.json").write_text("{not json", encoding="utf-8")
    assert "not readable as JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json; expected a folder saved with save_pretrained" in refusal(folder)
    (folder / "model.gguf").touch()
    assert f"give the GGUF file itself: {folder / 'model.gguf'}" in refusal(folder)
    (tmp_path / "notes.txt").touch()
    assert "not a model" in refusal(tmp_path / "notes.txt")


def test_too_little_memory_is_said_before_reading(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama")
    need = 4 * load_model(str(folder)).spec.parameters() * load_module.MEMORY_FACTOR
    monkeypatch.setattr(load_module, "available_bytes", lambda: int(need))
    load_model(str(folder))
    edit_weights(folder, poison(float("nan")))
    assert "NaN" in refusal(folder)
    monkeypatch.setattr(load_module, "available_bytes", lambda: int(need) - 1)
    assert "million parameters need about" in refusal(folder)


# Tokenizers


def test_a_tokenizer_of_another_model_is_refused(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["vocab"]["way too far"] = 320
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert "largest token id 320, the embedding has 320 rows" in refusal(folder)
    raw["model"]["vocab"]["way too far"] = 319
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    load_model(str(folder))


def test_added_tokens_past_the_embedding_are_left_out(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 320, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert max(load_model(str(folder)).encode("<image>")) < 256


def test_damaged_tokenizers_are_refused(tiny_folder: Folder) -> None:
    path = tiny_folder("llama") / "tokenizer.json"
    path.write_text('{"version": "1.0"}', encoding="utf-8")
    assert "not a tokenizer" in refusal(path.parent)
    path.write_text("[]", encoding="utf-8")
    assert "expected a JSON object" in refusal(path.parent)
    path.write_bytes(b"\xff\xfe")
    assert "tokenizer files are unreadable" in refusal(path.parent)
    path.unlink()
    assert "no tokenizer.json; write one with AutoTokenizer" in refusal(path.parent)


@pytest.mark.parametrize(("template", "stated", "expected"), [
    (False, None, False), (True, None, True), (True, False, False), (False, True, True),
])  # fmt: skip
def test_add_bos(template: bool, stated: bool | None, expected: bool, tiny_folder: Folder) -> None:
    folder = tiny_folder("llama", add_bos=template)
    edit_json(folder / "tokenizer_config.json", add_bos_token=stated)
    assert load_model(str(folder)).spec.add_bos is expected


def test_the_chat_template_file_joins_the_configuration(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert json.loads(load_model(str(folder)).tokenizer_config)["chat_template"] == "{{ messages }}"


# The hub and the machine


def test_a_hub_model_is_configuration_first_and_never_code(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tiny_folder("llama"), []

    def snapshot(source: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda source, file: str(folder / file))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = load_model("someone/tiny")
    assert (model.name, model.source) == ("tiny", "someone/tiny")
    assert {Path(pattern).suffix for pattern in asked} == {".json", ".safetensors", ".jinja"}
    asked.clear()
    edit_json(folder / "config.json", architectures=["FalconForCausalLM"])
    assert "someone/tiny: architecture FalconForCausalLM is not supported" in refusal("someone/tiny")
    assert asked == []


def test_available_memory_heeds_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = load_module.available_bytes()
    assert free > 1 << 20
    (tmp_path / "memory.max").write_text("3000", encoding="ascii")
    (tmp_path / "memory.current").write_text("1000", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n", encoding="ascii")
    monkeypatch.setattr(load_module, "CGROUP", tmp_path)
    assert load_module.available_bytes() == 2300  # page cache can be had back
    (tmp_path / "memory.max").write_text("max", encoding="ascii")
    assert load_module.available_bytes() > 1 << 20
