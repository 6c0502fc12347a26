"""Wrong requests: 4xx with a reason, in OpenAI's form; the server goes on."""

import asyncio
import json
import shutil
import socket
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from jpq_export.runtime import load

KEY = "a-key-of-good-length"
COMPLETION = {"model": "tiny", "prompt": "w3", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w3"}], "max_tokens": 2}
EMBEDDING = {"model": "tiny", "input": "w3"}
C, H, E = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


@pytest.mark.parametrize(("path", "body"), [(C, COMPLETION), (H, CHAT)])
def test_the_good_ones_are_answered(address, tools, path, body):
    assert tools.ask(address, path, body)[0] == 200
    nulls = {"stop": None, "seed": None, "logit_bias": None, "stream_options": None}
    neutral = {"frequency_penalty": 0.0, "user": "me", "response_format": {"type": "text"}, "tools": []}
    assert tools.ask(address, path, body | nulls | neutral)[0] == 200


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        (C, {"prompt": ""}, "no tokens"),
        (C, {"prompt": []}, "prompt: expected a text"),
        (C, {"prompt": [""]}, "no tokens"),
        (C, {"prompt": [1, True]}, "prompt: expected a text"),
        (C, {"prompt": [40]}, "token 40 is not in the model's vocabulary of 40"),
        (C, {"prompt": [-1]}, "token -1"),
        (C, {"prompt": [10**30]}, "token 1000"),
        (C, {"prompt": {"a": 1}}, "prompt: expected a text"),
        (C, {"prompt": "w3 " * 5000}, "5000 tokens and 2 new ones need more than the capacity of 4096"),
        (C, {"max_tokens": 5000}, "capacity of 4096"),
        (C, {"max_tokens": 0}, "max_tokens: Input should be greater"),
        (C, {"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        (C, {"max_tokens": 1.5}, "max_tokens"),
        (C, {"max_tokens": 10**400}, "capacity"),
        (C, {"temperature": -1}, "temperature"),
        (C, {"temperature": 3}, "temperature"),
        (C, {"temperature": "hot"}, "temperature: Input should be a valid number"),
        (C, {"top_p": 0}, "top_p"),
        (C, {"top_k": -1}, "top_k"),
        (C, {"seed": -1}, "seed"),
        (C, {"n": 0}, "n: Input should be greater"),
        (C, {"n": 100}, "1 prompts times n = 100: the server takes at most 64"),
        (C, {"stop": ""}, "stop: expected a text or at most 16"),
        (C, {"stop": ["a"] * 17}, "stop: expected"),
        (C, {"stop": [3]}, "stop: expected"),
        (C, {"stream": "yes"}, "stream: Input should be a valid boolean"),
        (C, {"stream_options": {"other": 1}}, "stream_options.other: not supported here"),
        (C, {"echo": True}, "echo: not supported here; leave it out"),
        (C, {"logprobs": 3}, "logprobs: not supported here"),
        (C, {"logprobs": 0}, "logprobs: not supported here"),
        (C, {"best_of": 2}, "best_of: not supported here"),
        (C, {"frequency_penalty": 0.5}, "frequency_penalty: not supported here"),
        (C, {"stream": True, "max_tokens": 5000}, "capacity of 4096"),
        (H, {"messages": []}, "messages"),
        (H, {"messages": "hello"}, "messages: Input should be a valid list"),
        (H, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        (H, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (H, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        (H, {"messages": [{"role": "user", "content": "w3 " * 5000}]}, "capacity"),
        (H, {"messages": [{"role": "user", "content": "w3 " * 5000}], "max_tokens": None}, "capacity"),
        (H, {"tools": [{"type": "function"}]}, "tools: not supported here"),
        (H, {"response_format": {"type": "json_object"}}, "response_format: not supported here"),
        (H, {"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        (E, {}, "tiny generates text, it has no embeddings"),
    ],
)  # fmt: skip
def test_wrong_fields(address, tools, path, change, says):
    good = {C: COMPLETION, H: CHAT, E: EMBEDDING}[path]
    status, answer = tools.ask(address, path, good | change)
    assert status == 400
    assert says in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert tools.load_of(address) == (0, 0)


def test_an_oversize_prompt_has_openais_code(address, tools):
    body = COMPLETION | {"prompt": "w3 " * 5000}
    assert tools.ask(address, C, body)[1]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": []}, "input: expected a text"),
        ({"input": ["w3", ""]}, "text 1 has no tokens"),
        ({"input": "w3 " * 17}, "text 0 has 17 tokens, expected at most 16"),
        ({"input": [[1, 40]]}, "token 40"),
        ({"input": ["w3"] * 2049}, "input: expected a text, token ids, or a list of 1 to 2048 of them"),
        ({"dimensions": 3}, "dimensions: got 3, this model has 8"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_wrong_embeddings(encoder_address, tools, change, says):
    status, answer = tools.ask(encoder_address, E, EMBEDDING | change)
    assert (status, says in answer["error"]["message"]) == (400, True), answer
    assert tools.ask(encoder_address, E, EMBEDDING | {"dimensions": 8})[0] == 200


@pytest.mark.parametrize(("path", "body"), [(C, COMPLETION), (H, CHAT)])
def test_an_encoder_generates_no_text(encoder_address, tools, path, body):
    status, answer = tools.ask(encoder_address, path, body)
    assert (status, "sentence encoder" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000,
     b'{"model": "tiny", "prompt": "w3", "seed": ' + b"9" * 5000 + b"}",
     b'{"model": "tiny", "prompt": "w3", "temperature": NaN}', b'{"prompt": "w3"}'],
    ids=["empty", "cut", "list", "number", "null", "no text", "deep", "huge number", "nan", "no model"],
)  # fmt: skip
def test_no_json_or_not_an_object(address, tools, body):
    status, answer = tools.ask(address, C, body)
    assert status == 400
    assert len(answer["error"]["message"]) > 5
    assert tools.ask(address, C, COMPLETION)[0] == 200


@pytest.mark.parametrize("name", ["other", "", "\ud800"])
def test_another_model(address, tools, name):
    status, answer = tools.ask(address, C, COMPLETION | {"model": name})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "use 'tiny'" in answer["error"]["message"]


def test_another_route_or_method(address, tools):
    assert tools.ask(address, "/v1/images", {})[0] == 404
    status, answer = tools.ask(address, C)
    assert status == 405
    assert "POST /v1/completions" in answer["error"]["message"]
    assert tools.ask(address, "/v1/models/other")[0] == 404
    assert tools.ask(address, "/v1/models/tiny")[0] == 200


def test_a_body_too_large(address, tools):
    status, answer = tools.ask(address, C, b" " * (9 << 20))
    assert (status, "larger than 8 MB" in answer["error"]["message"]) == (413, True)


def test_a_body_too_large_that_does_not_say_so(address):
    """Chunked: its length is known only when it has come."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(9):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_never_comes():
    from jpq_export.serve.guard import Guard

    sent = []

    async def nothing():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def app(*_):
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": C, "headers": [(b"content-type", b"application/json")]}
    asyncio.run(Guard(app, api_key=None, local=True, body_seconds=0.05)(scope, nothing, send))
    assert sent[0]["status"] == 408
    assert "did not arrive within 0.05 s" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_page_in_a_browser_cannot_talk_to_it(address, tools):
    """Neither as a simple request without asking first, nor under a name of its own that leads to this machine."""
    assert tools.ask(address, C, COMPLETION, Content_Type="text/plain")[0] == 415
    assert tools.ask(address, C, COMPLETION, Host="evil.example:8000")[0] == 403
    assert tools.ask(address, C, COMPLETION, Host="localhost:8000")[0] == 200
    assert tools.ask(address, C, COMPLETION, Host="[::1]")[0] == 200


@pytest.mark.parametrize("template", [None, "{{ raise_exception('only pairs') }}"])
def test_a_chat_without_a_template_or_one_that_it_refuses(long_bundle, tools, tmp_path, template):
    own = shutil.copytree(long_bundle, tmp_path / "own")
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with tools.running(load(own, threads=1)) as address:
        status, answer = tools.ask(address, H, CHAT)
        assert status == 400
        assert answer["error"]["message"].startswith("tiny: the model")
        assert ("no chat template" if template is None else "fails (only pairs)") in answer["error"]["message"]
        assert str(tmp_path) not in answer["error"]["message"]  # no business of a client's
        assert tools.ask(address, C, COMPLETION)[0] == 200


def test_an_api_key(decoder, tools):
    with tools.running(decoder, api_key=KEY, local=False) as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
            status, answer = tools.ask(address, C, COMPLETION, **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert KEY not in json.dumps(answer)
        assert tools.ask(address, "/v1/models")[0] == 401
        assert tools.ask(address, C, COMPLETION, Authorization=f"Bearer {KEY}", Host="kiosk.example")[0] == 200
        assert tools.ask(address, "/health")[0] == 200


def test_a_pass_that_fails_gives_up_its_requests_and_nothing_else(decoder, tools, monkeypatch, caplog):
    import jpq_export.runtime.slots as slots

    with tools.running(decoder) as address:
        with monkeypatch.context() as patch:
            patch.setattr(slots.Slots, "step", fail)
            status, answer = tools.ask(address, C, COMPLETION)
            assert (status, answer["error"]["type"]) == (500, "server_error")
            assert "secret" not in answer["error"]["message"]
            streamed = raw(address, COMPLETION | {"stream": True})
            assert b'data: {"error": {"message": "the model failed' in streamed
            assert b"[DONE]" not in streamed
        assert "secret place" in caplog.text  # the log says why
        assert tools.load_of(address) == (0, 0)
        assert tools.ask(address, C, COMPLETION)[0] == 200
        assert b"[DONE]" in raw(address, COMPLETION | {"stream": True})


def fail(*_):
    raise RuntimeError("secret place")


def raw(address, body):
    import urllib.request

    request = urllib.request.Request(address + C, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


def test_noise_on_the_wire_harms_nobody(address, tools):
    host, port = address.removeprefix("http://").split(":")

    def noise(data):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(data)

    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    pieces = [b"\x00" * 1000, head, head + b"Content-Length: 50\r\n\r\n{", b"GET /v1/models HTTP/1.1\r\n" * 50]
    threads = [threading.Thread(target=noise, args=(data,)) for data in pieces * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tools.ask(address, C, COMPLETION)[0] == 200
    tools.wait_for(lambda: tools.load_of(address) == (0, 0))
