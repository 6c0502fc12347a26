"""Sequences in one pass: each gets what it would get alone, whoever joins, leaves or is read meanwhile."""

import dataclasses

import numpy as np
import pytest

from jpq_export.errors import CapacityError, UsageError
from jpq_export.runtime import batching
from jpq_export.runtime.batching import Batcher, Sequence
from jpq_export.runtime.generate import generate
from jpq_export.runtime.sampling import Sampling
from jpq_export.runtime.slots import Slots

PROMPTS = [[3, 4, 5], [9], [8, 7, 6, 5, 4, 3, 2], [11, 12], [20, 21, 22, 23]]


def ask(new, **options):
    return Sampling(max_new_tokens=new, stop_ids=(), **options)


def alone(model, prompt, new, **options):
    return list(generate(model, prompt, max_new_tokens=new, stop_ids=[], **options))


def finish(batcher):
    for _ in range(200):
        if not batcher.busy:
            return
        batcher.step()
    raise AssertionError("never done")


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 2, 128])
def test_each_sequence_gets_what_it_gets_alone(model, monkeypatch, slots, chunk):
    monkeypatch.setattr(batching, "CHUNK", chunk)
    batcher = Batcher(model, slots=slots, capacity=24)
    sequences = [Sequence(prompt, ask(5 + 2 * i)) for i, prompt in enumerate(PROMPTS)]
    for sequence in sequences:
        batcher.add(sequence)
    finish(batcher)
    expected = [alone(model, prompt, 5 + 2 * i) for i, prompt in enumerate(PROMPTS)]
    assert [sequence.tokens for sequence in sequences] == expected
    assert len({tuple(tokens[:5]) for tokens in expected}) == len(PROMPTS)


def test_twin_rows_mixed_up_are_noticed(model, monkeypatch):
    leave = Slots.leave
    monkeypatch.setattr(Slots, "leave", lambda self, rows: leave(self, {len(self.lengths) - 1 - row for row in rows}))
    batcher = Batcher(model, slots=5, capacity=24)
    sequences = [Sequence(prompt, ask(3 + 3 * i)) for i, prompt in enumerate(PROMPTS)]
    for sequence in sequences:
        batcher.add(sequence)
    finish(batcher)
    expected = [alone(model, prompt, 3 + 3 * i) for i, prompt in enumerate(PROMPTS)]
    assert [sequence.tokens for sequence in sequences] != expected


def test_sampled_sequences_keep_their_own_random_numbers(model):
    batcher = Batcher(model, slots=3, capacity=24)
    sequences = [Sequence([3, 4], ask(9, temperature=2.0, seed=seed)) for seed in (1, 2, 1)]
    for sequence in sequences:
        batcher.add(sequence)
    finish(batcher)
    assert sequences[0].tokens == sequences[2].tokens == alone(model, [3, 4], 9, temperature=2.0, seed=1)
    assert sequences[0].tokens != sequences[1].tokens


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.parametrize("chunk", [2, 128])
def test_one_that_is_cancelled_frees_its_slot_and_disturbs_nobody(model, monkeypatch, steps, chunk):
    """After 0 steps it waits, then its prompt is being read, then it gets tokens."""
    monkeypatch.setattr(batching, "CHUNK", chunk)
    batcher = Batcher(model, slots=2, capacity=24)
    gone, stays, comes = Sequence(PROMPTS[2], ask(17)), Sequence(PROMPTS[0], ask(12)), Sequence(PROMPTS[4], ask(12))
    for sequence in (gone, stays, comes):
        batcher.add(sequence)
    for _ in range(steps):
        batcher.step()
    batcher.cancel(gone)
    batcher.cancel(gone)  # once more changes nothing
    before = len(gone.tokens)
    assert batcher.running <= 1
    finish(batcher)
    assert stays.tokens == alone(model, PROMPTS[0], 12)
    assert comes.tokens == alone(model, PROMPTS[4], 12)
    assert len(gone.tokens) == before < 17


def test_no_more_than_the_slots_run(model):
    batcher = Batcher(model, slots=2, capacity=24)
    for prompt in PROMPTS:
        batcher.add(Sequence(prompt, ask(4)))
    most = 0
    while batcher.busy:
        batcher.step()
        most = max(most, batcher.running)
    assert most == 2


def test_a_long_prompt_does_not_hold_up_the_others(model, monkeypatch):
    monkeypatch.setattr(batching, "CHUNK", 2)
    batcher = Batcher(model, slots=2, capacity=24)
    first, second = Sequence([3], ask(10)), Sequence([5] * 10, ask(3))
    batcher.add(first)
    batcher.step()
    batcher.add(second)
    for _ in range(5):  # as many as its prompt takes
        assert second.tokens == []
        batcher.step()
    assert len(first.tokens) == 6
    assert len(second.tokens) == 1


def test_the_capacity_is_fixed(model):
    batcher = Batcher(model, slots=1, capacity=10)
    batcher.add(Sequence([3] * 7, ask(3)))
    with pytest.raises(CapacityError, match="7 tokens and 4 new ones need more than the capacity of 10 tokens"):
        batcher.add(Sequence([3] * 7, ask(4)))
    with pytest.raises(UsageError, match="token 40"):
        batcher.add(Sequence([40], ask(1)))
    finish(batcher)


def test_nothing_asked_for_is_done_at_once(model):
    batcher, sequence = Batcher(model, slots=1, capacity=24), Sequence([3], ask(0))
    batcher.add(sequence)
    assert (batcher.busy, sequence.finish_reason) == (False, "length")


def test_padding_that_nobody_needs_is_cut_off(model):
    slots = Slots(model)
    for prompt in ([3] * 9, [4, 5], [6]):
        decoding = model.start()
        decoding.step(prompt)
        slots.join(decoding)
    assert slots.lengths.tolist() == [9, 2, 1]
    slots.leave({0})
    assert slots._cache.length == 2
    slots.step([7, 8])
    slots.leave({0, 1})
    assert slots.lengths.size == 0
    assert slots._cache is None


def test_a_row_may_be_joined_by_a_longer_one(model):
    slots, expected = Slots(model), []
    for prompt in ([4, 5], [3, 9, 8, 7, 6]):
        decoding = model.start()
        decoding.step(prompt)
        slots.join(decoding)
        expected.append(model.forward(np.array([[*prompt, 13]])).logits[0, -1])
    got = slots.step([13, 13])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(got[0] - got[1]).max() > 0.1 * np.abs(got).max()


def test_options_are_checked_when_they_are_made():
    good = Sampling()
    for change in ({"temperature": -1.0}, {"top_p": 0.0}, {"stop": ["a list"]}):
        with pytest.raises(UsageError):
            dataclasses.replace(good, **change)
