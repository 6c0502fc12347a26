"""`jpq-export study --export`: one cell of a study through lowering, parity and quality to a bundle."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from jpq_export.comparison_cells import Remembered
from jpq_export.errors import TargetError
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.feasible import check_board
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import is_table
from jpq_export.format.plan import Budget, Choice, LayerPlan, Plan, Predicted, Removal
from jpq_export.methods.srcr.points import Cell
from jpq_export.pipeline import Export
from jpq_export.progress import Stages
from jpq_export.request import Request, Texts
from jpq_export.study import Study
from jpq_export.workspace import write_atomic

if TYPE_CHECKING:
    from jpq_export.compress.apply import LayerChoice
    from jpq_export.compress.load import LoadedModel

METHOD = "srcr"


class StudyExport(Export):
    """An export of the study's model and text whose compression is the cell's; the study must have run."""

    def __init__(self, request: Request, stages: Stages, study: Study, cell: Cell) -> None:
        # The cell's name is part of the key, so that another cell does not resume here.
        super().__init__(replace(request, method=f"{METHOD} {cell.name}"), stages)
        self.study, self.cell = study, cell

    def load(self) -> LoadedModel:
        """The study's."""
        return self.study.loaded

    def texts(self, loaded: LoadedModel) -> Texts:
        """The study's."""
        return self.study.texts

    def plan(self, loaded: LoadedModel, texts: Texts, given: Plan | None) -> Plan:
        """Structure and schemes of the cell; TargetError when the target cannot store them."""
        plan = make_plan(self.study, self.cell, self.study.structure(self.cell), self.request)
        for choice in plan.choices:
            if not self.request.target.holds(choice.scheme):
                raise TargetError(
                    f"{self.request.target.name}: {choice.name}: {choice.bits}-bit codes with stored zero points, "
                    "which make zero weights exact, do not fit its signed codes; use --target cpu or a Jetson's"
                )
        check_board(self.request, plan, loaded.spec)
        write_atomic(self.work.path("plan.json"), plan.to_json())
        return plan

    def round(self, loaded: LoadedModel, texts: Texts, plan: Plan) -> tuple[Plan, CompressedModel]:
        """The cell's model, with its held-out KL."""
        if self.work.has("rounded.safetensors"):
            self.stages.resumed("compress", "pruning and rounding")
        else:
            model = self.study.compressed(self.cell, self.study.structure(self.cell))
            self.save(model, "rounded.safetensors", self._heldout_kl(model, texts))
        kl = self.kl_of("rounded.safetensors")
        self.staircase.append({"stage": "prune and round", "heldout_kl": kl, "applied": True})
        return plan, CompressedModel.load(self.work.path("rounded.safetensors"))

    def _heldout_kl(self, model: CompressedModel, texts: Texts) -> float:
        from jpq_export.compress.student import dequantized

        student = Remembered(dequantized(model).to(self.study.model.embed.weight.device))
        quality = evaluate_text(student, self.study.teacher, texts.heldout)
        assert quality.kl_mean is not None  # there is a teacher
        return quality.kl_mean


def export_cell(study: Study, cell: Cell, request: Request, stages: Stages) -> dict[str, Any]:
    """The bundle's summary, as of any export; `request` gives target, folder and context."""
    return StudyExport(request, stages, study, cell).run()


def make_plan(study: Study, cell: Cell, layers: tuple[LayerChoice, ...], request: Request) -> Plan:
    """The record of a cell: structure, a scheme a matrix, bytes as stored, latency by the target's data sheet."""
    from jpq_export.compress.cost import CostModel
    from jpq_export.methods.srcr.compress import schemes_for

    plans = tuple(
        LayerPlan(
            i,
            new.kv_heads,
            old.kv_heads,
            len(new.channels),
            old.ffn,
            None if len(new.channels) == old.ffn else new.channels,
        )
        for i, (old, new) in enumerate(zip(study.spec.layers, layers, strict=True))
    )
    spec = study.spec.with_layers(
        tuple(
            type(old)(len(new.kv_heads), new.ffn, old.window, old.rope)
            for old, new in zip(study.spec.layers, plans, strict=True)
        )
    )
    schemes, why = schemes_for(spec, cell.bits), f"{cell.name}: one width for all layers, 8 bits for tables"
    choices = tuple(
        Choice(name, s.bits, s.group_size, s.symmetric, *shape, s.weight_bytes(*shape), 0.0, why, s.integer_zero)
        for (name, shape), s in zip(spec.matrices().items(), schemes.values(), strict=True)
    )
    cost = CostModel(spec, request.target, request.context)
    size = sum(choice.bytes for choice in choices) + 4 * sum(spec.vectors().values())
    time = cost.fixed()[1] + sum(cost.table(n, s)[1] for n, s in schemes.items() if is_table(n))
    time += sum(cost.matrix(c.rows, c.columns, c.scheme)[1] for c in choices if not is_table(c.name))
    time += sum(
        cost.attention_rest(i, layer.kv_heads)[1] + cost.mlp_rest(i, layer.ffn)[1]
        for i, layer in enumerate(spec.layers)
    )
    removed = tuple(
        Removal(f"layers.{p.index}.{sub}", 0.0, f"structural, {cell.sparsity:.1%}: {of - kept} of {of} {what}")
        for p in plans
        for sub, kept, of, what in (
            ("attn", len(p.kv_heads), p.kv_heads_of, "key/value heads"),
            ("mlp", p.ffn, p.ffn_of, "channels"),
        )
        if kept < of
    )
    budget = Budget("size", float(size), size)
    predicted = Predicted(0.0, size, time / 1e3, 0.0)
    search = {"cell": asdict(cell), "theoretical_rate": cell.rate}
    return Plan(
        study.spec.name, study.loaded.sha256, request.target.name, METHOD, budget, plans, choices, removed, predicted,
        (), search,
    )  # fmt: skip
