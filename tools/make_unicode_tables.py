"""Write plugins/runtime/src/unicode_tables.inc: what the C tokenizer must know of Unicode.

Run with the `tokenizers` whose behaviour is to be met: `python tools/make_unicode_tables.py`. Classes are asked of that
library itself, code point by code point: its regular expressions, digits, punctuation and marks each follow another
version of Unicode, and Python's unicodedata none of them. Decompositions and combining classes come from unicodedata as
far as the library knows them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

OUT = Path(__file__).resolve().parent.parent / "plugins" / "runtime" / "src" / "unicode_tables.inc"
POINTS = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
ALL = "".join(map(chr, POINTS))
# In this order the bits of a class; see unicode.h.
LETTER, NUMBER, DIGIT, PUNCTUATION, CONTROL, MARK = (1 << i for i in range(6))
ROW = 8


def matched(pattern: str) -> set[int]:
    """Code points a regular expression takes."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed")
    kept = {ord(c) for piece, _ in split.pre_tokenize_str(ALL) for c in piece}
    return set(POINTS) - kept


def isolated(pre_tokenizer: pre_tokenizers.PreTokenizer) -> set[int]:
    """Code points that stand alone between two letters."""
    return {c for c in POINTS if len(pre_tokenizer.pre_tokenize_str(f"a{chr(c)}a")) == 3}


def bert(**switched_on: bool) -> Callable[[str], str]:
    """BertNormalizer with only these parts of it."""
    off = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    return normalizers.BertNormalizer(**(off | switched_on)).normalize_str


def classes() -> list[int]:
    """The class of every code point."""
    clean, strip = bert(clean_text=True), bert(strip_accents=True)
    members = {
        LETTER: matched(r"\p{L}"),
        NUMBER: matched(r"\p{N}"),
        DIGIT: isolated(pre_tokenizers.Digits(individual_digits=True)),
        PUNCTUATION: isolated(pre_tokenizers.BertPreTokenizer()),
        CONTROL: {c for c in POINTS if clean(chr(c)) == ""},
        MARK: {c for c in POINTS if strip(chr(c)) == ""},
    }
    found = [0] * 0x110000
    for bit, codes in members.items():
        for code in codes:
            found[code] |= bit
    return found


def ranges(values: list[int], bits: int) -> list[int]:
    """`first code << bits | value` wherever the value changes."""
    return [c << bits | v for c, v in enumerate(values) if c == 0 or v != values[c - 1]]


def decompositions() -> list[tuple[int, int, int]]:
    """(code, first, second or 0): one step of canonical decomposition, Hangul left out."""
    nfd, out = normalizers.NFD().normalize_str, []
    for code in POINTS:
        parts = unicodedata.decomposition(chr(code)).split()
        if parts and not parts[0].startswith("<") and nfd(chr(code)) == unicodedata.normalize("NFD", chr(code)):
            out.append((code, int(parts[0], 16), int(parts[1], 16) if len(parts) > 1 else 0))
    return out


def compositions(steps: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(first, second, code), sorted: what NFC puts together again."""
    nfc = normalizers.NFC().normalize_str
    return sorted((a, b, code) for code, a, b in steps if b and nfc(chr(a) + chr(b)) == chr(code))


def combining_classes() -> list[int]:
    """Canonical combining class of every code point, 0 where the library does not reorder it."""
    nfd, found = normalizers.NFD().normalize_str, [0] * 0x110000
    for code in POINTS:
        value = unicodedata.combining(chr(code))
        if value and (value >= 240 or nfd(f"\u0345{chr(code)}") != f"\u0345{chr(code)}"):
            found[code] = value
    return found


def lower_case() -> list[tuple[int, int]]:
    """(code, lower case), one to one; U+0130, which becomes two, is written in normalize.c."""
    lower = bert(lowercase=True)
    return [(c, ord(lower(chr(c)))) for c in POINTS if lower(chr(c)) != chr(c) and len(lower(chr(c))) == 1]


def table(name: str, kind: str, items: Iterable[str]) -> str:
    """One C array."""
    items = list(items)
    rows = [", ".join(items[i : i + ROW]) for i in range(0, len(items), ROW)]
    return f"static const {kind} {name}[{len(items)}] = {{\n  " + ",\n  ".join(rows) + "};\n"


def main() -> None:
    """Write the file."""
    steps = decompositions()
    text = "/* Made by tools/make_unicode_tables.py; see unicode.h. */\n"
    text += f"/* tokenizers {tokenizers.__version__}, unicodedata {unicodedata.unidata_version} */\n"
    text += table("class_ranges", "uint32_t", map(hex, ranges(classes(), 8)))
    text += table("combining_ranges", "uint32_t", map(hex, ranges(combining_classes(), 8)))
    text += table("decompositions", "unicode_triple", (f"{{{a:#x},{b:#x},{c:#x}}}" for a, b, c in steps))
    text += table("compositions", "unicode_triple", (f"{{{a:#x},{b:#x},{c:#x}}}" for a, b, c in compositions(steps)))
    text += table("lower_case", "unicode_pair", (f"{{{a:#x},{b:#x}}}" for a, b in lower_case()))
    OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
