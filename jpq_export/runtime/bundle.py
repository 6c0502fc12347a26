"""Open a bundle folder and use it: continue texts, answer messages, embed texts. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from jpq_export.errors import BundleError, UsageError
from jpq_export.format.bundle import Manifest, check_hashes, read_manifest
from jpq_export.runtime import batching
from jpq_export.runtime.chat import chat_text
from jpq_export.runtime.encoder import OrtEncoder, is_encoder
from jpq_export.runtime.sampling import Sampling
from jpq_export.runtime.session import OrtModel, open_session

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

READ = ("model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json")  # by a runtime
BATCH = 8  # prompts of a list that are continued together


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: a decoder, which generates text within `capacity` tokens, or an `encoder`, which embeds."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    decoder: OrtModel | None
    encoder: OrtEncoder | None
    capacity: int

    def with_capacity(self, capacity: int) -> Bundle:
        """The same, opened model for texts of at most `capacity` tokens; UsageError beyond what this one takes."""
        if not 1 <= capacity <= self.capacity:
            raise UsageError(f"capacity: got {capacity}, expected 1 to {self.capacity}, the model's positions")
        return replace(self, capacity=capacity)

    @property
    def model(self) -> OrtModel:
        """The decoder; UsageError when this bundle has none."""
        if self.decoder is None:
            raise UsageError(f"{self.folder}: a sentence encoder, it generates no text; use embed()")
        return self.decoder

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty when the bundle has none."""
        path = self.folder / "tokenizer_config.json"
        return _read_json(path) if path.is_file() else {}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, BOS in front when the model wants it."""
        return self._with_bos(self._ids(prompt, special=True))

    def encode_chat(self, messages: str | Sequence[Mapping[str, Any]], *, where: str | None = None) -> list[int]:
        """Token ids of the model's chat template over `messages` ({"role": ..., "content": ...}), or the user's one.

        `where`: what an error calls this bundle, by default its folder.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = chat_text(self.tokenizer_config, messages, where=where or str(self.folder))
        return self._with_bos(self._ids(text, special=False))

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = ..., **options: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str], *, stream: Literal[False] = ..., **options: Any) -> list[str]: ...

    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...

    def generate(
        self, prompt: str | list[str], *, stream: bool = False, batch_size: int = BATCH, **options: Any
    ) -> str | list[str] | Iterator[str]:
        """Continue a prompt, or every one of a list, `batch_size` of them in one pass; the new text only.

        `options`: max_new_tokens (128), temperature (0: greedy), top_k, top_p, stop (a text or several), seed,
        stop_ids; see `Sampling`. `stream`: pieces of text as they come, of one prompt.

        Raises:
            CapacityError: a prompt and its new tokens need more than `capacity`.
            UsageError: an option is out of range, or a prompt has no tokens.
        """
        if isinstance(prompt, str):
            return self._continue(self.encode(prompt), stream, options)
        if stream:
            raise UsageError("stream: one prompt at a time, got a list; call generate once a prompt")
        return self._continue_all([self.encode(text) for text in prompt], batch_size, options)

    @overload
    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, stream: Literal[False] = ..., **options: Any
    ) -> str: ...

    @overload
    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any
    ) -> str | Iterator[str]:
        """The assistant's answer to `messages`, as in `encode_chat`; options as in `generate`."""
        return self._continue(self.encode_chat(messages), stream, options)

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Embeddings float32 [len(texts), dimension], in the order given.

        Raises:
            CapacityError: a text has more tokens than the model reads.
            UsageError: this bundle is no sentence encoder, a text has no tokens, or `texts` is one string.
        """
        if isinstance(texts, str):
            raise UsageError("embed: got one string, expected a list of texts; give [text]")
        rows = [self.encode(text) for text in texts]
        self.check_rows(rows)
        return self.embed_rows(rows, batch_size=batch_size)

    def check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Whether `embed_rows` can embed these token ids; errors as in `embed`."""
        if self.encoder is None:
            raise UsageError(f"{self.folder}: a text generator, it has no embeddings; export a sentence encoder")
        self.encoder.check(rows, most=self.capacity)

    def embed_rows(self, rows: Sequence[Sequence[int]], *, batch_size: int = 32) -> np.ndarray:
        """Embeddings float32 [len(rows), dimension] of token ids that `check_rows` accepts."""
        if self.encoder is None:
            raise UsageError(f"{self.folder}: a text generator, it has no embeddings; export a sentence encoder")
        return self.encoder.embed(rows, batch_size=batch_size)

    def sequence(self, ids: list[int], **options: Any) -> batching.Sequence:
        """A prompt of token ids as a `Batcher` takes it; options as in `generate`."""
        stop = options.pop("stop", ())
        stop_ids = options.pop("stop_ids", None)
        sampling = Sampling(
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=None if stop_ids is None else tuple(stop_ids),
            **options,
        )
        return batching.Sequence(ids, sampling, tokenizer=self.tokenizer)

    def batcher(self, slots: int) -> batching.Batcher:
        """What runs sequences on this bundle, `slots` at a time."""
        return batching.Batcher(self.model, slots=slots, capacity=self.capacity)

    def _continue(self, ids: list[int], stream: bool, options: dict[str, Any]) -> str | Iterator[str]:
        batcher = self.batcher(1)
        batcher.add(self.sequence(ids, **options))  # refused now, not at the first piece
        pieces = (piece for piece in _pieces(batcher) if piece)
        return pieces if stream else "".join(pieces)

    def _continue_all(self, prompts: list[list[int]], batch_size: int, options: dict[str, Any]) -> list[str]:
        batcher = self.batcher(batch_size)
        sequences = [self.sequence(ids, **options) for ids in prompts]
        texts = dict.fromkeys(sequences, "")
        for sequence in sequences:
            batcher.add(sequence)
        while batcher.busy:
            for sequence, piece in batcher.step():
                texts[sequence] += piece
        return list(texts.values())

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except (UnicodeError, TypeError) as error:  # a lone surrogate, which JSON can hold and UTF-8 cannot
            raise UsageError(f"text: not valid Unicode ({error}); correct the text") from error

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.decoder is None:  # an encoder's tokenizer adds what its model wants
            return ids
        spec = self.decoder.spec
        wanted = spec.add_bos and spec.bos_id is not None and ids[:1] != [spec.bos_id]
        return [spec.bos_id, *ids] if wanted and spec.bos_id is not None else ids


