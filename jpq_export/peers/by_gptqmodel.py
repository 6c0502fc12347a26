"""GPTQModel (ModelCloud): GPTQ with activation-aware group order, its own loop over the layers, on the CPU.

Its own defaults but for the data (our calibration tokens, all of them) and zero points of their own (sym=False).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from jpq_export.errors import ModelError
from jpq_export.format.spec import ModelSpec
from jpq_export.peers.transformer import names, transformers_model
from jpq_export.peers.worker import Job

BATCH = 8


def quantize(job: Job) -> dict[str, Tensor]:
    """Every linear as its PyTorch kernel computes with it."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 takes half the cores and cannot work with one
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports] an extra

    groups = {name: job.group_of(name) for name in job.linears()}
    usual = max(groups.values(), key=list(groups.values()).count)
    foreign = {ours: theirs.removesuffix(".weight") for theirs, ours in names(job.spec).items()}
    other = {f"+:{re.escape(foreign[name])}$": {"group_size": g} for name, g in groups.items() if g != usual}
    config = QuantizeConfig(
        bits=job.bits,
        group_size=usual,
        sym=False,
        format="gptq_v2",  # the first format stores zero points less one, which its dequantization here does not undo
        dynamic=other or None,
        offload_to_disk=False,
    )
    with TemporaryDirectory() as folder:
        model = transformers_model(job.spec, job.weights)
        rotary = model.model.rotary_emb.inv_freq
        model.save_pretrained(folder)
        _tokenizer(job.spec, Path(folder))
        peer = GPTQModel.load(folder, config, device="cpu", dtype=torch.float32)
        peer.model.model.rotary_emb.inv_freq = rotary.clone()  # a folder holds a base, not the frequencies
        rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in job.ids()]
        peer.quantize(rows, batch_size=min(BATCH, len(rows)))
    if not torch.equal(peer.model.model.rotary_emb.inv_freq, rotary):
        raise ModelError(
            f"{job.spec.name}: GPTQModel put back other rotary frequencies; its row would be another model"
        )
    return {name: _exact(peer.model.get_submodule(foreign[name])) for name in groups}


def _exact(linear: Any) -> Tensor:
    """Float32 [out, in] from codes, zero points and fp16 scales."""
    linear.scales = linear.scales.float()
    return linear.dequantize_weight().T.contiguous()


def _tokenizer(spec: ModelSpec, folder: Path) -> None:
    """It wants one beside the model, and does not use it when it is given tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{i}": i for i in range(spec.vocab)}, unk_token="t0"))
    marks = {"unk_token": "t0", "eos_token": "t0", "pad_token": "t1"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)
