"""How much of the work over the whole vocabulary is done at once.

Products with the head want many tokens; what follows them (softmax, its gradient) wants few, whose logits then stay
in the processor's cache. 1,024 tokens of SmolLM2-135M on two cores of an EPYC (Zen 4): the KL and its slope 0.16 s
instead of 0.43 with 128 tokens at a time, the products 0.68 s instead of 0.83.
"""

from __future__ import annotations

import torch

TOKENS = 256  # whose logits exist at once: 25 MB in bf16 for 49,152 words
LOGITS = 2**20  # in fp32 at once, 4 MB


def tokens_in_cache(vocab: int, device: torch.device) -> int:
    """Tokens whose fp32 logits stay in a CPU's cache; on a GPU all of them."""
    return max(1, LOGITS // vocab) if device.type == "cpu" else TOKENS
