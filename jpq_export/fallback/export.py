"""The export of a family that is not described here: what it cannot do is refused or said, then stage by stage."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from jpq_export.errors import BudgetError, TargetError, UsageError
from jpq_export.fallback.load import TracedModel, load_traced, look
from jpq_export.fallback.plan import uniform_plan
from jpq_export.format.bundle import MANIFEST, Manifest, read_manifest, write_manifest
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Plan
from jpq_export.format.spec import FLOAT_CACHE
from jpq_export.numerics.scheme import BIT_WIDTHS
from jpq_export.progress import Stages
from jpq_export.prove import versions
from jpq_export.request import QUALITY_SEQUENCES, Request, Texts
from jpq_export.workspace import Workspace, check_disk, check_output

METHODS = ("jpq", "gptq", "rtn")
# Times the fp32 weights: the model, the teacher once more for the quality, codes, the runtime's copy. An estimate.
MEMORY = 3.5
LACKS = (
    "no pruning",
    "no joint search: one width for all linears, one for tables and head",
    "no recovery after rounding",
    "no graph for TensorRT",
    "a float KV cache that is copied at every step",
    "everything is computed on the CPU",
)


def check_request(request: Request, why: str) -> None:
    """UsageError or TargetError (exit code 2) for what makes no sense without the facts of a family.

    `why`: how the message starts to explain.
    """

    def refuse(option: str, remedy: str) -> UsageError:
        return UsageError(f"{option}: {why}; {remedy}")

    if request.budget.kind == "latency":
        raise refuse("--latency", "its operators have no price; give --size, --bits or --ratio")
    if request.method not in METHODS:
        raise refuse(f"--method {request.method}", f"there it is one of {', '.join(METHODS)}")
    if request.widths and len(request.widths) > 1:
        raise refuse("--widths", "all linears get one width; give one, or only a budget")
    if request.kv_cache != FLOAT_CACHE:
        raise refuse(f"--kv-cache {request.kv_cache}", "its cache is float; leave the option out")
    for option, value in (("--plan", request.plan), ("--until", request.until)):
        if value:
            raise refuse(option, "there is no search to stop after or to replace; leave the option out")
    if request.target.tensorrt or request.target.engine:
        raise TargetError(f"--target {request.target.name}: {why}, and no graph for TensorRT; use --target cpu")


class FallbackExport:
    """One run. A killed one starts anew: only the rounding takes long."""

    def __init__(self, request: Request, stages: Stages) -> None:
        from jpq_export.compress.effort import EFFORTS

        self.request, self.stages, self.effort = request, stages, EFFORTS[request.effort]

    def run(self) -> dict[str, Any]:
        """All stages; the summary as `pipeline.Export.run`'s."""
        request = self.request
        look(request.model)  # a model that no option could help says so first
        check_request(request, "this model is of no family described here and goes through torch.onnx.export")
        check_output(request.out, force=request.force)
        with self.stages.stage("load", "loading the model in transformers' own code") as report:
            loaded = load_traced(request.model, factor=MEMORY, progress=report)
        self.stages.note(f"{said(loaded)}: {'; '.join(LACKS)}")
        check_disk(request.out, loaded.spec.parameters())
        texts, plan = self.texts(loaded), self.plan(loaded)
        graph = self.trace(loaded, plan)
        self.work = Workspace(request.out)
        self.work.open(request.key(loaded.sha256, texts.sha256))
        try:
            return self.finish(loaded, texts, plan, graph)
        except BaseException:
            self.work.discard()
            raise

    def texts(self, loaded: TracedModel) -> Texts:
        """Calibration and held-out sequences, as for every decoder."""
        from jpq_export.compress.calibration_text import calibration_and_heldout

        spec, effort = loaded.spec, self.effort
        calibration, kept_out = calibration_and_heldout(
            self.request.calibration,
            loaded.encode,
            bos_id=spec.bos_id if spec.add_bos else None,
            calibration=effort.sequences,
            heldout=effort.heldout + QUALITY_SEQUENCES,
            length=min(effort.length, spec.max_positions),
            seed=self.request.seed,
        )
        return Texts(calibration, *np.split(kept_out, [effort.heldout]))

    def plan(self, loaded: TracedModel) -> Plan:
        """The widest that fits the budget; with the cache it must fit the board."""
        request, spec = self.request, loaded.spec
        kind = {"sha256": loaded.sha256, "method": "rtn" if request.method == "rtn" else "gptq"}
        plan = uniform_plan(
            spec, request.target, request.budget.resolve(spec), **kind, widths=request.widths or BIT_WIDTHS
        )
        tokens = min(request.context, spec.max_positions)
        cache = tokens * spec.cache_bytes_per_token
        if plan.predicted.bytes + cache > request.target.memory_bytes:
            raise BudgetError(
                f"{request.target.name}: weights of {plan.predicted.bytes / 1e6:.2f} MB and a KV cache of "
                f"{cache / 1e6:.2f} MB for {tokens} tokens do not fit its {request.target.memory_bytes / 1e6:.2f} MB; "
                "lower the budget or --context"
            )
        return plan

    def trace(self, loaded: TracedModel, plan: Plan) -> Any:
        """The graph without codes: a model that cannot be exported says so before it is rounded."""
        from jpq_export.fallback.graph import finish
        from jpq_export.fallback.trace import check_cache, trace

        schemes = {choice.name: choice.scheme for choice in plan.choices}
        with self.stages.stage("trace", "torch.onnx.export"):
            check_cache(loaded)
            graph = trace(loaded, schemes)
            finish(graph, loaded, schemes)
        return graph

    def finish(self, loaded: TracedModel, texts: Texts, plan: Plan, graph: Any) -> dict[str, Any]:
        """Round, write, prove; then the folder gets its name."""
        from jpq_export.parity.report import write_report

        work = self.work
        compressed = self.round(loaded, texts, plan)
        self.write(loaded, compressed, graph)
        parity = self.prove(loaded, texts, compressed)
        quality = self.quality(loaded, texts)
        work.path("plan.json").write_text(plan.to_json(), encoding="utf-8")
        keep = {"plan.json", "parity.json", "vectors.safetensors", "tokenizer.json", "tokenizer_config.json"}
        keep |= {"model.onnx", "model.onnx.data"}
        manifest = self.manifest(loaded, plan, compressed, quality)
        write_manifest(work.folder, manifest.with_contents(work.folder, names=keep))
        write_report(work.folder)
        manifest = read_manifest(work.folder)
        work.finish(keep={MANIFEST, *manifest.files})
        return {"out": str(work.out), "plan": plan, "manifest": manifest, "parity": parity}

    def round(self, loaded: TracedModel, texts: Texts, plan: Plan) -> CompressedModel:
        """GPTQ layer by layer; afterwards the model's own weights are the rounded ones."""
        from jpq_export.fallback.rounding import round_model

        schemes = {choice.name: choice.scheme for choice in plan.choices}
        with self.stages.stage("compress", "rounding, layer by layer") as report:
            kind = {"method": self.request.method, "passes": self.effort.passes, "progress": report}
            quantized = round_model(loaded, schemes, texts.calibration, **kind)
        matrices = {id(loaded.model.get_submodule(name).weight) for name in schemes}
        rest = ((n, p.float().numpy()) for n, p in loaded.model.named_parameters() if id(p) not in matrices)
        return CompressedModel(loaded.spec, {**quantized}, dict(rest))

    def write(self, loaded: TracedModel, compressed: CompressedModel, graph: Any) -> None:
        """model.onnx and the tokenizer."""
        from jpq_export.fallback.graph import write

        with self.stages.stage("lower", "writing the ONNX graph"):
            write(graph, loaded, compressed.quantized, self.work.path("model.onnx"))  # pyright: ignore[reportArgumentType] no row blocks here
            self.work.path("tokenizer.json").write_bytes(loaded.files.json)
            self.work.path("tokenizer_config.json").write_bytes(loaded.files.config)

    def prove(self, loaded: TracedModel, texts: Texts, compressed: CompressedModel) -> Any:
        """Parity against the rounded model in transformers, and what `verify` compares with."""
        from jpq_export.fallback.reference import TracedReference
        from jpq_export.parity.check import check_parity
        from jpq_export.parity.recalled import Recalled
        from jpq_export.parity.vectors import record_vectors

        prompts = [row[:64].tolist() for row in (*texts.heldout, *texts.calibration[:3])]
        path = self.work.path("model.onnx")
        traced = TracedReference(loaded, path)
        reference = Recalled(traced)
        with self.stages.stage("parity", "PyTorch against onnxruntime, every matrix") as report:
            parity = check_parity(compressed, path, prompts=prompts, reference=reference, progress=report)
            self.work.path("parity.json").write_text(parity.to_json(), encoding="utf-8")
        with self.stages.stage("vectors", "recording vectors for the device"):
            record_vectors(compressed, self.work.path("vectors.safetensors"), prompts=prompts, runner=reference)
        traced.close()
        return parity

    def quality(self, loaded: TracedModel, texts: Texts) -> dict[str, Any]:
        """Against the original, read once more: its weights are gone."""
        from jpq_export.evaluate.text_quality import evaluate_text
        from jpq_export.fallback.reference import logit_source

        with self.stages.stage("quality", "quality on held-out text") as report:
            teacher = logit_source(load_traced(self.request.model, factor=1.0))
            return asdict(evaluate_text(logit_source(loaded), teacher, texts.quality, progress=report))

    def manifest(
        self, loaded: TracedModel, plan: Plan, compressed: CompressedModel, quality: dict[str, Any]
    ) -> Manifest:
        """As every bundle's, with `fallback`."""
        spec, size = loaded.spec, compressed.weight_bytes
        per_token = spec.cache_bytes_per_token
        return Manifest(
            model={
                "name": loaded.name,
                "source": loaded.source,
                "sha256": loaded.sha256,
                "parameters": spec.parameters(),
                "spec": json.loads(spec.to_json()),
            },
            target=asdict(self.request.target),
            method=plan.method,
            bits_per_weight=size * 8 / spec.parameters(),
            weight_bytes=size,
            original_bytes=2 * spec.parameters(),
            effort=self.request.effort,
            seed=self.request.seed,
            budget=asdict(plan.budget),
            quality=quality,
            stages=tuple(record.to_dict() for record in self.stages.records),
            versions=versions(),
            kv_cache={"type": FLOAT_CACHE, "bytes_per_token": per_token, "float_bytes_per_token": per_token},
            fallback={"architecture": loaded.architecture, "line": said(loaded), "lacks": list(LACKS)},
        )


def said(loaded: TracedModel) -> str:
    """How the console, the manifest and the report name what happened."""
    return f"fallback: {loaded.architecture} is of no family described here, so torch.onnx.export wrote its graph"
