"""What is refused before a request is read: foreign hosts, missing keys, bodies too large or too slow."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from jpq_export.serve.answers import Refusal, refusal_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 8 << 20  # 2,048 texts of 4 KB
MOST_DROPPED_BYTES = 64 << 20
BODY_SECONDS = 30.0
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Middleware around the whole application.

    `api_key`: what a client must show, None for no key. `local`: only this machine is served, so a request for another
    host name comes from a web page that tricks a browser (DNS rebinding). `body_seconds`: for a whole body.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, local: bool, body_seconds: float = BODY_SECONDS
    ) -> None:  # fmt: skip
        self._app, self._key, self._local, self._body_seconds = app, api_key, local, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body in memory, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        try:
            body = await asyncio.wait_for(_read(receive), self._body_seconds)
        except asyncio.TimeoutError:
            body = b""
            refusal = Refusal(408, f"the body did not arrive within {self._body_seconds:g} s", code="timeout")
        if body is None:
            return  # the client left
        if len(body) > MOST_BODY_BYTES:
            message = f"the body is larger than {MOST_BODY_BYTES >> 20} MB; send less at once"
            refusal = refusal or Refusal(413, message, code="too_large")
        if refusal is None:
            await self._app(scope, _replay(body, receive), send)
        else:
            await refusal_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Refusal | None:
        """What the head of a request says against it."""
        host = headers.get(b"host", b"localhost").decode("latin-1")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self._local and name not in LOCAL_NAMES:
            return Refusal(403, f"host {host!r}: only {', '.join(LOCAL_NAMES)} is served", code="wrong_host")
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                return Refusal(
                    401, "missing or wrong API key; send 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
        # A browser sends JSON to another site only after asking, and nobody says yes here.
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            return Refusal(415, f"content-type {kind.decode('latin-1')!r}: expected application/json")
        return None


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or a little more of it than is accepted; None when the client leaves before its end.

    What is too much is read and dropped: a connection closed under a client that still sends gives it no reason.
    """
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if len(body) <= MOST_BODY_BYTES:
            body += part
        if size > MOST_DROPPED_BYTES or not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then what really comes: the end of the connection."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
