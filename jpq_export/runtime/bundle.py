"""Open a bundle folder and generate text from it: tokenizer, model, manifest. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpq_export.errors import BundleError, UsageError
from jpq_export.format.bundle import Manifest, check_hashes, read_manifest
from jpq_export.runtime.generate import generate
from jpq_export.runtime.session import OrtModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what the tokenizer gives for the first bytes of a character


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    model: OrtModel

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty when the bundle has none."""
        path = self.folder / "tokenizer_config.json"
        return _read_json(path) if path.is_file() else {}

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; `chat` puts it into the model's chat template as the user's message."""
        text = self._chat_text(prompt) if chat else prompt
        ids = self.tokenizer.encode(text, add_special_tokens=not chat).ids
        spec = self.model.spec
        if spec.add_bos and spec.bos_id is not None and ids[:1] != [spec.bos_id]:
            ids = [spec.bos_id, *ids]
        return ids

    def generate_text(
        self, prompt: str, *, max_new_tokens: int = 128, chat: bool = False, **sampling: Any
    ) -> Iterator[str]:
        """Stream the continuation of `prompt`; `sampling` as in `generate` (temperature, top_k, top_p, seed, stop_ids).

        Raises:
            UsageError: the prompt is empty or too long, or `chat` is asked of a model without a chat template.
        """
        ids = self.encode(prompt, chat=chat)
        return stream_text(self.tokenizer, generate(self.model, ids, max_new_tokens=max_new_tokens, **sampling))

    def _chat_text(self, prompt: str) -> str:
        template = self.tokenizer_config.get("chat_template")
        if not isinstance(template, str):
            raise UsageError(f"{self.folder}: the model has no chat template; leave out --chat")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        special = {key: _token_text(self.tokenizer_config.get(key)) for key in ("bos_token", "eos_token")}
        try:
            messages = [{"role": "user", "content": prompt}]
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise BundleError(f"{self.folder}: the chat template fails ({error}); leave out --chat") from error


def load(folder: Path, *, threads: int | None = None, exact: bool = True, check: bool = False) -> Bundle:
    """Open a bundle. `check` compares every file with the manifest's hashes first.

    Raises:
        BundleError: no bundle, another format version, a damaged file, or a tokenizer of another model.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if check and (problems := check_hashes(folder, manifest)):
        raise BundleError(f"{folder}: {problems[0].place}: {problems[0].message}; copy or export the bundle again")
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    model = OrtModel(folder / "model.onnx", threads=threads, exact=exact)
    if tokenizer.get_vocab_size() > model.spec.vocab:
        raise BundleError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, the model {model.spec.vocab}; "
            "it belongs to another model"
        )
    return Bundle(folder, manifest, tokenizer, model)


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens as they come; a character is given once all its bytes are there."""
    seen: list[int] = []
    shown = start = 0  # text of seen[start:shown] was given; decoding from `start` keeps the spaces between words
    for token in tokens:
        seen.append(token)
        before, now = tokenizer.decode(seen[start:shown]), tokenizer.decode(seen[start:])
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            yield now[len(before) :]
            start, shown = shown, len(seen)
    rest = tokenizer.decode(seen[start:])[len(tokenizer.decode(seen[start:shown])) :]
    if rest:
        yield rest


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BundleError(f"{path}: missing; export the bundle again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{path}: not a readable tokenizer ({error}); export the bundle again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not readable JSON ({error}); export the bundle again") from error


def _token_text(token: str | dict[str, Any] | None) -> str:
    """A special token of tokenizer_config.json: a string, or a record with its content."""
    return token["content"] if isinstance(token, dict) else token or ""


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
