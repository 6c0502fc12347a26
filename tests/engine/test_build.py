"""The whole command with stand-ins for TensorRT and CUDA (clearly not them), and as a new user without either."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.engine import build as steps
from jpq_export.engine.build import prepare, run
from jpq_export.engine.builder import EngineError
from jpq_export.engine.session import EngineSession

CACHES = tuple(f"{i}.{part}" for i in (0, 2) for part in ("key", "value"))
INPUTS = ("input_ids", "attention_mask", "position_ids", *(f"past.{name}" for name in CACHES), "logits_at")
OUTPUTS = ("logits", *(f"present.{name}" for name in CACHES))
# What a board has besides the standard library: everything else this package can use is taken away.
ABSENT = (
    *(
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx_ir",
        "rich",
        "jinja2",
        "markupsafe",
        "psutil",
    ),
    *("safetensors", "tokenizers", "huggingface_hub", "gguf", "triton", "tomli", "google.protobuf", "tensorrt"),
    "click_default_group",
)


def module(name: str):
    place = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert place
    assert place.loader
    loaded = importlib.util.module_from_spec(place)
    place.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def stand_ins(monkeypatch, kit, prebuilt, board):
    """`stand_ins(factor=1.0)`: the fake TensorRT whose engine multiplies right logits by `factor`; for build.py too.

    `asks`: the engine asks whose logits are wanted, as graphs do since `logits_at`.
    """
    prebuilt()

    def do(factor: float = 1.0, *, asks: bool = True):
        cuda = module("fake_cuda")
        gpu = cuda.FakeCuda()
        inputs = INPUTS if asks else INPUTS[:-1]
        trt = module("fake_tensorrt").FakeTensorRT(inputs)
        engine = cuda.FakeEngine(gpu, kit.logits_of, (*inputs, *OUTPUTS), factor)
        trt.Runtime, trt.engine, trt.gpu = cuda.runtime_for(engine), engine, gpu
        trt.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda *_: None})
        monkeypatch.setattr(steps, "Cuda", lambda: gpu)
        monkeypatch.setattr(steps, "import_tensorrt", lambda: (trt, None))
        monkeypatch.setattr(steps, "read_device", lambda _out: board)
        return trt

    return do


def test_build_writes_engine_and_reports(stand_ins, settings, bundle):
    trt = stand_ins()
    said: list[str] = []
    report = run(prepare(settings), said.append)
    assert report.passed
    assert settings.out.read_bytes() == b"engine"
    assert sorted(path.name for path in settings.home.iterdir()) == [
        *("device.html", "device.json", "model.engine", "timing.cache")
    ]
    written = json.loads((settings.home / "device.json").read_text())
    assert written["format"] == "jpq-device/1"
    assert written["passed"] is True
    assert written["parity"]["equal"] == written["parity"]["steps"] == 6
    assert written["device"]["board"] == "NVIDIA Jetson Orin Nano"
    assert written["versions"]["tensorrt"] == "10.3.0.30"
    assert written["speed"]["decode_tokens_per_s"] > 0
    page = (settings.home / "device.html").read_text()
    assert "parity holds" in page
    assert "logits.padded" in page
    assert trt.names().index("load_library") < trt.names().index("Builder")
    assert "running the recorded vectors" in said


def test_prompts_use_the_prefill_profile_and_steps_the_decode_profile(stand_ins, settings):
    trt = stand_ins()
    run(prepare(settings), lambda _text: None)
    assert {profile for profile, new, past in trt.engine.used if new == 1 and past} == {0}
    assert {profile for profile, new, past in trt.engine.used if new > 1 or not past} == {1}


@pytest.mark.parametrize("asks", [True, False])
def test_logits_of_a_prompt_are_computed_of_its_last_token_unless_they_are_checked(stand_ins, settings, kit, asks):
    trt = stand_ins(asks=asks)
    report = run(prepare(settings), lambda _text: None)
    assert report.passed
    prompt, vectors = len(kit.record()["ids.prefill"][0]), trt.engine.used
    timed = [rows for rows, (_, new, past) in zip(trt.engine.rows, vectors, strict=True) if (new, past) == (prompt, 0)]
    assert timed[0] == prompt  # the recorded one
    assert set(timed[1:]) == ({1} if asks else {prompt})


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_twin_an_engine_that_computes_something_else_never_gets_its_name(stand_ins, settings, bundle, factor):
    stand_ins(factor)
    done = CliRunner().invoke(main, ["build", str(bundle)])
    assert done.exit_code == 1
    assert "other numbers than recorded, first in logits.last" in done.output
    assert not settings.out.exists()
    assert settings.out.with_name("model.engine.failed").exists()
    assert "do not use this engine" in (settings.home / "device.html").read_text()
    written = json.loads((settings.home / "device.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert written["passed"] is False


def test_the_command_says_checks_and_speed(stand_ins, bundle, settings):
    stand_ins()
    done = CliRunner().invoke(main, ["build", str(bundle)])
    assert done.exit_code == 0, done.output
    assert done.output.count("ok  ") == 8
    assert "parity holds; decode" in done.output
    done = CliRunner().invoke(main, ["build", str(bundle), "--json"])
    document = json.loads(done.stdout)
    assert document["passed"] is True
    assert document["report"]["parity"]["steps"] == 6


def test_dry_run_says_what_it_would_do_and_writes_nothing(stand_ins, bundle):
    trt = stand_ins()
    before = sorted(bundle.rglob("*"))
    done = CliRunner().invoke(main, ["build", str(bundle), "--dry-run", "--max-tokens", "1024", "--workspace", "64MB"])
    assert done.exit_code == 0, done.output
    assert "plugin: prebuilt" in done.output
    assert "decode: 1..1 new tokens, 2..1024 in all" in done.output
    assert "prefill: 1..512 new tokens, 1..1024 in all" in done.output
    assert "workspace 64 MB" in done.output
    assert trt.calls == []
    assert sorted(bundle.rglob("*")) == before


def test_twin_a_dry_run_with_a_failing_check_fails(stand_ins, bundle):
    stand_ins()
    (bundle / "model.trt.onnx").write_bytes(b"damaged")
    done = CliRunner().invoke(main, ["build", str(bundle), "--dry-run"])
    assert done.exit_code == 1
    assert "FAIL bundle" in done.output
    assert "decode:" not in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workspace", "much"], "--workspace 'much'"),
        (["--max-prompt", "9", "--max-tokens", "9"], "--max-prompt 9"),
        (["--max-prompt", "0"], "--max-prompt 0"),
    ],
)
def test_wrong_options_are_usage_errors(bundle, arguments, words):
    done = CliRunner().invoke(main, ["build", str(bundle), *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_no_bundle_is_one_line(tmp_path):
    done = CliRunner().invoke(main, ["build", str(tmp_path)])
    assert done.exit_code == 1
    assert "not a bundle" in done.output


@pytest.mark.parametrize(
    "change", [{"bounds": {}}, {"tensorrt": "new"}, {"graph": "../x"}, {"binaries": [{"file": "/etc/x"}]}]
)
def test_a_malformed_device_section_is_one_line(bundle, change):
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    raw["device"] |= change
    path.write_text(json.dumps(raw))
    done = CliRunner().invoke(main, ["build", str(bundle)])
    assert done.exit_code == 1
    assert "export the bundle again" in done.output or "do not use this bundle" in done.output


def test_a_session_refuses_what_lies_beyond_its_profiles(stand_ins, settings, kit):
    trt = stand_ins()
    settings.home.mkdir()
    settings.out.write_bytes(b"engine")
    session = EngineSession(trt, settings.out, spec=kit.SPEC, settings=settings, logger=None, cuda=trt.gpu)
    session.forward(kit.record()["ids.prefill"][0])
    session.length = settings.max_tokens
    with pytest.raises(EngineError, match="1 tokens after 2048"):
        session.forward(kit.record()["greedy"][:1])


def board_run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter where a board's missing packages cannot be imported."""
    block = f"import sys\nfor name in {ABSENT}:\n    sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120, check=False
    )


def test_without_anything_but_numpy_and_click_it_says_what_is_missing(bundle):
    code = f"from jpq_export.cli import main\nmain(['build', {str(bundle)!r}])"
    done = board_run(code)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "FAIL tensorrt: got no Python module tensorrt" in done.stdout
    assert "sudo apt install nvidia-jetpack" in done.stdout
    assert "ok   bundle" in done.stdout
    assert done.stderr.startswith("Error: ")


def test_damage_is_reported_without_onnx_too(bundle):
    (bundle / "model.trt.onnx.data").write_bytes(bytes(999))
    done = board_run(f"from jpq_export.cli import main\nmain(['build', {str(bundle)!r}])")
    assert "FAIL bundle: got model.trt.onnx.data (expected 1000 bytes, got 999)" in done.stdout
    assert "Traceback" not in done.stderr


def test_every_module_of_the_device_side_loads_there():
    names = [path.stem for path in Path(steps.__file__).parent.glob("*.py")]
    code = "".join(f"import jpq_export.engine.{name}\n" for name in names if name != "__init__")
    assert board_run(code).returncode == 0


def test_twin_another_command_does_not_load_there():
    assert "ModuleNotFoundError" in board_run("import jpq_export.runtime.bundle, jpq_export.progress").stderr
