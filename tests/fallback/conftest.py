"""Bundles of three families that only torch.onnx.export takes, made once by the command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.compress import effort

FAMILIES = ("gpt_neox", "opt", "stablelm")
SHORT = effort.Effort("quick", 4, 2, 32, 1, 4, 2, (("removal", (1.0,)),))


class Made(NamedTuple):
    """A model's folder, its bundle's, and what the command said."""

    model: Path
    bundle: Path
    said: str


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the commands run."""
    folder = tmp_path_factory.mktemp("fallback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPQ_CACHE", str(folder / "cache"))
        patch.setitem(effort.EFFORTS, "quick", SHORT)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="session")
def run(shelf: Path) -> Callable[..., str]:
    """A command line's output on one line; its exit code must be the expected one."""

    def invoke(command: str, expected: int = 0) -> str:
        done = CliRunner().invoke(main, shlex.split(command), catch_exceptions=False)
        assert done.exit_code == expected, done.output
        return " ".join(done.output.split())

    return invoke


@pytest.fixture(scope="session")
def made(shelf: Path, save_tiny: Callable[..., Path], run: Callable[..., str]) -> Callable[[str], Made]:
    """The bundle of a family, made when it is first asked for."""
    done: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in done:
            model, bundle = save_tiny(shelf / family, family), shelf / f"{family}-bundle"
            said = run(f"export {model} --effort quick --context 64 --target cpu --bits 5 --out {bundle}")
            done[family] = Made(model, bundle, said)
        return done[family]

    return make
