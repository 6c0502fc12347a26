"""What makes one cell of `jpq-export compare`: a searched model, a study's, or a peer's, measured on the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from jpq_export.compress.decoder import Decoder
from jpq_export.compress.effort import EFFORTS
from jpq_export.compress.precision import autocast
from jpq_export.errors import BudgetError, UsageError
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.format.compressed import COMPRESSED, CompressedModel
from jpq_export.format.spec import ModelSpec
from jpq_export.peers.layout import PEERS
from jpq_export.pipeline import Export
from jpq_export.progress import Stages
from jpq_export.request import Request, Texts

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel


class PermutedExport(Export):
    """An export whose teacher is the permuted model."""

    def load(self) -> Any:
        """The permuted teacher, with a name of its own in every cache."""
        from jpq_export.compress.permute import permuted

        loaded = super().load()
        if not isinstance(loaded.model, Decoder):
            raise UsageError(f"{loaded.name}: compare measures language models; see eval --pairs")
        return replace(loaded, model=permuted(loaded.model, seed=self.request.seed), sha256=f"permuted-{loaded.sha256}")


@dataclass(slots=True, eq=False)
class Remembered:
    """A model as a `LogitSource` that runs every window once and keeps its final hidden states.

    Layers in the fast type of the machine, logits in fp32: all rows alike. Against fp32 throughout, 8 windows of C4 and
    GPTQ at 4.16 bits, bf16 layers gave a KL of 0.2120 instead of 0.2114, in 40% of the time.
    """

    model: Any
    states: dict[bytes, Any] = field(default_factory=dict)

    def __call__(self, ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Logits of a window, `size` positions at a time."""
        import torch

        key = ids.tobytes()
        with torch.no_grad():
            if key not in self.states:
                batch = torch.from_numpy(ids)[None].to(self.model.embed.weight.device)
                with autocast(batch.device):
                    self.states[key] = self.model.hidden(batch, self.model.context(batch))[0].float()
        for part in self.states[key].split(size):
            # Left before each yield: two such generators side by side would leave gradients off for the whole process.
            with torch.no_grad():
                values = self.model.logits(part).float().cpu().numpy()
            yield values


def table_moments(loaded: LoadedModel, texts: Texts) -> dict[str, Any]:
    """What the rows of peers need to know to round embedding and head, see `peers.run`."""
    from jpq_export.peers.run import table_moments

    assert isinstance(loaded.model, Decoder)
    return table_moments(loaded.model, texts.calibration)


def maker(
    method: str, loaded: LoadedModel, texts: Texts, moments: Callable[[], dict[str, Any]]
) -> Callable[..., dict[str, Any]]:
    """Makes a cell of `method` from (request, teacher, windows, stages); `moments`: of `table_moments`, for peers."""
    if method in PEERS:
        return partial(_peer_cell, method, loaded, texts, moments)
    return partial(_study_cell, loaded, texts) if method == "srcr" else _cell


def _cell(request: Request, teacher: Remembered, windows: dict[str, np.ndarray], stages: Stages) -> dict[str, Any]:
    from jpq_export.compress.student import dequantized

    stages.records.clear()  # of the cells before
    export = PermutedExport(request, stages)
    export.run()
    compressed = CompressedModel.load(request.out / COMPRESSED)
    row = _measured(compressed, teacher.model.spec, stages) | {"staircase": export.staircase}
    return row | _evaluated(dequantized(compressed), teacher, windows, stages)


def _measured(compressed: CompressedModel, teacher: ModelSpec, stages: Stages) -> dict[str, Any]:
    return {
        "bits_per_weight": compressed.weight_bytes * 8 / teacher.parameters(),
        "weight_bytes": compressed.weight_bytes,
        "seconds": sum(record.seconds for record in stages.records),
        "peak_rss_bytes": max(record.peak_rss_bytes for record in stages.records),
    }


def _study_cell(
    loaded: LoadedModel,
    texts: Texts,
    request: Request,
    teacher: Remembered,
    windows: dict[str, np.ndarray],
    stages: Stages,
) -> dict[str, Any]:
    from jpq_export.compress.student import dequantized
    from jpq_export.methods.srcr.at_size import recommended

    assert isinstance(loaded.model, Decoder)
    assert isinstance(loaded.spec, ModelSpec)
    stages.records.clear()  # of the cells before
    budget, effort = request.budget.resolve(loaded.spec).bytes, EFFORTS[request.effort]
    assert budget is not None
    calibration = texts.calibration[: effort.sequences]
    compressed, tried = recommended(loaded.model, calibration, texts.heldout, budget, seed=request.seed, stages=stages)
    request.out.mkdir(parents=True, exist_ok=True)
    compressed.save(request.out / COMPRESSED)
    row = _measured(compressed, loaded.spec, stages) | {"cells": tried}
    return row | _evaluated(dequantized(compressed), teacher, windows, stages)


def _peer_cell(
    method: str,
    loaded: LoadedModel,
    texts: Texts,
    moments: Callable[[], dict[str, Any]],
    request: Request,
    teacher: Remembered,
    windows: dict[str, np.ndarray],
    stages: Stages,
) -> dict[str, Any]:
    from jpq_export.peers.run import PeerError, peer_model

    budget = request.budget.resolve(loaded.spec).bytes
    assert budget is not None
    try:
        with stages.stage("peer", f"{method} in a process of its own"):
            assert isinstance(loaded.model, Decoder)
            peer = peer_model(method, loaded.model, texts.calibration, budget, request.out, moments)
    except (PeerError, BudgetError) as error:
        stages.console.print(f"[red]{escape(str(error))}[/red]")
        return {"error": str(error)}
    layout = peer.layout
    row = {"bits_per_weight": layout.bytes * 8 / loaded.spec.parameters(), "weight_bytes": layout.bytes} | peer.done
    row["layout"] = asdict(layout)
    return row | _evaluated(peer.model, teacher, windows, stages)


def _evaluated(model: Any, teacher: Remembered, windows: dict[str, np.ndarray], stages: Stages) -> dict[str, Any]:
    student, texts = Remembered(model), {}
    for name, sequences in windows.items():
        with stages.stage("evaluate", f"{name}: {len(sequences)} windows") as report:
            texts[name] = asdict(evaluate_text(student, teacher, sequences, progress=report))
    return {"texts": texts}
