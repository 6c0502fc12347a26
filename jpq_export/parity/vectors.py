"""vectors.safetensors: recorded inputs and what the PyTorch model computed, so that a device can check without torch.

    ids.prefill int64 [1, seq]      ids.padded, mask.padded int64 [3, seq]
    greedy      int64 [steps]       margin, rounding float32 [steps]   how near each choice was to a tie
    logits.last     float32 [1, <= LAST_WIDTH]              last position of the prefill, nearly in full
    logits.prefill  float32 [seq, <= WIDTH]                 all others folded by `compare.sketch`
    logits.padded   float32 [real positions, <= WIDTH]
    logits.decode   float32 [steps, <= WIDTH]
    point.{name}    float32 [POSITIONS, <= WIDTH]           every point at a few positions of the prefill
    written.{case}.{i}.{key,value}           int8 [batch, kv_heads, tokens, head_dim]      only with an int8 cache: what
    written.{case}.{i}.{key,value}_scale     float32 [batch, kv_heads, tokens, 1]          was stored, by case

Two megabytes for a 30-layer model, whatever its width; an int8 cache adds what 170 tokens take in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from jpq_export.errors import BundleError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import Spec
from jpq_export.format.spec import ModelSpec
from jpq_export.format.tensor_file import save_tensors
from jpq_export.parity import tolerance
from jpq_export.parity.cases import Cases, make_cases
from jpq_export.parity.compare import margin, sketch
from jpq_export.parity.runners import Outcome, TorchRunner

FORMAT = "jpq-vectors/1"
WIDTH = 256
LAST_WIDTH = 65536
POSITIONS = 4
WRITTEN = "written."


class Runner(Protocol):
    """One side of a parity check."""

    @property
    def version(self) -> str:
        """Of the program that computes."""
        ...

    @property
    def spec(self) -> Spec:
        """Of the model it computes."""
        ...

    def forward(
        self,
        ids: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        cache: Any = None,
        values: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> Outcome:
        """One pass; see `TorchRunner.forward`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """What the file holds; `reference` names the program that computed it."""

    reference: str
    tensors: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write the file."""
        save_tensors(path, self.tensors, meta={"format": FORMAT, "reference": self.reference})

    @staticmethod
    def load(path: Path) -> Vectors:
        """Read it back; BundleError when it is missing or damaged."""
        try:
            with safe_open(path, framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["jpq"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            if meta["format"] != FORMAT:
                raise ValueError(f"expected {FORMAT}, got {meta['format']}")
            return Vectors(meta["reference"], tensors)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise BundleError(f"{path}: not readable recorded vectors ({error}); export the bundle again") from error


def record_vectors(
    model: CompressedModel,
    path: Path,
    *,
    prompts: Sequence[Sequence[int]],
    steps: int = 64,
    runner: Runner | None = None,
) -> None:
    """Run the PyTorch model, or another `runner` of it, on cases cut from `prompts` and write what it computed."""
    assert isinstance(model.spec, ModelSpec)  # encoders: `parity.encoder`
    runner = runner or TorchRunner(model)
    cases = make_cases(prompts, model.spec)
    Vectors(f"pytorch {runner.version}", compute(runner, cases, steps=cases.steps_within(model.spec, steps))).save(path)


def compute(
    runner: Runner,
    cases: Cases,
    *,
    steps: int,
    forced: np.ndarray | None = None,
    recorded: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """All tensors of the file, from either runner; `forced` tokens are fed instead of the runner's own choices.

    `recorded`: such a file's tensors; what it stored in an int8 cache is read instead of what the runner stores, for
    codes that differ in the last step would spread (see `int8_cache`).
    """
    writes = _Writes(recorded)
    prefill = writes.forward("prefill", runner, cases.prefill, values=True)
    at = np.unique(np.linspace(1, cases.prefill.shape[1] - 1, POSITIONS).astype(int))
    out = {f"point.{name}": sketch(value[0, at], WIDTH) for name, value in prefill.values.items() if name != "logits"}
    out |= {"ids.prefill": cases.prefill, "ids.padded": cases.padded, "mask.padded": cases.mask}
    out["logits.last"] = sketch(prefill.logits[0, -1:], LAST_WIDTH)
    out["logits.prefill"] = sketch(prefill.logits[0], WIDTH)
    out["logits.padded"] = _padded(runner, cases, writes)
    out |= _decode(runner, prefill.logits[0, -1], prefill.cache, writes, steps=steps, forced=forced)
    return out | writes.tensors()


class _Writes:
    """What the passes of each case store in an int8 cache; nothing with a float one."""

    def __init__(self, recorded: Mapping[str, np.ndarray] | None) -> None:
        self._recorded = {name: value for name, value in (recorded or {}).items() if name.startswith(WRITTEN)}
        self._parts: dict[str, list[np.ndarray]] = {}
        self._fed: dict[str, int] = {}

    def forward(self, case: str, runner: Runner, ids: np.ndarray, **options: Any) -> Outcome:
        """The runner's next pass of a case."""
        stem, start = f"{WRITTEN}{case}.", self._fed.get(case, 0)
        end = self._fed[case] = start + ids.shape[1]
        mine = {name: value[:, :, start:end] for name, value in self._recorded.items() if name.startswith(stem)}
        given = {name.removeprefix(stem): value for name, value in mine.items()}
        outcome = runner.forward(ids, given=given or None, **options)
        for name, value in outcome.written.items():
            self._parts.setdefault(stem + name, []).append(value)
        return outcome

    def tensors(self) -> dict[str, np.ndarray]:
        """All of it, as recorded."""
        return {name: np.concatenate(parts, 2) for name, parts in self._parts.items()}


def _padded(runner: Runner, cases: Cases, writes: _Writes) -> np.ndarray:
    """Folded logits of the real positions of the padded batch, prefill and single steps."""
    cache, start, rows = None, 0, []
    for end in range(cases.padded_prefill, cases.padded.shape[1] + 1):
        mask = cases.mask[:, :end]
        outcome = writes.forward("padded", runner, cases.padded[:, start:end], mask=mask, cache=cache)
        rows.append(sketch(outcome.logits[mask[:, start:].astype(bool)], WIDTH))
        cache, start = outcome.cache, end
    return np.concatenate(rows)


def _decode(
    runner: Runner, logits: np.ndarray, cache: object, writes: _Writes, *, steps: int, forced: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Greedy decoding after the prefill: tokens, folded logits of each step, and how near each choice was to a tie."""
    tokens, rows, margins, roundings = [], [], [], []
    for step in range(steps):
        tokens.append(int(logits.argmax()))
        rows.append(sketch(logits[None], WIDTH))
        margins.append(margin(logits))
        size = float(np.sqrt(np.mean(logits.astype(np.float64) ** 2)))
        roundings.append(tolerance.greedy_tie(size, runner.spec))
        if step + 1 < steps:
            token = tokens[-1] if forced is None else int(forced[step])
            outcome = writes.forward("decode", runner, np.array([[token]], np.int64), cache=cache)
            logits, cache = outcome.logits[0, -1], outcome.cache
    return {
        "greedy": np.array(tokens, np.int64),
        "logits.decode": np.concatenate(rows),
        "margin": np.array(margins, np.float32),
        "rounding": np.array(roundings, np.float32),
    }
