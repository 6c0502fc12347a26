"""A causal language model in transformers' own code, checked before it is loaded, and its facts."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from jpq_export.compress import tokenizer as tokenizing
from jpq_export.compress.checkpoint import read_json, weight_files
from jpq_export.compress.families import id_tuple, supported
from jpq_export.compress.load import MEMORY_FACTOR, check_memory, weights_sha256
from jpq_export.compress.sources import Origin, Report, find
from jpq_export.errors import ModelError
from jpq_export.fallback.cache import cache_argument, check_layers, past_tensors
from jpq_export.fallback.quiet import quiet
from jpq_export.format.spec import LayerSpec, ModelSpec, Traced

logger = logging.getLogger(__name__)
LEAST_SHARE = 0.9  # of the parameters that must lie in matrices we store packed
POSITIONS = 2048  # where a configuration states no last position (alibi): what Bloom and MPT were trained on
MOVING_ROPES = ("dynamic", "longrope")  # their angles depend on the text's length: no one graph computes them


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """`model`: of transformers, fp32, eager attention; `where` and `architecture` name it in errors.

    `owners`: of every linear and table the name of the matrix it computes with, its own or that of a tied one.
    """

    model: Any
    spec: ModelSpec
    owners: dict[str, str]
    files: tokenizing.TokenizerFiles
    architecture: str
    name: str
    source: str
    where: str
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens; BOS goes first if `spec.add_bos`."""
        return tokenizing.encode(self.files.tokenizer, text)

    def matrix(self, name: str) -> Tensor:
        """The present weight of a matrix as [N, K], not a copy."""
        return self.model.get_submodule(name).weight


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What a model is before its weights are read; `owners` as in `TracedModel`."""

    origin: Origin
    architecture: str
    config: Any
    owners: dict[str, str]
    traced: Traced


def look(source: str | None, *, progress: Report | None = None) -> Outline:
    """`source` as far as its configuration tells; ModelError names what the fallback cannot do with it."""
    origin = find(source, progress=progress)
    where = str(origin.path / "config.json")
    raw = read_json(origin.path / "config.json")
    architecture = str(next(iter(raw.get("architectures") or ()), raw.get("model_type")))
    if raw.get("quantization_config"):
        raise ModelError(f"{where}: weights are already quantized; give the original floating-point model")
    config = _config(origin.path, where, architecture)
    with torch.device("meta"):
        model = _try(lambda: AutoModelForCausalLM.from_config(config), where, architecture)
    owners, traced = matrices_of(model)
    _check_form(model, traced, where, architecture)
    return Outline(origin, architecture, config, owners, traced)


def load_traced(source: str | None, *, factor: float = MEMORY_FACTOR, progress: Report | None = None) -> TracedModel:
    """Load `source`, of a family that is not described here; ModelError names what is wrong or cannot be done.

    `factor`: times the fp32 weights that must be free.
    """
    outline = look(source, progress=progress)
    folder, name, architecture = outline.origin.path, outline.origin.name, outline.architecture
    where, spec = str(folder), _spec(outline.config, outline.traced, name)
    weight_files(folder)  # its errors are clearer
    check_memory(spec, where, factor=factor)
    model = _read(folder, outline.config, where, architecture)
    spec = _facts(model, spec, where, architecture)
    files = tokenizing.read_tokenizer(folder, vocab=spec.vocab, bos_id=spec.bos_id)
    spec = replace(spec, add_bos=files.add_bos, eos_ids=_stops(folder, spec))
    digest = weights_sha256(spec, dict(model.named_parameters()))
    return TracedModel(model, spec, outline.owners, files, architecture, name, outline.origin.source, where, digest)


def refusal(where: str, architecture: str, why: str) -> ModelError:
    """The one line of a model that the fallback cannot take."""
    said = " ".join(why.split())[:300].rstrip(".")
    return ModelError(
        f"{where}: {architecture} cannot go through torch.onnx.export here: {said}; use a model of a family that needs "
        f"no fallback: {supported()}"
    )


def matrices_of(model: Any) -> tuple[dict[str, str], Traced]:
    """The name of the matrix that every linear and table uses, and what there is in all.

    Only GPT-2 and models without a language model's head have transformers' Conv1D, so nothing here knows it.
    """
    owners, found, first, tables = {}, [], {}, []
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        owner = owners[path] = first.setdefault(id(module.weight), path)
        if owner != path:
            continue
        rows, columns = module.weight.shape
        found.append((path, int(rows), int(columns)))
        if isinstance(module, nn.Embedding) or module is head:
            tables.append(path)
    others = sum(p.numel() for p in model.parameters()) - sum(n * k for _, n, k in found)
    return owners, Traced(tuple(found), tuple(tables), others)


def _config(folder: Path, where: str, architecture: str) -> Any:
    config = _try(
        lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), where, architecture
    )
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        if rope.get("rope_type") in MOVING_ROPES:
            raise refusal(where, architecture, f"rope type {rope['rope_type']!r} depends on the text's length")
    config._attn_implementation = "eager"  # the others leave a row without keys undefined: padding would be NaN
    return config


def _try(make: Callable[[], Any], where: str, architecture: str) -> Any:
    """What transformers makes; its errors are of every class there is."""
    try:
        with quiet():
            return make()
    except MemoryError:
        raise
    except Exception as error:
        raise refusal(where, architecture, f"transformers says {error!r}") from error


def _check_form(model: Any, traced: Traced, where: str, architecture: str) -> None:
    """What can be seen without weights: a cache of keys and values, and linears that hold the parameters."""
    if cache_argument(model) is None or "attention_mask" not in inspect.signature(model.forward).parameters:
        raise refusal(where, architecture, "it takes no cache of keys and values, or no attention mask")
    try:
        check_layers(DynamicCache(config=model.config))
    except ValueError as error:
        raise refusal(where, architecture, str(error)) from error
    packed = sum(rows * columns for _, rows, columns in traced.matrices)
    if packed < LEAST_SHARE * (packed + traced.others):
        share = traced.others / (packed + traced.others)
        raise refusal(where, architecture, f"{share:.0%} of its parameters lie in no linear layer or table (experts?)")


def _read(folder: Path, config: Any, where: str, architecture: str) -> Any:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )

    model, told = _try(load, where, architecture)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, told[kind])):
            raise ModelError(
                f"{where}: {len(names)} {kind.split('_')[0]} tensors ({names[0]}); configuration and weights do not "
                "belong together"
            )
    for name, parameter in model.named_parameters():
        if not all(bound.isfinite() for bound in torch.aminmax(parameter)):
            raise ModelError(f"{where}: {name} has NaN or infinite values, expected none; download the model again")
    return model.eval().requires_grad_(False)


def _spec(config: Any, traced: Traced, name: str) -> ModelSpec:
    """All that the configuration says."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is None:
        logger.warning("%s: the configuration states no last position; exported for %d tokens", name, POSITIONS)
    return ModelSpec(
        name=name,
        family=text.model_type,
        vocab=text.vocab_size,
        hidden=text.hidden_size,
        head_dim=0,
        heads_per_group=0,
        layers=(),
        ropes=(),
        norm_eps=0.0,
        activation="",
        tied=False,
        attention_scale=0.0,
        max_positions=int(most or POSITIONS),
        bos_id=text.bos_token_id,
        eos_ids=id_tuple(text.eos_token_id),
        traced=traced,
    )


