"""What is refused before a request is read: foreign hosts, missing keys, bodies too large or too slow."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from jpq_export.serve.answers import Refusal, refusal_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 8 << 20  # 2,048 texts of 4 KB
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
        try:
            self._check(scope, headers)
            body = await asyncio.wait_for(_read(receive, headers), self._body_seconds)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send)
        except asyncio.TimeoutError:
            late = Refusal(408, f"the body did not arrive within {self._body_seconds:g} s", code="timeout")
            await refusal_response(late)(scope, receive, send)
        else:
            if body is not None:  # None: the client left
                await self._app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"localhost").decode("latin-1")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self._local and name not in LOCAL_NAMES:
            raise Refusal(403, f"host {host!r}: only {', '.join(LOCAL_NAMES)} is served", code="wrong_host")
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                raise Refusal(401, "missing or wrong API key; send 'Authorization: Bearer KEY'", code="invalid_api_key")
        # A browser sends JSON to another site only after asking, and nobody says yes here.
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refusal(415, f"content-type {kind.decode('latin-1')!r}: expected application/json")


async def _read(receive: Receive, headers: dict[bytes, bytes]) -> bytes | None:
    """The whole body; None when the client leaves before its end."""
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > MOST_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MOST_BODY_BYTES >> 20} MB; send less at once", code="too_large")


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
