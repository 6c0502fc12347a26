"""One peer's run: `python -m jpq_export.peers.worker NAME FOLDER`.

FOLDER holds job.json (the spec, the layout), weights.safetensors (fp32, canonical names) and tokens.npy (int64
[n, length]); the peer's linears, as it would compute with them, go to linears.safetensors, what it took to done.json.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jpq_export.format.spec import ModelSpec
from jpq_export.peers.layout import PEERS, Peer
from jpq_export.progress import peak_memory_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What a peer is given; `bits` and `group_size` are 0 for a program, which chooses by `budget_bytes`."""

    spec: ModelSpec
    peer: Peer
    folder: Path
    budget_bytes: int
    bits: float
    group_size: int
    weights: dict[str, Tensor]
    tokens: np.ndarray

    def linears(self) -> list[str]:
        """What a peer rounds: all matrices but embedding and head."""
        return [name for name in self.spec.matrices() if name not in ("embed", "head")]

    def group_of(self, name: str) -> int:
        """The group size of a linear."""
        return self.peer.group_size(self.spec.matrices()[name][1], self.group_size)

    def ids(self) -> Tensor:
        """The calibration tokens [n, length]."""
        return torch.from_numpy(self.tokens)


def main(name: str, folder: Path) -> None:
    """Run peer `name` on the job in `folder`."""
    raw = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    peer = PEERS[name]
    job = Job(
        ModelSpec.from_json(raw["spec"]),
        peer,
        folder,
        raw["budget_bytes"],
        raw["bits"],
        raw["group_size"],
        load_file(folder / "weights.safetensors"),
        np.load(folder / "tokens.npy"),
    )
    start = time.perf_counter()
    torch.manual_seed(0)
    module = import_module(f"jpq_export.peers.by_{peer.package.replace('-', '_').replace('.', '_')}")
    linears = module.quantize(job)
    seconds = time.perf_counter() - start
    save_file({key: value.float().contiguous() for key, value in linears.items()}, folder / "linears.safetensors")
    version = module.version() if peer.program else metadata.version(peer.package)
    done = {"seconds": seconds, "peak_rss_bytes": peak_memory_bytes(), "version": version}
    (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