def load(
    folder: Path | str,
    *,
    capacity: int | None = None,
    threads: int | None = None,
    exact: bool = True,
    check: bool = False,
) -> Bundle:
    """Open a bundle. `check` compares the files read here with the manifest's hashes first (0.1 s for 100 MB).

    `capacity`: most tokens of a prompt and its continuation, by default the model's positions. `exact`, `threads`: see
    `OrtModel`.

    Raises:
        BundleError: no bundle, another format version, a damaged file, or a tokenizer of another model.
        UsageError: a capacity beyond the model's positions.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if check:
        check_files(folder, manifest)
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    path = folder / "model.onnx"
    opened = open_session(path, threads=threads, exact=exact)
    decoder, encoder = None, None
    if is_encoder(opened[0]):
        encoder = OrtEncoder(path, opened[0])
        vocab, positions = encoder.vocab, encoder.max_positions
    else:
        decoder = OrtModel(path, exact=exact, opened=opened)
        vocab, positions = decoder.spec.vocab, decoder.spec.max_positions
    if vocab is not None and tokenizer.get_vocab_size() > vocab:
        raise BundleError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, the model {vocab}; "
            "it belongs to another model"
        )
    bundle = Bundle(folder, manifest, tokenizer, decoder, encoder, positions)
    return bundle if capacity is None else bundle.with_capacity(capacity)


def check_files(folder: Path, manifest: Manifest) -> None:
    """BundleError names the first file a runtime reads that is not as exported."""
    if problems := check_hashes(folder, manifest, READ):
        place = problems[0].place  # a file, or an initializer in one
        where = f"{folder / place}" if place in READ else f"{folder}: {place}"
        raise BundleError(f"{where}: {problems[0].message}; copy or export the bundle again")


def _pieces(batcher: batching.Batcher) -> Iterator[str]:
    while batcher.busy:
        yield from (piece for _, piece in batcher.step())


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BundleError(f"{path}: missing; export the bundle again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{path}: not a readable tokenizer ({error}); export the bundle again") from error
    # Some are stored cutting every text at 128 tokens and filling it up to as many (all-MiniLM-L6-v2's).
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not readable JSON ({error}); export the bundle again") from error
