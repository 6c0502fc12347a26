"""plugins/runtime: its tokenizers against the tokenizers library, awkward texts and bytes that are no text."""

import random
import struct
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PIECES = [
    *(" ", "  ", "\n", "\r\n", "\t", "a", "B", "the", " quick", "'s", "'S", "'Re", "1", "23", "٣", "Ⅷ", "é", "e\u0301"),
    *("\u00a0", "\u3000", "👩‍👩‍👧", "🇩🇪", "!", "...", "_", "-", "<|end|>", "<|en", "ﬁ", "İ", "ß", "\0"),
    *("\u200d", "[CLS]", "[MASK]", "##ing", "中", "한"),
]
INVALID = [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xff"]
TEXT = [
    "the quick brown fox jumps over it, isn't it? 12345 times.",
    "Über die Brücke, naïvement: 中文 и русский",
    "ing",
]
# As Qwen2 and Llama 3 cut words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(digits):
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        steps = [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=340, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return tokenizer


def word_piece(_):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXT * 3, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def samples():
    """Bytes of texts: mixtures of awkward pieces, then bytes that are no UTF-8."""
    rng = random.Random(0)
    raw = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 30))).encode() for _ in range(400)]
    points = [c for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    raw += ["".join(map(chr, points[i : i + 499])).encode() for i in range(0, len(points), 4990)]
    raw += [rng.choice(INVALID) + b"ab " + bytes(rng.randrange(256) for _ in range(6)) for _ in range(60)]
    return [*raw, b"", b"a" * 3000, b" " * 2000]


def answers(out, count):
    """(ids, text) of each sample as the harness printed them."""
    at, found = 0, []
    for _ in range(count):
        end = out.index(b"\n", at)
        ids = [int(i) for i in out[at:end].split()]
        (length,) = struct.unpack_from("<I", out, end + 1)
        found.append((ids, out[end + 5 : end + 5 + length].decode()))
        at = end + 5 + length
    return found


@pytest.fixture
def wide_bundle(conftest_of, tmp_path):
    """A bundle whose model has room for the tokens of these tokenizers."""
    runtime = conftest_of("runtime")
    return runtime.write_bundle(tmp_path / "wide", spec=replace(runtime.SPEC, vocab=400))


@pytest.mark.parametrize(
    ("make", "digits", "decodes"),
    [(byte_level, True, True), (byte_level, False, True), (word_piece, False, False)],
    ids=["digits-bpe", "regex-bpe", "wordpiece"],
)
def test_ids_and_text_are_those_of_the_tokenizers_library(harness, wide_bundle, make, digits, decodes):
    tokenizer = make(digits)
    tokenizer.save(str(wide_bundle / "tokenizer.json"))
    raw = samples()
    given = b"".join(struct.pack("<I", len(text)) + text for text in raw)
    more = {} if decodes else {"NO_DECODE": "1"}
    done = harness("text", "none", wide_bundle, input=given, **more)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    found = answers(done.stdout, len(raw))
    different = 0
    for text, (ids, back) in zip(raw, found, strict=True):
        expected = tokenizer.encode(text.decode("utf-8", "replace")).ids
        assert ids == expected, text
        if decodes:
            assert back == tokenizer.decode(expected), text
        different += ids != list(reversed(ids))
    assert different > 200  # the samples tell one order from another
