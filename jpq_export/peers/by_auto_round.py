"""AutoRound (Cheng et al., 2023): signed gradient descent on rounding and clipping, block by block; RTN at 0 steps.

AutoScheme, its search, gives every linear one of several widths first, by how much each changes the loss. Its own
defaults but for the data: our calibration tokens, all of them (AutoScheme looks at its usual number of samples, ours).
bf16 forward passes, as it chooses on a CPU.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from jpq_export.peers.layout import WIDTHS
from jpq_export.peers.transformer import names, transformers_model
from jpq_export.peers.worker import Job

BATCH = 8
DATASET = "jpq-calibration"  # the name of our tokens among its datasets, where it takes a name only


class NoTokenizer:
    """It asks for one, and does not use it when it is given tokens."""


def quantize(job: Job) -> dict[str, Tensor]:
    """Every linear as its integer kernels compute with it, in fp32; AutoScheme's widths go to widths.json."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports] an extra

    ids = job.ids()
    foreign = {ours: theirs.removesuffix(".weight") for theirs, ours in names(job.spec).items()}
    linears = {name: foreign[name] for name in job.linears()}
    rounder = AutoRound(
        transformers_model(job.spec, job.weights),
        tokenizer=NoTokenizer(),
        iters=job.peer.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=min(BATCH, len(ids)),
        enable_torch_compile=False,
        device_map="cpu",
        **(_mixed(job, ids) if job.peer.mixed else _uniform(job, ids, linears)),
        **({"lr": job.peer.rate} if job.peer.rate else {}),
    )
    rounded = rounder.quantize()
    rounded = rounded[0] if isinstance(rounded, tuple) else rounded
    modules = {name: rounded.get_submodule(theirs) for name, theirs in linears.items()}
    if job.peer.mixed:
        widths = {name: module.bits for name, module in modules.items()}
        (job.folder / WIDTHS).write_text(json.dumps(widths), encoding="utf-8")
    return {name: _exact(module) for name, module in modules.items()}


def _uniform(job: Job, ids: Tensor, linears: dict[str, str]) -> dict[str, Any]:
    mask = torch.ones_like(ids[0])
    rows = [{"input_ids": row, "attention_mask": mask} for row in ids]
    return {
        "scheme": "W4A16",
        "bits": int(job.bits),
        "group_size": job.group_size,
        "sym": False,
        "layer_config": {
            theirs: {"bits": int(job.bits), "group_size": job.group_of(name)} for name, theirs in linears.items()
        },
        "dataset": torch.utils.data.DataLoader(rows, batch_size=1),  # pyright: ignore[reportArgumentType] a list is a dataset
    }


def _mixed(job: Job, ids: Tensor) -> dict[str, Any]:
    from auto_round import AutoScheme  # pyright: ignore[reportMissingImports] an extra
    from auto_round.calib_dataset import register_dataset  # pyright: ignore[reportMissingImports] an extra
    from auto_round.schemes import QuantizationScheme  # pyright: ignore[reportMissingImports] an extra
    from datasets import Dataset  # pyright: ignore[reportMissingImports] with it

    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"  # one that is forked knows the tokens, and may hang

    @register_dataset(DATASET)
    def ours(*_: Any, **__: Any) -> Any:
        mask = [1] * ids.shape[1]
        return Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": mask} for row in ids])

    options = [QuantizationScheme(bits=bits, group_size=job.group_size, sym=False) for bits in job.peer.widths]
    scheme = AutoScheme(
        avg_bits=job.bits,
        options=options,
        seqlen=ids.shape[1],
        batch_size=1,
        low_cpu_mem_usage=False,  # it would read the weights again, from a folder
    )
    return {"scheme": scheme, "dataset": DATASET}


def _exact(linear: Any) -> Tensor:
    """It leaves bf16 weights behind; the codes they stand for times the scales, without that rounding."""
    weight, scale = linear.weight.detach().float(), linear.scale.float()
    zero = linear.zp.float() if isinstance(linear.zp, Tensor) else torch.full_like(scale, float(linear.zp))
    groups = weight.view(weight.shape[0], scale.shape[1], -1)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**linear.bits - 1)
    return ((codes - zero[..., None]) * scale[..., None]).view_as(weight)
