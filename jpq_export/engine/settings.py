"""What one build is asked for, and the bytes it needs: the memory formula, shown to the user term by term."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpq_export.errors import BundleError, UsageError
from jpq_export.format.bundle import Manifest, safe_name
from jpq_export.format.encoder_spec import KIND
from jpq_export.format.spec import ModelSpec

FOLDER = "device"  # inside the bundle: everything this board made
FP32 = 4
PLUGIN_BYTES = 300_000_000  # object files of a CUDA library, generously


@dataclass(frozen=True, slots=True)
class Settings:
    """One build. `plugin`: a library to use instead of those of the bundle; `aot`: its kernels instead of a library."""

    bundle: Path
    out: Path
    plugin: Path | None = None
    aot: bool = False
    workspace_bytes: int = 512_000_000
    max_prompt: int = 512
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        """Refuse profiles that no TensorRT engine can have."""
        if not 1 <= self.max_prompt < self.max_tokens:
            raise UsageError(
                f"--max-prompt {self.max_prompt}: expected at least 1 and less than --max-tokens {self.max_tokens}; "
                "the cache holds the prompt and what follows"
            )

    @property
    def home(self) -> Path:
        """Where reports, logs, timing cache and a compiled plugin go: beside the engine."""
        return self.out.parent


def spec_of(manifest: Manifest, bundle: Path) -> ModelSpec:
    """The model's facts; BundleError when the manifest holds none."""
    if manifest.kind == KIND:
        raise BundleError(
            f"{bundle}: a sentence encoder, `build` makes engines of language models only; use `jpq-export run`"
        )
    try:
        return ModelSpec.from_json(json.dumps(manifest.model["spec"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{bundle}: no model spec in its manifest ({error!r}); export the bundle again") from error


def device_section(manifest: Manifest) -> dict[str, Any]:
    """What the exporter said about the device side; empty when the bundle has none. BundleError when malformed."""
    section = manifest.device or {}
    try:
        if section:
            _check_section(section)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"manifest.json: device: malformed ({error!r}); export the bundle again") from error
    return section


def _check_section(section: dict[str, Any]) -> None:
    """A bundle may come from anywhere: every value that is used later, once."""
    if not re.match(r"\d+\.\d+", section["tensorrt"]):
        raise ValueError(f"tensorrt {section['tensorrt']!r}")
    names = [section["graph"], *(raw["file"] for raw in section["binaries"])]
    for name in names:
        safe_name(name, Path("manifest.json"))
    for raw in section["binaries"]:
        kinds = {"abi": int, "sms": list, "sha256": str, "machine": str}
        if wrong := [key for key, kind in kinds.items() if not isinstance(raw[key], kind)]:
            raise TypeError(f"binaries: {wrong[0]}")
        if wrong := [key for key in ("tensorrt", "cuda") if not isinstance(raw.get(key, 0), int)]:
            raise TypeError(f"binaries: {wrong[0]}")
    for value in (section["bounds"]["logits"], section["bounds"]["peak"]):
        if not 0 < float(value) < 1e6:
            raise ValueError(f"bound {value!r}")
    kinds = {"vectors_prompt": int, "vectors_tokens": int, "parts": list, "missing": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(section[key], kind)]:
        raise TypeError(wrong[0])


def memory_terms(manifest: Manifest, spec: ModelSpec, settings: Settings) -> dict[str, int]:
    """Bytes by purpose, while the engine is built and checked.

    weights: twice, the parsed graph's and the engine's. kv cache: keys and values of every kept head for all tokens, in
    fp32 as the graph has them, twice: what a step reads (past) and writes (present). logits: of a whole prompt.
    """
    heads = sum(layer.kv_heads for layer in spec.layers)
    return {
        "weights x 2": 2 * manifest.weight_bytes,
        "kv cache x 2": 2 * (2 * heads * spec.head_dim * settings.max_tokens * FP32),
        "logits": settings.max_prompt * spec.vocab * FP32,
        "workspace": settings.workspace_bytes,
    }


def disk_needed(manifest: Manifest) -> int:
    """The engine holds the weights again; a compiled plugin and the logs come on top."""
    return round(1.2 * manifest.weight_bytes) + PLUGIN_BYTES


def size_text(size: float) -> str:
    """'123 MB'."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