def _facts(model: Any, spec: ModelSpec, where: str, architecture: str) -> ModelSpec:
    """The facts only a pass of two tokens shows: widths of vocabulary and cache."""
    with torch.no_grad():
        out = _try(lambda: model(torch.zeros(1, 2, dtype=torch.long), use_cache=True), where, architecture)
    try:
        kept = past_tensors(getattr(out, str(cache_argument(model))))
    except ValueError as error:
        raise refusal(where, architecture, str(error)) from error
    widths = {tensor.shape[3] for tensor in kept}
    if len(widths) > 1:
        raise refusal(where, architecture, f"its keys and values are {sorted(widths)} wide, expected one width")
    vocab, rows = out.logits.shape[-1], model.get_input_embeddings().weight.shape[0]
    if vocab != rows:
        raise refusal(where, architecture, f"it has {rows} embedded tokens and {vocab} logits, expected as many")
    window = getattr(model.config, "sliding_window", None) if getattr(model.config, "use_sliding_window", 1) else None
    layers = tuple(LayerSpec(key.shape[1], 0, window) for key in kept[::2])
    return replace(spec, vocab=vocab, head_dim=widths.pop(), layers=layers)


def _stops(folder: Path, spec: ModelSpec) -> tuple[int, ...]:
    """Chat models list all their stop tokens only in the other file."""
    path = folder / "generation_config.json"
    extra = id_tuple(read_json(path).get("eos_token_id")) if path.is_file() else ()
    return tuple(dict.fromkeys((*spec.eos_ids, *extra)))
