"""Our encoder is transformers' model with the pooling of sentence-transformers; and small faults show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jpq_export.compress.load import load_model
from jpq_export.errors import ModelError
from jpq_export.numerics.reference import distance_bucket

# fp32 against fp32 with another order of sums
BOUND = 1e-5
# A wrong formula is not a rounding error.
FAULT = 1e-3
NAMES = ("bert", "bge", "roberta", "xlm_roberta", "mpnet")
Save = Callable[..., Path]
Make = Callable[..., Any]


def loaded(folder: Path) -> Any:
    return load_model(str(folder))


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def batch(pad: int, *, longest: int = 40) -> tuple[Tensor, Tensor]:
    """Three texts of different lengths, padded on the right; 40 tokens reach MPNet's logarithmic buckets."""
    ids = torch.randint(3, 300, (3, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, longest, dtype=torch.long)
    for row, length in ((1, 7), (2, 23)):
        ids[row, length:], mask[row, length:] = pad, 0
    return ids, mask


def pooled(model: Any, ids: Tensor, mask: Tensor, pooling: str) -> Tensor:
    hidden = model(ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(hidden[:, 0] if pooling == "cls" else mean, dim=-1)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_equal_transformers(name: str, save_encoder: Save, tiny_encoder: Make, tmp_path: Path) -> None:
    model = loaded(save_encoder(tmp_path, name))
    ids, mask = batch(model.spec.pad_id)
    expected = pooled(tiny_encoder(name), ids, mask, model.spec.pooling)
    assert relative_rms(model.model(ids, mask), expected) < BOUND
    assert relative_rms(model.model(ids), expected) < BOUND  # without a mask the padding is told by its id
    assert relative_rms(pooled(tiny_encoder(name, seed=1), ids, mask, model.spec.pooling), expected) > FAULT
    other = "mean" if model.spec.pooling == "cls" else "cls"
    assert relative_rms(pooled(tiny_encoder(name), ids, mask, other), expected) > FAULT


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str, save_encoder: Save, tmp_path: Path) -> None:
    model = loaded(save_encoder(tmp_path, name)).model
    ids, mask = batch(model.spec.pad_id)
    assert relative_rms(model(ids, mask)[1:2], model(ids[1:2, :7])) < BOUND
    assert relative_rms(model(ids, torch.ones_like(mask))[1:2], model(ids[1:2, :7])) > FAULT


def test_distance_buckets_are_mpnets() -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distances = torch.arange(-300, 301)
    expected = MPNetEncoder.relative_position_bucket(distances, num_buckets=32).tolist()
    assert [distance_bucket(d, 32) for d in range(-300, 301)] == expected
    assert [distance_bucket(-d, 32) for d in range(-300, 301)] != expected


def test_the_tokenizer_cuts_and_does_not_pad(save_encoder: Save, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "bert")
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    raw["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}', encoding="utf-8")
    model = loaded(folder)
    stored = json.loads(model.tokenizer_json)
    assert (stored["padding"], stored["truncation"]["max_length"], model.spec.max_positions) == (None, 24, 24)
    assert len(model.tokenizer.encode("the " * 100).ids) == 24
    assert len(model.tokenizer.encode("the").ids) < 24


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", "[", "modules.json: not readable"),
        ("modules.json", '[{"type": "a.Dense", "path": "2_Dense"}]', "module Dense is not supported"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pooling max_tokens; supported: mean_tokens"),
        ("config.json", '{"model_type": "bert", "hidden_act": "silu"}', "activation 'silu' is not supported"),
        ("config.json", '{"model_type": "bert", "num_attention_heads": 5}', "5 heads do not divide hidden size"),
        ("config.json", '{"model_type": "bert", "vocab_size": 9}', "the embedding has 9 rows"),
    ],
)
def test_what_cannot_be_loaded_is_named(file: str, content: str, says: str, save_encoder: Save, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "bge")
    loaded(folder)
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=says):
        loaded(folder)
