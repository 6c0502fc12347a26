"""Tokenizer files beside a model: read, checked against the model, and used without special tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jpq_export.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerFiles:
    """`json`, `config`: the bytes of tokenizer.json and tokenizer_config.json; `add_bos`: texts start with BOS."""

    json: bytes
    config: bytes
    tokenizer: Tokenizer
    add_bos: bool


def encode(tokenizer: Tokenizer, text: str, *, bos_id: int | None = None) -> list[int]:
    """Token ids of `text`; BOS stands in front when `bos_id` is given, no other special token is added."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if bos_id is None else [bos_id, *ids]


def read_tokenizer(folder: Path, *, vocab: int, bos_id: int | None) -> TokenizerFiles:
    """tokenizer.json (required), tokenizer_config.json and chat_template.jinja of a model folder."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json; write one with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    config: dict[str, Any] = {}
    try:
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if (folder / "chat_template.jinja").is_file():
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder}: tokenizer files are unreadable ({error}); download them again") from error
    return make_tokenizer(raw, config, vocab=vocab, bos_id=bos_id, where=str(path))


def make_tokenizer(
    raw: dict[str, Any], config: dict[str, Any], *, vocab: int, bos_id: int | None, where: str
) -> TokenizerFiles:
    """Build and check: every id it can produce must have a row in the embedding of `vocab` rows."""
    if not isinstance(raw, dict) or not isinstance(config, dict):
        raise ModelError(f"{where}: expected a JSON object; download it again")
    # Added tokens past the embedding (Gemma-3's <image_soft_token>) can never be used: without them the text encodes
    # to ordinary tokens instead of to an id that does not exist.
    added = raw.get("added_tokens") or []
    raw = raw | {"added_tokens": [token for token in added if token.get("id", 0) < vocab]}
    body = json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode()
    try:
        tokenizer = Tokenizer.from_str(body.decode())
    except Exception as error:  # tokenizers raises the bare class
        raise ModelError(f"{where}: not a tokenizer ({' '.join(str(error).split())}); download it again") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocab:
        raise ModelError(
            f"{where}: largest token id {largest}, the embedding has {vocab} rows; it belongs to another model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = json.dumps(config, ensure_ascii=False, sort_keys=True).encode()
    return TokenizerFiles(body, settings, tokenizer, adds_bos(tokenizer, config, bos_id))


def adds_bos(tokenizer: Tokenizer, config: dict[str, Any], bos_id: int | None) -> bool:
    """The configuration's word when it gives one, else what the tokenizer's own template does."""
    stated = config.get("add_bos_token")
    if isinstance(stated, bool):
        return stated and bos_id is not None
    return bos_id is not None and tokenizer.encode("a").ids[:1] == [bos_id]
