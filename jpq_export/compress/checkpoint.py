"""A model on disk, described but not yet read; a folder of safetensors opened as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jpq_export.compress.families import Family, canonical, family_of, id_tuple, parse_config, spec_of
from jpq_export.compress.stored_layout import Read, split_fused, turned
from jpq_export.compress.tokenizer import TokenizerFiles, read_tokenizer
from jpq_export.errors import ModelError
from jpq_export.format.encoder_spec import Spec


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """`tensors`: canonical name -> function that reads it; `where` names the file in errors."""

    spec: Spec
    tensors: dict[str, Read]
    tokenizer: TokenizerFiles
    where: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ModelError when it is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{path}: not readable as JSON ({reason}); download it again") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds a {type(raw).__name__}, expected a JSON object; download it again")
    return raw


def open_folder(folder: Path, *, name: str) -> Checkpoint:
    """A folder as transformers saves it: config.json, safetensors, tokenizer.json."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; {_remedy(folder)}")
    where = str(folder / "config.json")
    raw = read_json(folder / "config.json")
    family = family_of(raw, where)
    config = parse_config(raw, family, where)
    spec = spec_of(config, family, name=name, where=where)
    if (folder / "generation_config.json").is_file():  # chat models list all their stop tokens only here
        extra = id_tuple(read_json(folder / "generation_config.json").get("eos_token_id"))
        spec = replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *extra))))
    files = weight_files(folder)
    tensors: dict[str, Read] = {}
    for file in files:
        tensors |= open_safetensors(file, family)
    tensors = split_fused(turned(tensors) if family.transposed else tensors, spec, str(folder))
    tokenizer = read_tokenizer(folder, vocab=spec.vocab, bos_id=spec.bos_id)
    return Checkpoint(replace(spec, add_bos=tokenizer.add_bos), tensors, tokenizer, str(folder))


def _remedy(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"give the GGUF file itself: {ggufs[0]}"
    return "expected a folder saved with save_pretrained, or a .gguf file"


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards its index lists."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise ModelError(f"{index}: no weight_map of tensor names to files; download it again")
        files = [folder / file for file in sorted(set(listed.values()))]
        missing = [file.name for file in files if file.parent != folder or not file.is_file()]
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(files)} weight files missing ({missing[0]}); get it")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder}: weights are pickled ({pickled[0]}), which can run code when opened; convert them with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    raise ModelError(f"{folder}: no model.safetensors; {_remedy(folder)}")


def open_safetensors(path: Path, family: Family) -> dict[str, Read]:
    """Readers of one decoder file's tensors by canonical name."""

    def offset(name: str) -> float:
        return family.norm_offset if "norm" in name.rpartition(".")[2] else 0.0

    return named_readers(path, lambda stored: canonical(stored, family), family.architecture, offset=offset)


def named_readers(
    path: Path, name_of: Callable[[str], str | None], kind: str, *, offset: Callable[[str], float] = lambda _: 0.0
) -> dict[str, Read]:
    """Readers of one file's tensors by canonical name; nothing but the header is read yet.

    `name_of`: None for a tensor that is not needed, KeyError for one that a model of this `kind` does not have.
    `offset`: what is added to a tensor.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); download it again") from error
    out: dict[str, Read] = {}
    for stored in sorted(file.keys()):
        try:
            name = name_of(stored)
        except KeyError as error:
            raise ModelError(
                f"{path}: unexpected tensor {stored!r} for {kind}; config.json and weights do not "
                "belong together, or the weights are quantized"
            ) from error
        if name is not None:
            out[name] = reader(file, stored, path, offset(name))
    return out


def reader(file: Any, stored: str, path: Path, offset: float = 0.0) -> Read:
    """A function that reads one tensor as fp32 and adds `offset`."""

    def read() -> torch.Tensor:
        tensor = file.get_tensor(stored)
        if not tensor.is_floating_point():
            raise ModelError(
                f"{path}: {stored} is {str(tensor.dtype).removeprefix('torch.')}, expected a floating-point type; give "
                "the original model, not a quantized one"
            )
        tensor = tensor.to(torch.float32, copy=True)  # a copy: the file may be replaced while the export runs
        return tensor + offset if offset else tensor

    return read
