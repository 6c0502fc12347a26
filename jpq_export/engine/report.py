"""device.json and device.html: what was built on which board, its parity with recorded vectors, tokens per second."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jpq_export.engine.preflight import Check
from jpq_export.engine.vectors import DeviceParity, Session

FORMAT = "jpq-device/1"
ROUNDS = 5  # the median of them is reported
DECODE_TOKENS = 32
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}"
    "td,th{padding:.25rem .75rem;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}"
    ".bad{color:#b00020;font-weight:600}.good{color:#1b6e2d}"
)


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians on this board, logits copied back to the host included, as an app that samples there pays them."""

    prefill_tokens: int
    prefill_tokens_per_s: float
    decode_tokens: int
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """Everything of one build. `versions`: of this package, Python, TensorRT, CUDA."""

    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    checks: tuple[Check, ...]
    plugin: Mapping[str, Any]
    engine: Mapping[str, Any]
    seconds: Mapping[str, float]
    parity: DeviceParity
    speed: Speed

    @property
    def passed(self) -> bool:
        """Whether the engine computes what was recorded."""
        return self.parity.passed

    def to_json(self) -> str:
        """The text of device.json."""
        raw = {"format": FORMAT, "passed": self.passed, **asdict(self)}
        return json.dumps(_without_infinities(raw), indent=1, allow_nan=False) + "\n"


def _without_infinities(value: Any) -> Any:
    """The same with None for what JSON cannot say: an error that is infinite or no number."""
    if isinstance(value, Mapping):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def measure_speed(session: Session, prompt: np.ndarray) -> Speed:
    """Time `prompt` int64 [seq], then DECODE_TOKENS greedy steps, ROUNDS times after one that is not counted."""
    prefill, decode = [], []
    for turn in range(ROUNDS + 1):
        session.reset()
        start = time.perf_counter()
        logits = session.step(prompt)
        middle = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            logits = session.step(np.array([int(logits.argmax())], np.int64))
        if turn:
            prefill.append(middle - start)
            decode.append(time.perf_counter() - middle)
    return Speed(len(prompt), len(prompt) / median(prefill), DECODE_TOKENS, DECODE_TOKENS / median(decode))


def write_report(report: DeviceReport, folder: Path) -> tuple[Path, Path]:
    """Write device.json and device.html; returns both paths."""
    paths = folder / "device.json", folder / "device.html"
    for path, text in zip(paths, (report.to_json(), page(report)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def page(report: DeviceReport) -> str:
    """One self-contained HTML page."""
    verdict = "parity holds" if report.passed else "parity fails: do not use this engine"
    mark = "good" if report.passed else "bad"
    title = f"Engine on {report.device['board']}"
    parts = [
        f"<h1>{escape(title)}</h1><p class={mark}>{verdict}</p>",
        _speed(report.speed),
        "<h2>Recorded vectors</h2>" + _parity(report.parity),
        "<h2>Engine</h2>" + _pairs({**report.engine, **{f"{k} seconds": v for k, v in report.seconds.items()}}),
        "<h2>Plugin</h2>" + _pairs(report.plugin),
        "<h2>Board and versions</h2>" + _pairs({**report.device, **report.versions}),
        "<h2>Checks</h2>" + _table(("check", "got", "needed"), [(c.name, c.got, c.needed) for c in report.checks]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _speed(speed: Speed) -> str:
    return (
        f"<p>Decode {speed.decode_tokens_per_s:.1f} tokens/s, prefill of {speed.prefill_tokens} tokens "
        f"{speed.prefill_tokens_per_s:.0f} tokens/s (medians of {ROUNDS}, batch 1).</p>"
    )


def _parity(parity: DeviceParity) -> str:
    rows = [
        (r.name, f"{r.rel_rms:.1e} of {r.rel_rms_bound:.1e}", f"{r.peak:.1e} of {r.peak_bound:.1e}", _word(r.passed))
        for r in parity.rows
    ]
    note = " (the first other one is a tie within rounding)" if parity.tie else ""
    table = _table(("recorded", "relative RMS of its bound", "largest value of its bound", ""), rows)
    greedy = f"Greedy tokens equal: {parity.equal} of {parity.steps}{note}. Reference: {escape(parity.reference)}."
    return f"{table}<p>{greedy} Values inside layers are not compared: the engine has no outputs for them.</p>"


def _word(passed: bool) -> str:
    return "within" if passed else "BEYOND"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table((), [(key.replace("_", " "), value) for key, value in values.items() if value is not None])


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in head) + "</tr>" if head else ""
    cells = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows)
    return f"<table>{top}{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
