"""tokenizer.json from a GGUF header: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

transformers' own import drops pre-tokenizer rules (SmolLM2's digit splitting), so the rules stand here by their GGUF
name; a name that is not listed is refused rather than guessed.
"""

from __future__ import annotations

from typing import Any

from jpq_export.compress.tokenizer import TokenizerFiles, make_tokenizer
from jpq_export.errors import ModelError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> list[dict[str, Any]]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [rule, BYTE_LEVEL | {"use_regex": False}]


# llama.cpp's name -> tokenizers' rules (llama.cpp src/llama-vocab.cpp states the same expressions)
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
    "llama-bpe": _split(WORDS % r"\p{N}{1,3}"),
    "llama3": _split(WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(WORDS % r"\p{N}"),
}


def gguf_tokenizer(fields: dict[str, Any], *, vocab: int, bos_id: int | None, where: str) -> TokenizerFiles:
    """The tokenizer a GGUF header describes; ModelError for a kind that is not known here."""
    kind = fields.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders or "tokenizer.ggml.tokens" not in fields:
        raise ModelError(f"{where}: tokenizer {kind!r} is not supported; supported: {', '.join(builders)}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(tokens) > vocab:
        raise ModelError(
            f"{where}: {len(tokens)} tokens, {len(types)} token types, the embedding has {vocab} rows; use another file"
        )
    raw = builders[kind](fields, tokens, types, where) | {"version": "1.0", "truncation": None, "padding": None}
    raw["added_tokens"] = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama")) and bos_id is not None
    if add_bos:
        raw["post_processor"] = _bos_template(tokens[bos_id or 0], bos_id)
    return make_tokenizer(raw, _config(fields, tokens, add_bos), vocab=vocab, bos_id=bos_id, where=where)


def _config(fields: dict[str, Any], tokens: list[str], add_bos: bool) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name and the chat template."""
    config: dict[str, Any] = {"add_bos_token": add_bos, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            config[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config


def _bos_template(token: str, index: int | None) -> dict[str, Any]:
    bos, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [bos, text, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": pair, "special_tokens": special}


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    base = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    base |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return base | options | {"vocab": vocab, "merges": merges}


def _byte_level(fields: dict[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    """GPT-2's scheme: merges are given; what a word is depends on `tokenizer.ggml.pre`."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where}: pre-tokenizer {pre!r} is not known; known: {', '.join(PRE_TOKENIZERS)}; give the "
            "safetensors model"
        )
    merges = [merge.split(" ") for merge in fields.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    ignore_merges = pre in ("llama-bpe", "llama3")  # as Llama-3's own tokenizer.json: a word in the vocabulary is whole
    return {
        "model": _bpe(vocab, merges, ignore_merges=ignore_merges),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"use_regex": True},
    }


def _sentencepiece(fields: dict[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    """SentencePiece BPE: merges follow from the scores; bytes stand for what the vocabulary lacks."""
    scores = fields.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ModelError(f"{where}: {len(scores)} token scores for {len(tokens)} tokens; use another GGUF file")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    decoders += [{"type": "Fuse"}] + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = score_merges(tokens, types, scores)
    return {
        "model": _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
        if prefix
        else space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def score_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to join two pieces into a third, best score of the result first, as SentencePiece merges."""
    pieces = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == NORMAL}
    merges = [
        (-score, token[:cut], token[cut:])
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[0])
    return [[left, right] for _, left, right in merges]
