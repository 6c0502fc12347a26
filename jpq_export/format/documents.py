"""Text files as documents: .jsonl has one JSON object with key "text" a line, any other file is one UTF-8 document."""

from __future__ import annotations

import json
from pathlib import Path

from jpq_export.errors import JpqError


def read_documents(path: Path, *, what: str, error: type[JpqError]) -> list[str]:
    """The documents of one file that are not blank.

    `error` is what is raised, `what` names the option in its line, such as "--text".
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        at = f"byte {cause.start} is 0x{cause.object[cause.start]:02x}"
        raise error(f"{what} {path}: not UTF-8 text ({at}); convert it to UTF-8") from cause
    except OSError as cause:
        raise error(f"{what} {path}: cannot be read ({cause.strerror}); give a text file") from cause
    if path.suffix != ".jsonl":
        return [text] if text.strip() else []
    # Split at \n only: JSON may hold the other line separators of Unicode unescaped.
    found = (_line(path, number, line, what, error) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [document for document in found if document.strip()]


def _line(path: Path, number: int, line: str, what: str, error: type[JpqError]) -> str:
    try:
        value = json.loads(line)
    except ValueError as cause:
        raise error(f'{what} {path}: line {number}: not JSON ({cause}); expected an object with key "text"') from cause
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        got = f"keys {', '.join(map(str, value)) or 'none'}" if isinstance(value, dict) else type(value).__name__
        raise error(f'{what} {path}: line {number}: got {got}, expected an object with key "text" and a text in it')
    return value["text"]
