"""Where a run writes: the partial folder it resumes from, and the checks that refuse a bad `--out` before any work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from jpq_export.errors import StorageError, UsageError
from jpq_export.format.bundle import publish

MARK = "run.json"  # holds the key of the run that a partial folder belongs to
OURS = (MARK, "plan.json", "manifest.json")  # a folder with one of these was made here


class Workspace:
    """`<out>.partial/`: stage results, valid only for one key."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self._made: list[Path] = []  # folders above it that were not there, innermost first

    def open(self, key: str) -> None:
        """Keep the folder of a killed run with the same key; start afresh otherwise."""
        if self.folder.exists() and self._key() != key:
            shutil.rmtree(self.folder)
        self._made = [parent for parent in self.folder.absolute().parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / MARK, json.dumps({"key": key}))

    def _key(self) -> str | None:
        try:
            return json.loads((self.folder / MARK).read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def leave(self) -> None:
        """Remove the folder when no stage has finished in it."""
        if all(path.name == MARK for path in self.folder.iterdir()):
            shutil.rmtree(self.folder)
            for parent in self._made:
                parent.rmdir()

    def path(self, name: str) -> Path:
        """A stage's file."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """True when that stage finished."""
        return self.path(name).exists()

    def finish(self, *, keep: set[str]) -> None:
        """Drop stage files that are not part of the bundle and give the folder its name."""
        for path in sorted(self.folder.iterdir()):
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        publish(self.folder, self.out)


def write_atomic(path: Path, text: str) -> None:
    """Write beside and rename, so that a killed run never leaves half a file under the real name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse early: an existing folder, a stranger's folder, a place that cannot be written."""
    if out.exists() and not force:
        raise UsageError(f"--out {out}: already exists; choose another folder or pass --force to replace it")
    if not _replaceable(out):
        raise UsageError(f"--out {out}: is not a bundle, so --force will not replace it; choose another folder")
    partial = Workspace(out).folder
    if not _replaceable(partial):
        raise UsageError(f"--out {out}: {partial} is in the way and no unfinished export; move it away")
    parent = _existing_parent(out)
    try:
        probe = parent / f".jpq-write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot write to {parent} ({error.strerror}); choose a writable folder"
        ) from error


def check_disk(out: Path, parameters: int) -> None:
    """The run needs about 4 bytes a parameter for stage files and the bundle."""
    needed = 4 * parameters + 50_000_000
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise StorageError(
            f"--out {out}: {free / 1e9:.1f} GB free, the run needs about {needed / 1e9:.1f} GB; free some space"
        )


def _replaceable(folder: Path) -> bool:
    """Not there, empty, or made here: everything else is somebody's."""
    if not folder.exists():
        return True
    return folder.is_dir() and (not any(folder.iterdir()) or any((folder / name).is_file() for name in OURS))


def _existing_parent(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())
