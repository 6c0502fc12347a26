"""The bench: what it compares with computes the model, its medians are medians, and a runtime that stops is told."""

import json
import stat
from dataclasses import replace

import numpy as np
import pytest

from jpq_export.bench import layers, rounds
from jpq_export.bench.baselines import original_spec, random_model, write_baselines
from jpq_export.bench.layers import LayerRate
from jpq_export.bench.llama_cpp import LlamaBench, LlamaError
from jpq_export.bench.report import by_bits, page
from jpq_export.bench.rounds import BenchError, Settings, Worker, bench
from jpq_export.errors import UsageError
from jpq_export.format.bundle import Manifest, write_manifest
from jpq_export.format.plan import Budget, LayerPlan, Plan, Predicted
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.scheme import TERNARY
from jpq_export.progress import Stages
from jpq_export.runtime.session import OrtModel

WHOLE = ModelSpec(
    name="tiny",
    family="llama",
    vocab=96,
    hidden=64,
    head_dim=16,
    heads_per_group=2,
    layers=(LayerSpec(2, 96), LayerSpec(2, 96)),
    ropes=(RopeSpec(tuple(float(f) for f in 1e4 ** (-np.arange(0, 16, 2) / 16))),),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=0.25,
    max_positions=64,
)
PRUNED = WHOLE.with_layers((LayerSpec(1, 96), LayerSpec(0, 64)))
LAYERS = (LayerPlan(0, (1,), 2, 96, 96), LayerPlan(1, (), 2, 64, 96, tuple(range(64))))
PLAN = Plan("tiny", "00", "cpu", "jpq", Budget("bits", 4.0, 1), LAYERS, (), (), Predicted(0.0, 1, 1.0, 0.0), (), {})
IDS = np.arange(12)[None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    folder.mkdir()
    export_onnx(random_model(PRUNED), folder / "model.onnx", form="custom_op")
    (folder / "plan.json").write_text(PLAN.to_json(), encoding="utf-8")
    facts = {"name": "tiny", "spec": json.loads(PRUNED.to_json())}
    manifest = Manifest(
        model=facts, target={"name": "cpu"}, method="rtn", bits_per_weight=4.5, weight_bytes=77, original_bytes=99
    )
    write_manifest(folder, manifest.with_contents(folder))
    return folder


def test_the_original_has_what_pruning_took(bundle):
    assert original_spec(PRUNED, PLAN) == WHOLE
    assert original_spec(replace(PRUNED, kv_cache="int8"), PLAN) == WHOLE


def test_what_is_compared_with_computes_the_same_model(tmp_path):
    graphs = write_baselines(WHOLE, tmp_path)
    export_onnx(random_model(WHOLE), tmp_path / "ours.onnx", form="custom_op")
    expected = OrtModel(tmp_path / "ours.onnx", threads=1).forward(IDS).logits
    for path in graphs.values():
        np.testing.assert_allclose(OrtModel(path, threads=1).forward(IDS).logits, expected, rtol=1e-3, atol=1e-5)
    export_onnx(random_model(WHOLE, seed=1), tmp_path / "twin.onnx", form="fp32")
    assert not np.allclose(
        OrtModel(tmp_path / "twin.onnx", threads=1).forward(IDS).logits, expected, rtol=1e-3, atol=1e-5
    )


def test_a_bundle_is_measured(bundle, kernels):
    result = bench(bundle, Settings(rounds=2, prefill=8, decode=3, widths=(3, 8)), Stages())
    assert set(result.bundle) == {"jpq", "jpq-fast"}
    assert set(result.baselines) == {"onnxruntime-fp32", "matmulnbits-4bit"}
    assert set(result.uniform) == {"jpq-3bit", "jpq-3bit-fast", "jpq-8bit", "jpq-8bit-fast"}
    assert all("jpq kernels" in speed.runs for speed in (result.bundle | result.uniform).values())
    assert result.uniform["jpq-8bit"].file_bytes > result.uniform["jpq-3bit"].file_bytes > 0
    assert "MatMulNBits" in result.baselines["matmulnbits-4bit"].runs
    for speed in (result.bundle | result.baselines).values():
        assert speed.decode_tokens_per_s > 1
        assert speed.peak_rss_bytes > 1e7
    assert {speed.cache_bytes_per_token for speed in result.bundle.values()} == {2 * 16 * 4}  # one head of 16 left
    assert {speed.cache_bytes_per_token for speed in result.baselines.values()} == {2 * 4 * 16 * 4}
    # q with k and v, o of one attention, gate with up, down of two MLPs, the head; of the original, written for a CPU,
    # the first q with k and v, a chain behind each attention, the head
    assert {bits: count for bits, (count, _) in by_bits(result).items()} == {3: 4, 4: 2 + 2 + 2 + 1, 8: 4}
    raw = json.loads(rounds.to_json([result]))
    best = max(speed.decode_tokens_per_s for speed in result.bundle.values())
    assert raw["decode_tokens_per_s"] == best
    assert raw["weight_bytes"] == 77
    shown = page([result, replace(result, settings=Settings(threads=2))], "a <b>")
    assert "a &lt;b&gt;" in shown
    assert shown.count(">matmulnbits-4bit<") == 10  # five pictures for each
    assert "2 thread(s)" in shown
    several = json.loads(rounds.to_json([result, replace(result, settings=Settings(threads=2))]))
    assert set(several["threads"]) == {"1", "2"}
    assert several["decode_tokens_per_s"] == several["threads"]["1"]["decode_tokens_per_s"] == best


def test_rates_are_medians_over_turns():
    class Known:
        file_bytes = 7

        def __init__(self, *seconds):
            self.turns = iter(seconds)

        def ask(self, **job):
            if "memory" in job:
                return {"peak_rss_bytes": 5, "runs": "known"}
            second = next(self.turns)
            return {"seconds": second if "prefill" in job else [second, second]}

    workers = {"a": Known(2.0, 0.1, 4.0, 0.2, 900.0, 0.4), "b": Known(*[1.0] * 6)}
    speeds = rounds._take_turns(workers, Settings(rounds=3, prefill=8), lambda done, total: None)
    assert speeds["a"].prefill_tokens_per_s == 8 / 4.0
    assert speeds["a"].decode_tokens_per_s == 1 / 0.2
    assert speeds["b"].decode_tokens_per_s == 1.0
    assert speeds["a"].first_token_ms == 4000
    assert speeds["a"].token_p50_ms == pytest.approx(200)
    assert 390 < speeds["a"].token_p99_ms <= 400
    assert speeds["a"].joules_per_token is None


def test_energy_is_a_median_a_token():
    class Meter:
        joules = iter((1.0, 100.0, 3.0))

        def around(self, work):
            return work(), {"meter": next(self.joules)}

    class Known:
        file_bytes = 7

        def ask(self, **job):
            return {"peak_rss_bytes": 5, "runs": "known", "seconds": 1.0 if "prefill" in job else [1.0, 1.0]}

    speeds = rounds._take_turns({"a": Known()}, Settings(rounds=3, decode=2), lambda done, total: None, Meter())
    assert speeds["a"].joules_per_token == {"meter": 1.5}


def test_two_bundles_are_measured_in_turns(bundle):
    result = bench(bundle, Settings(rounds=1, prefill=4, decode=2, baselines=False, other=bundle), Stages())
    assert set(result.compared) == {"B: tiny", "B: tiny-fast"}
    assert set(result.bundle) == {"jpq", "jpq-fast"}
    assert result.bundle["jpq"].first_token_ms > 0
    assert result.bundle["jpq"].token_p99_ms >= result.bundle["jpq"].token_p50_ms > 0
    assert (result.energy_reason is None) == (result.bundle["jpq"].joules_per_token is not None)
    shown = page([result], "x")
    assert shown.count(">B: tiny<") == 5


def test_layer_rates_are_bytes_over_time(bundle, kernels):
    for layer in layers.layer_rates(bundle / "model.onnx", 1):
        assert layer.gb_s == pytest.approx(layer.bytes / layer.microseconds / 1e3)
        assert layer.bytes == stored_bytes(random_model(PRUNED), layer.name)


def stored_bytes(model, operator):
    """Of all weights the operator called `operator` multiplies with."""
    together = {"q": "qkv", "gate": ("gate", "up")}
    stem, _, last = operator.rpartition(".")
    names = [f"{stem}.{part}" for part in together.get(last, (last,))] if stem else ["embed"]
    return sum(model.quantized[name].nbytes for name in names)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("bits", [1, TERNARY])
def test_layer_rates_know_the_narrowest_widths(bits, chained, kernels, tmp_path):
    model = random_model(PRUNED, bits=bits, symmetric=True)
    export_onnx(model, tmp_path / "model.onnx", form="custom_op", chained=chained)
    rates = layers.layer_rates(tmp_path / "model.onnx", 1)
    assert sum(layer.bytes for layer in rates) == sum(weight.nbytes for weight in model.quantized.values())
    assert {layer.bits for layer in rates} == {bits}
    assert len(rates) == (3 if chained else 7)
    for layer in () if chained else rates:
        assert layer.bytes == stored_bytes(model, layer.name)


def test_an_operator_of_several_widths_counts_at_the_nearest(bundle):
    result = bench(bundle, Settings(rounds=1, prefill=4, decode=2, baselines=False), Stages())
    mixed = [LayerRate("a", 3.4, 10, 1.0, 1.0), LayerRate("b", 3.0, 10, 1.0, 3.0), LayerRate("c", 1.7, 10, 1.0, 5.0)]
    assert by_bits(replace(result, layers=tuple(mixed))) == {1.6: (1, 5.0), 3: (2, 2.0)}


def test_the_machine_reads_memory(kernels):
    assert 0.5 < layers.read_bandwidth(1, repeats=1) < 2000


def test_a_runtime_that_stops_is_told(tmp_path):
    worker = Worker(tmp_path / "no.onnx", 1, kernels=False, exact=True)
    with pytest.raises(BenchError, match=r"no\.onnx"):
        worker.ask(decode=1)


def test_a_missing_gguf_is_said_before_any_graph_is_written(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(rounds, "write_baselines", lambda *_: pytest.fail("written"))
    with pytest.raises(UsageError, match=r"no\.gguf: no such file"):
        bench(bundle, Settings(gguf=(tmp_path / "no.gguf",)), Stages())


def test_llama_bench_takes_its_turn(tmp_path, monkeypatch):
    model, program = tmp_path / "m.gguf", tmp_path / "llama-bench"
    model.touch()
    with pytest.raises(UsageError, match="not on the PATH"):
        LlamaBench(model, 1)
    script = '#!/bin/sh\necho "[{\\"avg_ts\\": 40.0, \\"args\\": \\"$*\\"}]"\n'
    program.write_text(script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    llama = LlamaBench(model, 2)
    assert llama.ask(prefill=80)["seconds"] == 2.0
    assert llama.ask(decode=3)["seconds"] == [1 / 40] * 3
    assert llama.ask(memory=True)["peak_rss_bytes"] > 0
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(LlamaError, match="code 3"):
        llama.ask(prefill=8)
    program.write_text("#!/bin/sh\necho '[{}]'\n")
    with pytest.raises(LlamaError, match="avg_ts"):
        llama.ask(prefill=8)


def test_too_little_room_is_said_before_writing(monkeypatch, tmp_path):
    usage = rounds.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BenchError, match="TMPDIR"):
        rounds.check_room(tmp_path, replace(WHOLE))
