"""Evaluation text to token windows: the first non-overlapping ones, as published perplexities use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from jpq_export.errors import UsageError
from jpq_export.format.documents import read_documents


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """A text file: name, sha256 of its bytes, and its content; documents of a .jsonl are joined by blank lines."""

    name: str
    sha256: str
    content: str


def read_text(path: Path) -> EvaluationText:
    """Read a .raw, .txt or .jsonl file; UsageError when it is unreadable, empty or malformed."""
    documents = read_documents(path, what="--text", error=UsageError)
    if not documents:
        raise UsageError(f"--text {path}: empty; give a text of at least one window of tokens")
    return EvaluationText(path.name, sha256(path.read_bytes()).hexdigest(), "\n\n".join(documents))


def token_windows(
    text: EvaluationText,
    encode: Callable[[str], Iterable[int]],
    *,
    windows: int,
    context: int,
    bos_id: int | None,
) -> np.ndarray:
    """The first `windows` windows of `context` tokens, int64 [windows, context]; BOS leads each one where wanted."""
    payload = context - (bos_id is not None)
    ids = np.fromiter(encode(text.content), np.int64)
    if len(ids) < windows * payload:
        fit = len(ids) // payload
        remedy = f"give a longer text or --windows {fit}" if fit else "give a longer text or a smaller --context"
        raise UsageError(
            f"--text {text.name}: {len(ids)} tokens, needed {windows * payload} "
            f"for {windows} windows of {context}; {remedy}"
        )
    rows = ids[: windows * payload].reshape(windows, payload)
    if bos_id is None:
        return rows
    return np.concatenate([np.full((windows, 1), bos_id, np.int64), rows], 1)
