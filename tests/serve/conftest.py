"""A server in a thread: a tiny decoder that never stops by itself, or a tiny sentence encoder."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jpq_export.runtime.bundle import Bundle, load


@pytest.fixture(scope="session")
def long_bundle(tmp_path_factory: pytest.TempPathFactory, conftest_of: Callable[[str], Any]) -> Path:
    """A decoder of 4,096 positions and no end token: it writes until it is stopped."""
    runtime = conftest_of("runtime")
    spec = dataclasses.replace(runtime.SPEC, max_positions=4096, eos_ids=())
    return runtime.write_bundle(tmp_path_factory.mktemp("served") / "long", spec=spec)


@pytest.fixture(scope="session")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory, conftest_of: Callable[[str], Any]) -> Path:
    """A sentence encoder of 16 positions."""
    return conftest_of("runtime").write_encoder_bundle(tmp_path_factory.mktemp("served") / "encoder")


@contextlib.contextmanager
def running(bundle: Bundle, *, slots: int = 4, queue: int = 60, **guarding: Any) -> Iterator[str]:
    """A server of a bundle in a thread; gives its address."""
    import uvicorn

    from jpq_export.serve.app import make_app, make_service

    service = make_service(bundle, model="tiny", slots=slots, queue=queue)
    config = uvicorn.Config(make_app(service, **guarding), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield address
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_for(true: Callable[[], bool], *, seconds: float = 20) -> None:
    """Wait until something holds; fail when it never does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def ask(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request; `body`: bytes, or what becomes JSON, None for GET."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address + path, data, given)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def load_of(address: str) -> tuple[int, int]:
    """Sequences that run, and that wait."""
    health = ask(address, "/health")[1]
    return health["running"], health["waiting"]


@pytest.fixture(scope="session")
def decoder(long_bundle: Path) -> Bundle:
    return load(long_bundle, threads=1)


@pytest.fixture(scope="session")
def encoder(encoder_bundle: Path) -> Bundle:
    return load(encoder_bundle, threads=1)


@pytest.fixture(scope="module")
def address(decoder: Bundle) -> Iterator[str]:
    """The decoder, served."""
    with running(decoder) as found:
        yield found


@pytest.fixture(scope="module")
def encoder_address(encoder: Bundle) -> Iterator[str]:
    """The encoder, served."""
    with running(encoder) as found:
        yield found


@pytest.fixture(scope="session")
def tools(conftest_of: Callable[[str], Any]) -> Any:
    """The functions of this file."""
    return conftest_of("serve")
