"""What is computed once per model and calibration text, and kept on disk: statistics, rounded weights, the price list.

Every later budget reads it: a plan then takes seconds, and an export resumes here after a kill. Files are safetensors
and JSON in a folder named by a hash of everything that went in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jpq_export.cache import cache_root
from jpq_export.compress.prices import PriceList, RoundedCache
from jpq_export.compress.rounding import Rounded
from jpq_export.compress.statistics import Statistics
from jpq_export.errors import PlanError, StorageError
from jpq_export.format.encoder_spec import is_table
from jpq_export.format.tensor_file import save_tensors
from jpq_export.numerics.scheme import read_width

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Price list, rounded weights, and the part of the statistics that compression needs again."""

    prices: PriceList
    cache: RoundedCache
    stats: Statistics


def prepared_folder(**inputs: object) -> Path:
    """The folder for these inputs (all of them JSON values)."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return cache_root() / "search" / digest[:24]


def check_cache(folder: Path) -> None:
    """StorageError when the price list could not be stored there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        probe = folder.with_name(f".write-test-{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _cannot_store(folder, error) from error


def _cannot_store(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder}: cannot store the price list ({error.strerror}); free some space or set JPQ_CACHE to a "
        "writable folder"
    )


def save_prepared(folder: Path, prepared: Prepared) -> None:
    """Write to a temporary folder and rename: a killed run leaves nothing that looks finished."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # in a container a killed run had the same process number
        partial.mkdir(parents=True)
        save_tensors(partial / "statistics.safetensors", _statistics_tensors(prepared.stats))
        save_tensors(partial / "rounded.safetensors", _rounded_tensors(prepared.cache))
        prepared.prices.save(partial / "prices.json")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_store(folder, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_prices(folder: Path) -> PriceList | None:
    """The price list alone, when it is there."""
    path = folder / "prices.json"
    return PriceList.load(path) if path.is_file() else None


def load_prepared(folder: Path, *, device: str = "cpu") -> Prepared | None:
    """All of it, when it is there and whole."""
    try:
        prices, stats = load_prices(folder), _load_statistics(folder, device)
        if prices is None or stats is None:
            return None
        return Prepared(prices, _load_rounded(folder / "rounded.safetensors", prices, device), stats)
    except (SafetensorError, PlanError, OSError) as error:
        logger.warning("%s: damaged (%s); making it again", folder, error)
        return None


def load_statistics(folder: Path, *, device: str = "cpu") -> Statistics | None:
    """The statistics alone: compression needs them without half a gigabyte of rounded weights."""
    try:
        return _load_statistics(folder, device)
    except (SafetensorError, OSError) as error:
        logger.warning("%s: damaged (%s); making it again", folder, error)
        return None


def _load_statistics(folder: Path, device: str) -> Statistics | None:
    path = folder / "statistics.safetensors"
    if not path.is_file():
        return None
    stats = Statistics()
    for name, value in load_file(path, device=device).items():
        kind, _, key = name.partition("/")
        if key:
            getattr(stats, kind)[key] = value
        else:
            setattr(stats, kind, value)
    stats.tokens = stats.token_weights.numel()
    return stats


def _statistics_tensors(stats: Statistics) -> dict[str, np.ndarray]:
    """Only what compression uses: layer Hessians are made anew from the compressed prefix."""
    out = {f"hessians/{name}": stats.hessians[name] for name in sorted(stats.hessians) if is_table(name)}
    out |= {f"outputs/{name}": moment for name, moment in stats.outputs.items()}
    out |= {"token_weights": stats.token_weights, "rows": stats.rows}
    return {name: value.cpu().numpy() for name, value in out.items()}


def _rounded_tensors(cache: RoundedCache) -> dict[str, np.ndarray]:
    out = {}
    for (name, bits), rounded in cache.entries.items():
        out[f"{bits}/{name}/codes"] = rounded.codes.cpu().numpy()
        out[f"{bits}/{name}/scales"] = rounded.scales.half().cpu().numpy()
    return out


def _load_rounded(path: Path, prices: PriceList, device: str) -> RoundedCache:
    cache, tensors = RoundedCache(), load_file(path, device=device)
    for name in [n for n in tensors if n.endswith("/codes")]:
        bits, matrix, _ = name.split("/")
        scales = tensors[f"{bits}/{matrix}/scales"].float()
        zeros = torch.full_like(scales, prices.scheme(tensors[name].shape[1], read_width(bits)).centre)
        cache.entries[matrix, read_width(bits)] = Rounded(tensors[name], scales, zeros)
    return cache
