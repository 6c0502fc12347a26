"""`jpq::LowBitMatMulInteger`: the graph's integers against the reference, every width and zero, and what must fail."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from jpq_export.errors import TargetError
from jpq_export.format.spec import INT8_ACTIVATIONS
from jpq_export.lower.export import export_onnx
from jpq_export.numerics import reference
from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.scheme import TERNARY, Scheme
from jpq_export.parity.bisect import find_divergence
from jpq_export.parity.runners import OrtRunner, TorchRunner

torch = pytest.importorskip("torch")

IDS = np.random.default_rng(1).integers(0, 96, (2, 9))
WIDTHS = (1, TERNARY, 2, 3, 4, 5, 6, 8)


def rounding_model(tiny, family="llama", **kind):
    """A random model whose linears round what they read."""
    model = tiny.model(tiny.specs[family], **kind)
    return replace(model, spec=replace(model.spec, activations=INT8_ACTIVATIONS))


def values_of(model, path):
    """All values inside onnxruntime's pass, and the runner."""
    export_onnx(model, path, form="custom_op")
    runner = OrtRunner(path, with_points=True)
    return runner.forward(IDS, values=True).values, runner


def product(model, name, x):
    codes, step = reference.int8_codes(x)
    y = (codes * step).astype(np.float64) @ model.weight(name).astype(np.float64).T
    return y + model.vectors.get(f"{name}.bias", 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_every_width(tiny, tmp_path, bits, symmetric):
    if bits == TERNARY and not symmetric:
        pytest.skip("ternary codes have no stored zero points")
    products_are_rounded(tiny, tmp_path, Scheme(bits, 16, symmetric=symmetric))


@pytest.mark.parametrize("bits", NORMAL_WIDTHS)
def test_products_of_normal_levels(tiny, tmp_path, bits):
    products_are_rounded(tiny, tmp_path, Scheme(bits, 16, normal=True))


def products_are_rounded(tiny, tmp_path, scheme):
    """Without rounding X the products differ a thousand times as much."""
    model = rounding_model(tiny, "biases", scheme_of=lambda _name, _i: scheme)
    values, _ = values_of(model, tmp_path / "m.onnx")
    for name, source in (("layers.0.attn.q", "layers.0.attn_norm"), ("layers.1.mlp.down", "layers.1.mlp.inner")):
        x = values[source]
        assert tiny.relative_rms(values[name], product(model, name, x)) < 1e-6
        exact = x.astype(np.float64) @ model.weight(name).astype(np.float64).T + model.vectors[f"{name}.bias"]
        assert tiny.relative_rms(values[name], exact) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "pruned"])
def test_no_linear_of_any_family_diverges(tiny, tmp_path, family):
    model = rounding_model(tiny, family)
    values, runner = values_of(model, tmp_path / "m.onnx")
    wanted = TorchRunner(model).forward(IDS, values=True).values
    assert find_divergence(model, runner, wanted, values) is None
    assert tiny.relative_rms(values["logits"], wanted["logits"]) < 0.05


def test_twin_a_wrong_scale_is_named(tiny, tmp_path):
    model = rounding_model(tiny)
    values, runner = values_of(model, tmp_path / "m.onnx")
    weight = model.quantized["layers.1.attn.o"]
    wrong = replace(weight, scales=np.roll(weight.scales, 1, axis=1))
    told = replace(model, quantized=model.quantized | {"layers.1.attn.o": wrong})
    found = find_divergence(told, runner, TorchRunner(told).forward(IDS, values=True).values, values)
    assert found is not None
    assert found.place == "layers.1.attn.o"


def test_twin_a_model_that_does_not_round_is_told_apart(tiny, tmp_path):
    model = rounding_model(tiny)
    values, runner = values_of(model, tmp_path / "m.onnx")
    plain = replace(model, spec=replace(model.spec, activations="float"))
    found = find_divergence(plain, runner, TorchRunner(plain).forward(IDS, values=True).values, values)
    assert found is not None


def test_a_token_of_zeros(tiny, tmp_path):
    """Its codes are 0, not NaN: here the embedding of token 7 is zero."""
    model = rounding_model(tiny)
    embed = model.quantized["embed"]
    scales = embed.scales.copy()
    scales[7] = 0
    model = replace(model, quantized=model.quantized | {"embed": replace(embed, scales=scales)})
    export_onnx(model, tmp_path / "m.onnx", form="custom_op")
    got = OrtRunner(tmp_path / "m.onnx").forward(np.full((1, 3), 7)).logits
    assert np.isfinite(got).all()
    assert tiny.relative_rms(got + 1, TorchRunner(model).forward(np.full((1, 3), 7)).logits + 1) < 1e-5


def test_the_graph_multiplies_integers(tiny, tmp_path):
    model = rounding_model(tiny)
    export_onnx(model, tmp_path / "m.onnx", form="custom_op")
    file = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    nodes = [node.op_type for node in file.graph.node]
    assert nodes.count("LowBitMatMulInteger") == 14
    assert nodes.count("LowBitMatMul") == 1  # the head
    bodies = [f for f in file.functions if f.name == "LowBitMatMulInteger"]
    assert bodies
    assert all([node.op_type for node in body.node].count("MatMulInteger") == 1 for body in bodies)


@pytest.mark.parametrize("kind", [{"form": "signed"}, {"form": "custom_op", "tensorrt": "10.7"}])
def test_tensorrt_graphs_are_refused(tiny, tmp_path, kind):
    with pytest.raises(TargetError, match="--activation-bits 16"):
        export_onnx(rounding_model(tiny), tmp_path / "m.onnx", **kind)
    assert not list(tmp_path.iterdir())
