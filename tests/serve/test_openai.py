"""The official `openai` client talks to the server: completions, chats, streams, embeddings, many at once."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

MESSAGES = [{"role": "user", "content": "w3 w4"}]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def encoder_client(encoder_address):
    with openai.OpenAI(base_url=f"{encoder_address}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_completion_is_what_the_runtime_generates(client, decoder):
    got = client.completions.create(model="tiny", prompt="w3 w4 w5", max_tokens=12, temperature=0)
    assert got.choices[0].text == decoder.generate("w3 w4 w5", max_new_tokens=12)
    assert len(got.choices[0].text.split()) > 3
    assert got.choices[0].finish_reason == "length"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (3, 12, 15)
    other = client.completions.create(model="tiny", prompt="w9", max_tokens=12, temperature=0)
    assert other.choices[0].text != got.choices[0].text


def test_a_chat_is_what_the_runtime_answers(client, decoder):
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9, temperature=0)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == decoder.chat("w3 w4", max_new_tokens=9)
    assert got.usage.prompt_tokens == len(decoder.encode_chat("w3 w4"))


def test_content_in_parts_and_a_developer_are_understood(client, decoder):
    messages = [
        {"role": "developer", "content": "w8"},
        {"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "text", "text": " w4"}]},
    ]
    got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)
    plain = [{"role": "system", "content": "w8"}, {"role": "user", "content": "w3 w4"}]
    assert got.choices[0].message.content == decoder.chat(plain, max_new_tokens=9)


def test_a_chat_stream(client, decoder):
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=9, temperature=0, stream=True, stream_options=options
        )
    )
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == decoder.chat("w3 w4", max_new_tokens=9)
    assert sum(map(bool, texts)) > 3  # piece by piece
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 9
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_stream_of_several_prompts(client, decoder):
    prompts = ["w3 w4", "w9 w8 w7"]
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=7, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == decoder.generate(prompts, max_new_tokens=7)
    assert texts[0] != texts[1]


def test_a_prompt_of_token_ids(client, decoder):
    ids = decoder.encode("w3 w4 w5")
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0)
    two = client.completions.create(model="tiny", prompt=[ids, ids[:2]], max_tokens=5, temperature=0)
    assert one.choices[0].text == two.choices[0].text == decoder.generate("w3 w4 w5", max_new_tokens=5)
    assert two.choices[1].text == decoder.generate("w3 w4", max_new_tokens=5)


def test_a_stop_text_ends_it_and_is_not_given(client):
    def complete(**options):
        return client.completions.create(model="tiny", prompt="w3 w4 w5", max_tokens=12, temperature=0, **options)

    free = complete().choices[0].text
    stop = free.split()[4]
    got = complete(stop=stop).choices[0]
    assert got.text == free[: free.index(stop)]
    assert got.finish_reason == "stop"


def test_a_seed_repeats_and_choices_differ(client):
    def complete(seed):
        got = client.completions.create(model="tiny", prompt="w3", max_tokens=12, temperature=2, seed=seed, n=2)
        return [choice.text for choice in got.choices]

    assert complete(1) == complete(1)
    assert complete(1) != complete(2)
    assert len(set(complete(1))) == 2


def test_top_k_of_one_is_greedy(client, decoder):
    got = client.completions.create(model="tiny", prompt="w3", max_tokens=9, temperature=2, extra_body={"top_k": 1})
    assert got.choices[0].text == decoder.generate("w3", max_new_tokens=9)


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings(encoder_client, encoder, form):
    texts = ["w3 w4", "w9", "w1 w2 w3 w4 w5"]
    options = {} if form is None else {"encoding_format": form}
    got = encoder_client.embeddings.create(model="tiny", input=texts, **options)
    vectors = [entry.embedding for entry in got.data]
    if form == "base64":
        import base64

        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_array_equal(np.array(vectors, np.float32), encoder.embed(texts))
    assert got.usage.prompt_tokens == 8


def test_sixteen_clients_lose_nothing(address, decoder, tools):
    """Every one gets its own text, whole, though only four run at a time and lengths differ."""
    asked = [(f"w{turn % 30 + 1} w{client}", 5 + (turn * 7 + client) % 23) for client in range(16) for turn in range(4)]

    def talk(client_number):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            return [stream(client, *pair) for pair in asked[client_number * 4 : client_number * 4 + 4]]

    with ThreadPoolExecutor(16) as pool:
        got = [text for texts in pool.map(talk, range(16)) for text in texts]
    assert got == [decoder.generate(prompt, max_new_tokens=new) for prompt, new in asked]
    assert len(set(got)) > 30
    assert tools.load_of(address) == (0, 0)


def stream(client, prompt, new):
    chunks = client.completions.create(model="tiny", prompt=prompt, max_tokens=new, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


def test_sixteen_clients_embed(encoder_client, encoder):
    texts = [[f"w{client} w{turn}" for turn in range(client % 3 + 1)] for client in range(16)]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda each: encoder_client.embeddings.create(model="tiny", input=each), texts))
    for answer, each in zip(got, texts, strict=True):
        # Other texts in the same pass change nothing but the order of sums.
        np.testing.assert_allclose([entry.embedding for entry in answer.data], encoder.embed(each), atol=1e-6)


def test_a_client_that_leaves_mid_stream_frees_its_slot(decoder, tools):
    with tools.running(decoder, slots=1, queue=2) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            chunks = client.completions.create(model="tiny", prompt="w3", max_tokens=4000, temperature=0, stream=True)
            next(iter(chunks))
            assert tools.load_of(address) == (1, 0)
            chunks.close()
            tools.wait_for(lambda: tools.load_of(address) == (0, 0), seconds=2)
            got = client.completions.create(model="tiny", prompt="w3", max_tokens=3, temperature=0)
        assert got.choices[0].text == decoder.generate("w3", max_new_tokens=3)


def test_a_client_that_is_killed_mid_stream_frees_its_slot(decoder, tools):
    code = (
        "import openai, sys; client = openai.OpenAI(base_url=sys.argv[1], api_key='any')\n"
        "for _ in client.completions.create(model='tiny', prompt='w3', max_tokens=4000, stream=True): print(flush=True)"
    )
    with tools.running(decoder, slots=1, queue=2) as address:
        client = subprocess.Popen([sys.executable, "-c", code, f"{address}/v1"], stdout=subprocess.PIPE)
        try:
            assert client.stdout.readline()
            assert tools.load_of(address) == (1, 0)
        finally:
            client.kill()
            client.communicate()
        tools.wait_for(lambda: tools.load_of(address) == (0, 0), seconds=5)


def test_a_client_that_leaves_without_a_stream_frees_its_slot_or_its_place(decoder, tools):
    with tools.running(decoder, slots=1, queue=2) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=0.5) as client:

            def give_up():
                with pytest.raises(openai.APITimeoutError):
                    client.completions.create(model="tiny", prompt="w3", max_tokens=4000, temperature=0)

            both = [threading.Thread(target=give_up) for _ in range(2)]
            for thread in both:
                thread.start()
            tools.wait_for(lambda: tools.load_of(address) == (1, 1))
            for thread in both:
                thread.join()
        tools.wait_for(lambda: tools.load_of(address) == (0, 0), seconds=2)


def test_a_full_queue_says_so_and_a_place_becomes_free(decoder, tools):
    with (
        tools.running(decoder, slots=1, queue=1) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        streams = [
            client.completions.create(model="tiny", prompt="w3", max_tokens=4000, temperature=0, stream=True)
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError, match="2 sequences are running or waiting") as refused:
            client.completions.create(model="tiny", prompt="w3", max_tokens=2)
        assert refused.value.response.headers["retry-after"] == "1"
        streams[1].close()
        tools.wait_for(lambda: tools.load_of(address) == (1, 0))
        streams[0].close()
        tools.wait_for(lambda: tools.load_of(address) == (0, 0))
        assert client.completions.create(model="tiny", prompt="w3", max_tokens=2).usage.completion_tokens == 2
