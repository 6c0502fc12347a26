"""Mutual information of Gaussian pairs against its closed form, and of layers that say much or nothing."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from jpq_export.compress.load import load_model  # noqa: E402
from jpq_export.methods.qpruner.information import (  # noqa: E402
    by_histogram,
    by_neighbours,
    layer_information,
    principal,
)

SAMPLES = 20_000  # the deviation of both estimates is about 1% then


def pair(correlation, seed=0):
    generator = np.random.default_rng(seed)
    x, noise = generator.normal(size=(2, SAMPLES))
    return x, correlation * x + np.sqrt(1 - correlation**2) * noise


@pytest.mark.parametrize("estimate", [by_neighbours, by_histogram])
@pytest.mark.parametrize("correlation", [0.8, 0.9, -0.9])
def test_a_gaussian_pair_is_within_five_percent(estimate, correlation):
    known = -np.log(1 - correlation**2) / 2
    assert estimate(*pair(correlation)) == pytest.approx(known, rel=0.05)


@pytest.mark.parametrize("estimate", [by_neighbours, by_histogram])
def test_twin_another_pairs_value_is_not(estimate):
    x, y = pair(0.8)
    assert estimate(x, y) != pytest.approx(-np.log(1 - 0.84**2) / 2, rel=0.05)
    assert estimate(x, np.random.default_rng(1).permutation(y)) < 0.02


@pytest.mark.parametrize("estimate", [by_neighbours, by_histogram])
def test_units_do_not_matter(estimate):
    """The neighbours' distances are taken after scaling, the bins are of ranks."""
    x, y = pair(0.8)
    assert estimate(1e3 * x + 5, y) == pytest.approx(estimate(x, y), rel=0.02)


def test_principal_components_are_those_of_largest_variance():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.1])
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    parts = principal(hidden @ turn, 2)
    centred = (hidden - hidden.mean(0)).double()
    for part, column in zip(parts.T, (1, 0), strict=True):
        assert abs(torch.corrcoef(torch.stack([part, centred[:, column]]))[0, 1]) > 0.99


def test_a_layer_that_says_nothing_has_no_information(tiny_folder):
    """The last layer's outputs made a hundred times smaller: the prediction no longer follows them."""
    model: torch.nn.Module = load_model(str(tiny_folder("llama"))).model
    ids = np.random.default_rng(0).integers(0, 256, size=(16, 128))
    before = layer_information(model, ids)
    layer = model.layers[1]
    for linear in (layer.attn.o, layer.mlp.down):
        linear.weight.data = linear.weight / 100
    after = layer_information(model, ids)
    for name in ("neighbours", "histogram"):
        assert after[name][1] < 0.6 * before[name][1]
        assert after[name][0] > 0.6 * before[name][0]  # the twin: the layer that still speaks keeps its information
