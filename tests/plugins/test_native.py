"""Compiling and finding the library: what a user without a compiler reads, and a file somebody changed."""

import json
import shutil

import pytest

from jpq_export.runtime import native
from jpq_export.runtime.native import NativeError, cpu_library


@pytest.fixture
def cache(library, tmp_path, monkeypatch):
    """A copy of the cache with the compiled library in it."""
    shutil.copytree(library.path.parents[2], tmp_path / "cache")
    monkeypatch.setenv("JPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_builds(monkeypatch):
    def refuse(*_args):
        raise AssertionError("built again")

    monkeypatch.setattr(native, "_compile", refuse)


def test_a_built_library_is_found_again(cache, library, no_builds):
    found = cpu_library()
    assert found.path == cache / "native" / library.path.parent.name / library.path.name
    assert found.implementations[-1] == "scalar"


def test_a_changed_library_is_built_again_not_loaded(cache, monkeypatch, caplog):
    path = cpu_library().path
    good = path.read_bytes()
    path.unlink()  # the loaded file stays mapped: writing into it would change this process
    path.write_bytes(good + b"x")
    monkeypatch.setattr(native, "_compile", lambda _folder, _compiler, out: out.write_bytes(good))
    assert cpu_library().path.read_bytes() == good
    assert "sha256 differs" in caplog.text


def test_a_record_for_another_file_does_not_count(cache, monkeypatch):
    record = cpu_library().path.with_name(native.RECORD)
    record.write_text(json.dumps({"sha256": "0" * 64}))
    built = []
    good = record.with_name(native.LIBRARY).read_bytes()
    monkeypatch.setattr(native, "_compile", lambda _folder, _compiler, out: built.append(out.write_bytes(good)))
    cpu_library()
    assert len(built) == 1


def test_another_source_is_another_library(library, tmp_path, monkeypatch):
    folder = tmp_path / "plugins"
    shutil.copytree(native.sources_folder(), folder)
    compiler = native._compiler()
    before = native._key(folder, compiler)
    assert before == library.path.parent.name
    with (folder / "core" / "wide.inc").open("a") as file:
        file.write("\n")
    assert native._key(folder, compiler) != before


def test_without_a_compiler_one_line_says_so(cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NativeError, match=r"no C compiler.*no-such-compiler.*install gcc or clang") as caught:
        cpu_library()
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    folder = tmp_path / "plugins"
    shutil.copytree(native.sources_folder(), folder)
    (folder / "core" / "dispatch.c").write_text("int broken(")
    monkeypatch.setenv("JPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "sources_folder", lambda: folder)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-fsyntax-only"))
    with pytest.raises(NativeError, match=r"fails \(.*dispatch.c.*error") as caught:
        cpu_library()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob(native.LIBRARY))


def test_a_cache_that_cannot_be_written(library, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("JPQ_CACHE", str(file))
    with pytest.raises(NativeError, match=r"cannot store the compiled kernels.*JPQ_CACHE"):
        cpu_library()
