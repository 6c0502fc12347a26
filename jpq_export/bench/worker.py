"""One measured runtime in a process of its own, so that its memory is its own: JSON jobs in, JSON answers out.

python -m jpq_export.bench.worker model.onnx --threads 1 [--exact]
{"prefill": 128}  ->  {"seconds": 0.28}
{"decode": 16}    ->  {"seconds": [0.010, ...]}      one number a token, after a prompt of 8
{"memory": true}  ->  {"peak_rss_bytes": 133000000, "runs": "onnxruntime CPU, jpq kernels ...",
                       "cache_bytes_per_token": 46080}

A sentence encoder reads rows of token ids from a JSON file:
{"embed": ["rows.json", 32]}           ->  {"seconds": [0.04, ...]}      one number a batch of 32
{"vectors": ["rows.json", "out.npy"]}  ->  {}                            embeddings float32 [rows, dimension]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.progress import peak_memory_bytes
from jpq_export.runtime.encoder import OrtEncoder, is_encoder
from jpq_export.runtime.native import Library
from jpq_export.runtime.session import OrtModel, open_session

PROMPT = 8


def prefill(model: OrtModel, tokens: int) -> float:
    """Seconds to the first logits after a prompt of `tokens`."""
    ids = np.random.default_rng(0).integers(0, model.spec.vocab, tokens)
    start = time.perf_counter()
    model.start().step(ids.tolist())
    return time.perf_counter() - start


def decode(model: OrtModel, tokens: int) -> list[float]:
    """Seconds of each of `tokens` greedy steps."""
    decoding, seconds = model.start(), []
    logits = decoding.step(range(min(PROMPT, model.spec.vocab)))
    for _ in range(tokens):
        token = int(logits.argmax())
        start = time.perf_counter()
        logits = decoding.step([token])
        seconds.append(time.perf_counter() - start)
    return seconds


def embed(model: OrtEncoder, rows: list[list[int]], batch: int) -> list[float]:
    """Seconds of each batch of texts, equal lengths together."""
    rows, seconds = sorted(rows, key=len), []
    for at in range(0, len(rows), batch):
        start = time.perf_counter()
        model.embed(rows[at : at + batch], batch_size=batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def decoder_jobs(model: OrtModel) -> dict[str, Callable[[Any], Any]]:
    """What is asked of a decoder."""
    return {
        "prefill": lambda tokens: {"seconds": prefill(model, tokens)},
        "decode": lambda tokens: {"seconds": decode(model, tokens)},
        "memory": lambda _: {
            "peak_rss_bytes": peak_memory_bytes(),
            "runs": model.path,
            "cache_bytes_per_token": model.cache_bytes_per_token,
        },
    }


def encoder_jobs(model: OrtEncoder, runs: str) -> dict[str, Callable[[Any], Any]]:
    """What is asked of a sentence encoder; `runs`: what computes its products."""

    def rows(path: str) -> list[list[int]]:
        return json.loads(Path(path).read_text(encoding="utf-8"))

    def vectors(paths: list[str]) -> dict[str, Any]:
        np.save(paths[1], model.embed(rows(paths[0])))
        return {}

    return {
        "embed": lambda job: {"seconds": embed(model, rows(job[0]), job[1])},
        "vectors": vectors,
        "memory": lambda _: {"peak_rss_bytes": peak_memory_bytes(), "runs": runs},
    }


def main() -> None:
    """Load, then answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    opened = open_session(options.model, threads=options.threads, exact=options.exact, device="cpu")
    if is_encoder(opened[0]):
        ours = isinstance(opened[1], Library)
        runs = f"onnxruntime CPU{', jpq kernels' * ours}, activations in {'fp32' if options.exact else 'fewer bits'}"
        jobs = encoder_jobs(OrtEncoder(options.model, opened[0]), runs)
    else:
        jobs = decoder_jobs(OrtModel(options.model, exact=options.exact, opened=opened))
    for line in sys.stdin:
        [(name, argument)] = json.loads(line).items()
        sys.stdout.write(json.dumps(jobs[name](argument)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
