"""A sentence encoder's folder opened as a checkpoint: BERT, RoBERTa, XLM-RoBERTa and MPNet as facts.

MiniLM, BGE and E5 are BERT with weights of their own. Pooling and normalisation are read from the files that
sentence-transformers keeps beside the model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jpq_export.compress.checkpoint import Checkpoint, Read, named_readers, read_json, weight_files
from jpq_export.compress.encoder import ACTIVATIONS
from jpq_export.compress.tokenizer import TokenizerFiles, read_tokenizer
from jpq_export.errors import ModelError
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.format.spec import LayerSpec

logger = logging.getLogger(__name__)

TOP = {
    "embeddings.word_embeddings.weight": "embed",
    "embeddings.position_embeddings.weight": "positions",
    "embeddings.token_type_embeddings.weight": "segments",  # its row 0 is added to the positions
    "embeddings.LayerNorm.weight": "embed_norm",
    "embeddings.LayerNorm.bias": "embed_norm.bias",
    "encoder.relative_attention_bias.weight": "distances",
}
MLP = {"intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm"}
BERT = {f"attention.self.{theirs}": f"attn.{theirs[0]}" for theirs in ("query", "key", "value")}
BERT |= {"attention.output.dense": "attn.o", "attention.output.LayerNorm": "attn_norm"} | MLP
MPNET = {f"attention.attn.{part}": f"attn.{part}" for part in "qkvo"} | {"attention.LayerNorm": "attn_norm"} | MLP
# Parts that a sentence embedding does not use.
IGNORED = re.compile(r"pooler\.|cls\.|lm_head\.|classifier\.|embeddings\.position_ids$")
HIDDEN_ACT = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """One model type: names inside a layer; whether position rows begin after the padding id; distance buckets."""

    model_type: str
    names: Mapping[str, str]
    shifted: bool = False
    distances: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        EncoderFamily("bert", BERT),
        EncoderFamily("roberta", BERT, shifted=True),
        EncoderFamily("xlm-roberta", BERT, shifted=True),
        EncoderFamily("mpnet", MPNET, shifted=True, distances=True),
    )
}


def is_encoder(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is a sentence encoder's."""
    return raw.get("model_type") in FAMILIES


def open_encoder(folder: Path, raw: Mapping[str, Any], *, name: str) -> Checkpoint:
    """The checkpoint of a folder whose config.json is `raw`; ModelError says what is wrong with it."""
    where = str(folder / "config.json")
    family, config = FAMILIES[raw["model_type"]], parse(raw, where)
    spec = spec_of(config, family, folder, name=name, where=where)
    stored: dict[str, Read] = {}
    for file in weight_files(folder):
        stored |= named_readers(file, lambda name: canonical(name, family), family.model_type)
    tokenizer = read_tokenizer(folder, vocab=spec.vocab, bos_id=None)
    first = config.pad_token_id + 1 if family.shifted else 0
    return Checkpoint(spec, shaped(stored, spec, first), for_texts(tokenizer, spec.max_positions), str(folder))


def parse(raw: Mapping[str, Any], where: str) -> Any:
    """The configuration as transformers reads it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{where}: bad configuration ({reason}); download the model again") from error


def spec_of(config: Any, family: EncoderFamily, folder: Path, *, name: str, where: str) -> EncoderSpec:
    """`EncoderSpec` of a configuration and the pooling files beside it; ModelError says what cannot be expressed."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    if min(heads, hidden, config.intermediate_size, config.vocab_size, config.num_hidden_layers) < 1 or hidden % heads:
        raise ModelError(f"{where}: {heads} heads do not divide hidden size {hidden}; download the model again")
    if config.hidden_act not in HIDDEN_ACT:
        known = ", ".join(HIDDEN_ACT)
        raise ModelError(f"{where}: activation {config.hidden_act!r} is not supported; supported: {known}")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ModelError(f"{where}: position_embedding_type {kind!r} is not supported, expected 'absolute'")
    pooling, normalize = pooling_of(folder)
    table = config.max_position_embeddings - (config.pad_token_id + 1 if family.shifted else 0)
    assert HIDDEN_ACT[config.hidden_act] in ACTIVATIONS
    return EncoderSpec(
        name=name,
        family=family.model_type,
        vocab=config.vocab_size,
        hidden=hidden,
        head_dim=hidden // heads,
        layers=(LayerSpec(heads, config.intermediate_size),) * config.num_hidden_layers,
        max_positions=min(table, longest_text(folder) or table),
        norm_eps=config.layer_norm_eps,
        activation=HIDDEN_ACT[config.hidden_act],
        pad_id=config.pad_token_id,
        pooling=pooling,
        normalize=normalize,
        buckets=config.relative_attention_num_buckets if family.distances else 0,
    )


def longest_text(folder: Path) -> int | None:
    """Tokens after which sentence-transformers cuts a text."""
    path = folder / "sentence_bert_config.json"
    return read_json(path).get("max_seq_length") if path.is_file() else None


def pooling_of(folder: Path) -> tuple[str, bool]:
    """("mean" or "cls", whether embeddings are normalised) from modules.json; without it mean and normalised."""
    path = folder / "modules.json"
    if not path.is_file():
        logger.info("%s: no modules.json: mean pooling, normalised", folder)
        return "mean", True
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = {module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in modules}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: not readable ({error}); download it again") from error
    if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(f"{path}: module {min(unknown)} is not supported; supported: Transformer, Pooling, Normalize")
    pooling = read_json(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {"pooling_mode_mean_tokens": True}
    modes = [key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True and "_mode_" in key]
    names = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise ModelError(f"{path.parent}: pooling {' and '.join(modes) or 'none'}; supported: {', '.join(names)}")
    return names[modes[0]], "Normalize" in kinds


def canonical(name: str, family: EncoderFamily) -> str | None:
    """A checkpoint's tensor name -> canonical name, None for a part that is not used; KeyError when unknown."""
    name = re.sub(rf"^({family.model_type.replace('xlm-', '')})\.", "", name)
    if IGNORED.match(name):
        return None
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if name in TOP:
        return TOP[name]
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if not match:
        raise KeyError(name)
    return f"layers.{match[1]}.{family.names[match[2]]}" + {"weight": "", "bias": ".bias"}[match[3]]


def shaped(stored: dict[str, Read], spec: EncoderSpec, first: int) -> dict[str, Read]:
    """Positions from row `first` on with segment 0 added in, and every layer's own copy of the distance table."""
    out = {name: read for name, read in stored.items() if name not in ("segments", "distances")}
    if "positions" in out:
        out["positions"] = lambda: _positions(stored, slice(first, first + spec.max_positions))
    if "distances" in stored:
        for i in range(len(spec.layers)):
            out[f"layers.{i}.attn.distance"] = lambda: stored["distances"]().T.flatten()  # [heads, buckets]
    return out


def _positions(stored: dict[str, Read], rows: slice) -> torch.Tensor:
    table = stored["positions"]()[rows]
    return table + stored["segments"]()[0] if "segments" in stored else table


def for_texts(files: TokenizerFiles, longest: int) -> TokenizerFiles:
    """The tokenizer cuts texts at `longest` tokens and pads none: runtimes pad a batch to its own longest text."""
    raw = json.loads(files.json)
    raw["padding"] = None
    raw["truncation"] = {"max_length": longest, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    files.tokenizer.enable_truncation(longest)
    return replace(files, json=json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode())
