"""The C runtime's TensorRT backend against a stand-in for TensorRT and CUDA: calls, shapes, tokens, the choice.

The backend is compiled against NVIDIA's own headers. It was NOT run on a GPU: see stand_in.py.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jpq_export.engine.builder import DECODE, PREFILL
from jpq_export.engine.plugin import LIBRARY
from jpq_export.format.bundle import hash_file, read_manifest, write_manifest
from jpq_export.runtime import native

BAD_ARGUMENT, BAD_BUNDLE, BACKEND = 1, 2, 4
TENSORRT = {"BACKEND": "1"}
MAX_PROMPT, MAX_TOKENS = 5, 24  # of stand_in.py's engine
PROMPT = (3, 17, 4)

PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(in_c C)
find_package(jpq_runtime 0.1 REQUIRED)
add_executable(generate generate.c)
target_link_libraries(generate PRIVATE jpq::runtime)
"""


def test_a_generation_makes_the_expected_calls(stand_in, backend, device_bundle):
    done, calls = backend("ids", device_bundle, 3, *PROMPT, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 3)
    assert done.stderr.decode().splitlines() == ["TensorRT 10.3.0.30, sm_87, jpq plugin"]
    engine = device_bundle / "device" / "model.engine"
    start = calls.index("createInferRuntime 10")
    assert calls[start - 1] == "cuDevicePrimaryCtxRetain"  # TensorRT crashes without a GPU's context
    assert calls[start + 1] == f"loadLibrary {engine.with_name(LIBRARY)}"
    assert calls[start + 2] == f"deserializeCudaEngine {engine.stat().st_size}"
    steps = [line for line in calls if line.startswith(("profile", "shape input_ids", "shape past.2.key", "enqueue"))]
    past = "shape past.2.key 1 1 {} 8".format
    first = ["profile 1", "shape input_ids 1 3", past(0), "enqueue profile 1"]
    second = ["profile 0", "shape input_ids 1 1", past(3), "enqueue profile 0"]
    third = ["shape input_ids 1 1", past(4), "enqueue profile 0"]  # the profile stays
    assert steps == first + second + third
    assert calls[-4:] == ["cuStreamDestroy_v2", "~engine", "~runtime", "cuDevicePrimaryCtxRelease_v2"]


def test_the_cache_has_two_sides_of_the_capacity_and_grows_in_place(stand_in, backend, device_bundle):
    done, calls = backend("ids", device_bundle, 10, *PROMPT, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 10)
    sizes = sorted(int(line.split()[1]) for line in calls if line.startswith("cuMemAlloc_v2 "))
    heads = {"0": 2, "2": 1}
    caches = [heads[name[0]] * MAX_TOKENS * 8 * 4 for name in stand_in.CACHES] * 2
    tokens = [MAX_PROMPT * 8, MAX_PROMPT * 8, MAX_TOKENS * 8, 8, stand_in.VOCAB * 4]
    assert sizes == sorted(caches + tokens)
    assert calls.count("cuMemFree_v2") == len(sizes)
    assert max(i for i, line in enumerate(calls) if "cuMemAlloc" in line) < calls.index("enqueue profile 1")


