"""Generation: greedy, sampled, stopped, and refused."""

import numpy as np
import pytest

from jpq_export.errors import CapacityError, UsageError
from jpq_export.runtime.generate import generate
from jpq_export.runtime.sampling import choose
from jpq_export.runtime.session import OrtModel

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))


def drawn(**options):
    rng = np.random.default_rng(0)
    return [choose(LOGITS, rng, **options) for _ in range(4000)]


def frequencies(tokens):
    return np.bincount(tokens, minlength=4) / len(tokens)


def test_greedy_is_the_argmax_of_the_whole_pass_again_and_again(model):
    prompt = [3, 4, 5]
    got = list(generate(model, prompt, max_new_tokens=10, stop_ids=[]))
    expected = list(prompt)
    for _ in range(10):
        expected.append(int(model.forward(np.array([expected])).logits[0, -1].argmax()))
    assert got == expected[3:]
    assert len(set(got)) > 1


def test_learned_positions_are_followed_to_the_last_and_no_further(make_bundle, conftest_of):
    model = OrtModel(make_bundle(spec=conftest_of("runtime").GPT2) / "model.onnx", threads=1)
    prompt = [3, 4, 5]
    got = list(generate(model, prompt, max_new_tokens=21, stop_ids=[]))
    expected = list(prompt)
    for _ in range(21):
        expected.append(int(model.forward(np.array([expected])).logits[0, -1].argmax()))
    assert got == expected[3:]
    again = model.forward(np.array([prompt]), position_ids=np.array([[0, 0, 0]])).logits
    assert np.abs(again - model.forward(np.array([prompt])).logits).max() > 1e-2
    with pytest.raises(CapacityError, match="capacity of 24 tokens"):
        list(generate(model, prompt, max_new_tokens=22, stop_ids=[]))


def test_a_stop_token_ends_it_and_is_not_given(model):
    free = list(generate(model, [3, 4, 5], max_new_tokens=10, stop_ids=[]))
    stop = free[3]
    assert list(generate(model, [3, 4, 5], max_new_tokens=10, stop_ids=[stop])) == free[: free.index(stop)]


def test_the_models_own_stop_tokens_are_the_default(model):
    prompt = next(
        [start]
        for start in range(2, 40)
        if 1 in generate(model, [start], max_new_tokens=20, temperature=3.0, stop_ids=[])
    )
    free = list(generate(model, prompt, max_new_tokens=20, temperature=3.0, stop_ids=[]))
    assert list(generate(model, prompt, max_new_tokens=20, temperature=3.0)) == free[: free.index(1)]


def test_a_seed_repeats_and_another_does_not(model):
    def run(seed):
        return list(generate(model, [3], max_new_tokens=20, temperature=2.0, seed=seed, stop_ids=[]))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_no_new_tokens(model):
    assert list(generate(model, [3], max_new_tokens=0)) == []


def test_temperature_one_draws_the_distribution():
    np.testing.assert_allclose(frequencies(drawn(temperature=1.0)), np.exp(LOGITS), atol=0.03)


def test_a_low_temperature_sharpens_it():
    expected = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    np.testing.assert_allclose(frequencies(drawn(temperature=0.5)), expected, atol=0.03)


def test_top_k_keeps_the_likeliest():
    np.testing.assert_allclose(frequencies(drawn(temperature=1.0, top_k=2)), [0, 0.625, 0, 0.375], atol=0.03)
    assert set(drawn(temperature=1.0, top_k=0)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.6, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    assert set(drawn(temperature=1.0, top_p=top_p)) == kept


def test_top_k_and_top_p_together_keep_what_both_keep():
    assert set(drawn(temperature=1.0, top_k=3, top_p=0.6)) == {1, 3}


def test_top_p_of_many_tokens_keeps_the_fewest_that_reach_it():
    logits = np.random.default_rng(1).normal(size=2000).astype(np.float32) * 3
    weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-weights)
    kept = set(order[: int(np.searchsorted(weights[order].cumsum(), 0.9)) + 1].tolist())
    rng = np.random.default_rng(0)
    got = {choose(logits, rng, temperature=1.0, top_p=0.9) for _ in range(20000)}
    assert got <= kept
    assert len(got) > 0.8 * len(kept)


def test_huge_logits_do_not_overflow():
    assert choose(np.array([1e30, 0.0], np.float32), np.random.default_rng(0), temperature=0.01) == 0
    assert choose(np.array([1.0, 8.0], np.float32), np.random.default_rng(0), temperature=1e-308) == 1


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([40], {}, "token 40 is not in the model's vocabulary of 40"),
        ([-1], {}, "token -1"),
        ([3] * 20, {"max_new_tokens": 5}, "20 tokens and 5 new ones need more than the capacity of 24 tokens"),
        ([3], {"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ([3], {"temperature": -0.5}, "temperature: got -0.5"),
        ([3], {"top_k": -2}, "top_k: got -2"),
        ([3], {"top_p": 0.0}, "top_p: got 0.0"),
        ([3], {"top_p": 1.5}, "top_p: got 1.5"),
        ([3], {"temperature": float("nan")}, "temperature: got nan"),
        ([3], {"stop": ("",)}, "stop: got"),
        ([3], {"seed": -1}, "seed: got -1"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_generated(model, ids, options, message):
    with pytest.raises(UsageError, match=message):
        generate(model, ids, **{"max_new_tokens": 3, **options})


def test_the_last_position_can_be_used(model):
    assert len(list(generate(model, [3] * 20, max_new_tokens=4, stop_ids=[]))) == 4
