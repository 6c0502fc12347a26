"""A jetson bundle without weights (random bytes), recorded vectors in their real layout, and described boards."""

import json
import platform
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jpq_export.engine.contents import add_device_files, bundle_names
from jpq_export.engine.device import Device
from jpq_export.engine.settings import Settings
from jpq_export.format.bundle import Manifest, hash_file, read_manifest, write_manifest
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec

VOCAB = 40
SPEC = ModelSpec(
    name="tiny",
    family="llama",
    vocab=VOCAB,
    hidden=32,
    head_dim=8,
    heads_per_group=2,
    layers=(LayerSpec(2, 48), LayerSpec(0, 48), LayerSpec(1, 0)),
    ropes=(RopeSpec((1.0, 0.1, 0.01, 0.001)),),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=8**-0.5,
    max_positions=4096,
)
PROMPT, STEPS, BOUND, PEAK = 12, 6, 1e-4, 8.0
Change = Callable[..., None]


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], meta: dict[str, str]) -> None:
    """By hand, so that the reader is not tested against itself; test_vectors.py also reads the package's files."""
    header: dict = {"__metadata__": meta}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        kind = {"float32": "F32", "int64": "I64"}[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def logits_of(tokens: np.ndarray) -> np.ndarray:
    """A stand-in for a model: logits [VOCAB] that depend on every real token before and their order."""
    state = np.zeros(VOCAB)
    for token in tokens:
        state = 0.7 * np.roll(state, 1) + np.cos(np.arange(VOCAB) * (token + 1) * 0.37)
    return state.astype(np.float32)


class StandIn:
    """What EngineSession does, with `logits_of` in the place of an engine."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.reset_count = error, 0
        self.reset()

    def reset(self) -> None:
        self.tokens: list[int] = []
        self.reset_count += 1

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        first = len(self.tokens)
        self.tokens += [int(token) for token in ids]
        mask = np.ones(len(self.tokens), np.int64) if mask is None else mask
        assert len(mask) == len(self.tokens)
        rows = []
        for end in range(first + 1, len(self.tokens) + 1):
            real = [token for token, m in zip(self.tokens[:end], mask, strict=False) if m]
            rows.append(logits_of(np.array(real)))
        out = np.stack(rows)
        out[..., 3] += self.error * np.abs(out).max()
        return out

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self.forward(ids)[-1]


def record() -> dict[str, np.ndarray]:
    """The tensors of vectors.safetensors, batched as parity/vectors.py computes them."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, VOCAB, (1, PROMPT))
    padded, mask = rng.integers(0, VOCAB, (3, 10)), np.ones((3, 10), np.int64)
    for row, empty in enumerate((5, 2, 0)):
        mask[row, :empty] = padded[row, :empty] = 0
    prefill = np.stack([logits_of(prompt[0, : end + 1]) for end in range(PROMPT)])
    tokens, decode = list(prompt[0]), [prefill[-1]]
    for _ in range(STEPS - 1):
        tokens.append(int(decode[-1].argmax()))
        decode.append(logits_of(np.array(tokens)))
    rows, start = [], 0
    for end in range(6, 11):  # 4 columns one by one
        for row in range(3):
            for at in range(start, end):
                if mask[row, at]:
                    rows.append(logits_of(padded[row, : at + 1][mask[row, : at + 1] == 1]))
        start = end
    greedy = np.array([row.argmax() for row in decode], np.int64)
    return {
        "ids.prefill": prompt.astype(np.int64),
        "ids.padded": padded.astype(np.int64),
        "mask.padded": mask,
        "greedy": greedy,
        "margin": np.full(STEPS, 1.0, np.float32),
        "rounding": np.full(STEPS, 1e-3, np.float32),
        "logits.last": prefill[-1:],
        "logits.prefill": prefill,
        "logits.padded": np.stack(rows),
        "logits.decode": np.stack(decode),
    }


def save_record(path: Path, tensors: dict[str, np.ndarray]) -> None:
    meta = {"jpq": json.dumps({"format": "jpq-vectors/1", "reference": "pytorch 2"})}
    write_safetensors(path, tensors, meta)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """plugins/ as a checkout with all parts has it, and a build folder that no bundle may carry."""
    folder = tmp_path / "checkout" / "plugins"
    for name in ("core/low_bit.h", "core/CMakeLists.txt", "tensorrt/plugin.cpp", "tensorrt/CMakeLists.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"// {name}\n", encoding="utf-8")
    (folder / "tensorrt" / "build").mkdir()
    (folder / "tensorrt" / "build" / "left.cpp").write_text("")
    (folder / "tensorrt" / "notes.o").write_text("")
    return folder


@pytest.fixture
def bundle(tmp_path: Path, sources: Path) -> Path:
    """A bundle for sm_87 and TensorRT 10.3, weights of 1000 bytes said to be 100 MB."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.trt.onnx").write_bytes(b"graph")
    (folder / "model.trt.onnx.data").write_bytes(bytes(1000))
    save_record(folder / "vectors.safetensors", record())
    bounds = {"logits": BOUND, "peak": PEAK}
    section = add_device_files(folder, sources, tensorrt="10.3", bounds=bounds, prompt=PROMPT, tokens=PROMPT + STEPS)
    manifest = Manifest(
        model={"name": "tiny", "spec": json.loads(SPEC.to_json())},
        target={"name": "jetson", "sm": 87, "tensorrt": "10.3"},
        method="jpq",
        bits_per_weight=4.0,
        weight_bytes=100_000_000,
        original_bytes=400_000_000,
        device=section,
    )
    names = {"model.trt.onnx", "model.trt.onnx.data", "vectors.safetensors"} | bundle_names(folder)
    write_manifest(folder, replace(manifest, files={name: hash_file(folder / name) for name in sorted(names)}))
    return folder


@pytest.fixture
def settings(bundle: Path) -> Settings:
    return Settings(bundle, bundle / "device" / "model.engine")


@pytest.fixture
def board() -> Device:
    """An Orin Nano as JetPack 6.2 leaves it, compilers included. A description; nothing of it was measured."""
    return Device(
        board="NVIDIA Jetson Orin Nano",
        machine=platform.machine(),
        python="3.10.12",
        free_memory_bytes=6_000_000_000,
        free_disk_bytes=20_000_000_000,
        sm=87,
        gpu="Orin",
        cuda="12.6",
        tensorrt="10.3.0.30",
        tools={"cmake": "/usr/bin/cmake", "nvcc": "/usr/local/cuda/bin/nvcc"},
    )


@pytest.fixture
def prebuilt(bundle: Path) -> Callable[..., Path]:
    """`prebuilt(sms=(87,), abi=1)` puts a library (not a real one) into the bundle, recorded in its manifest."""

    def do(sms: tuple[int, ...] = (87,), abi: int = 1) -> Path:
        path = bundle / "plugins" / "prebuilt" / "libjpq_tensorrt.so"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"library")
        manifest = read_manifest(bundle)
        name = path.relative_to(bundle).as_posix()
        entry = hash_file(path)
        raw = {"file": name, "sha256": entry.sha256, "sms": list(sms), "abi": abi, "machine": platform.machine()}
        section = {**(manifest.device or {}), "binaries": [raw]}
        write_manifest(bundle, replace(manifest, device=section, files={**manifest.files, name: entry}))
        return path

    return do


@pytest.fixture
def kit() -> SimpleNamespace:
    """What a test file cannot import from here."""
    return SimpleNamespace(
        SPEC=SPEC,
        StandIn=StandIn,
        logits_of=logits_of,
        record=record,
        save_record=save_record,
        bounds={"logits": BOUND, "peak": PEAK},
    )
