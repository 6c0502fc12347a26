"""The C runtime's TensorRT backend against a stand-in for TensorRT and CUDA: calls, shapes, profiles, tokens, refusals.

The backend is compiled against NVIDIA's own headers. NOT run on a GPU: the stand-in (fake_tensorrt.cpp, fake_cuda.cpp)
records the calls, keeps the tokens it finds in the KV cache and runs a stream only when it is synchronised; the address
sanitizer watches the sizes of its buffers.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jpq_export.engine.builder import DECODE, PREFILL, input_shape, profile_shapes
from jpq_export.engine.plugin import LIBRARY
from jpq_export.engine.report import DeviceReport, Speed, write_report
from jpq_export.engine.settings import Settings
from jpq_export.engine.vectors import DeviceParity
from jpq_export.format.bundle import Manifest, hash_file, read_manifest, write_manifest
from jpq_export.runtime import native
from jpq_export.runtime.sampling import choose

HERE = Path(__file__).parent
STRICT = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
BAD_ARGUMENT, BAD_BUNDLE, UNSUPPORTED, BACKEND, NO_MEMORY = 1, 2, 3, 4, 5
TENSORRT = {"BACKEND": "1"}
MAX_PROMPT, MAX_TOKENS, VOCAB = 5, 24, 40
FLOAT, HALF, INT64 = 0, 1, 8
CACHES = tuple(f"{i}.{part}" for i in (0, 2) for part in ("key", "value"))
INPUTS = ("input_ids", "attention_mask", "position_ids", *(f"past.{name}" for name in CACHES))
MODULE = Path(__file__).parents[1] / "test_tensorrt.py"


def module(path: Path):
    place = importlib.util.spec_from_file_location(path.stem, path)
    assert place
    assert place.loader
    loaded = importlib.util.module_from_spec(place)
    place.loader.exec_module(loaded)
    return loaded


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def headers():
    """Compiler options for NVIDIA's headers; skips without them."""
    found = module(MODULE)
    return ("-isystem", found.tensorrt_headers(), "-isystem", found.cuda_headers())


@pytest.fixture(scope="session")
def gpu(headers, tmp_path_factory):
    """A folder with the stand-in under the names of the driver and of TensorRT."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "all.cpp").write_text("#include <NvInferRuntime.h>\n")
    text = run("g++", "-std=c++17", "-E", "-P", *headers, folder / "all.cpp")
    text = re.sub(r"\[\[.*?\]\]|__attribute__\s*\(\(.*?\)\)", "", text)
    (folder / "fake_stubs.h").write_text(module(HERE / "stubs.py").stub_classes(text))
    flags = ("-std=c++17", *STRICT, "-fPIC", "-shared", f"-I{HERE}", f"-I{folder}", *headers)
    quiet = ("-Wno-deprecated-declarations", "-Wno-unused-parameter")
    run("g++", *flags, *quiet, HERE / "fake_tensorrt.cpp", HERE / "fake_cuda.cpp", "-o", folder / "libcuda.so.1")
    (folder / "libnvinfer.so.10").symlink_to("libcuda.so.1")
    return folder


@pytest.fixture(scope="session")
def program(headers, tmp_path_factory):
    """harness.c with the runtime, TensorRT backend included, under the sanitizers."""
    folder, source = tmp_path_factory.mktemp("backend"), native.sources_folder() / "runtime"
    c = ("-std=c99", "-D_POSIX_C_SOURCE=200809L", "-DJPQ_HAVE_TENSORRT", f"-I{source / 'include'}")
    files = [HERE / "harness.c", *source.glob("src/*.c"), *source.glob("src/tensorrt/*.c")]
    for path in sorted(files):
        run("gcc", *c, *STRICT, *SANITIZE, "-c", path, "-o", folder / f"{path.stem}.o")
    cpp = ("-std=c++17", "-fno-exceptions", "-fno-rtti", "-Wno-deprecated-declarations", *headers)
    run("g++", *cpp, *STRICT, *SANITIZE, "-c", source / "src/tensorrt/trt_engine.cpp", "-o", folder / "trt_engine.o")
    run("g++", *SANITIZE, "-pthread", *sorted(folder.glob("*.o")), "-o", folder / "harness", "-ldl", "-lm")
    return folder / "harness"


def engine_text(spec, settings, **changes):
    """The stand-in's engine, with the profiles `jpq-export build` gives TensorRT."""
    lines = []
    for name in INPUTS:
        shape = list(input_shape(name, spec, seq=-1, past=0))
        shape = [1, -1] if len(shape) == 2 else [1, shape[1], -1, shape[3]]
        kind = INT64 if len(shape) == 2 else FLOAT
        lines.append(f"in {name} {kind} {len(shape)} {' '.join(map(str, shape))}")
        for profile in (DECODE, PREFILL):
            low, _, high = profile_shapes(name, spec, settings, profile=profile)
            lines.append(f"range {profile} {name} {len(low)} {' '.join(map(str, (*low, *high)))}")
        if name.startswith("past."):
            lines.append(lines[-3].replace("in past.", "out present."))
    lines.append(f"out logits {FLOAT} 3 1 -1 {VOCAB}")
    text = "\n".join(lines) + "\n"
    for old, new in changes.items():
        assert re.search(old, text)
        text = re.sub(old, new, text)
    return text


