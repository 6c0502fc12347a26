"""Answers in the form of the OpenAI interface: errors, whole answers, events of a stream, embeddings."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.responses import Response

from jpq_export.errors import CapacityError, UsageError
from jpq_export.serve.worker import BusyError, Job, Piece

RETRY_SECONDS = 1


class Refusal(Exception):
    """A request that is not answered: HTTP `status`, what is wrong, and a word for programs."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def refusal_of(error: Exception) -> Refusal:
    """What a client hears of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, CapacityError):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return Refusal(400, str(error))
    if isinstance(error, BusyError):
        return Refusal(429, str(error), code="queue_full")
    return Refusal(500, str(error), code="server_error")


def error_body(refusal: Refusal) -> dict[str, Any]:
    """{"error": ...} as OpenAI's clients read it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(refusal.status, "invalid_request_error")
    kind = "server_error" if refusal.status >= 500 else kind
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}


def refusal_response(refusal: Refusal) -> Response:
    """As JSON with its status."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if refusal.status == 429 else {}
    return json_response(error_body(refusal), status=refusal.status, headers=headers)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII: a text of a client may hold half a surrogate pair, which UTF-8 cannot."""
    return Response(json.dumps(value), status, headers, media_type="application/json")


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


@dataclass(frozen=True)
class Form:
    """How one request is answered: as a chat or as a completion, under which model's name."""

    model: str
    chat: bool
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Iterable[Piece], job: Job) -> dict[str, Any]:
        """The answer at once."""
        texts = [""] * len(job.sequences)
        for piece in pieces:
            texts[piece.index] += piece.text
        choices = [
            self._choice(index, {"role": "assistant", "content": text} if self.chat else text, sequence.finish_reason)
            for index, (text, sequence) in enumerate(zip(texts, job.sequences, strict=True))
        ]
        return self._frame(choices, stream=False) | {"usage": self.usage(job)}

    def opening(self, job: Job) -> list[dict[str, Any]]:
        """What a chat's stream begins with: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._frame([self._choice(index, delta, None, stream=True)], stream=True)
            for index in range(len(job.sequences) if self.chat else 0)
        ]

    def part(self, piece: Piece) -> dict[str, Any]:
        """One piece of a stream."""
        content = ({"content": piece.text} if piece.text else {}) if self.chat else piece.text
        return self._frame([self._choice(piece.index, content, piece.finish_reason, stream=True)], stream=True)

    def closing(self, job: Job) -> dict[str, Any]:
        """The count of tokens after a stream."""
        return self._frame([], stream=True) | {"usage": self.usage(job)}

    def usage(self, job: Job) -> dict[str, int]:
        """Tokens read and written."""
        new = sum(len(sequence.tokens) for sequence in job.sequences)
        return usage(self.prompt_tokens, new)

    def _choice(self, index: int, content: Any, reason: str | None, *, stream: bool = False) -> dict[str, Any]:
        key = ("delta" if stream else "message") if self.chat else "text"
        return {"index": index, key: content, "finish_reason": reason, "logprobs": None}

    def _frame(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(prompt: int, new: int) -> dict[str, int]:
    """Tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def embeddings_body(vectors: np.ndarray, *, model: str, tokens: int, form: str) -> dict[str, Any]:
    """`form`: "float", or "base64" of little-endian float32, which OpenAI's client asks for."""
    rows = [
        base64.b64encode(row.astype("<f4").tobytes()).decode() if form == "base64" else row.tolist() for row in vectors
    ]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
