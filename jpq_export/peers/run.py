"""A peer's row: its linears from a process of its own, the table from our GPTQ, one dequantized model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jpq_export.compress.decoder import Decoder, build_decoder, named_weights
from jpq_export.compress.rounding import quantize
from jpq_export.compress.statistics import plain_statistics
from jpq_export.errors import JpqError
from jpq_export.format.spec import ModelSpec
from jpq_export.peers.layout import LAYOUT, MODEL, PEERS, WIDTHS, FileLayout, Layout, Peer, layout_bytes, layout_for

Moments = Callable[[], dict[str, Tensor]]
ROWS = 16384  # of a table at once: bounds the memory of a large vocabulary


class PeerError(JpqError):
    """A peer is not installed, or failed; its row says so and the comparison goes on."""


@dataclass(frozen=True, slots=True, eq=False)
class PeerModel:
    """What a peer made of a model; `done`: seconds, peak_rss_bytes and version of its process."""

    model: Decoder
    layout: Layout | FileLayout
    done: dict[str, Any]


def peer_model(
    name: str,
    teacher: Decoder,
    calibration: np.ndarray,
    budget_bytes: int,
    folder: Path,
    moments: Moments | None = None,
) -> PeerModel:
    """Quantize `teacher` by peer `name`, its files in `folder`; `moments`: `table_moments` where they are known.

    Raises PeerError, and BudgetError when nothing fits.
    """
    peer = PEERS[name]
    if teacher.spec.learned_positions:  # its bytes would be counted as a linear's, its values stay fp32
        raise PeerError(
            f"{name}: {teacher.spec.name} has a table of positions, which peers do not quantize; leave it out"
        )
    _check_installed(name, peer)
    layout = None if peer.program else layout_for(teacher.spec, peer, budget_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in named_weights(teacher).items()}
    bits, group_size = (layout.bits, layout.group_size) if layout else (0, 0)
    job = {"spec": teacher.spec.to_json(), "budget_bytes": budget_bytes, "bits": bits, "group_size": group_size}
    rounded = _run(name, weights, teacher, job, calibration, folder)
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    if layout and peer.mixed:
        widths = json.loads((folder / WIDTHS).read_text(encoding="utf-8"))
        layout = replace(layout, bytes=layout_bytes(teacher.spec, peer, widths, group_size, layout.table))
        if layout.bytes > budget_bytes:
            raise PeerError(f"{name}: chose {layout.bytes:,} bytes, asked for at most {budget_bytes:,}")
    for part in ("weights.safetensors", "tokens.npy", "linears.safetensors"):
        (folder / part).unlink()
    moments = moments or partial(table_moments, teacher, calibration)
    weights |= rounded | (_tables(teacher, layout, moments()) if layout else {})
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / MODEL)
    chosen = layout or FileLayout(**json.loads((folder / LAYOUT).read_text(encoding="utf-8")))
    return PeerModel(build_decoder(teacher.spec, weights), chosen, done)


def _check_installed(name: str, peer: Peer) -> None:
    if peer.program:
        if shutil.which(peer.program) is None:
            raise PeerError(f"{name}: {peer.program} is not on the PATH; {peer.install}")
        return
    try:
        metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        raise PeerError(f"{name}: {peer.package} is not installed; {peer.install}") from None


def saved_model(folder: Path, spec: ModelSpec) -> Decoder:
    """What `peer_model` made in `folder`."""
    return build_decoder(spec, load_file(folder / MODEL))


def _run(
    name: str, weights: dict[str, Tensor], teacher: Decoder, job: dict[str, Any], calibration: np.ndarray, folder: Path
) -> dict[str, Tensor]:
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    save_file(weights, folder / "weights.safetensors")
    np.save(folder / "tokens.npy", calibration)
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "jpq_export.peers.worker", name, str(folder.resolve())],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,  # some leave work folders behind
        env=os.environ | {"PYTHONPATH": paths},
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line] or ["no message"]
        raise PeerError(f"{name}: {told[-1].strip()}")
    return _checked(name, load_file(folder / "linears.safetensors"), teacher)


def _checked(name: str, linears: dict[str, Tensor], teacher: Decoder) -> dict[str, Tensor]:
    tables = () if PEERS[name].program else ("embed", "head")
    shapes = {key: shape for key, shape in teacher.spec.matrices().items() if key not in tables}
    for key, shape in shapes.items():
        if key not in linears or tuple(linears[key].shape) != shape:
            raise PeerError(f"{name}: {key} is missing or not {shape}")
        if not linears[key].isfinite().all():
            raise PeerError(f"{name}: {key} is not finite")
    return {key: linears[key] for key in shapes}


def table_moments(teacher: Decoder, calibration: np.ndarray) -> dict[str, Tensor]:
    """Second moments [hidden, hidden] of what embedding and head read: the same for every peer."""
    return plain_statistics(teacher, calibration).hessians


def _tables(teacher: Decoder, layout: Layout, hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embedding and head as our GPTQ baseline rounds them."""
    out = {}
    for key in ("embed", "head"):
        weight = named_weights(teacher).get(key)
        if weight is not None:
            parts = [quantize(w, hessians[key], layout.table, method="gptq").dequantize() for w in weight.split(ROWS)]
            out[key] = torch.cat(parts).cpu()
    return out