def write_device(bundle, engine, *, library=b"a plugin", origin="compiled here", tensorrt="10.3.0.30", sm=87):
    """What `jpq-export build` leaves in device/, by its own report; the engine is the stand-in's."""
    home = bundle / "device"
    home.mkdir(exist_ok=True)
    (home / "model.engine").write_text(engine)
    (home / LIBRARY).write_bytes(library)
    entry, plugin = hash_file(home / "model.engine"), hash_file(home / LIBRARY)
    report = DeviceReport(
        device={"board": "described", "sm": sm, "machine": "any"},
        versions={"tensorrt": tensorrt},
        settings={},
        checks=(),
        plugin={"file": LIBRARY, "origin": origin, "sha256": plugin.sha256, "sms": [sm]},
        engine={"file": "model.engine", "sha256": entry.sha256, "bytes": entry.bytes},
        seconds={},
        parity=DeviceParity("pytorch", (), 1, 1, tie=False),
        speed=Speed(1, 1.0, 1, 1.0),
    )
    write_report(report, home)


@pytest.fixture
def spec(conftest_of):
    return conftest_of("engine").SPEC


@pytest.fixture
def device_bundle(tmp_path, spec, conftest_of):
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = {"name": "tiny", "spec": json.loads(spec.to_json())}
    helpers = conftest_of("runtime")
    helpers.write_tokenizer(folder, helpers.WORDS)
    sizes = {"bits_per_weight": 4.0, "weight_bytes": 1, "original_bytes": 4}
    write_manifest(folder, Manifest(model=model, target={"name": "jetson"}, method="jpq", **sizes))
    settings = Settings(folder, folder / "device" / "model.engine", max_prompt=MAX_PROMPT, max_tokens=MAX_TOKENS)
    write_device(folder, engine_text(spec, settings))
    return folder


@pytest.fixture
def backend(program, gpu, tmp_path):
    """`backend("ids", folder, count, *ids, library="", kernels="", **environment)`: the process and the recorded calls."""
    log = tmp_path / "calls"

    def do(what, folder, *arguments, library="", kernels="", **environment):
        log.write_text("")
        own = {"LD_LIBRARY_PATH": str(gpu), "FAKE_LOG": str(log), **environment}
        command = [program, what, library, kernels, folder, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, timeout=200, env={**os.environ, **own}, check=False)
        return done, log.read_text().splitlines()

    return do


def tokens_of(done):
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [int(line) for line in done.stdout.split()]


def refused(done, *words):
    """Code of a refusal of one line that holds all words."""
    assert done.returncode == 3, done.stderr.decode()[-3000:]
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("TensorRT 10")]
    assert len(lines) == 1, lines
    code, text = lines[0].split(" ", 1)
    for word in words:
        assert word in text
    return int(code)


