"""What rounding activations costs a bundle: KL to its own fp32, for 16 and 8 bits, eight tokens a pass.

python tools/fast_bits.py BUNDLE TEXT [--tokens 2048]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jpq_export.runtime.session import OrtModel

STEP = 8  # few enough rows for all kernels that round


def log_probabilities(graph: Path, ids: list[int], bits: str | None) -> np.ndarray:
    """[tokens, vocab] of the kernels in fp32 (None), or with activations in `bits`."""
    os.environ["JPQ_FAST_BITS"] = bits or "16"
    model, parts = OrtModel(graph, exact=bits is None, device="cpu"), []
    past = None
    for at in range(0, len(ids), STEP):
        out = model.forward(np.asarray([ids[at : at + STEP]], np.int64), past=past)
        logits, past = out.logits[0].astype(np.float64), out.past
        logits -= logits.max(-1, keepdims=True)
        parts.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.concatenate(parts)


def main() -> None:
    """Print a line a mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    tokenizer = Tokenizer.from_file(str(options.bundle / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: options.tokens]
    graph = options.bundle / "model.onnx"
    exact = log_probabilities(graph, ids, None)
    after = np.arange(len(ids) - 1), np.array(ids[1:])
    sys.stdout.write(f"fp32: perplexity {np.exp(-exact[after].mean()):.3f} over {len(ids)} tokens\n")
    for bits in ("16", "8"):
        rounded = log_probabilities(graph, ids, bits)
        kl = (np.exp(exact) * (exact - rounded)).sum(-1)
        facts = f"KL {kl.mean():.2e} (p99 {np.quantile(kl, 0.99):.2e})"
        same = (exact.argmax(-1) == rounded.argmax(-1)).mean()
        perplexity = np.exp(-rounded[after].mean())
        sys.stdout.write(f"{bits} bits: {facts}, top-1 {same:.4f}, perplexity {perplexity:.3f}\n")


if __name__ == "__main__":
    main()
