"""The export, stage by stage: load, prices, plan, compress, recover, lower, parity, quality, bundle.

Every stage leaves a file in `<out>.partial/`; a run that was killed starts again after the last finished one and ends
with the same bytes. The folder becomes `<out>` by one rename at the end.

Under torchrun every process runs the stages up to `recover` together; what goes through `once` rank 0 does for all: it
alone touches the folder. The rest is rank 0's (see `compress/parallel.py`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jpq_export.compress.parallel import check_same, check_share, lead, once
from jpq_export.errors import JpqError, TargetError, UsageError
from jpq_export.feasible import asked_of, cached_spec, check_board, check_budget, check_either_basis
from jpq_export.format.compressed import COMPRESSED, CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.format.plan import Plan, load_plan
from jpq_export.format.spec import FLOAT_CACHE
from jpq_export.format.wording import wording
from jpq_export.given_plan import check_given
from jpq_export.progress import Stages
from jpq_export.published import PUBLISHED
from jpq_export.ranks import local_world
from jpq_export.read_activations import ACTIVATIONS, measure_activations, with_activations
from jpq_export.request import QUALITY_SEQUENCES, Request, Texts, prepared_for
from jpq_export.rotate import settle_rotation
from jpq_export.workspace import Workspace, check_disk, check_output, write_atomic

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel

CHECKPOINT = "recovering.safetensors"
FINAL_SEQUENCES = 12  # of the effort's length, to choose between finalists

logger = logging.getLogger(__name__)


class Export:
    """One run. Each method is a stage; `run` reads like a table of contents."""

    def __init__(self, request: Request, stages: Stages) -> None:
        from jpq_export.compress.effort import EFFORTS

        self.request, self.stages = request, stages
        self.effort = EFFORTS[request.effort]
        self.final_sequences = FINAL_SEQUENCES
        self.staircase: list[dict[str, Any]] = []
        self.activations: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """All stages up to `request.until`; returns the summary shown at the end."""
        once(check_output, self.request.out, force=self.request.force)
        plan = once(load_plan, self.request.plan) if self.request.plan else None
        if self.request.calibration:
            once(self._read_calibration)  # text that cannot be read is said before the long part
        loaded = self.load()
        texts = once(self.texts, loaded)
        self.work = Workspace(self.request.out)
        once(self.work.open, self.request.key(loaded.sha256, texts.sha256))
        try:
            searched = plan is None and self.request.method == "jpq" and not once(self.work.has, "plan.json")
            if searched:
                once(check_either_basis, self.request, loaded.spec)
            loaded = settle_rotation(
                loaded, texts, self.request, plan, self.stages, partial(once, check_budget, self.request)
            )
            if searched:
                once(check_budget, self.request, loaded.spec)
            plan = self.plan(loaded, texts, plan)
        except JpqError:
            if lead():
                self.work.leave()
            raise
        if self.request.until == "plan":
            return self.stop_early(loaded, plan, keep={"plan.json"})
        plan, rounded = self.round(loaded, texts, plan)
        compressed = self.recover(loaded, texts, plan, rounded)
        if lead():
            found = {"teacher": loaded.model, "texts": texts, "compressed": compressed}
            self.activations = measure_activations(self.request, self.work, self.stages, **found)
            if (spec := with_activations(cached_spec(compressed.spec, self.request), self.request)) != compressed.spec:
                compressed = replace(compressed, spec=spec)
                compressed.save(self.work.path(COMPRESSED))
        if self.request.until == "compress":
            return self.stop_early(loaded, plan, keep={"plan.json", COMPRESSED, ACTIVATIONS})
        if not lead():
            return {}
        self.lower(loaded, compressed)
        if self.request.until == "onnx":
            names = {p.name for p in self.work.folder.glob("model*")} | {"tokenizer.json", "tokenizer_config.json"}
            return self.stop_early(loaded, plan, keep={"plan.json", COMPRESSED, ACTIVATIONS, *names})
        return self.prove(loaded, texts, plan, compressed)

    def load(self) -> LoadedModel:
        """The teacher."""
        from jpq_export.compress.encoder_text import PER_SEQUENCE, for_texts
        from jpq_export.compress.load import EXPORT_FACTOR, check_memory, load_model
        from jpq_export.compress.sources import find

        check_share(self.effort.sequences, f"calibration sequences with --effort {self.effort.name}")
        with self.stages.stage("load", "loading the model") as report:
            once(find, self.request.model, progress=report)  # downloads once for all processes
            loaded = load_model(self.request.model, progress=report, device=self.request.device)
        check_same(loaded.sha256, loaded.name)
        if isinstance(loaded.spec, EncoderSpec):
            self.effort, self.final_sequences = for_texts(self.effort), FINAL_SEQUENCES * PER_SEQUENCE
            if self.request.kv_cache != FLOAT_CACHE:
                raise UsageError(
                    f"--kv-cache {self.request.kv_cache}: {loaded.name} is a sentence encoder, which keeps no keys and "
                    "values; leave the option out"
                )
            if self.request.target.engine:
                raise TargetError(
                    f"{self.request.target.name}: TensorRT-RTX engines of encoders are not built yet; use --target cpu"
                )
        elif self.request.context > loaded.spec.max_positions:
            most = loaded.spec.max_positions
            self.stages.note(f"{loaded.name} has {most} positions: latency is that with so many tokens in the cache")
            self.request = replace(self.request, context=most)
        once(check_disk, self.request.out, loaded.spec.parameters())
        if self.request.device == "cpu":  # every process here has the teacher in memory by now
            check_memory(loaded.spec, loaded.name, factor=(EXPORT_FACTOR - 1) * local_world())
        return loaded

    def texts(self, loaded: LoadedModel) -> Texts:
        """Calibration and held-out sequences."""
        from jpq_export.compress.calibration_text import calibration_and_heldout
        from jpq_export.compress.encoder_text import texts_and_heldout

        if isinstance(loaded.spec, EncoderSpec):
            calibration, kept_out = texts_and_heldout(
                self.request.calibration,
                loaded.tokenizer,
                loaded.spec,
                calibration=self.effort.calibration_sequences + self.final_sequences,
                heldout=2 * self.effort.heldout,
                seed=self.request.seed,
            )
            return Texts(calibration, *np.split(kept_out, [len(kept_out) // 2]))
        calibration, kept_out = calibration_and_heldout(
            self.request.calibration,
            loaded.encode,
            bos_id=loaded.spec.bos_id if loaded.spec.add_bos else None,
            calibration=self.effort.calibration_sequences,
            heldout=self.effort.heldout + QUALITY_SEQUENCES,
            length=min(self.effort.length, loaded.spec.max_positions),
            seed=self.request.seed,
        )
        return Texts(calibration, *np.split(kept_out, [self.effort.heldout]))

    def plan(self, loaded: LoadedModel, texts: Texts, given: Plan | None) -> Plan:
        """plan.json: the user's, a killed run's, a uniform baseline's, or the search's."""
        from jpq_export.compress.plan import uniform_plan

        if given is not None:
            check_given(given, self.request, loaded)
            if given.target != self.request.target.name:
                made = f"{self.request.plan}: made for {given.target}"
                self.stages.note(f"{made}; its choices hold for {self.request.target.name}, its latency does not")
            check_board(self.request, given, loaded.spec)
            once(write_atomic, self.work.path("plan.json"), given.to_json())
            return given
        if once(self.work.has, "plan.json"):
            self.stages.resumed("plan", "search")
            return once(load_plan, self.work.path("plan.json"))
        cost, budget, widths = asked_of(self.request, loaded.spec)
        if self.request.method == "jpq":
            plan, *rivals = self.search(loaded, texts, cost)
            for i, each in enumerate([plan, *rivals] if rivals else []):
                once(write_atomic, self.work.path(f"finalist-{i}.json"), each.to_json())
        elif self.request.method in PUBLISHED:
            plan = once(PUBLISHED[self.request.method], self.request, loaded, texts, cost, self.stages)
        else:
            kind = {"method": self.request.method, "widths": widths}
            plan = uniform_plan(loaded.spec, cost, budget, sha256=loaded.sha256, **kind)
        check_board(self.request, plan, loaded.spec)
        once(write_atomic, self.work.path("plan.json"), plan.to_json())
        return plan

    def _read_calibration(self) -> None:
        from jpq_export.compress.calibration_text import load_documents

        load_documents(self.request.calibration)

    def search(self, loaded: LoadedModel, texts: Texts, cost: Any) -> list[Plan]:
        """Prices, exact solution, true-KL refinement; the finalists, best first."""
        from jpq_export.compress.plan import Problem, contrast, make_plan
        from jpq_export.compress.prepare import group_size_for, prepare
        from jpq_export.compress.prepared import check_cache
        from jpq_export.compress.prices import narrow_widths
        from jpq_export.compress.refine import finalists, refine
        from jpq_export.compress.search import start_knobs
        from jpq_export.compress.teaching import SharedHeldout

        request, (_, budget, widths) = self.request, asked_of(self.request, loaded.spec)
        folder = prepared_for(request, loaded, texts)
        calibration = texts.calibration[: self.effort.sequences]
        once(check_cache, folder)  # one that cannot be written is said before the long part
        kind = {"seed": request.seed, "stages": self.stages, "narrow": narrow_widths(widths)}
        kind["group_size"] = group_size_for(request.target, loaded.spec, request.group_size)
        kind["normal"] = request.target.normal_bits
        prepared = prepare(loaded.model, calibration, texts.heldout, folder, **kind)
        problem = Problem(prepared.prices, cost, budget, widths)
        with self.stages.stage("plan", "searching structure and bits together") as report:
            heldout = SharedHeldout(loaded.model, texts.heldout)
            trials = refine(
                partial(once, problem.solve),
                loaded.model,
                prepared.prices,
                prepared.cache,
                heldout,
                start=start_knobs(prune=request.prune),
                trials=self.effort.trials,
                progress=report,
            )
        listed = [{"knobs": _finite(asdict(t.knobs)), **t.told()} for t in trials]
        plans = []
        kinds = {"by_bits": self.effort.finalists_by_bits, "within": self.effort.finalists_within}
        for trial in finalists(trials, prepared.prices, self.effort.finalists, **kinds):
            measured: dict[str, Any] = {
                "knobs": _finite(asdict(trial.knobs)),
                "measured_kl_before_recovery": trial.kl,
                "trials": listed,
            }
            if request.prune:
                measured["contrast"] = once(contrast, problem, trial.solution, trial.knobs)
            plans.append(
                make_plan(problem, trial.solution, trial.knobs, sha256=loaded.sha256, method="jpq", measured=measured)
            )
        return plans

    def round(self, loaded: LoadedModel, texts: Texts, plan: Plan) -> tuple[Plan, CompressedModel]:
        """Round every finalist; the plan that is best then, and its model."""
        from jpq_export.finalists import round_finalists

        if once(self.work.has, "rounded.safetensors"):
            self.stages.resumed("compress", "pruning and rounding")
        else:
            plan = round_finalists(self, loaded, texts, plan)
        kl = once(self.kl_of, "rounded.safetensors")
        self.staircase.append({"stage": "prune and round", "heldout_kl": kl, "applied": True})
        return plan, once(CompressedModel.load, self.work.path("rounded.safetensors"))

    def recover(self, loaded: LoadedModel, texts: Texts, plan: Plan, rounded: CompressedModel) -> CompressedModel:
        """Tune scales and norms, or low-rank branches; kept only if the held-out KL says so."""
        from jpq_export.compress.stages import recover
        from jpq_export.compress.training import Checkpoint
        from jpq_export.methods.qpruner.adapters import adapt

        if not (plan.method == "jpq" or plan.adapter_rank) or self.effort.tune_steps == 0:
            once(shutil.copyfile, self.work.path("rounded.safetensors"), self.work.path(COMPRESSED))
            return rounded
        if not once(self.work.has, "recovered.safetensors"):
            what = "low-rank branches" if plan.adapter_rank else "scales and norms"
            with self.stages.stage("recover", f"end-to-end recovery of {what}") as report:
                sequences, heldout = texts.calibration[: self.effort.tune_sequences], texts.heldout
                kind = {"steps": self.effort.tune_steps, "seed": self.request.seed, "progress": report}
                if plan.adapter_rank:
                    tuned, fresh = once(adapt, loaded.model, rounded, plan, sequences, heldout, **kind)
                else:
                    kind |= {"measured_every": self.effort.tune_measured}
                    kind |= {"checkpoint": Checkpoint(self.work.path(CHECKPOINT))}
                    tuned, fresh = recover(loaded.model, rounded, sequences, heldout, **kind)
                once(self.save, tuned, "recovered.safetensors", fresh)
                once(self.work.path(CHECKPOINT).unlink, missing_ok=True)
        else:
            self.stages.resumed("recover", "end-to-end recovery")
        tuned = once(CompressedModel.load, self.work.path("recovered.safetensors"))
        fresh, kl = (once(self.kl_of, f"{name}.safetensors") for name in ("recovered", "rounded"))
        self.staircase.append({"stage": "recover", "heldout_kl": fresh, "applied": fresh < kl})
        name = "recovered" if fresh < kl else "rounded"
        once(shutil.copyfile, self.work.path(f"{name}.safetensors"), self.work.path(COMPRESSED))
        return tuned if fresh < kl else rounded

    def save(self, model: CompressedModel, name: str, kl: float) -> None:
        """The number first, the file last: a stage is finished when its file has its name."""
        write_atomic(self.work.path(f"{name}.json"), json.dumps({"heldout_kl": kl}))
        temporary = self.work.path(f".{name}.tmp")
        model.save(temporary)
        os.replace(temporary, self.work.path(name))

    def kl_of(self, name: str) -> float:
        """The held-out KL that was saved with a model."""
        return json.loads(self.work.path(f"{name}.json").read_text(encoding="utf-8"))["heldout_kl"]

    def lower(self, loaded: LoadedModel, compressed: CompressedModel) -> None:
        """model.onnx, for TensorRT and TensorRT-RTX a graph of their own, and the tokenizer."""
        from jpq_export.lower.export import export_onnx, share_data

        target, done = self.request.target, self.work.path("lowered.json")
        if done.exists():
            self.stages.resumed("lower", "ONNX graphs")
            return
        with self.stages.stage("lower", "writing the ONNX graphs"):
            path = self.work.path("model.onnx")
            export_onnx(compressed, path, form=target.graph, chained=target.kind == "cpu")
            if target.tensorrt:
                path = self.work.path("model.trt.onnx")
                export_onnx(compressed, path, form="custom_op", tensorrt=target.tensorrt)
                share_data(path, self.work.path("model.onnx"))
            if target.engine:
                export_onnx(compressed, self.work.path("model.rtx.onnx"), form="signed")
            self.work.path("tokenizer.json").write_bytes(loaded.tokenizer_json)
            self.work.path("tokenizer_config.json").write_bytes(loaded.tokenizer_config)
            write_atomic(done, "{}")

    def prove(self, loaded: LoadedModel, texts: Texts, plan: Plan, compressed: CompressedModel) -> dict[str, Any]:
        """Parity, quality, manifest, report; then the folder gets its name."""
        from jpq_export.prove import finish_bundle

        return finish_bundle(self, loaded, texts, plan, compressed)

    def stop_early(self, loaded: LoadedModel, plan: Plan, *, keep: set[str]) -> dict[str, Any]:
        """--until: what exists so far becomes the output folder; under torchrun every process comes here."""
        if lead():
            self.work.finish(keep=keep)
        about = {"until": self.request.until, "activations": self.activations, "wording": wording(loaded.spec)}
        return {"out": str(self.request.out), "plan": plan, **about}


def _finite(knobs: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: None means pruning was not allowed."""
    return {name: value if np.isfinite(value) else None for name, value in knobs.items()}
