"""The hypernetwork: frozen inputs -> bi-GRU over the layers -> one bias-free head per structure -> binary masks.

As published for DISP-LLM (Gao et al., 2024) and taken over by TOGA (arXiv 2606.07819); the budget as a further input is
what lets one training answer many budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, HIDDEN = 32, 64
TEMPERATURE, BASE = 0.4, 3.0  # BASE: training starts from the whole model in high precision
Masks = dict[str, Tensor]


class Hypernetwork(nn.Module):
    """One head for every name of every layer; `structures[i][name]` is how many masks it gives."""

    inputs: Tensor

    def __init__(self, structures: Sequence[Mapping[str, int]], *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(structures), INPUT))
            self.budget = nn.Linear(1, INPUT, bias=False)
            self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True, batch_first=True)
            self.norm = nn.LayerNorm(2 * HIDDEN)
            self.owners = [(i, name) for i, layer in enumerate(structures) for name in layer]
            self.heads = nn.ModuleList(
                nn.Linear(2 * HIDDEN, structures[i][name], bias=False) for i, name in self.owners
            )

    def forward(self, fraction: float) -> Masks:
        """Logits by name, for a size that is `fraction` of the largest."""
        asked = self.inputs.new_tensor([[4 * fraction - 2]])  # about the spread of the frozen inputs
        states, _ = self.gru((self.inputs + self.budget(asked))[None])  # [1, layers, 2 * HIDDEN]
        states = F.gelu(self.norm(states[0]))
        return {name: head(states[i]) for (i, name), head in zip(self.owners, self.heads, strict=True)}


def sample(logits: Masks, generator: torch.Generator) -> Masks:
    """Soft masks in (0, 1): sigmoid((logit + Gumbel + BASE) / TEMPERATURE)."""
    out = {}
    for name, logit in logits.items():
        uniform = torch.rand(logit.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logit.device)
        gumbel = -(-uniform.log()).log()
        out[name] = torch.sigmoid((logit + gumbel + BASE) / TEMPERATURE)
    return out


def straight_through(masks: Masks) -> Masks:
    """Rounded to 0 or 1 forwards, the soft masks' gradient backwards."""
    return {name: mask + (mask.round() - mask).detach() for name, mask in masks.items()}
