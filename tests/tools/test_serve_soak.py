"""The soak of `serve`: nothing is lost by a good server, and what a bad one loses is found."""

import asyncio

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")


@pytest.fixture(scope="module")
def soak_tool(load_tool):
    module = load_tool("serve_soak")
    module.TEXTS = tuple(f"w{number} w{number + 9} w{number + 18}" for number in range(8))  # words of the tiny model
    return module


@pytest.fixture
def soak(soak_tool, conftest_of):
    serving = conftest_of("serve")

    def run(bundle, *, seconds=3.0, **options):
        with serving.running(bundle, **options) as address:
            return asyncio.run(soak_tool.soak(f"{address}/v1", clients=16, seconds=seconds, api_key="any"))

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, conftest_of):
    import dataclasses

    from jpq_export.runtime import load

    runtime = conftest_of("runtime")
    spec = dataclasses.replace(runtime.SPEC, max_positions=4096, eos_ids=())
    return load(runtime.write_bundle(tmp_path_factory.mktemp("soak") / "long", spec=spec), threads=1)


def test_sixteen_clients_lose_nothing(soak, bundle):
    result = soak(bundle)
    assert result["lost"] == []
    assert min(result["counts"][kind] for kind in ("complete", "stream", "chat", "break off", "nonsense")) > 0
    assert "other words than alone" not in result["counts"]


def test_twin_a_server_that_mixes_rows_up_is_found(soak, bundle, monkeypatch):
    from jpq_export.runtime.slots import Slots

    step = Slots.step
    monkeypatch.setattr(Slots, "step", lambda self, tokens: step(self, tokens)[::-1])
    assert soak(bundle, seconds=1)["counts"]["other words than alone"] > 0


def test_twin_a_queue_too_short_is_found(soak, bundle):
    assert any("RateLimitError" in line for line in soak(bundle, seconds=1, slots=1, queue=1)["lost"])
