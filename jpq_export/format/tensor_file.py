"""Safetensors files written so that the same tensors give the same bytes, and a full disk one line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jpq_export.errors import StorageError


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], *, meta: Any = None) -> None:
    """Write `tensors` by sorted name; `meta` becomes JSON under the one key "jpq".

    Only one key, because safetensors writes several in random order.
    """
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    metadata = None if meta is None else {"jpq": json.dumps(meta, sort_keys=True)}
    try:
        save_file(arrays, path, metadata=metadata)
    except SafetensorError as error:  # also for what the system refuses, without its number
        path.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot write ({error}); free some space or choose another place") from error
    mask = os.umask(0)  # the library leaves the file readable for its owner alone
    os.umask(mask)
    path.chmod(0o666 & ~mask)
