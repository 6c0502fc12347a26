"""`jpq-export serve` as people start and stop it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from jpq_export.cli import main
from jpq_export.errors import UsageError
from jpq_export.serve import command

KEY = "a-key-of-good-length"


@contextmanager
def started(bundle, *options, **environment):
    """The process and its address."""
    arguments = [sys.executable, "-m", "jpq_export", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found, line + process.stderr.read()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def post(address, body, **headers):
    given = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), given)
    return urllib.request.urlopen(request, timeout=60)


def reachable(address):
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_what_it_began(long_bundle, tools, number):
    with started(long_bundle, "--max-tokens", "4000", "--name", "mine") as (process, address):
        tools.wait_for(lambda: reachable(address))
        text = []

        def read():
            with post(address, {"model": "mine", "prompt": "w3", "max_tokens": 800, "stream": True}) as answer:
                text.extend(answer)

        reader = threading.Thread(target=read)
        reader.start()
        tools.wait_for(lambda: len(text) > 4)
        process.send_signal(number)
        reader.join()
        events = [json.loads(line[6:]) for line in text if line.startswith(b"data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert text[-2] == b"data: [DONE]\n"
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_after_the_grace_a_stream_ends_with_a_reason(long_bundle, tools):
    code = (
        "import sys; from jpq_export.serve import command; command.GRACE_SECONDS = 0.2\n"
        "from jpq_export.cli import main; main(['serve', sys.argv[1], '--port', sys.argv[2], '--max-tokens', '4000'])"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-c", code, str(long_bundle), str(port)], stdout=subprocess.DEVNULL)
    try:
        tools.wait_for(lambda: reachable(address))
        with post(address, {"model": "tiny", "prompt": "w3", "max_tokens": 3990, "stream": True}) as answer:
            answer.readline()
            process.terminate()
            text = answer.read()
        assert b'"message": "the server was shut down"' in text
        assert b"[DONE]" not in text
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_it_loads_no_torch_and_is_up_soon(long_bundle, tools):
    code = (
        "import sys, threading, asyncio, time\n"
        "from jpq_export.serve.command import open_bundle, Settings\n"
        "from jpq_export.serve.app import make_app, make_service\n"
        "make_app(make_service(open_bundle(Settings(bundle=sys.argv[1])), model='m', slots=1, queue=1))\n"
        "sys.exit(bool({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(long_bundle)], check=False).returncode == 0


def test_other_addresses_want_a_key(long_bundle, monkeypatch):
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::"):
        done = CliRunner().invoke(main, ["serve", str(long_bundle), "--host", host, "--port", "0"])
        assert done.exit_code == 2
        assert re.fullmatch(rf"Error: --host {host}: .*API key is required; set JPQ_API_KEY .*\n", done.stderr)


def test_with_a_key_it_serves_other_addresses(long_bundle, tools, tmp_path):
    (tmp_path / "key").write_text(KEY + "\n")
    body = {"model": "tiny", "prompt": "w3", "max_tokens": 2}
    with started(long_bundle, "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "key")) as (_, address):
        address = address.replace("0.0.0.0", "127.0.0.1")
        tools.wait_for(lambda: reachable(address))
        assert tools.ask(address, "/v1/completions", body)[0] == 401
        assert tools.ask(address, "/v1/completions", body, Authorization=f"Bearer {KEY}")[0] == 200
        assert tools.ask(address, "/v1/models", Authorization=f"Bearer {KEY}")[1]["data"][0]["context_length"] == 2048


@pytest.mark.parametrize("key", ["", "short", "with a space in it, long", "ключ-достаточной-длины", "a\x00" * 20])
def test_a_poor_key_is_refused(key, monkeypatch, tmp_path):
    (tmp_path / "key").write_text(key, encoding="utf-8")
    with pytest.raises(UsageError, match="expected at least 16 of printable ASCII"):
        command.read_key(tmp_path / "key")
    if "\x00" not in key:
        monkeypatch.setenv(command.KEY_VARIABLE, key)
        with pytest.raises(UsageError, match="JPQ_API_KEY"):
            command.read_key(None)
    monkeypatch.setenv(command.KEY_VARIABLE, KEY)
    assert command.read_key(None) == KEY


def test_bad_addresses_get_one_line(long_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, code, says in (
            (("--port", port), 1, "Address already in use; choose another --port"),
            (("--host", "no such host.invalid"), 2, "--host 'no such host.invalid'"),
            (("--host", "192.0.2.1", "--port", "0"), 2, "API key"),
            (("--api-key-file", "missing"), 1, "missing"),
        ):
            done = CliRunner().invoke(main, ["serve", str(long_bundle), *options])
            assert done.exit_code == code, done.output
            assert done.stderr.count("\n") == 1
            assert says in done.stderr


def test_no_bundle(tmp_path):
    done = CliRunner().invoke(main, ["serve", str(tmp_path), "--port", "0"])
    assert done.exit_code == 1
    assert "not a bundle" in done.stderr


def test_without_its_packages_it_says_what_to_install(long_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = CliRunner().invoke(main, ["serve", str(long_bundle), "--port", "0"])
    assert done.exit_code == 2
    assert "pip install 'jpq-export[serve]'" in done.stderr
