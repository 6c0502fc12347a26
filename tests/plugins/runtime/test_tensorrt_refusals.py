"""What the C runtime's TensorRT backend refuses, each in one line, with nothing left behind. NOT run on a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest

from jpq_export.engine.plugin import LIBRARY

BAD_ARGUMENT, BAD_BUNDLE, UNSUPPORTED, BACKEND, NO_MEMORY = 1, 2, 3, 4, 5
TENSORRT = {"BACKEND": "1"}
MAX_TOKENS = 24  # of stand_in.py's engine
PROMPT = (3, 17, 4)


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"LD_LIBRARY_PATH": ""}, BACKEND, ["libcuda.so.1 not found", "JetPack"]),
        ({"FAKE_BROKEN": "cuInit 1 100"}, BACKEND, ["cuInit failed with CUDA error 100"]),
        ({"FAKE_SM": "110"}, BACKEND, ["built for sm_87, this GPU is sm_110", "build it again"]),
        ({"FAKE_VERSION": "100400"}, BACKEND, ["TensorRT 10.4.0: the engine was built with 10.3.0.30"]),
        ({"FAKE_VERSION": "110400"}, BACKEND, ["TensorRT 11.4.0: this libjpq_runtime was compiled for TensorRT 10"]),
        ({"FAKE_BROKEN": "cuDevicePrimaryCtxRetain 1 3"}, BACKEND, ["cuDevicePrimaryCtxRetain", "3"]),
        ({"FAKE_BROKEN": "cuCtxPushCurrent_v2 1 201"}, BACKEND, ["cuCtxPushCurrent_v2", "201"]),
        ({"FAKE_BROKEN": "runtime"}, BACKEND, ["no TensorRT runtime"]),
        ({"FAKE_BROKEN": "plugin"}, BACKEND, [LIBRARY, "TensorRT says: refused: plugin"]),
        ({"FAKE_BROKEN": "deserialize"}, BACKEND, ["model.engine: TensorRT says: refused: deserialize"]),
        ({"FAKE_BROKEN": "context"}, BACKEND, ["no execution context", "refused: context"]),
        ({"FAKE_BROKEN": "cuStreamCreate 1 2"}, NO_MEMORY, ["out of memory in cuStreamCreate"]),
        *(
            ({"FAKE_BROKEN": f"cuMemAlloc_v2 {i} 2"}, NO_MEMORY, ["out of memory in cuMemAlloc"])
            for i in (1, 2, 4, 5, 12)
        ),
        ({"FAKE_BROKEN": "cuMemcpyHtoDAsync_v2 1 700"}, BACKEND, ["cuMemcpyHtoDAsync_v2 failed with CUDA error 700"]),
        ({"FAKE_BROKEN": "cuMemcpyHtoDAsync_v2 4 700"}, BACKEND, ["cuMemcpyHtoDAsync_v2 failed with CUDA error 700"]),
        ({"FAKE_BROKEN": "cuStreamSynchronize 3 700"}, BACKEND, ["cuStreamSynchronize failed with CUDA error 700"]),
        ({"FAKE_BROKEN": "profile 2"}, BACKEND, ["decode profile: TensorRT says: refused: profile"]),
        ({"FAKE_BROKEN": "shape 16"}, BACKEND, ["past.2.value", "3 positions are beyond the engine's profile"]),
        ({"FAKE_BROKEN": "address 2"}, BACKEND, ["attention_mask: TensorRT says: refused: address"]),
        ({"FAKE_BROKEN": "enqueue 2"}, BACKEND, ["the engine did not run: TensorRT says: refused: enqueue"]),
        ({"FAKE_BROKEN": "cuMemcpyDtoHAsync_v2 1 700"}, BACKEND, ["cuMemcpyDtoHAsync_v2"]),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(stand_in, backend, device_bundle, environment, code, words):
    """The sanitizer counts what was not freed; the stand-in ends the test when a context is left too often."""
    done, calls = backend("ids", device_bundle, 3, *PROMPT, **TENSORRT, **environment)
    assert stand_in.refused(done, *words) == code
    retained = calls.count("cuDevicePrimaryCtxRetain") - ("Retain" in environment.get("FAKE_BROKEN", ""))
    assert calls.count("cuDevicePrimaryCtxRelease_v2") == retained


def test_tensorrt_that_is_not_there_or_something_else(
    stand_in, backend, device_bundle, gpu, tmp_path, onnxruntime_library
):
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "libcuda.so.1").symlink_to(gpu / "libcuda.so.1")
    done, _ = backend("ids", device_bundle, 3, *PROMPT, LD_LIBRARY_PATH=str(driver), **TENSORRT)
    assert stand_in.refused(done, "libnvinfer.so.10: cannot be loaded", "set `library`") == BACKEND
    done, _ = backend("ids", device_bundle, 3, *PROMPT, library=str(onnxruntime_library), **TENSORRT)
    assert stand_in.refused(done, "not TensorRT (no getInferLibVersion); give libnvinfer.so.10") == BACKEND
    named = str(gpu / "libnvinfer.so.10")
    done, _ = backend("ids", device_bundle, 3, *PROMPT, library=named, LD_LIBRARY_PATH=str(driver), **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 3)


def change_record(folder, change):
    path = folder / "device" / "device.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: (b / "device" / "device.json").unlink(), ["device.json: cannot be read", "jpq-export build"]),
        (lambda b: (b / "device" / "model.engine").unlink(), ["model.engine: cannot be read"]),
        (
            lambda b: (b / "device" / "model.engine").write_text("x"),
            ["model.engine: expected sha256", "build it again"],
        ),
        (lambda b: (b / "device" / LIBRARY).write_text("x"), [f"{LIBRARY}: expected sha256", "it is not loaded"]),
        (lambda b: (b / "device" / LIBRARY).unlink(), [f"{LIBRARY}: cannot be read"]),
        (lambda b: change_record(b, lambda r: r.update(passed=False)), ["did not compute what was recorded"]),
        (lambda b: change_record(b, lambda r: r.update(format="jpq-device/9")), ["got 'jpq-device/9'"]),
        (lambda b: change_record(b, lambda r: r["engine"].update(sha256="0")), ["malformed record"]),
        (lambda b: change_record(b, lambda r: r.pop("plugin")), ["malformed record"]),
        (lambda b: change_record(b, lambda r: r["device"].update(sm=None)), ["malformed record"]),
        (lambda b: change_record(b, lambda r: r["versions"].update(tensorrt=None)), ["malformed record"]),
    ],
)
def test_files_that_are_not_the_recorded_ones_are_not_loaded(stand_in, backend, device_bundle, change, words):
    change(device_bundle)
    done, calls = backend("ids", device_bundle, 3, *PROMPT, **TENSORRT)
    assert stand_in.refused(done, *words) == BAD_BUNDLE
    assert not [line for line in calls if line.startswith(("loadLibrary", "deserialize", "createInferRuntime"))]


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("out logits 0 3 1 -1 40", "out logits 0 3 1 -1 41", BAD_BUNDLE, ["logits has another shape"]),
        ("out logits 0", "out logits 1", UNSUPPORTED, ["logits has element type 1, expected 0"]),
        ("in input_ids 8", "in input_ids 3", UNSUPPORTED, ["input_ids has element type 3, expected 8"]),
        ("in logits_at 8", "in logits_at 3", UNSUPPORTED, ["logits_at has element type 3, expected 8"]),
        ("in past.0.key 0 4 1 2 -1 8", "in past.0.key 0 4 1 3 -1 8", BAD_BUNDLE, ["past.0.key has another shape"]),
        (
            "out present.0.key 0 4 1 2 -1 8",
            "out present.0.key 0 4 1 2 -1 16",
            BAD_BUNDLE,
            ["present.0.key has another"],
        ),
        ("out present.0.key 0", "out present.1.key 0", BAD_BUNDLE, ["present.1.key: no such layer"]),
        ("out present.0.key 0", "out present.x.key 0", BAD_BUNDLE, ["present.x.key: no such layer"]),
        ("out present.0.key .*\n", "", BAD_BUNDLE, ["a cache tensor is missing"]),
        ("out logits", "out embedding", UNSUPPORTED, ["embedding: not an input or output of a decoder"]),
        ("in input_ids", "in token_type_ids", UNSUPPORTED, ["token_type_ids: not an input"]),
        ("range 1 .*\n", "", BAD_BUNDLE, ["1 profiles, expected a decode and a prefill profile"]),
        ("range 1 input_ids 2 1 1 1 5", "range 1 input_ids 2 1 1 1 0", BAD_BUNDLE, ["profiles of no tokens"]),
    ],
)
def test_an_engine_of_another_model_is_refused(stand_in, backend, device_bundle, conftest_of, old, new, code, words):
    stand_in.write_device(device_bundle, stand_in.engine_text(conftest_of("engine").SPEC, **{old: new}))
    done, calls = backend("ids", device_bundle, 3, *PROMPT, **TENSORRT)
    assert stand_in.refused(done, *words) == code
    assert "~engine" in calls


@pytest.mark.parametrize(
    ("what", "arguments", "said"),
    [
        ("ids", [1, *([3] * (MAX_TOKENS + 1))], "25 tokens after 0 need more than the sequence's 24 positions"),
        ("sample", [20, 1, *([3] * 5)], "need more than the engine's 24 positions"),
    ],
)
def test_more_than_the_engines_profiles_hold_is_refused(stand_in, backend, device_bundle, what, arguments, said):
    done, _ = backend(what, device_bundle, *arguments, **TENSORRT)
    assert stand_in.refused(done, said) == BAD_ARGUMENT


def test_nvidias_own_library_of_another_version_is_told_apart(stand_in, backend, device_bundle):
    """The only real one that can be had without a GPU: its entry points are found and its version is read."""
    name = "tensorrt_dispatch_libs"
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"no {name}: pip install tensorrt-dispatch-cu13-libs")
    library = next(Path(next(iter(found.submodule_search_locations or ()))).glob("libnvinfer_dispatch.so.*"))
    done, _ = backend("ids", device_bundle, 3, *PROMPT, library=str(library), **TENSORRT)
    assert stand_in.refused(done, "TensorRT 11.", "this libjpq_runtime was compiled for TensorRT 10") == BACKEND
