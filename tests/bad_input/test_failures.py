"""What a refused or failed run says and leaves, in this process and in one of its own; and that the check sees it."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from spoil import check, export, message_of

import jpq_export
from jpq_export.cli import main
from jpq_export.workspace import Workspace


def test_a_folder_that_cannot_be_written_is_named(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # the user root may write anywhere
    check(bench, export(), 1, ("--out out", "cannot write", "Permission denied", "writable folder"))


def test_a_cache_that_cannot_be_written_is_named(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPQ_CACHE", str(bench / "plan.json"))
    check(bench, export(), 1, ("plan.json/search", "Not a directory", "JPQ_CACHE"))


def test_a_refused_run_leaves_no_new_folder_above_its_own(bench: Path) -> None:
    check(bench, export("--size 1KB").replace("--out out", "--out new/deep/out"), 1, ("cannot be met",))


@pytest.mark.parametrize(
    ("option", "unit"),
    [
        ("--size 1KB", "MB"),
        ("--latency 1us", "ms"),
        ("--method gptq --size 1KB", "MB"),
        ("--no-prune --size 1KB", "MB"),
    ],
)
def test_the_smallest_budget_it_names_can_be_met(option: str, unit: str, bench: Path) -> None:
    said = message_of(CliRunner().invoke(main, shlex.split(export(option))))
    smallest = re.search(rf"needs (?:at least )?([0-9.]+) {unit}", said)
    assert smallest, said
    enough = f"{option.rpartition(' ')[0]} {smallest[1]}{unit} --until plan"
    done = CliRunner().invoke(main, shlex.split(export(enough)))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("command", "code"), [("verify nowhere", 1), ("export --target jetsn", 2), ("verify --fast", 2)]
)
def test_a_real_process_says_the_same(command: str, code: int, bench: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jpq_export", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(jpq_export.__file__).parents[1])},
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")


def test_twin_good_input_fails_the_check(bench: Path) -> None:
    with pytest.raises(AssertionError):
        check(bench, "verify b", 1, ())


def test_twin_what_is_left_behind_fails_the_check(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "leave", lambda _: None)
    with pytest.raises(AssertionError, match="left behind"):
        check(bench, export("--size 1KB"), 1, ("cannot be met",))
