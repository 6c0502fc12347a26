"""Tiny random compressed models, and whole bundles of them, for the tests of parity."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jpq_export.format.bundle import Manifest, read_manifest, write_manifest
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.numerics.scheme import Scheme
from jpq_export.parity.vectors import record_vectors

HEAD_DIM = 16
ROPE = RopeSpec(tuple(float(f) for f in 1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)))
LLAMA = ModelSpec(
    name="tiny",
    family="llama",
    vocab=96,
    hidden=64,
    head_dim=HEAD_DIM,
    heads_per_group=2,
    layers=(LayerSpec(2, 96), LayerSpec(2, 64), LayerSpec(2, 96)),
    ropes=(ROPE,),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=HEAD_DIM**-0.5,
    max_positions=256,
)
SPECS = {
    "llama": LLAMA,
    "pruned": replace(LLAMA, layers=(LayerSpec(2, 32), LayerSpec(0, 96), LayerSpec(1, 0)), tied=False, qkv_bias=True),
    "gemma": replace(
        LLAMA,
        layers=(LayerSpec(1, 96, window=8), LayerSpec(1, 96)),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embed_scale=8.0,
    ),
}
PROMPTS = [np.random.default_rng(i).integers(0, 96, size=30).tolist() for i in range(3)]


def quantize(matrix: np.ndarray, bits: float) -> QuantizedWeight:
    """Round to nearest in symmetric groups of 16."""
    scheme = Scheme(bits, 16)
    grouped = matrix.reshape(len(matrix), -1, 16)
    scales = (2 * np.abs(grouped).max(-1) / scheme.max_code + 1e-3).astype(np.float16)
    codes = np.rint(grouped / scales.astype(np.float32)[..., None] + scheme.centre)
    return store(np.clip(codes, 0, scheme.max_code).reshape(matrix.shape).astype(np.uint8), scales, None, scheme)


def random_model(spec: ModelSpec, seed: int = 0, widths: tuple[float, ...] = (4, 3, 8, 2, 3)) -> CompressedModel:
    rng = np.random.default_rng(seed)
    quantized = {}
    for index, (name, shape) in enumerate(spec.matrices().items()):
        matrix = rng.normal(size=shape) * (0.5 if name == "embed" else 1.5 * shape[1] ** -0.5)
        quantized[name] = quantize(matrix.astype(np.float32), widths[index % len(widths)])
    vectors = {
        name: (rng.normal(size=n) * 0.2 + ("norm" in name)).astype(np.float32) for name, n in spec.vectors().items()
    }
    return CompressedModel(spec, quantized, vectors)


@pytest.fixture(scope="session")
def models() -> dict[str, CompressedModel]:
    return {name: random_model(spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="session")
def whole_models(models) -> dict[str, CompressedModel]:
    """The same with zeros that INT4 and INT8 can hold."""
    fitted = {}
    for name, model in models.items():
        quantized = {}
        for key, weight in model.quantized.items():
            scheme = Scheme(weight.scheme.bits, 16, integer_zero=weight.scheme.bits in (4, 8))
            quantized[key] = QuantizedWeight(scheme, weight.shape, weight.packed, weight.scales)
        fitted[name] = CompressedModel(model.spec, quantized, model.vectors)
    return fitted


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return PROMPTS


def manifest_of(model: CompressedModel) -> Manifest:
    return Manifest(
        model={"name": "tiny", "source": "random", "sha256": "0" * 64, "parameters": 1, "spec": {}},
        target={"name": "cpu-x86"},
        method="rtn",
        bits_per_weight=3.5,
        weight_bytes=model.weight_bytes,
        original_bytes=4 * model.weight_bytes,
    )


@pytest.fixture(scope="session")
def pristine(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "bundle"
    folder.mkdir()
    export_onnx(models["llama"], folder / "model.onnx", form="custom_op")
    record_vectors(models["llama"], folder / "vectors.safetensors", prompts=PROMPTS, steps=12)
    write_manifest(folder, manifest_of(models["llama"]).with_contents(folder))
    return folder


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A fresh copy of one good bundle."""
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.fixture
def rehash() -> Callable[[Path], None]:
    """Write a manifest that fits whatever lies in the folder."""
    return lambda folder: write_manifest(folder, read_manifest(folder).with_contents(folder))


@pytest.fixture
def damage() -> Callable[[Path, str, Callable[[np.ndarray], np.ndarray]], None]:
    """`damage(folder, initializer, change)` rewrites one initializer inside model.onnx.data."""
    return edit_initializer


def edit_initializer(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    import onnx
    from onnx import helper

    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(where["offset"]), int(where["length"])
    data = folder / where["location"]
    content = bytearray(data.read_bytes())
    array = np.frombuffer(bytes(content[offset : offset + length]), helper.tensor_dtype_to_np_dtype(tensor.data_type))
    changed = change(array.reshape(tensor.dims).copy())
    assert changed.tobytes() != array.tobytes()
    content[offset : offset + length] = changed.tobytes()
    data.write_bytes(content)
