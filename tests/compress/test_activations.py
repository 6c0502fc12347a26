"""Rounded activations: the formula, A3.2's channels, gradients, and that hooks come and go; twins that must fail."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jpq_export.compress.activations import (  # noqa: E402
    ACTIVATION_BITS,
    Rounding,
    linears,
    rounded,
    rounded_inputs,
    rounding_for,
)
from jpq_export.numerics.reference import int8_codes  # noqa: E402

IDS = np.random.default_rng(1).integers(0, 96, (4, 24))


@pytest.fixture(scope="module")
def decoder(conftest_of):
    tiny = conftest_of("lower")
    return tiny.torch_decoder(tiny.random_model(tiny.SPECS["llama"]))


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS))


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15), (3, 7)])
def test_every_token_has_its_own_step(bits, levels):
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1, 50, 0])[:, None]
    y = rounded(x, bits)
    for row, got in zip(x[:4], y[:4], strict=True):
        step = row.abs().max() / (2 ** (bits - 1) - 1)
        assert float((got - row).abs().max()) <= 0.5001 * float(step)
        assert len(got.unique()) <= levels
    assert torch.equal(y[4], x[4])
    whole = rounded(x.flatten()[None], bits).view_as(x)  # the twin: one step for all tokens loses the small one
    assert float(whole[0].abs().max()) < 1e-4 < float(y[0].abs().max())


def test_8_bits_are_the_reference_of_the_operator():
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    codes, step = int8_codes(x.numpy())
    np.testing.assert_array_equal(rounded(x, 8).numpy(), codes * step)


def test_the_gradient_passes_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    rounded(x, 4).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * rounded(x.detach(), 4))


def test_the_mixed_mode_keeps_the_fifth_with_the_largest_magnitudes(decoder):
    """Precise are the channels with outliers, which round with a step of their own; twin: without it all is lost."""
    rounding = rounding_for(decoder, 3.2, IDS)
    assert rounding.precise.keys() == linears(decoder).keys()
    for name, high in rounding.precise.items():
        assert int(high.sum()) == round(0.2 * len(high)), name
    peaks = {}
    handle = decoder.layers[0].attn.q.register_forward_pre_hook(lambda _m, x: peaks.update(q=x[0].abs()))
    logits(decoder)
    handle.remove()
    peak, high = peaks["q"].flatten(0, -2).amax(0), rounding.precise["layers.0.attn.q"]
    assert float(peak[high].min()) >= float(peak[~high].max())
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    x[:, 3] = 100.0
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[3, 5]] = True
    kept = Rounding(3.2, {"a": mask}).of(x, "a")
    assert float((kept - x)[:, ~mask].norm() / x[:, ~mask].norm()) < 0.3
    assert float(rounded(x, 4)[:, ~mask].norm()) == 0


def test_fewer_bits_cost_more_and_the_head_is_left_alone(decoder):
    plain = logits(decoder)
    seen = []
    for bits in ACTIVATION_BITS:
        with rounded_inputs(decoder, rounding_for(decoder, bits, IDS)):
            seen.append(float((logits(decoder) - plain).norm() / plain.norm()))
    assert seen[0] == 0 < seen[1] < 0.05 < seen[2] < seen[3]
    assert torch.equal(logits(decoder), plain)  # the hooks are gone
    assert not any(name in ("head", "embed") for name in linears(decoder))


def test_a_spec_that_rounds_makes_a_decoder_that_rounds(conftest_of, decoder):
    tiny = conftest_of("lower")
    model = tiny.random_model(tiny.SPECS["llama"])
    spec = replace(model.spec, activations="int8")
    with rounded_inputs(decoder, Rounding(8)):
        expected = logits(decoder)
    assert torch.equal(logits(tiny.torch_decoder(replace(model, spec=spec))), expected)
    assert not torch.equal(logits(decoder), expected)


def test_unknown_bits_and_kinds_are_refused(conftest_of):
    with pytest.raises(ValueError, match="activation bits"):
        Rounding(5)
    with pytest.raises(ValueError, match="activations"):
        replace(conftest_of("lower").LLAMA, activations="int4")
