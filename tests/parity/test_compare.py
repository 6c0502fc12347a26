"""Error measures: against slow definitions, and that they see what they must."""

import numpy as np
import pytest

from jpq_export.parity.compare import (
    LogitsTally,
    compare_logits,
    kl_divergence,
    margin,
    peak_error,
    relative_rms,
    sketch,
    worst,
)

RNG = np.random.default_rng(0)


def test_relative_rms_weighs_positions_alike():
    reference = np.array([[100.0, 0.0], [0.0, 1.0]])
    value = reference + np.array([[0.0, 0.0], [0.1, 0.0]])
    assert relative_rms(reference, value) == pytest.approx(0.1 / np.sqrt(2))


def test_equal_is_exactly_zero_and_shapes_must_match():
    x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    assert relative_rms(x, x) == peak_error(x, x) == 0.0
    with pytest.raises(ValueError, match="shapes differ"):
        relative_rms(x, x[:1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float):
    reference = RNG.normal(size=(3, 8))
    value = reference.copy()
    value[1, 2] = bad
    assert relative_rms(reference, value) == np.inf
    assert relative_rms(value, value) == np.inf  # a NaN on both sides is not agreement
    assert compare_logits(reference, value).kl_mean == np.inf


def test_peak_error_sees_one_feature_that_the_mean_hides():
    reference = RNG.normal(size=(10, 4000))
    value = reference.copy()
    value[3, 17] += 0.01
    assert relative_rms(reference, value) < 1e-4
    assert peak_error(reference, value) > 5e-3


def test_kl_equals_its_definition():
    p_logits, q_logits = RNG.normal(size=(2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p_logits, q_logits))
    np.testing.assert_allclose(kl_divergence(p_logits, q_logits), (p * np.log(p / q)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(kl_divergence(p_logits + 1000, p_logits), 0, atol=1e-12)


def test_tally_equals_one_comparison_of_everything():
    reference = RNG.normal(size=(50, 20)).astype(np.float32)
    value = (reference + 0.3 * RNG.normal(size=reference.shape)).astype(np.float32)
    tally = LogitsTally()
    for start in range(0, 50, 7):
        tally.add(reference[start : start + 7], value[start : start + 7])
    once, parts = compare_logits(reference, value), tally.result()
    assert tally.positions == 50
    assert parts.rel_rms == pytest.approx(once.rel_rms)
    assert (parts.max_abs, parts.kl_p99) == (once.max_abs, once.kl_p99)
    assert parts.kl_mean == pytest.approx(float(kl_divergence(reference, value).mean()))
    assert parts.top1_agreement == np.mean(reference.argmax(-1) == value.argmax(-1)) < 1


def test_worst_takes_the_worst_of_each():
    good = compare_logits(np.eye(4), np.eye(4))
    bad = compare_logits(np.eye(4), np.eye(4)[::-1])
    assert worst([good, bad]) == bad


def test_margin():
    assert margin(np.array([1.0, 5.0, 4.5, -3.0])) == 0.5


def test_sketch_is_linear_keeps_norms_and_small_arrays():
    x, y = RNG.normal(size=(2, 6, 5000))
    np.testing.assert_allclose(sketch(x, 256) + sketch(y, 256), sketch(x + y, 256), atol=1e-3)
    assert np.linalg.norm(sketch(x, 256)) == pytest.approx(np.linalg.norm(x), rel=0.15)
    assert np.array_equal(sketch(x[:, :256], 256), x[:, :256].astype(np.float32))


def test_sketch_is_the_same_on_every_machine():
    expected = [0.0] * 8
    for i in range(1000):  # splitmix64 in plain integers
        z = (i + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        expected[z % 8] += i if z >> 63 else -i
    assert sketch(np.arange(1000.0), 8).tolist() == expected


def test_sketch_moves_one_sum_for_one_feature():
    x = RNG.normal(size=(1, 5000))
    changed = x.copy()
    changed[0, 1234] += 1
    different = np.flatnonzero(sketch(x, 256) != sketch(changed, 256))
    assert len(different) == 1
