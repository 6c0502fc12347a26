"""Where a run writes: the partial folder it resumes from, and the checks that refuse a bad `--out` before any work."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from jpq_export.errors import StorageError, UsageError
from jpq_export.format.bundle import publish

LOCK = ".lock"
MARK = "run.json"  # holds the key of the run that a partial folder belongs to
FORMATS = {"plan.json": "jpq-plan/1", "manifest.json": "jpq-bundle/1"}  # a folder with one of these was made here


class Workspace:
    """`<out>.partial/`: stage results, valid only for one key."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self._held: int | None = None
        self._made: list[Path] = []  # folders above it that were not there, innermost first

    def open(self, key: str) -> None:
        """Keep the folder of a killed run with the same key; start afresh otherwise."""
        if self.folder.exists():
            self._lock()
            if self.key() != key:
                shutil.rmtree(self.folder)
        self._made = [parent for parent in self.folder.absolute().parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        write_atomic(self.folder / MARK, json.dumps({"key": key}))

    def _lock(self) -> None:
        """One run at a time: the lock belongs to this process and goes with it, however it ends."""
        self._unlock()
        self._held = os.open(self.folder / LOCK, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._unlock()
            raise StorageError(
                f"--out {self.out}: another run is writing {self.folder}; wait for it or choose another --out"
            ) from error

    def key(self) -> str | None:
        """Of the run that the folder belongs to."""
        try:
            return json.loads((self.folder / MARK).read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _unlock(self) -> None:
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def leave(self) -> None:
        """Remove the folder when no stage has finished in it."""
        self._unlock()
        if all(path.name in (MARK, LOCK) for path in self.folder.iterdir()):
            shutil.rmtree(self.folder)
            for parent in self._made:
                parent.rmdir()

    def discard(self) -> None:
        """Remove the folder with all that is in it: nothing there could be gone on from."""
        self._unlock()
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
        """Drop stage files that are not part of the bundle, the mark last, and give the folder its name."""
        for path in sorted(self.folder.iterdir(), key=lambda path: (path.name == MARK, path.name)):
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._unlock()
        publish(self.folder, self.out)


def write_atomic(path: Path, text: str) -> None:
    """Write beside and rename, so that a killed run never leaves half a file under the real name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse early: an existing folder, a stranger's folder, a place that cannot be written."""
    if out.exists() and not force:
        remedy = "choose another folder" + (" or pass --force to replace it" if _replaceable(out) else "")
        raise UsageError(f"--out {out}: already exists; {remedy}")
    if not _replaceable(out):
        raise UsageError(f"--out {out}: is not a bundle, so --force will not replace it; choose another folder")
    partial = Workspace(out).folder
    if Workspace(out).key() is None and not _replaceable(partial):
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
    return folder.is_dir() and (not any(folder.iterdir()) or any(_made_here(folder / name) for name in FORMATS))


def _made_here(path: Path) -> bool:
    """Many programs write a manifest.json; ours says its format."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"] == FORMATS[path.name]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _existing_parent(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())
