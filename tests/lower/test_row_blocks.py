"""Two widths inside one layer: the graph in onnxruntime against the PyTorch decoder, its bytes, and what must fail."""

from dataclasses import replace

import numpy as np
import pytest

from jpq_export.errors import TargetError
from jpq_export.format.compressed import CompressedModel
from jpq_export.lower.export import export_onnx, weight_bytes
from jpq_export.numerics.row_blocks import RowBlocks, RowLayout
from jpq_export.numerics.scheme import TERNARY, Scheme
from jpq_export.runtime.session import OrtModel

torch = pytest.importorskip("torch")

BOUND = 3e-6  # as in test_export.py: fp32 in another order of sums; the twin is four orders of magnitude above it
IDS = np.random.default_rng(1).integers(0, 96, (2, 9))


def in_blocks(tiny, family, *, ordered=False, widths=(4, TERNARY, 2)):
    """Every linear in three blocks of unlike widths, its rows shuffled unless `ordered`."""
    model, rng = tiny.model(tiny.specs[family]), np.random.default_rng(5)
    quantized = dict(model.quantized)
    for name, weight in model.quantized.items():
        rows = weight.shape[0]
        if name in ("embed", "head") or not rows:
            continue
        counts = (rows // 2, rows // 4, rows - rows // 2 - rows // 4)
        order = None if ordered else tuple(int(r) for r in rng.permutation(rows))
        layout = RowLayout(tuple((Scheme(b, 16), n) for b, n in zip(widths, counts, strict=True)), order)
        codes = (rng.random(weight.shape) * (layout.max_codes()[:, None] + 1)).astype(np.uint8)
        scales = rng.random((rows, weight.shape[1] // 16)) * 0.1 + 0.02
        quantized[name] = layout.store(codes, scales, None)
    return replace(model, quantized=quantized)


def run(model, path, **kind):
    export_onnx(model, path, **kind)
    return OrtModel(path, threads=1, exact=True).forward(IDS).logits


def expected(tiny, model):
    with torch.no_grad():
        return tiny.decoder(model)(torch.from_numpy(IDS)).numpy()


@pytest.mark.parametrize("kind", [{"form": "custom_op"}, {"form": "qdq"}, {"form": "custom_op", "tensorrt": "10.7"}])
@pytest.mark.parametrize(("family", "ordered"), [("llama", False), ("biases", False), ("biases", True)])
def test_graph_equals_the_decoder(tiny, tmp_path, kind, family, ordered):
    model = in_blocks(tiny, family, ordered=ordered)
    got = run(model, tmp_path / "m.onnx", **kind)
    assert tiny.relative_rms(got, expected(tiny, model)) < BOUND


def test_twin_rows_gathered_from_the_wrong_places_are_caught(tiny, tmp_path):
    model = in_blocks(tiny, "llama")
    weight = model.quantized["layers.0.mlp.up"]
    assert isinstance(weight, RowBlocks)
    assert weight.positions is not None
    wrong = {"layers.0.mlp.up": RowBlocks(weight.blocks, np.roll(weight.positions, 1))}
    got = run(replace(model, quantized=model.quantized | wrong), tmp_path / "m.onnx", form="custom_op")
    assert tiny.relative_rms(got, expected(tiny, model)) > 1e-2


def test_the_kernels_compute_it_too(tiny, tmp_path, kernels):
    model = in_blocks(tiny, "llama", widths=(4, 2, 2))
    export_onnx(model, tmp_path / "m.onnx", form="custom_op")
    got = OrtModel(tmp_path / "m.onnx", threads=1, exact=True).forward(IDS).logits
    assert tiny.relative_rms(got, expected(tiny, model)) < BOUND


def test_the_file_holds_exactly_the_bytes_that_are_counted(tiny, tmp_path):
    model = in_blocks(tiny, "biases")
    export_onnx(model, tmp_path / "m.onnx", form="custom_op")
    small = 4096  # constants of the graph: shapes, rotary frequencies
    assert 0 <= weight_bytes(tmp_path / "m.onnx") - model.weight_bytes < small


def test_a_saved_model_comes_back(tiny, tmp_path):
    model = in_blocks(tiny, "biases")
    model.save(tmp_path / "m.safetensors")
    again = CompressedModel.load(tmp_path / "m.safetensors")
    assert again.weight_bytes == model.weight_bytes
    assert again.vectors.keys() == model.vectors.keys()
    for name, weight in model.quantized.items():
        np.testing.assert_array_equal(again.quantized[name].dequantize(), weight.dequantize())


def test_signed_graphs_refuse_them_by_name(tiny, tmp_path):
    with pytest.raises(TargetError, match=r"layers\.0\.attn\.q: rows of several widths"):
        export_onnx(in_blocks(tiny, "llama"), tmp_path / "m.onnx", form="signed")


def test_training_the_scales_keeps_the_blocks(tiny):
    """PyTorch student and back: widths, order and codes as they were."""
    from jpq_export.compress.student import to_compressed, to_student
    from jpq_export.numerics.row_blocks import layout_of

    model = in_blocks(tiny, "llama")
    layouts = {name: layout_of(weight) for name, weight in model.quantized.items()}
    again = to_compressed(to_student(model), layouts)
    assert {name: layout_of(weight) for name, weight in again.quantized.items()} == layouts
    np.testing.assert_array_equal(
        again.quantized["layers.1.mlp.down"].codes(), model.quantized["layers.1.mlp.down"].codes()
    )
