"""llama.cpp: its own `llama-quantize` with an importance matrix of our calibration tokens, on a GGUF file of the model.

It mixes types by presets of its own, the embedding included, so what fits the bytes is found by its dry runs: the
preset with the largest linears, then the largest table, which is not narrower than all linears. Rows whose length is no
multiple of 256 get its fallback types.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from jpq_export.compress.decoder import build_decoder
from jpq_export.errors import BudgetError, JpqError
from jpq_export.peers.layout import LAYOUT, PEERS
from jpq_export.peers.worker import Job

PROGRAM = PEERS["llama.cpp"].program or ""
PRESETS = (
    *("Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S"),
    *("IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "Q2_0", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
)
TABLES = ("Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q2_0")  # of the embedding, for a preset whose own choice is too large
# type -> (weights, bytes) of a block; Q2_0 is younger than the Python package
BLOCKS = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()} | {"Q2_0": (64, 18)}
TENSOR = re.compile(r"\] (\S+) +- \[.*type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")  # of a dry run
THEIRS = {
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
TABLE = {"embed": "token_embd.weight", "head": "output.weight"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A preset, the embedding's type where it is not the preset's, and the type of every tensor."""

    preset: str
    table: str | None
    types: dict[str, str]

    def options(self) -> list[str]:
        """For the command line; the head follows the embedding."""
        return [] if self.table is None else ["--token-embedding-type", self.table, "--output-tensor-type", self.table]

    def sizes(self, job: Job) -> tuple[int, int]:
        """Bytes of the linears, and of the whole model with its fp32 vectors."""
        sizes = {name: _bytes(self.types[theirs(name)], shape) for name, shape in job.spec.matrices().items()}
        vectors = 4 * sum(job.spec.vectors().values())
        return sum(sizes[name] for name in job.linears()), sum(sizes.values()) + vectors

    def balanced(self) -> bool:
        """True when no table is narrower than every linear: such files are broken."""
        widths = {name: BLOCKS[kind][1] / BLOCKS[kind][0] for name, kind in self.types.items()}
        tables = [width for name, width in widths.items() if name in TABLE.values()]
        return min(tables) >= min(width for name, width in widths.items() if name not in TABLE.values())


def quantize(job: Job) -> dict[str, Tensor]:
    """Every matrix, embedding and head included, as llama.cpp dequantizes it; `layout.json` says what was chosen.

    Raises:
        BudgetError: no preset fits.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_model(job, folder / "model.gguf")
        _write_importance(job, folder / "importance.gguf")
        choice = _choose(job, folder)
        _run(folder, "--imatrix", "importance.gguf", *choice.options(), "model.gguf", "out.gguf", choice.preset)
        _run(folder, "--allow-requantize", "out.gguf", "plain.gguf", "F32")  # its own dequantization, of every type
        found = _read(job, folder / "plain.gguf")
    layout = {"preset": choice.preset, "table": choice.table, "bytes": choice.sizes(job)[1]}
    (job.folder / LAYOUT).write_text(json.dumps(layout), encoding="utf-8")
    return found


def version() -> str:
    """Of the program."""
    command = [
        PROGRAM,
        "--dry-run",
        "none.gguf",
        "F32",
    ]  # it has no --version, and says it before it looks for the file
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"version: (\S+)", told.stdout + told.stderr)
    return found[1] if found else "unknown"


def _choose(job: Job, folder: Path) -> Choice:
    """The largest linears that fit, then the largest table: what `layout_for` does for the others."""
    found = [_dry_run(folder, preset, table) for preset in PRESETS for table in (None, *TABLES)]
    known = [choice for choice in found if choice and set(choice.types.values()) <= BLOCKS.keys()]
    sized = [(choice.sizes(job), choice) for choice in known if choice.balanced()]
    fit = [(sizes, choice) for sizes, choice in sized if sizes[1] <= job.budget_bytes]
    if not fit:
        smallest = min((sizes[1] for sizes, _ in sized), default=0)
        raise BudgetError(
            f"llama.cpp: its smallest file has {smallest / 1e6:.2f} MB, asked for {job.budget_bytes / 1e6:.2f} MB; "
            "ask for more bits"
        )
    return max(fit, key=lambda pair: pair[0])[1]


def _dry_run(folder: Path, preset: str, table: str | None) -> Choice | None:
    """What a preset would store; None when this version does not know it."""
    choice = Choice(preset, table, {})
    done = subprocess.run(
        [PROGRAM, "--dry-run", "--imatrix", "importance.gguf", *choice.options(), "model.gguf", preset],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    lines = TENSOR.findall(done.stdout + done.stderr)
    if done.returncode or not lines:
        return None
    return Choice(preset, table, {name: (after or before).upper() for name, before, after in lines})


def _run(folder: Path, *arguments: str) -> None:
    command = [PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise JpqError(f"{' '.join(command)}: ended with code {done.returncode}; {done.stderr.strip()[-200:]}")


def _read(job: Job, path: Path) -> dict[str, Tensor]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    out = {}
    for name, shape in job.spec.matrices().items():
        out[name] = torch.from_numpy(tensors[theirs(name)].data.reshape(shape).copy())
    return out


def _bytes(kind: str, shape: tuple[int, int]) -> int:
    block, size = BLOCKS[kind]
    return shape[0] * shape[1] // block * size


def theirs(name: str) -> str:
    """'layers.3.attn.o' -> 'blk.3.attn_output.weight'."""
    if name in TABLE:
        return TABLE[name]
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{THEIRS[part]}.weight"


def _write_model(job: Job, path: Path) -> None:
    """What quantizing looks at. Nothing runs this file, so rows stay in our order: every row is rounded by itself."""
    spec = job.spec
    first = spec.layers[0]
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(len(spec.layers))
    file.add_embedding_length(spec.hidden)
    file.add_feed_forward_length(first.ffn)
    file.add_head_count(first.kv_heads * spec.heads_per_group)
    file.add_head_count_kv(first.kv_heads)
    file.add_key_length(spec.head_dim)
    file.add_value_length(spec.head_dim)
    file.add_layer_norm_rms_eps(spec.norm_eps)
    file.add_context_length(spec.max_positions)
    file.add_vocab_size(spec.vocab)
    file.add_rope_dimension_count(spec.head_dim)
    file.add_tokenizer_model("none")
    for name in spec.matrices():
        file.add_tensor(theirs(name), job.weights[name].numpy())
    _close(file)


def _write_importance(job: Job, path: Path) -> None:
    """Sums of squares of every linear's inputs, as `llama-imatrix` collects them; none for the embedding, as there."""
    model, sums = build_decoder(job.spec, job.weights), {}

    def collect(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].float().flatten(0, -2).square().sum(0)

        return hook

    for name in job.linears():
        model.get_submodule(name).register_forward_pre_hook(collect(name))
    with torch.no_grad():
        for row in job.ids():
            model.hidden(row[None], model.context(row[None]))
    file = gguf.GGUFWriter(path, "")
    file.add_type("imatrix")
    file.add_array("imatrix.datasets", ["calibration"])
    file.add_uint32("imatrix.chunk_count", len(job.tokens))
    file.add_uint32("imatrix.chunk_size", job.tokens.shape[1])
    for name, value in sums.items():
        file.add_tensor(f"{theirs(name)}.in_sum2", value.numpy()[None])
        file.add_tensor(f"{theirs(name)}.counts", np.array([[job.tokens.size]], np.float32))
    _close(file)


def _close(file: Any) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
