"""The engine step with the recorded stand-in (fake_tensorrt.py): order and parameters of calls; no TensorRT runs."""

import importlib.util
from pathlib import Path

import pytest

from jpq_export.engine.builder import DECODE, PREFILL, EngineError, build_engine, load_plugin, profile_shapes
from jpq_export.engine.plugin import Plugin, PluginError
from jpq_export.format.bundle import hash_file

INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past.0.key",
    "past.0.value",
    "past.2.key",
    "past.2.value",
    "logits_at",
)


@pytest.fixture
def fake():
    """`fake(broken=("parse",))`: the stand-in module."""
    place = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
    assert place
    assert place.loader
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return lambda broken=(): module.FakeTensorRT(INPUTS, broken=broken)


@pytest.fixture
def build(settings, kit, tmp_path):
    settings.home.mkdir()

    def do(trt, say=lambda _text: None) -> Path:
        out = tmp_path / "engine"
        graph = settings.bundle / "model.trt.onnx"
        build_engine(trt, graph, out, spec=kit.SPEC, settings=settings, logger=None, say=say)
        return out

    return do


def test_calls_come_in_the_order_tensorrt_needs(fake, build, settings):
    trt = fake()
    assert build(trt).read_bytes() == b"engine"
    assert trt.names() == [
        *("Builder", "create_network", "parse", "workspace", "clear_flag"),
        *("create_profile", "add_profile", "create_profile", "add_profile"),
        *("create_timing_cache", "set_timing_cache", "build"),
    ]
    assert trt.arguments("create_network") == [(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)]
    assert trt.arguments("parse") == [(str(settings.bundle / "model.trt.onnx"),)]
    assert trt.arguments("workspace") == [(trt.MemoryPoolType.WORKSPACE, 512_000_000)]
    assert trt.arguments("clear_flag") == [(trt.BuilderFlag.TF32,)]
    assert (settings.home / "timing.cache").read_bytes() == b"timings"


def test_profiles_decode_first_then_prefill(fake, build):
    trt = fake()
    build(trt)
    decode, prefill = (shapes for (shapes,) in trt.arguments("create_profile"))
    assert set(decode) == set(prefill) == set(INPUTS)
    assert decode["input_ids"] == ((1, 1), (1, 1), (1, 1))
    assert decode["attention_mask"] == ((1, 2), (1, 1025), (1, 2048))
    assert decode["past.0.key"] == ((1, 2, 1, 8), (1, 2, 1024, 8), (1, 2, 2047, 8))
    assert decode["past.2.value"] == ((1, 1, 1, 8), (1, 1, 1024, 8), (1, 1, 2047, 8))
    assert prefill["position_ids"] == ((1, 1), (1, 512), (1, 512))
    assert prefill["past.0.key"] == ((1, 2, 0, 8), (1, 2, 0, 8), (1, 2, 1536, 8))
    assert decode["logits_at"] == ((1,), (1,), (1,))
    assert prefill["logits_at"] == ((1,), (1,), (512,))


@pytest.mark.parametrize("profile", [DECODE, PREFILL])
def test_total_is_past_plus_new_in_every_shape(settings, kit, profile):
    ids, mask, past = (
        profile_shapes(name, kit.SPEC, settings, profile=profile)
        for name in ("input_ids", "attention_mask", "past.0.key")
    )
    assert [m[1] for m in mask] == [i[1] + p[2] for i, p in zip(ids, past, strict=True)]
    assert mask[-1][1] == settings.max_tokens


def test_an_unknown_graph_input_is_refused(settings, kit):
    with pytest.raises(EngineError, match="'pixels'"):
        profile_shapes("pixels", kit.SPEC, settings, profile=DECODE)


def test_an_earlier_timing_cache_is_used_and_one_of_another_board_is_not(fake, build, settings):
    (settings.home / "timing.cache").write_bytes(b"earlier")
    trt = fake()
    build(trt)
    assert trt.arguments("create_timing_cache") == [(b"earlier",)]
    assert trt.arguments("set_timing_cache") == [(False,)]
    trt = fake(broken=("cache",))
    build(trt)
    assert trt.arguments("create_timing_cache") == [(b"timings",), (b"",)]


def test_progress_is_said_in_tenths_of_the_outer_phase(fake, build):
    said: list[str] = []
    build(fake(), said.append)
    assert said == ["  Building: 20 steps", *(f"  Building: {step} of 20" for step in range(2, 21, 2))]


def test_a_version_without_monitor_or_flags_builds_too(fake, build):
    trt = fake()
    del type(trt).IProgressMonitor  # of this test's own copy of the module
    trt.BuilderFlag = trt.NetworkDefinitionCreationFlag = type("None", (), {})
    build(trt)
    assert trt.monitor is None
    assert trt.arguments("create_network") == [(0,)]
    assert "clear_flag" not in trt.names()


@pytest.mark.parametrize(("broken", "words"), [("parse", "no importer for op LowBitMatMul"), ("build", "--workspace")])
def test_what_tensorrt_refuses_is_one_line_and_leaves_no_engine(fake, build, tmp_path, broken, words):
    with pytest.raises(EngineError, match=words) as caught:
        build(fake(broken=(broken,)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "engine").exists()


def plugin_of(path: Path) -> Plugin:
    return Plugin(path, hash_file(path).sha256, (87,), 1, "aarch64", "test")


def test_a_library_is_loaded_only_with_its_recorded_hash(fake, tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"library")
    plugin, trt = plugin_of(path), fake()
    load_plugin(trt, plugin, None)
    assert trt.calls == [("init_plugins", ("",)), ("load_library", (str(path),))]
    path.write_bytes(b"librarY")
    trt = fake()
    with pytest.raises(PluginError, match="sha256 is not the recorded"):
        load_plugin(trt, plugin, None)
    assert trt.calls == []


def test_a_library_tensorrt_cannot_load_is_said(fake, tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"library")
    with pytest.raises(PluginError, match=r"TensorRT 10\.3"):
        load_plugin(fake(broken=("plugin",)), plugin_of(path), None)
