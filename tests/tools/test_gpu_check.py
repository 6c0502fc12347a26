"""tools/gpu_check.py on a machine without a GPU: steps rehearsed, steps that fail, the report, the one-line refusal."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is only built for Linux on x86-64")
torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "kernels")]
    yield
    sys.path[:] = before


@pytest.fixture
def part(on_path):
    """A module of the steps."""
    return lambda name: importlib.import_module(f"gpu_steps.{name}")


def run(folder, *arguments, code=None, environment=None):
    """Exit code, output and report of the command; `code`: Python to run before it."""
    start = [str(TOOL)] if code is None else ["-c", f"{code}\nimport sys\nsys.exit(gpu_check.main())"]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parent)} | (environment or {})
    done = subprocess.run(
        [sys.executable, *start, "--out", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    record = folder / "gpu_check.json"
    return done.returncode, done.stdout, json.loads(record.read_text()) if record.exists() else None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    code, said, record = run(tmp_path)
    assert (code, record) == (1, None)
    assert said.startswith("gpu_check: no CUDA GPU: torch ")
    assert said.count("\n") == 1


def test_the_cuda_kernels_and_the_clocks_rehearsed(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++: the CUDA sources cannot be rehearsed on the CPU")
    code, said, record = run(tmp_path, "--rehearse", "--quick", "--only", "cuda", "--only", "gemm")
    assert code == 0, said
    assert {name: step["status"] for name, step in record["steps"].items()} == dict.fromkeys(
        ("environment", "cuda", "gemm"), "passed"
    )
    facts = record["steps"]["cuda"]["facts"]
    assert facts["cases"] > 15
    assert facts["wrong"] == 0
    assert facts["weakest twin, same unit"] > 4 > 1 >= facts["largest error, of what rounding may do"]
    assert {row["kernels"] for row in record["steps"]["gemm"]["rows"]} == {"triton", "cuda"}
    assert all(row["of cuBLAS"] > 0 for row in record["steps"]["gemm"]["rows"])
    page = (tmp_path / "gpu_check.md").read_text()
    assert "Nothing here ran on a GPU" in page
    assert str(tmp_path.parent) not in page


def test_the_triton_kernels_rehearsed(tmp_path):
    code, said, record = run(tmp_path, "--rehearse", "--quick", "--only", "triton")
    assert code == 0, said
    assert record["steps"]["triton"]["facts"]["cases"] > 15
    assert record["steps"]["triton"]["facts"]["weakest twin, same unit"] > 4


BREAK = """
import sys
sys.path.insert(0, {tools!r})
import gpu_check
gpu_check.STEPS |= {{"cuda": ("breaking:{how}", 60), "gemm": ("breaking:fine", 60)}}
gpu_check.__file__ = {child!r}
"""
CHILD = """
import os, signal, sys, time, types
sys.path.insert(0, {tools!r})
import gpu_check
from gpu_steps.outcome import CannotRun, Outcome
breaking = types.ModuleType("breaking")
def crash(settings): print("before it broke", flush=True); os.kill(os.getpid(), signal.SIGSEGV)
def hang(settings): time.sleep(60)
def wrong(settings): raise ValueError("bad number\\nand more")
def absent(settings): raise CannotRun("no such tool")
def fine(settings): return Outcome("passed", "", {{"answer": 42.0}})
vars(breaking).update(crash=crash, hang=hang, wrong=wrong, absent=absent, fine=fine)
sys.modules["breaking"] = breaking
gpu_check.STEPS |= {{"cuda": ("breaking:{how}", 60), "gemm": ("breaking:fine", 60)}}
sys.exit(gpu_check.main())
"""


@pytest.mark.parametrize(
    ("how", "status", "reason", "code"),
    [
        ("crash", "failed", "ended with exit code -11, no result; last line: before it broke; see logs/cuda.log", 1),
        ("hang", "failed", "no end after 12 s, no result; see logs/cuda.log", 1),
        ("wrong", "failed", "ValueError: bad number", 1),
        ("absent", "not run", "no such tool", 0),
        ("fine", "passed", "", 0),
    ],
)
def test_a_step_that_fails_says_why_and_loses_nothing_else(tmp_path, how, status, reason, code):
    child = tmp_path / "child.py"
    child.write_text(CHILD.format(tools=str(TOOL.parent), how=how))
    start = BREAK.format(tools=str(TOOL.parent), how=how, child=str(child))
    out = tmp_path / "out"
    arguments = ("--rehearse", "--only", "cuda", "--only", "gemm", "--timeout", "12")
    got, said, record = run(out, *arguments, code=start)
    step = record["steps"]["cuda"]
    assert (got, step["status"], step["reason"]) == (code, status, reason), said
    assert record["steps"]["gemm"]["status"] == "passed"
    assert reason in (out / "gpu_check.md").read_text()


class Reference:
    """Right kernels, by torch; `spoil` changes what they return."""

    def __init__(self, cases, spoil=None):
        self.cases, self.spoil = cases, spoil or (lambda y: y)

    def matmul(self, x, weight, bias, out):
        y = x.to(torch.float64) @ weight.dense().T
        out.copy_(self.spoil(y if bias is None else y + bias))

    def gather(self, indices, weight, out):
        n = weight.shape[0]
        rows = weight.dense()[indices.long() % n]
        rows[(indices >= n) | (indices < -n)] = float("nan")
        out.copy_(self.spoil(rows.to(torch.float32)))

    def rounding(self, shape):
        return self.cases.FP32_SUMS


SPOILT = {
    "right": None,
    "left out": lambda y: torch.where(torch.arange(y.shape[1]) == y.shape[1] - 1, torch.nan, y),
    "a little off": lambda y: y * (1 + 1e-3),
}


@pytest.mark.parametrize("how", SPOILT)
def test_the_comparison_passes_right_kernels_and_no_others(part, how):
    outcome = part("correctness").check_all(
        Reference(part("cases"), SPOILT[how]), part("outcome").Settings(quick=True, rehearse=True)
    )
    assert (outcome.status == "passed") == (how == "right"), outcome.reason
    assert (outcome.facts["wrong"] == 0) == (how == "right")
    assert bool(outcome.rows) == (how != "right")


def test_twin_kernels_that_ignore_the_weight_are_seen(part):
    cases, correctness = part("cases"), part("correctness")

    class Deaf(Reference):
        def matmul(self, x, weight, bias, out):
            self.kept = getattr(self, "kept", weight)  # the first weight, whatever comes later
            super().matmul(x, self.kept, bias, out)

    shape = cases.Shape(4, 32, 3, 13, 3, "fp32")
    checked = correctness.check_product(Deaf(cases), shape, correctness.np.random.default_rng(0), "cpu")
    assert "twin not seen" in checked.wrong
    right = correctness.check_product(Reference(cases), shape, correctness.np.random.default_rng(0), "cpu")
    assert right.wrong == ""


def test_a_write_past_the_end_is_seen(part):
    cases, correctness = part("cases"), part("correctness")

    class Long(Reference):
        def matmul(self, x, weight, bias, out):
            super().matmul(x, weight, bias, out)
            out.as_strided((out.numel() + 1,), (1,))[-1] = 0

    checked = correctness.check_product(
        Long(cases), cases.Shape(4, 32, 3, 13, 3, "fp32"), correctness.np.random.default_rng(0), "cpu"
    )
    assert checked.wrong == "written past the end of Y"


def test_every_width_type_and_count_of_rows_is_among_the_shapes(part):
    cases = part("cases")
    for quick, rows in ((False, cases.ROWS), (True, cases.QUICK_ROWS)):
        made = cases.shapes(quick=quick)
        assert {(s.bits, s.dtype, s.rows) for s in made} == {
            (b, d, r) for b in cases.BITS for d in cases.DTYPES for r in rows
        }
        assert {s.group_size for s in made} == set(cases.GROUP_SIZES)
        assert {(s.symmetric, s.biased) for s in made} == {(a, b) for a in (True, False) for b in (True, False)}


def test_what_compute_sanitizer_says_is_judged(part):
    sanitizer = part("sanitizer")
    clean, twin = (sanitizer.Check("c", (), is_clean, {}) for is_clean in (True, False))
    assert sanitizer.judge(clean, 0, "ran") == ("passed", "")
    found = "========= Invalid __global__ read of size 4 bytes\n"
    assert sanitizer.judge(clean, 9, found) == ("failed", f"exit code 9: {found.strip()}")
    assert sanitizer.judge(twin, 9, found)[0] == "passed"
    assert sanitizer.judge(twin, 0, "ran") == ("failed", "the planted fault was not found")
    assert sanitizer.judge(clean, 1, "========= Error: Device not supported.")[0] == "not run"
    assert sanitizer.judge(twin, 1, "========= Error: Device not supported.")[0] == "not run"


def test_goals_are_counted_and_impossible_times_refused(part):
    speed, outcome = part("speed"), part("outcome")
    rows = [{"kernels": "cuda", "rows": 1, "of copy": value, "microseconds": 5.0} for value in (0.5, 0.9, 0.86)]
    said = speed.best_of(rows, "of copy", 0.85, rows_at_most=1)
    assert said == {"goal": "of copy >= 0.85", "cuda": "0.50 to 0.90 of copy; 2 of 3 reach the goal"}
    assert speed.check_numbers(outcome.Outcome("passed", "", {}, rows)).status == "passed"
    rows[0]["of copy"] = 3.0
    assert speed.check_numbers(outcome.Outcome("passed", "", {}, rows)).status == "failed"


def test_the_sanitizers_programs_run_and_their_twins_are_found(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++: the CUDA sources cannot be rehearsed on the CPU")
    code, said, record = run(tmp_path, "--rehearse", "--only", "sanitizer")
    assert code == 0, said
    rows = record["steps"]["sanitizer"]["rows"]
    assert [row["result"] for row in rows] == ["passed"] * 7
    assert sum("heap-buffer-overflow" in row["says"] for row in rows) == 6


def test_the_triton_launches_run(tmp_path):
    script = ROOT / "tools" / "gpu_steps" / "launches.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "launched the Triton kernels" in done.stdout


def test_decode_of_a_bundle_rehearsed(tmp_path, conftest_of, library):
    tiny = conftest_of("runtime")
    bundle = tiny.write_bundle(tmp_path / "bundle", spec=replace(tiny.SPEC, max_positions=128))
    arguments = ("--rehearse", "--quick", "--only", "decode")
    before = run(tmp_path / "none", *arguments)
    assert before[2]["steps"]["decode"]["status"] == "not run"
    assert "give --bundle" in before[2]["steps"]["decode"]["reason"]
    cache = {"JPQ_CACHE": str(library.path.parents[2])}
    code, said, record = run(tmp_path / "out", *arguments, "--bundle", str(bundle), environment=cache)
    assert code == 0, said
    facts = record["steps"]["decode"]["facts"]
    assert facts["greedy tokens equal, of 64"] == 64
    error = facts["largest relative RMS error of the logits"]
    assert error < facts["bound"] < facts["twin: the same of another prompt"]
    assert record["steps"]["decode"]["rows"][0]["decode tokens/s"] > 0


def test_twin_a_decoder_that_is_wrong_fails(part, tmp_path, monkeypatch):
    decode, outcome, np = part("decode"), part("outcome"), pytest.importorskip("numpy")
    weights = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)

    class Decoder:
        path, spec = "fake", type("Spec", (), {"vocab": 16, "max_positions": 256})

        def __init__(self, error):
            self.error = error

        def forward(self, ids):
            return type("Output", (), {"logits": weights[ids] * (1 + self.error)})

        def start(self):
            return self

        def step(self, ids):
            y = weights[list(ids)[-1]]
            return y + self.error * np.abs(y).max() * np.eye(16, dtype=np.float32)[int(y.argmin())]

    for error, status in ((0.0, "passed"), (1e-2, "failed"), (5.0, "failed"), (np.nan, "failed")):
        monkeypatch.setattr(decode, "loaded", lambda *_, e=error: (Decoder(e), Decoder(0.0)))
        got = decode.run(outcome.Settings(bundle=str(tmp_path)))
        assert got.status == status, error
    assert "greedy" in decode.run(outcome.Settings(bundle=str(tmp_path))).reason
