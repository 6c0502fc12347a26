"""`jpq-export serve`: checks address and key, opens the bundle, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpq_export.errors import JpqError, UsageError
from jpq_export.runtime.bundle import Bundle, load

if TYPE_CHECKING:
    import uvicorn

    from jpq_export.serve.app import Service

KEY_VARIABLE = "JPQ_API_KEY"
SHORTEST_KEY = 16
GRACE_SECONDS = 30
MOST_CONNECTIONS = 512
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`slots`: sequences in one pass; `queue`: requests that wait; `max_tokens`: prompt and answer together."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key_file: Path | None = None
    slots: int = 8
    queue: int = 64
    max_tokens: int = 2048
    threads: int | None = None
    exact: bool = True
    verbose: bool = False


def serve(settings: Settings, say: Say) -> None:
    """Serve until SIGINT or SIGTERM; requests under way get GRACE_SECONDS to end.

    Raises:
        UsageError: packages are missing, or an address beyond this machine without an API key.
        BundleError: the bundle cannot be opened.
        JpqError: the address is taken or not of this machine.
    """
    _check_packages()
    key = read_key(settings.api_key_file)
    address = resolve(settings.host, settings.port)
    local = ipaddress.ip_address(address[1][0]).is_loopback
    if not local and key is None:
        raise UsageError(
            f"--host {settings.host}: reaches beyond this machine, so an API key is required; set {KEY_VARIABLE} or "
            "give --api-key-file"
        )
    with _bind(*address) as listener:
        bundle = open_bundle(settings)
        from jpq_export.serve.app import make_service

        name = settings.name or str(bundle.manifest.model.get("name") or settings.bundle.resolve().name)
        service = make_service(bundle, model=name, slots=settings.slots, queue=settings.queue)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"{name}: http://{shown}:{port}/v1" + ("" if key is None else ", with API key"))
        asyncio.run(_serve(service, listener, key, local=local, verbose=settings.verbose))


def open_bundle(settings: Settings) -> Bundle:
    """The bundle with room for `max_tokens`, or for as many as its model has positions."""
    bundle = load(settings.bundle, threads=settings.threads, exact=settings.exact, check=True)
    return bundle.with_capacity(min(settings.max_tokens, bundle.capacity))


def read_key(path: Path | None) -> str | None:
    """The API key of a file, or of the environment; never of the command line, which every process can read."""
    where = f"{path}" if path else KEY_VARIABLE
    text = path.read_text(encoding="utf-8") if path else os.environ.get(KEY_VARIABLE)
    if text is None:
        return None
    key = text.strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{where}: got a key of {len(key)} characters, expected at least {SHORTEST_KEY} of printable ASCII "
            "without spaces; make one with `openssl rand -hex 16`"
        )
    return key


def resolve(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """Address family and address to bind; UsageError for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r}: {error}; give an address of this machine") from error
    return found[0][0], found[0][4]


@contextlib.contextmanager
def _bind(family: int, address: tuple[Any, ...]) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise JpqError(
                f"{address[0]} port {address[1]}: {error.strerror}; choose another --port or --host"
            ) from error
        yield listener


async def _serve(service: Service, listener: socket.socket, key: str | None, *, local: bool, verbose: bool) -> None:
    import uvicorn

    from jpq_export.serve.app import make_app

    class Server(uvicorn.Server):
        """uvicorn's, which ends with exit code 0 when told to stop, and ends long streams with a reason."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(GRACE_SECONDS, service.thread.stop)
            await super().shutdown(sockets)

    app = make_app(service, api_key=key, local=local)
    await Server(_config(app, verbose=verbose)).serve([listener])


def _config(app: Any, *, verbose: bool) -> uvicorn.Config:
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="info" if verbose else "warning",
        access_log=verbose,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS + 5,
        ws="none",
    )


def _check_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serve: {error}; pip install 'jpq-export[serve]'") from error
