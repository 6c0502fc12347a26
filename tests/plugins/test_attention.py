"""Attention in C against its definition: every implementation, every division into tasks, outputs that start as NaN."""

import numpy as np
import pytest

from jpq_export.numerics import reference

IMPLEMENTATIONS = ("avx512", "avx2", "neon", "scalar")
LANES = {"avx512": 16, "avx2": 8, "neon": 8, "scalar": 1}
OK, BAD_WEIGHT, NOT_HERE = 0, 1, 4
TOLERANCE = 2e-6  # relative RMS: fp32 sums of some hundred terms, exponentials within 2 units of the last place
# batch, seq, past, room behind, heads, kv_heads, dim
SIZES = {
    "a token": (1, 1, 9, 4, 6, 2, 32),
    "a token far on": (1, 1, 700, 0, 9, 3, 16),  # six chunks of keys, the last of them not full
    "a token of a batch": (3, 1, 70, 2, 14, 2, 16),  # seven queries a key head: two calls of at most four
    "a token of a batch far on": (2, 1, 300, 1, 14, 2, 16),  # the same in three chunks of keys
    "wide heads far on": (1, 1, 290, 1, 8, 8, 128),  # as many keys a task as fit: 32
    "the first": (1, 1, 0, 0, 2, 1, 16),
    "a prompt": (1, 37, 0, 0, 6, 2, 48),
    "a prompt after a past": (2, 20, 65, 3, 4, 4, 32),
    "wide heads": (1, 9, 130, 0, 3, 1, 96),
    "two tiles of rows": (1, 13, 5, 1, 4, 2, 16),
}


def inputs(sizes, *, rotary=True, seed=0, window=None):
    """Arrays as the C functions take them, all that nobody may read NaN; rows are padded on the left as in a batch."""
    batch, seq, past, room, heads, kv_heads, dim = sizes
    rng, total = np.random.default_rng(seed), past + seq
    q, k, v = (rng.normal(size=(batch, seq, n * dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    angle = rng.random((batch, seq, dim // 2)).astype(np.float32)
    mask = np.tril(np.ones((seq, total), bool), past)
    if window:
        mask &= ~np.tril(np.ones((seq, total), bool), past - window)
    mask = np.broadcast_to(mask, (batch, 1, seq, total)).copy()
    for row in range(batch):
        mask[row, ..., : row * 2 if past else 0] = False
    cache = [rng.normal(size=(total + room, batch, kv_heads, dim)).astype(np.float32) for _ in range(2)]
    for tensor in cache:
        tensor[past:] = np.nan
    tables = (np.cos(angle), np.sin(angle)) if rotary else (None, None)
    return [q, k, v, *tables, mask.view(np.uint8), *cache], (batch, seq, total, heads, kv_heads, dim, dim**-0.5)


def expected(arrays, sizes):
    q, k, v, cos, sin, mask, keys, values = (a if a is None or a.dtype == np.uint8 else a.astype(float) for a in arrays)
    *_, heads, kv_heads, _, scale = sizes
    rotary = None if cos is None else (cos, sin)
    facts = {"heads": heads, "kv_heads": kv_heads, "scale": scale}
    return reference.attention(q, k, v, mask.astype(bool), (keys, values), rotary, **facts)


def distance(got, wanted):
    return float(np.sqrt(np.mean(np.square(got - wanted)) / np.mean(np.square(wanted))))


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_is_the_references(core_of, name, case, rotary):
    core = core_of(name)
    arrays, sizes = inputs(SIZES[case], rotary=rotary)
    status, y, keys, values = core.attend(arrays, sizes, name)
    wanted, *present = expected(arrays, sizes)
    total = sizes[2]
    assert status == OK
    assert distance(y, wanted) < TOLERANCE
    for got, other in zip((keys, values), present, strict=True):
        np.testing.assert_allclose(got[:total], other[:total], rtol=1e-6, atol=1e-6)
        assert np.isnan(got[total:]).all(), "written behind the new rows"
    arrays[2] = arrays[2].copy()
    arrays[2][-1, -1, -1] += 0.05  # the twin: one number of one new value
    assert distance(y, expected(arrays, sizes)[0]) > TOLERANCE


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_the_mask_hides_is_not_looked_at(core_of, name):
    core = core_of(name)
    arrays, sizes = inputs((2, 30, 200, 0, 4, 2, 16), window=50)
    status, y, *_ = core.attend(arrays, sizes, name)
    assert status == OK
    assert distance(y, expected(arrays, sizes)[0]) < TOLERANCE
    arrays[6] = arrays[6].copy()
    arrays[6][:140] += 3  # before any window
    assert np.array_equal(core.attend(arrays, sizes, name)[1], y)
    arrays[6][200 - 40] += 3  # the twin
    assert not np.array_equal(core.attend(arrays, sizes, name)[1], y)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seq", [1, 12])
def test_a_row_that_may_look_at_nothing_gives_zeros(core_of, name, seq):
    arrays, sizes = inputs((2, seq, 600, 0, 2, 1, 16))
    arrays[5] = arrays[5].copy()
    arrays[5][1, :, 0] = 0
    status, y, *_ = core_of(name).attend(arrays, sizes, name)
    assert status == OK
    assert not y[1, 0].any()
    assert distance(y, expected(arrays, sizes)[0]) < TOLERANCE


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seq", [2, 20])
def test_low_scores_behind_keys_that_are_hidden_keep_their_order(core_of, name, seq):
    """Of rows that see nothing for a whole block, then scores of which e^x is 0: the largest still counts as 1."""
    arrays, sizes = inputs((1, seq, 300, 0, 2, 1, 16), rotary=False)
    arrays[0] = np.full_like(arrays[0], 10)
    arrays[1] = np.full_like(arrays[1], -10)
    arrays[6] = arrays[6].copy()
    arrays[6][:300] = -10 - 0.02 * np.arange(300)[:, None, None, None]
    arrays[5] = arrays[5].copy()
    arrays[5][0, :, 0, :200] = 0
    status, y, *_ = core_of(name).attend(arrays, sizes, name)
    assert status == OK
    assert distance(y, expected(arrays, sizes)[0]) < 1e-4  # scores of hundreds


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_stay_finite(core_of, name):
    arrays, sizes = inputs((1, 1, 300, 0, 2, 1, 16), rotary=False)
    arrays[0] = arrays[0] * np.float32(300)
    status, y, *_ = core_of(name).attend(arrays, sizes, name)
    assert status == OK
    assert np.isfinite(y).all()
    assert distance(y, expected(arrays, sizes)[0]) < 1e-4  # scores of hundreds: their own rounding, exponentiated


def test_widths_no_vector_fits_are_left_to_others(core):
    arrays, sizes = inputs((1, 2, 3, 0, 2, 1, 12))
    for name in core.names:
        if name in LANES:
            assert core.attend(arrays, sizes, name)[0] == (NOT_HERE if 12 % LANES[name] else OK)


def test_sizes_that_do_not_fit_are_refused(core):
    arrays, sizes = inputs((1, 2, 3, 0, 4, 2, 16))
    assert core.attend(arrays, (*sizes[:4], 3, *sizes[5:]), "scalar")[0] == BAD_WEIGHT
    assert core.attend(arrays, (*sizes[:2], 1, *sizes[3:]), "scalar")[0] == BAD_WEIGHT
