"""Whole exports of a tiny model: killed and resumed, out of disk, repeated, stopped early, damaged afterwards."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A process that has everything imported and forks one child a command: a run takes one second instead of six.
# A fault "module:function:call:what" makes that call of a function end the process as kill -9 does, or raise `what`.
SERVER = """
import errno, gc, importlib, json, os, resource, signal, sys
import jpq_export.cli, jpq_export.evaluation, jpq_export.pipeline, jpq_export.prove
from jpq_export.compress import effort, finals, load, prepare, stages, training
from jpq_export.lower import export
from jpq_export.parity import check, report, verify
import transformers.models.llama.modeling_llama

two = ("two_bit", (float("inf"),)), ("removal", (float("inf"),))
both = {"finalists": 2, "finalists_by_bits": True, "finalists_within": float("inf")}
effort.EFFORTS["quick"] = effort.Effort("quick", 4, 2, 64, 1, 6, 2, two, **both)
training.CHECKPOINT_SECONDS = -1  # a file after every step of recovery
RAISED = {
    "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file"),
    "memory": MemoryError(),
    "torch memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "interrupt": KeyboardInterrupt(),
}

def inject(fault):
    module, name, call, what = fault.split(":")
    *path, name = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, left = getattr(owner, name), [int(call)]
    def faulty(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RAISED[what]
        return original(*args, **options)
    setattr(owner, name, faulty)

gc.collect(), gc.freeze()  # children need not look through the libraries at the end of every stage
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(job["folder"])
        os.environ["JPQ_CACHE"] = job["cache"]
        if job["fault"]:
            inject(job["fault"])
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        jpq_export.cli.main(job["command"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TIMED = ("manifest.json", "parity.html")  # they hold seconds and peak memory
KILLED = -9
# Where a run is stopped, in the order it gets there, and the stage the next run must not do again.
POINTS = (
    ("jpq_export.compress.load:read_weights:1", ""),
    ("jpq_export.compress.prepare:measure_prices:1", ""),
    ("jpq_export.compress.prices:PriceList.save:1", ""),
    ("jpq_export.compress.refine:refine:1", ""),
    ("jpq_export.compress.stages:round_model:1", "price list"),
    ("jpq_export.compress.stages:_heldout_error:1", "search"),
    ("jpq_export.compress.stages:round_model:2", "search"),
    ("jpq_export.compress.finals:champion:1", "search"),
    ("jpq_export.compress.training:Checkpoint.save:1", "search"),
    ("jpq_export.compress.tune:distil_step:2", "pruning and rounding"),
    ("jpq_export.format.compressed:save_tensors:1", "search"),
    ("jpq_export.compress.stages:recover:1", "search"),
    ("jpq_export.compress.stages:_heldout_error:1", "pruning and rounding"),
    ("jpq_export.lower.export:export_onnx:1", "pruning and rounding"),
    ("jpq_export.lower.export:check_graph:1", "end-to-end recovery"),
    ("jpq_export.lower.export:export_onnx:2", "end-to-end recovery"),
    ("jpq_export.parity.check:check_parity:1", "end-to-end recovery"),
    ("jpq_export.parity.vectors:record_vectors:1", "ONNX graphs"),
    ("jpq_export.prove:_quality:1", "ONNX graphs"),
    ("jpq_export.parity.report:write_report:1", "ONNX graphs"),
    ("jpq_export.workspace:Workspace.finish:1", "ONNX graphs"),
    ("jpq_export.workspace:publish:1", ""),
)


@dataclass(frozen=True)
class Done:
    code: int
    text: str

    @property
    def error(self) -> str:
        """The one line of a failed command; finished stages and what they note may stand before it."""
        lines = [line for line in self.text.splitlines() if not line.startswith(("✓", "  "))]
        assert len(lines) == 1, self.text
        assert lines[0].startswith("Error: ")
        return lines[0]


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[..., Path]) -> Path:
    """The working folder of all runs, with the model m."""
    folder = tmp_path_factory.mktemp("faults")
    save_tiny(folder / "m", "llama")
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Iterator[Run]:
    """`run(command, fault="", cache="cache", largest_file=None)` in the folder `place`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin
        assert server.stdout

        def send(command: str, fault: str = "", *, cache: str = "cache", largest_file: int | None = None) -> Done:
            job = {"command": shlex.split(command), "fault": fault, "largest_file": largest_file}
            job |= {"folder": str(place), "log": str(place / "log"), "cache": str(place / cache)}
            print(json.dumps(job), file=server.stdin, flush=True)
            return Done(int(server.stdout.readline()), (place / "log").read_text(encoding="utf-8"))

        yield send
        server.stdin.close()


def export(out: str, rest: str = "--bits 3") -> str:
    return f"export m --target jetson --effort quick --context 64 --out {out} {rest}"


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def lasting(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its seconds and without the page that shows them."""
    files = {name: entry for name, entry in manifest["files"].items() if name not in TIMED}
    return manifest | {"stages": None, "files": files}


@pytest.fixture(scope="module")
def whole(place: Path, run: Run) -> Path:
    """A bundle made without trouble."""
    done = run(export("whole"))
    assert done.code == 0, done.text
    return place / "whole"


def test_two_finalists_are_weighed(whole: Path) -> None:
    finals = json.loads((whole / "plan.json").read_text(encoding="utf-8"))["search"]["finals"]
    assert len(finals) == 2
    assert sum(final["chosen"] for final in finals) == 1
    assert "The finalists" in (whole / "parity.html").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_bytes_without_the_cache(whole: Path, place: Path, run: Run) -> None:
    assert run(export("again"), cache="cache.again").code == 0
    assert files_of(place / "again") == files_of(whole)
    assert lasting(manifest_of(place / "again")) == lasting(manifest_of(whole))


def test_twin_another_seed_gives_other_bytes(whole: Path, place: Path, run: Run) -> None:
    assert run(export("seeded", "--bits 3 --seed 1 --until compress"), cache="cache.seed").code == 0
    assert run(export("unseeded", "--bits 3 --until compress")).code == 0
    name = "compressed.safetensors"
    assert (place / "seeded" / name).read_bytes() != (place / "unseeded" / name).read_bytes()


@pytest.mark.parametrize("what", ["kill", "full"])
def test_stopped_at_every_stage_it_goes_on_and_ends_with_the_same_bytes(
    what: str, whole: Path, place: Path, run: Run
) -> None:
    # Every stage for the kill; the full disk takes the same way out at each, so every fourth will do.
    for point, found in POINTS if what == "kill" else POINTS[::4]:
        done = run(export(what), f"{point}:{what}", cache=f"cache.{what}")
        assert done.code == (KILLED if what == "kill" else 1), (point, done.text)
        if what == "full":
            assert "No space left on device" in done.error
        elif found:
            assert f"{found} (found finished, resumed)" in done.text, (point, done.text)
        assert not (place / what).exists(), point
    assert run(export(what), cache=f"cache.{what}").code == 0
    assert files_of(place / what) == files_of(whole)
    assert lasting(manifest_of(place / what)) == lasting(manifest_of(whole))
    assert not [path for path in place.rglob("*") if path.name.startswith(f"{what}.") or ".partial" in path.name]


def test_killed_while_it_replaces_a_bundle_the_next_run_replaces_it(whole: Path, place: Path, run: Run) -> None:
    shutil.copytree(whole, place / "old")
    command = export("old", "--bits 5 --force")
    assert run(command, "pathlib:Path.rename:2:kill").code == KILLED
    assert not (place / "old").exists()
    assert (place / ".old.old/manifest.json").is_file()
    assert run(command).code == 0
    assert manifest_of(place / "old")["budget"]["value"] == 5
    assert not (place / ".old.old").exists()


@pytest.mark.parametrize(("cache", "most"), [("cache.limited", 3_000), ("cache", 45_000), ("cache", 150_000)])
def test_a_file_that_cannot_grow_is_one_line(cache: str, most: int, whole: Path, place: Path, run: Run) -> None:
    done = run(export("limited"), cache=cache, largest_file=most)
    assert done.code == 1
    assert "too large" in done.error
    assert "free" in done.error
    assert not (place / "limited").exists()


@pytest.mark.parametrize("what", ["memory", "torch memory"])
def test_out_of_memory_is_one_line(what: str, run: Run) -> None:
    done = run(export("tight"), f"jpq_export.compress.stages:recover:1:{what}")
    assert done.code == 1
    assert "out of memory; use a smaller model" in done.error


def test_interrupted_it_says_so_without_a_traceback(run: Run) -> None:
    done = run(export("interrupted"), "jpq_export.compress.stages:recover:1:interrupt")
    assert done.code == 130
    assert "goes on after the last finished stage" in done.text
    assert "Traceback" not in done.text


def test_a_damaged_cache_is_made_again(whole: Path, place: Path, run: Run) -> None:
    shutil.copytree(place / "cache", place / "cache.damaged")
    for path in (place / "cache.damaged").rglob("rounded.safetensors"):
        path.write_bytes(path.read_bytes()[:99])
    done = run(export("mended"), cache="cache.damaged")
    assert done.code == 0
    assert "damaged" in done.text
    assert files_of(place / "mended") == files_of(whole)


@pytest.mark.parametrize(
    ("until", "names"),
    [
        ("plan", {"plan.json"}),
        ("compress", {"plan.json", "compressed.safetensors"}),
        (
            "onnx",
            {"plan.json", "compressed.safetensors", "tokenizer.json", "tokenizer_config.json"}
            | {"model.onnx", "model.onnx.data", "model.trt.onnx"},
        ),
    ],
)
def test_until_leaves_what_it_says(until: str, names: set[str], whole: Path, place: Path, run: Run) -> None:
    assert run(export(f"until-{until}", f"--bits 3 --until {until}")).code == 0
    left = files_of(place / f"until-{until}")
    assert set(left) == names
    same = files_of(whole)
    if until == "plan":  # the final, which needs rounded models and may choose the other finalist, is not run
        first, final = (json.loads(files["plan.json"])["search"] for files in (left, same))
        assert first["trials"] == final["trials"]
        assert first["knobs"] == min(first["trials"], key=lambda trial: trial["score"])["knobs"]
        return
    assert all(left[name] == same[name] for name in names & same.keys())


def test_plan_command_finds_what_an_export_starts_from(whole: Path, place: Path, run: Run) -> None:
    done = run(export("planned").replace("export", "plan", 1))
    assert done.code == 0
    assert "price list (found finished, resumed)" in done.text
    first, final = (json.loads((path / "plan.json").read_text(encoding="utf-8")) for path in (place / "planned", whole))
    assert first["search"]["trials"] == final["search"]["trials"]
    best = min(first["search"]["trials"], key=lambda t: t["score"])
    assert first["search"]["measured_kl_before_recovery"] == best["kl"]


def test_the_plan_of_a_bundle_gives_the_same_bundle(whole: Path, run: Run, place: Path) -> None:
    done = run(export("reused", "--plan whole/plan.json"))
    assert done.code == 0
    assert "searching" not in done.text
    assert files_of(place / "reused") == files_of(whole)


@pytest.mark.parametrize("option", ["--method gptq", "--method rtn", "--no-prune", "--latency 0.2ms"])
def test_every_kind_of_search_reaches_its_report(option: str, place: Path, run: Run) -> None:
    out = place / f"kind{option.replace(' ', '')}"
    assert run(export(out.name, option)).code == 0
    assert ("Bytes or time" in (out / "parity.html").read_text(encoding="utf-8")) == ("latency" in option)


def test_two_runs_do_not_share_a_folder(place: Path, run: Run) -> None:
    import fcntl

    assert run(export("shared"), "jpq_export.compress.stages:recover:1:kill").code == KILLED
    with (place / "shared.partial/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(export("shared"))
        assert done.code == 1
        assert "another run is writing shared.partial" in done.error
    assert run(export("shared")).code == 0


@pytest.mark.parametrize(
    ("budget", "most"), [("--bits 3", 3 * 102_720 / 8), ("--size 33KB", 33e3), ("--ratio 0.15", 0.15 * 205_440)]
)
def test_stored_bytes_stay_within_the_budget(budget: str, most: float, place: Path, run: Run) -> None:
    out = place / f"within{budget.replace(' ', '')}"
    assert run(export(out.name, budget)).code == 0
    manifest = manifest_of(out)
    assert (manifest["model"]["parameters"], manifest["original_bytes"]) == (102_720, 205_440)
    assert 0.8 * most < manifest["weight_bytes"] <= most


def test_the_predicted_latency_stays_within_the_budget(place: Path, run: Run) -> None:
    assert run(export("quick", "--latency 0.2ms --until plan")).code == 0
    plan = json.loads((place / "quick/plan.json").read_text(encoding="utf-8"))
    assert 0 < plan["predicted"]["latency_ms"] <= 0.2


def test_verify_accepts_the_bundle_and_names_the_byte_that_flipped(whole: Path, place: Path, run: Run) -> None:
    assert run("verify whole").code == 0
    shutil.copytree(whole, place / "flipped")
    path = place / "flipped/model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    done = run("verify flipped")
    assert done.code == 1
    place_, _, said = done.text.partition(": ")
    assert place_.split(".")[-1] in ("packed", "scales", "zeros")
    assert "model.onnx.data" in said
    assert "Error: flipped: " in done.text


def test_report_writes_the_page_again_and_the_bundle_stays_verified(whole: Path, place: Path, run: Run) -> None:
    shutil.copytree(whole, place / "reported")
    (place / "reported/parity.html").write_text("lost", encoding="utf-8")
    assert run("verify reported").code == 1
    assert run("report reported").code == 0
    assert (place / "reported/parity.html").read_bytes() == (whole / "parity.html").read_bytes()
    assert run("verify reported").code == 0


@pytest.mark.parametrize(("name", "options"), [("run", ["the cat", "--max-new-tokens", "8"]), ("verify", [])])
def test_bundles_run_and_verify_without_torch(name: str, options: list[str], whole: Path) -> None:
    command = [name, str(whole), *options]
    code = "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"  # importing them now fails
    code += f"from jpq_export.cli import main\nmain({command!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
