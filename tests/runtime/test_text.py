"""Tokens as text, piece by piece: whole characters, stop texts."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jpq_export.runtime.text import TextStream

LETTERS = "abcdefgh é中"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, one a token."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return found


def pieces(tokenizer, text, *, stop=(), after=""):
    stream = TextStream(tokenizer, after=tokenizer.encode(after).ids, stop=stop)
    found = []
    for token in tokenizer.encode(text).ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.end()], stream.stopped


@pytest.mark.parametrize(
    ("text", "stop", "given", "stopped"),
    [
        ("abcdef", ("cd",), "ab", True),
        ("abcdef", ("x",), "abcdef", False),
        ("abcdef", ("fg",), "abcdef", False),  # what was held back comes at the end
        ("abcdef", ("a",), "", True),
        ("abcdef", ("f",), "abcde", True),
        ("abcdef", ("de", "cdefg", "ef"), "abc", True),
        ("ccccd", ("cccd",), "c", True),
        ("a中b", ("中",), "a", True),
        ("aéb", ("éb",), "a", True),
        ("abab", ("abc",), "abab", False),
    ],
)
def test_stop_texts(tokenizer, text, stop, given, stopped):
    got, found = pieces(tokenizer, text, stop=stop)
    assert ("".join(got), found) == (given, stopped)


def test_nothing_that_may_become_a_stop_text_is_given_early(tokenizer):
    got, _ = pieces(tokenizer, "abcabd", stop=("abd",))
    assert got == ["", "", "abc", "", "", "", ""]
    assert pieces(tokenizer, "abcabd")[0] == ["a", "b", "c", "a", "b", "d", ""]


def test_a_stop_text_does_not_begin_in_the_prompt(tokenizer):
    got, stopped = pieces(tokenizer, "cd", stop=("bc",), after="ab")
    assert ("".join(got), stopped) == ("cd", False)


def test_the_prompt_is_not_given(tokenizer):
    assert "".join(pieces(tokenizer, " d", after="abc é中")[0]) == " d"


def test_a_first_word_keeps_its_space_after_a_prompt():
    """SentencePiece's decoder strips the space of a text's first word; a continuation is no first word."""
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2}, unk_token="▁one"))
    words.decoder = decoders.Metaspace()
    after, fresh = TextStream(words, after=[0]), TextStream(words)
    assert [after.push(1), after.push(2)] == [" two", " three"]
    assert [fresh.push(1), fresh.push(2)] == ["two", " three"]