def logits_of(tokens):
    """The stand-in's rule."""
    state = 7
    for token in tokens:
        state = (state * 31 + token * 17 + 5) % 1009
    return (state * np.arange(1, VOCAB + 1) * 13 % 101 / 8).astype(np.float32)


def expected(prompt, count, **sampling):
    tokens, rng = list(prompt), np.random.default_rng(sampling.pop("seed", 0))
    for _ in range(count):
        tokens.append(choose(logits_of(tokens), rng, **sampling))
    return tokens[len(prompt) :]


PROMPT = (3, 17, 4)


def test_a_generation_makes_the_expected_calls(backend, device_bundle):
    done, calls = backend("ids", device_bundle, 3, *PROMPT, **TENSORRT)
    assert tokens_of(done) == expected(PROMPT, 3)
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


def test_the_cache_has_two_sides_of_the_capacity_and_grows_in_place(backend, device_bundle):
    done, calls = backend("ids", device_bundle, 10, *PROMPT, **TENSORRT)
    assert tokens_of(done) == expected(PROMPT, 10)
    sizes = sorted(int(line.split()[1]) for line in calls if line.startswith("cuMemAlloc_v2 "))
    heads = {"0": 2, "2": 1}
    caches = [heads[name[0]] * MAX_TOKENS * 8 * 4 for name in CACHES] * 2
    tokens = [MAX_PROMPT * 8, MAX_PROMPT * 8, MAX_TOKENS * 8, MAX_PROMPT * VOCAB * 4]
    assert sizes == sorted(caches + tokens)
    assert calls.count("cuMemFree_v2") == len(sizes)
    assert max(i for i, line in enumerate(calls) if "cuMemAlloc" in line) < calls.index("enqueue profile 1")


@pytest.mark.parametrize("count", [1, 4, 5, 6, 11, 23])
def test_a_prompt_longer_than_the_profile_goes_in_parts(backend, device_bundle, count):
    prompt = [(7 * i + 2) % VOCAB for i in range(count)]
    new = MAX_TOKENS - count + 1  # to the engine's last position
    done, calls = backend("ids", device_bundle, new, *prompt, **TENSORRT)
    assert tokens_of(done) == expected(prompt, new)
    widths = [int(line.split()[-1]) for line in calls if line.startswith("shape input_ids")]
    whole = min(count, (MAX_TOKENS - MAX_PROMPT) // MAX_PROMPT * MAX_PROMPT + MAX_PROMPT)
    parts = [min(MAX_PROMPT, whole - at) for at in range(0, whole, MAX_PROMPT)]
    assert widths == parts + [1] * (count - whole + new - 1)
    used = [int(line.split()[-1]) for line in calls if line.startswith("enqueue")]
    single = [width == 1 and at > 0 for at, width in enumerate(widths)]
    assert used == [DECODE if one else PREFILL for one in single]


def test_twin_another_prompt_gives_other_tokens(backend, device_bundle):
    done, _ = backend("ids", device_bundle, 8, *reversed(PROMPT), **TENSORRT)
    assert tokens_of(done) != expected(PROMPT, 8)


def test_a_seed_draws_the_tokens_of_python(backend, device_bundle):
    drawn = {}
    for seed in (1, 2):
        done, _ = backend("sample", device_bundle, 15, seed, *PROMPT, **TENSORRT)
        drawn[seed] = tokens_of(done)
        assert drawn[seed] == expected(PROMPT, 15, seed=seed, temperature=1.5, top_p=0.9)
    assert drawn[1] != drawn[2]


def test_two_threads_share_an_engine_not_a_cache(backend, device_bundle):
    done, calls = backend("pair", device_bundle, 12, 9, *PROMPT, **TENSORRT)
    assert tokens_of(done) == expected([9], 12) + expected(PROMPT, 12)
    assert calls.count("createExecutionContext") == calls.count("~context") == 2
    assert calls.count("cuDevicePrimaryCtxRetain") == 1