@pytest.mark.parametrize("count", [1, 4, 5, 6, 11, 23])
def test_a_prompt_longer_than_the_profile_goes_in_parts(stand_in, backend, device_bundle, count):
    prompt = [(7 * i + 2) % stand_in.VOCAB for i in range(count)]
    new = MAX_TOKENS - count + 1  # to the engine's last position
    done, calls = backend("ids", device_bundle, new, *prompt, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(prompt, new)
    widths = [int(line.split()[-1]) for line in calls if line.startswith("shape input_ids")]
    whole = min(count, (MAX_TOKENS - MAX_PROMPT) // MAX_PROMPT * MAX_PROMPT + MAX_PROMPT)
    parts = [min(MAX_PROMPT, whole - at) for at in range(0, whole, MAX_PROMPT)]
    assert widths == parts + [1] * (count - whole + new - 1)
    used = [int(line.split()[-1]) for line in calls if line.startswith("enqueue")]
    single = [width == 1 and at > 0 for at, width in enumerate(widths)]
    assert used == [DECODE if one else PREFILL for one in single]


def test_an_engine_of_an_older_bundle_gives_all_logits_of_a_prompt(stand_in, backend, device_bundle, conftest_of):
    """Its graph does not ask whose are wanted; the last token's are the last."""
    older = {r"(?m)^in logits_at.*\n": "", r"(?m)^range \d logits_at.*\n": ""}
    stand_in.write_device(device_bundle, stand_in.engine_text(conftest_of("engine").SPEC, **older))
    done, calls = backend("ids", device_bundle, 10, *PROMPT, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 10)
    assert f"cuMemAlloc_v2 {MAX_PROMPT * stand_in.VOCAB * 4}" in calls
    assert not [line for line in calls if "logits_at" in line]


def test_twin_another_prompt_gives_other_tokens(stand_in, backend, device_bundle):
    done, _ = backend("ids", device_bundle, 8, *reversed(PROMPT), **TENSORRT)
    assert stand_in.tokens_of(done) != stand_in.expected(PROMPT, 8)


def test_a_seed_draws_the_tokens_of_python(stand_in, backend, device_bundle):
    drawn = {}
    for seed in (1, 2):
        done, _ = backend("sample", device_bundle, 15, seed, *PROMPT, **TENSORRT)
        drawn[seed] = stand_in.tokens_of(done)
        assert drawn[seed] == stand_in.expected(PROMPT, 15, seed=seed, temperature=1.5, top_p=0.9)
    assert drawn[1] != drawn[2]


def test_two_threads_share_an_engine_not_a_cache(stand_in, backend, device_bundle):
    done, calls = backend("pair", device_bundle, 12, 9, *PROMPT, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected([9], 12) + stand_in.expected(PROMPT, 12)
    assert calls.count("createExecutionContext") == calls.count("~context") == 2
    assert calls.count("cuDevicePrimaryCtxRetain") == 1


def test_a_prebuilt_plugin_of_the_manifest_and_an_asked_one(stand_in, backend, device_bundle):
    path = device_bundle / "plugins" / "prebuilt" / LIBRARY
    path.parent.mkdir(parents=True)
    shutil.move(device_bundle / "device" / LIBRARY, path)
    manifest, name = read_manifest(device_bundle), path.relative_to(device_bundle).as_posix()
    raw = {"file": name, "sha256": hash_file(path).sha256, "sms": [87], "abi": 1, "machine": "any"}
    write_manifest(device_bundle, replace(manifest, device={"binaries": [raw]}, files={name: hash_file(path)}))
    done, calls = backend("ids", device_bundle, 2, *PROMPT, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 2)
    assert f"loadLibrary {path}" in calls
    other = shutil.copy(path, device_bundle / "other.so")
    done, calls = backend("ids", device_bundle, 2, *PROMPT, kernels=str(other), **TENSORRT)
    assert f"loadLibrary {other}" in calls
    Path(other).write_bytes(b"changed")
    done, calls = backend("ids", device_bundle, 2, *PROMPT, kernels=str(other), **TENSORRT)
    assert stand_in.refused(done, "other.so: expected sha256", "it is not loaded") == BAD_BUNDLE


def test_an_engine_with_its_kernels_inside_loads_no_library(stand_in, backend, device_bundle, conftest_of):
    stand_in.write_device(
        device_bundle, stand_in.engine_text(conftest_of("engine").SPEC), origin="kernels compiled ahead of time"
    )
    (device_bundle / "device" / LIBRARY).unlink()
    done, calls = backend("ids", device_bundle, 2, *PROMPT, **TENSORRT)
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 2)
    assert b"kernels inside the engine" in done.stderr
    assert not [line for line in calls if line.startswith("loadLibrary")]


def test_an_engine_elsewhere_with_its_record_and_plugin_beside_it(stand_in, backend, device_bundle, tmp_path):
    shutil.move(device_bundle / "device", tmp_path / "built")
    engine = tmp_path / "built" / "model.engine"
    done, calls = backend("ids", device_bundle, 2, *PROMPT, ENGINE=str(engine))  # found without JPQ_TENSORRT, too
    assert stand_in.tokens_of(done) == stand_in.expected(PROMPT, 2)
    assert f"loadLibrary {engine.with_name(LIBRARY)}" in calls
    done, _ = backend("ids", device_bundle, 2, *PROMPT, **TENSORRT)
    assert stand_in.refused(done, "device/device.json: cannot be read", "jpq-export build") == BAD_BUNDLE


@pytest.fixture
def both(device_bundle, bundle_folder, tmp_path):
    """A bundle for onnxruntime with the stand-in's engine, which knows another model, in device/."""
    folder = Path(shutil.copytree(bundle_folder, tmp_path / "both"))
    shutil.copytree(device_bundle / "device", folder / "device")
    raw = json.loads((folder / "manifest.json").read_text())
    raw["model"] = json.loads((device_bundle / "manifest.json").read_text())["model"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("environment", "kernels", "tensorrt", "said"),
    [
        ({}, "", True, "TensorRT 10.3.0.30, sm_87"),
        ({"JPQ_BACKEND": "tensorrt"}, "", True, "TensorRT 10.3.0.30"),
        ({"JPQ_BACKEND": "onnxruntime"}, "none", False, "onnxruntime CPU"),
        ({}, "none", False, 'the engine is not used: kernels is "none"'),
        ({"FAKE_SM": "89"}, "", False, "the engine is not used: built for sm_87, this GPU is sm_89"),
        ({"LD_LIBRARY_PATH": ""}, "", False, "the engine is not used: libcuda.so.1 not found"),
    ],
)
def test_the_engine_is_chosen_on_the_device_it_was_built_for(
    stand_in, backend, both, onnxruntime_library, environment, kernels, tensorrt, said
):
    done, calls = backend("ids", both, 4, *PROMPT, library=str(onnxruntime_library), kernels=kernels, **environment)
    assert len(stand_in.tokens_of(done)) == 4
    assert (stand_in.tokens_of(done) == stand_in.expected(PROMPT, 4)) == tensorrt
    assert ("createInferRuntime 10" in calls) == tensorrt
    assert said in done.stderr.decode()


def test_an_engine_of_this_device_that_fails_is_no_reason_for_another_backend(
    stand_in, backend, both, onnxruntime_library
):
    done, _ = backend("ids", both, 4, *PROMPT, library=str(onnxruntime_library), FAKE_VERSION="100400")
    assert stand_in.refused(done, "the engine was built with 10.3.0.30") == BACKEND
    (both / "device" / "model.engine").write_text("x")
    done, _ = backend("ids", both, 4, *PROMPT, library=str(onnxruntime_library))
    assert stand_in.refused(done, "model.engine: expected sha256") == BAD_BUNDLE


def test_a_wrong_backend_is_refused(stand_in, backend, both):
    done, _ = backend("ids", both, 4, *PROMPT, JPQ_BACKEND="cuda")
    assert stand_in.refused(done, "JPQ_BACKEND: got 'cuda', expected onnxruntime or tensorrt") == BAD_ARGUMENT
    done, _ = backend("ids", both, 4, *PROMPT, BACKEND="7")
    assert stand_in.refused(done, "backend: got 7") == BAD_ARGUMENT
    done, _ = backend("ids", both, 4, *PROMPT, kernels="none", JPQ_BACKEND="tensorrt")
    assert stand_in.refused(done, 'kernels: "none", but the engine needs its plugin library') == BAD_ARGUMENT


def finish(*command, **environment):
    command, environment = [str(part) for part in command], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def configure(folder, *options, source=None):
    if not shutil.which("cmake") or not shutil.which("gcc"):
        pytest.skip("no cmake or no gcc")
    source = source or native.sources_folder() / "runtime"
    return finish("cmake", "-S", source, "-B", folder, "-DJPQ_KERNELS=OFF", "-DJPQ_EXAMPLES=OFF", *options)


@pytest.mark.parametrize("shared", ["ON", "OFF"])
def test_a_project_in_c_runs_the_installed_library(device_bundle, gpu, stand_in, nvidia_headers, tmp_path, shared):
    where = (f"-DJPQ_TENSORRT_INCLUDE={nvidia_headers[1]}", f"-DJPQ_CUDA_INCLUDE={nvidia_headers[3]}")
    prefix, project = tmp_path / "prefix", tmp_path / "project"
    said = configure(tmp_path / "build", *where, f"-DBUILD_SHARED_LIBS={shared}", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    assert "TensorRT backend with the headers of 1" in said
    finish("cmake", "--build", tmp_path / "build", "--target", "install")
    project.mkdir()
    shutil.copy(native.sources_folder() / "runtime" / "examples" / "generate.c", project)
    (project / "CMakeLists.txt").write_text(PROJECT)
    configure(tmp_path / "out", f"-DCMAKE_PREFIX_PATH={prefix}", source=project)
    finish("cmake", "--build", tmp_path / "out")
    own = {"LD_LIBRARY_PATH": str(gpu), "JPQ_IDS": "1"}
    tokens = finish(tmp_path / "out" / "generate", device_bundle, "w0 w1 w2", "6", **own).split()
    words = Tokenizer.from_file(str(device_bundle / "tokenizer.json"))
    assert [int(token) for token in tokens] == stand_in.expected(words.encode("w0 w1 w2").ids, 6)


def test_a_library_built_without_the_headers_says_so(harness, device_bundle, tmp_path):
    """`harness`: without the backend, as cmake builds it where a header is missing."""
    nowhere = (f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY")
    assert "TensorRT backend left out: needs a C++ compiler, NvInferRuntime.h" in configure(tmp_path / "a", *nowhere)
    assert "TensorRT backend" not in configure(tmp_path / "b", "-DJPQ_TENSORRT=OFF")
    old = tmp_path / "old"
    old.mkdir()
    (old / "NvInferRuntime.h").write_text("")
    (old / "cuda_runtime_api.h").write_text("")
    (old / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 5 //!< minor\n")
    said = configure(tmp_path / "c", f"-DJPQ_TENSORRT_INCLUDE={old}", f"-DJPQ_CUDA_INCLUDE={old}")
    assert "left out: the headers in" in said
    assert "are of 8.5, needed 10.3 or later" in said
    done = harness("ids", "none", device_bundle, 1, 3, BACKEND="1")
    assert done.returncode == 3
    assert b"was built without TensorRT's headers" in done.stderr
