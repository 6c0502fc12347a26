"""Phi-3's fused and GPT-2's transposed weights as their files hold them, and the facts only these two have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jpq_export.compress import statistics
from jpq_export.compress.decoder import Decoder, build_decoder, named_weights
from jpq_export.compress.load import load_model
from jpq_export.compress.permute import permuted
from jpq_export.compress.stored_layout import split_fused, turned
from jpq_export.compress.tune import heldout_kl, trainable
from jpq_export.errors import ModelError

Folder = Callable[..., Path]


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def decoder_of(folder: Path) -> Decoder:
    model = load_model(str(folder)).model
    assert isinstance(model, Decoder)
    return model


def sequences(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 24))


def test_rows_of_fused_matrices_are_split_in_order(tiny_folder: Folder) -> None:
    folder = tiny_folder("phi3")
    stored, weights = load_file(folder / "model.safetensors"), named_weights(decoder_of(folder))
    qkv, gate_up = (stored[f"model.layers.1.{name}_proj.weight"] for name in ("self_attn.qkv", "mlp.gate_up"))
    for name, rows in (("attn.q", qkv[:64]), ("attn.k", qkv[64:96]), ("attn.v", qkv[96:])):
        assert torch.equal(weights[f"layers.1.{name}"], rows)
    assert torch.equal(weights["layers.1.mlp.gate"], gate_up[:96])
    assert torch.equal(weights["layers.1.mlp.up"], gate_up[96:])
    assert not torch.equal(weights["layers.1.mlp.up"], gate_up[:96])


def test_transposed_matrices_are_turned_and_their_biases_split(tiny_folder: Folder) -> None:
    folder = tiny_folder("gpt2")
    stored, weights = load_file(folder / "model.safetensors"), named_weights(decoder_of(folder))
    at = "transformer.h.0."
    assert torch.equal(weights["layers.0.attn.k"], stored[f"{at}attn.c_attn.weight"][:, 64:128].T)
    assert torch.equal(weights["layers.0.attn.v.bias"], stored[f"{at}attn.c_attn.bias"][128:])
    assert torch.equal(weights["layers.0.attn.o"], stored[f"{at}attn.c_proj.weight"].T)
    assert torch.equal(weights["positions"], stored["transformer.wpe.weight"])  # a table is not turned
    assert not torch.equal(weights["layers.0.attn.o"], stored[f"{at}attn.c_proj.weight"])


def test_gpt2s_own_files_have_shorter_names_and_masks_beside_the_weights(tiny_folder: Folder) -> None:
    folder = tiny_folder("gpt2")
    before = named_weights(decoder_of(folder))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {name.removeprefix("transformer."): tensors.pop(name) for name in list(tensors)}
        masks = {"h.0.attn.bias": torch.ones(1, 1, 256, 256), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        tensors.update(renamed | masks)

    edit_weights(folder, rename)
    after = named_weights(decoder_of(folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fused_matrix_of_another_shape_is_refused(tiny_folder: Folder) -> None:
    folder, name = tiny_folder("phi3"), "model.layers.1.self_attn.qkv_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name][1:]}))
    assert "layers.1.attn.qkv has 127 rows, expected 128" in refusal(folder)
    edit_weights(folder, lambda tensors: tensors.update({name.replace("1", "2"): tensors.pop(name)}))
    assert "missing tensors (layers.1.attn.k)" in refusal(folder)


def test_nothing_is_read_before_it_is_asked_for(tiny_folder: Folder) -> None:
    def never() -> torch.Tensor:
        raise AssertionError("read")

    spec = decoder_of(tiny_folder("gpt2")).spec
    names = split_fused(turned({"embed": never, "layers.0.attn.qkv.bias": never}), spec, "here")
    assert list(names) == ["embed", *(f"layers.0.attn.{part}.bias" for part in "qkv")]
    with pytest.raises(AssertionError, match="read"):
        names["layers.0.attn.q.bias"]()


def test_the_facts_of_gpt2(tiny_folder: Folder) -> None:
    spec = load_model(str(tiny_folder("gpt2"))).spec
    assert (spec.ropes, spec.layer_norm, spec.gated, spec.learned_positions) == ((), True, False, True)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.tied, spec.heads_per_group) == (True, True, True, True, 1)
    assert spec.matrices()["positions"] == (256, 64)
    assert "layers.0.mlp.gate" not in spec.matrices()
    wide = load_model(str(tiny_folder("gpt2", n_inner=None, seed=1))).spec
    assert wide.layers[0].ffn == 256


def test_later_facts_leave_the_identity_of_other_models_alone(tiny_folder: Folder) -> None:
    gpt2, llama = (load_model(str(tiny_folder(name))).spec for name in ("gpt2", "llama"))
    assert not {"layer_norm", "gated", "learned_positions"} & json.loads(llama.to_json()).keys()
    assert {"layer_norm", "gated", "learned_positions"} <= json.loads(gpt2.to_json()).keys()
    for spec in (gpt2, llama):
        assert type(spec).from_json(spec.to_json()) == spec


def test_unscaled_scores_of_gpt2(tiny_folder: Folder, tiny_model: Callable[..., Any]) -> None:
    ids = torch.from_numpy(sequences(2))
    expected = tiny_model("gpt2", scale_attn_weights=False)(ids).logits
    got = decoder_of(tiny_folder("gpt2", scale_attn_weights=False))(ids)
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(tiny_model("gpt2")(ids).logits, expected, atol=1e-1)


def test_what_the_decoder_does_not_compute_is_refused(tiny_folder: Folder) -> None:
    folder = tiny_folder("gpt2")
    edit_config(folder, scale_attn_by_inverse_layer_idx=True)
    assert "scale_attn_by_inverse_layer_idx=True is not supported" in refusal(folder)
    folder = tiny_folder("phi3")
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert "partial_rotary_factor 0.5 is not supported" in refusal(folder)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [4.0 + 0.1 * i for i in range(8)],
}


def test_longrope_is_exported_up_to_the_length_of_its_short_factors(
    tiny_folder: Folder, tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "max_position_embeddings": 128}
    model = decoder_of(tiny_folder("phi3", **changes))
    assert model.spec.max_positions == 32
    assert "texts of up to 32 tokens, not 128" in caplog.text
    assert model.spec.ropes[0].scaling > 1.1  # attention factor of four times the length
    theirs, ids = tiny_model("phi3", **changes), torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 40)))
    assert torch.allclose(model(ids[:, :32]), theirs(ids[:, :32]).logits, atol=1e-4)
    assert not torch.allclose(model(ids), theirs(ids).logits, atol=1e-1)  # the twin: beyond it they part


def test_the_price_of_a_position_predicts_its_kl(tiny_folder: Folder) -> None:
    weights = {name: value * 0.5 for name, value in named_weights(decoder_of(tiny_folder("gpt2"))).items()}
    teacher = build_decoder(decoder_of(tiny_folder("gpt2")).spec, weights)
    ids = sequences(32)
    H = statistics.collect(teacher, ids, seed=0).hessians["positions"]
    E = 0.01 * torch.randn(weights["positions"].shape, generator=torch.Generator().manual_seed(1))
    used = E[: ids.shape[1]]
    predicted = 0.5 * float(((used @ H) * used).sum()) / len(used)
    measured = heldout_kl(teacher, build_decoder(teacher.spec, weights | {"positions": weights["positions"] + E}), ids)
    assert 0.5 < predicted / measured < 2.0
    farther = weights | {"positions": weights["positions"] + 4 * E}
    assert not 0.5 < predicted / heldout_kl(teacher, build_decoder(teacher.spec, farther), ids) < 2.0


def test_other_orders_of_channels_compute_the_same(tiny_folder: Folder) -> None:
    teacher, ids = decoder_of(tiny_folder("gpt2")), torch.from_numpy(sequences(2))
    other = permuted(teacher, seed=3)
    assert torch.allclose(other(ids), teacher(ids), atol=2e-4)
    for name in ("positions", "norm.bias", "layers.0.attn_norm.bias", "layers.1.mlp.up"):
        assert not torch.equal(named_weights(other)[name], named_weights(teacher)[name])


def test_every_norm_learns(tiny_folder: Folder) -> None:
    assert len(trainable(decoder_of(tiny_folder("gpt2")))[1]) == 2 * 2 + 1
