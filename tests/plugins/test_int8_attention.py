"""Attention over an int8 cache in C against its definition: every implementation, outputs that start as NaN."""

import numpy as np
import pytest

from jpq_export.numerics import reference

IMPLEMENTATIONS = ("avx512", "avx2", "neon", "scalar")
OK, BAD_WEIGHT = 0, 1
TOLERANCE = 2e-6  # relative RMS: fp32 sums of some hundred terms, exponentials within 2 units of the last place
# batch, seq, past, room behind, heads, kv_heads, dim
SIZES = {
    "a token": (1, 1, 9, 4, 6, 2, 32),
    "a token far on": (1, 1, 700, 0, 9, 3, 64),  # three chunks of keys, the last of them not full
    "a token of a batch": (3, 1, 70, 2, 14, 2, 16),  # seven queries a key head: two calls of at most four
    "the first": (1, 1, 0, 0, 2, 1, 16),
    "a prompt": (1, 37, 0, 0, 6, 2, 48),
    "a prompt after a past": (2, 20, 65, 3, 4, 4, 32),
    "wide heads": (1, 9, 130, 0, 3, 1, 96),
    "two tiles of rows": (1, 13, 5, 1, 4, 2, 16),
}
MASK, NEW, CACHED = 3, 4, 8  # places in `inputs`
UNREAD = 77  # a code where nobody may read or write; scales there are NaN


def coded(rng, *shape):
    codes, scale = reference.int8_codes(rng.normal(size=shape).astype(np.float32))
    return codes, scale


def inputs(sizes, *, rotary=True, seed=0, window=None):
    """q, cos, sin, mask, new codes and scales, cached ones; rows are padded on the left as in a batch."""
    batch, seq, past, room, heads, kv_heads, dim = sizes
    rng, total = np.random.default_rng(seed), past + seq
    q = rng.normal(size=(batch, seq, heads * dim)).astype(np.float32)
    angle = rng.random((batch, seq, dim // 2)).astype(np.float32)
    mask = np.tril(np.ones((seq, total), bool), past)
    if window:
        mask &= ~np.tril(np.ones((seq, total), bool), past - window)
    mask = np.broadcast_to(mask, (batch, 1, seq, total)).copy()
    for row in range(batch):
        mask[row, ..., : row * 2 if past else 0] = False
    new = [coded(rng, batch, seq, kv_heads, dim) for _ in range(2)]
    cache = [coded(rng, total + room, batch, kv_heads, dim) for _ in range(2)]
    for codes, scale in cache:
        codes[past:], scale[past:] = UNREAD, np.nan
    tables = (np.cos(angle), np.sin(angle)) if rotary else (None, None)
    parts = [part[i] for pairs in (new, cache) for i in range(2) for part in pairs]
    return [q, *tables, mask.view(np.uint8), *parts], (batch, seq, total, heads, kv_heads, dim, dim**-0.5)


def expected(arrays, sizes):
    """Output in float64 and the cache."""
    q, cos, sin, mask, *parts = arrays
    rotary = None if cos is None else (cos.astype(float), sin.astype(float))
    facts = {"heads": sizes[3], "scale": sizes[6]}
    y, *cache = reference.int8_attention(
        q.astype(float), tuple(parts[:4]), mask.astype(bool), tuple(parts[4:]), rotary, **facts
    )
    return y, cache


def distance(got, wanted):
    return float(np.sqrt(np.mean(np.square(got - wanted)) / np.mean(np.square(wanted))))


def changed(arrays, at, change):
    """The arrays with one of them changed in place by a function."""
    out = list(arrays)
    out[at] = out[at].copy()
    change(out[at])
    return out


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_is_the_references(core_of, name, case, rotary):
    arrays, sizes = inputs(SIZES[case], rotary=rotary)
    status, y, cache = core_of(name).attend_int8(arrays, sizes, name)
    wanted, present = expected(arrays, sizes)
    assert status == OK
    assert distance(y, wanted) < TOLERANCE
    for got, other in zip(cache, present, strict=True):
        assert np.array_equal(got, other, equal_nan=True)  # room behind the new rows as it was

    def one_step(codes):
        codes[-1, -1, -1, -1] += 1 if codes[-1, -1, -1, -1] < 127 else -1

    def a_percent(scale):
        scale[-1, -1, -1] *= 1.01

    for at, change in ((NEW + 1, one_step), (NEW + 3, a_percent)):  # the twins: a code of a value, its scale
        assert distance(y, expected(changed(arrays, at, change), sizes)[0]) > TOLERANCE


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_the_mask_hides_is_not_looked_at(core_of, name):
    core = core_of(name)
    arrays, sizes = inputs((2, 30, 200, 0, 4, 2, 16), window=50)
    status, y, _ = core.attend_int8(arrays, sizes, name)
    assert status == OK
    assert distance(y, expected(arrays, sizes)[0]) < TOLERANCE

    def before(scales):
        scales[:140] *= 3  # before any window

    def within(scales):
        scales[200 - 40] *= 3

    assert np.array_equal(core.attend_int8(changed(arrays, CACHED + 2, before), sizes, name)[1], y)
    assert not np.array_equal(core.attend_int8(changed(arrays, CACHED + 2, within), sizes, name)[1], y)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seq", [1, 12])
def test_a_row_that_may_look_at_nothing_gives_zeros(core_of, name, seq):
    arrays, sizes = inputs((2, seq, 600, 0, 2, 1, 16))
    arrays[MASK] = arrays[MASK].copy()
    arrays[MASK][1, :, 0] = 0
    status, y, _ = core_of(name).attend_int8(arrays, sizes, name)
    assert status == OK
    assert not y[1, 0].any()
    assert distance(y, expected(arrays, sizes)[0]) < TOLERANCE


def test_sizes_that_do_not_fit_are_refused(core):
    arrays, sizes = inputs((1, 2, 3, 0, 4, 2, 16))
    assert core.attend_int8(arrays, (*sizes[:4], 3, *sizes[5:]), "scalar")[0] == BAD_WEIGHT
    assert core.attend_int8(arrays, (*sizes[:2], 1, *sizes[3:]), "scalar")[0] == BAD_WEIGHT
    odd = np.ones((1, 2, 6), np.float32)
    tables = np.ones((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32)
    assert core.to_int8(odd, odd, tables, kv_heads=2)[0] == BAD_WEIGHT


@pytest.mark.parametrize("shape", [(1, 1, 3, 64), (2, 7, 2, 20), (3, 5, 1, 16)])
def test_codes_and_scales_are_the_references_bit_for_bit(core, shape):
    rng = np.random.default_rng(3)
    key, value = (
        (rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:3], 1)) * 8))
        .astype(np.float32)
        .reshape(*shape[:2], -1)
        for _ in range(2)
    )
    status, got = core.to_int8(key, value, None, kv_heads=shape[2])
    assert status == OK
    wanted = reference.cache_codes(key, value, kv_heads=shape[2])
    for a, b in zip(got, wanted, strict=True):
        assert np.array_equal(a, b)
    assert np.abs(got[0].astype(int)).max() == 127
    assert not np.array_equal(reference.cache_codes(key * np.float32(1.001), value, kv_heads=shape[2])[2], got[2])


