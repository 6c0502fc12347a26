"""Who made a measurement: the commit of our own checkout, never that of a checkout around an installed package."""

import subprocess
from pathlib import Path

import pytest

from jpq_export import __version__, revision


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *name, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_a_checkout_that_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "revision.py").write_text("")
    monkeypatch.setattr(revision, "ROOT", package)
    assert revision.commit() == __version__  # no checkout
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "somebody else's")
    assert revision.commit() == __version__  # installed inside one
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "ours")
    assert revision.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    (package / "revision.py").write_text("changed")
    assert revision.commit().endswith("+")