def test_keys_are_turned_before_and_values_are_not(core):
    rng = np.random.default_rng(4)
    key, value = (rng.normal(size=(2, 6, 3 * 32)).astype(np.float32) for _ in range(2))
    angle = rng.random((2, 6, 16)).astype(np.float32)
    rotary = np.cos(angle), np.sin(angle)
    status, got = core.to_int8(key, value, rotary, kv_heads=3)
    exact = reference.cache_codes(
        key.astype(float), value.astype(float), tuple(t.astype(float) for t in rotary), kv_heads=3
    )
    assert status == OK
    assert np.array_equal(got[1], reference.cache_codes(key, value, kv_heads=3)[1])
    np.testing.assert_allclose(got[2], exact[2], rtol=1e-6)  # a product and a sum in fp32
    steps = np.abs(got[0].astype(int) - exact[0])
    assert steps.max() <= 1
    assert steps.mean() < 1e-4  # only where a key lies in the middle between two codes
    assert np.mean(got[0] != reference.cache_codes(key, value, kv_heads=3)[0]) > 0.5  # the twin: not turned


def test_ties_go_to_even_zeros_stay_zero_and_no_number_is_seen(core):
    x = np.zeros((1, 4, 8), np.float32)
    x[0, 0] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3]
    x[0, 2] = np.float32(1e-44)  # below the smallest normal number
    x[0, 3, 2] = np.nan
    status, (keys, values, scales, _) = core.to_int8(x, x, None, kv_heads=1)
    assert status == OK
    assert keys[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -126, 3]  # half up: 1, 2, 3, ...
    assert np.array_equal(keys, values)
    assert not keys[0, 1:3].any()
    assert scales[0, 1] == 0
    assert np.isnan(scales[0, 3])
