"""Text quality: closed forms, a plain fp64 reference, streaming in any chunk size, and twins that must fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

import jpq_export.evaluate.text_quality as text_quality
from jpq_export.comparison_cells import Remembered
from jpq_export.compress.decoder import Decoder, build_decoder, named_weights
from jpq_export.errors import ModelError
from jpq_export.evaluate.text_quality import LogitSource, TextQuality, evaluate_text
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec

VOCAB = 37


def table(logits: np.ndarray) -> LogitSource:
    """A model whose logits at a position depend on the token there: logits [vocab, vocab]."""

    def source(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(ids), size):
            yield logits[ids[start : start + size]].astype(np.float32)

    return source


def random_logits(seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (VOCAB, VOCAB)).astype(np.float32)


def sequences(count: int = 3, context: int = 20) -> np.ndarray:
    return np.random.default_rng(9).integers(0, VOCAB, (count, context))


def slow_quality(student: np.ndarray, teacher: np.ndarray, ids: np.ndarray) -> TextQuality:
    """The definitions, one prediction at a time in fp64."""
    nll, teacher_nll, kl, agree = [], [], [], []
    for row in ids:
        for token, target in pairwise(row):
            q, p = (np.exp(x[token].astype(np.float64)) for x in (student, teacher))
            q, p = q / q.sum(), p / p.sum()
            nll.append(-math.log(q[target]))
            teacher_nll.append(-math.log(p[target]))
            kl.append(float((p * np.log(p / q)).sum()))
            agree.append(p.argmax() == q.argmax())
    return TextQuality(
        math.exp(np.mean(nll)),
        len(nll),
        *ids.shape,
        teacher_perplexity=math.exp(np.mean(teacher_nll)),
        kl_mean=float(np.mean(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(np.mean(agree)),
    )


def assert_close(got: TextQuality, expected: TextQuality) -> None:
    assert (got.tokens, got.windows, got.context) == (expected.tokens, expected.windows, expected.context)
    assert got.top1_agreement == expected.top1_agreement
    for name in ("perplexity", "teacher_perplexity", "kl_mean", "kl_p99"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


@pytest.mark.parametrize("chunk_values", [1, 3 * VOCAB, 19 * VOCAB, 10**6])
def test_equals_the_definitions_in_any_chunk_size(chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_quality, "CHUNK_VALUES", chunk_values)
    student, teacher = random_logits(1), random_logits(2)
    assert_close(
        evaluate_text(table(student), table(teacher), sequences()), slow_quality(student, teacher, sequences())
    )


def test_another_model_does_not_equal_them() -> None:
    student, teacher = random_logits(1), random_logits(2)
    other = student + np.eye(VOCAB, dtype=np.float32) / 50  # one logit of each row, by 0.02
    with pytest.raises(AssertionError, match="perplexity"):
        assert_close(
            evaluate_text(table(other), table(teacher), sequences()), slow_quality(student, teacher, sequences())
        )


def test_targets_shifted_by_one_do_not_equal_them() -> None:
    student, teacher = random_logits(1), random_logits(2)
    shifted = np.roll(sequences(), 1, 1)
    with pytest.raises(AssertionError):
        assert_close(
            evaluate_text(table(student), table(teacher), shifted), slow_quality(student, teacher, sequences())
        )


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    quality = evaluate_text(table(np.full((VOCAB, VOCAB), 7.0)), None, sequences(2, 11))
    assert quality.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert quality == TextQuality(quality.perplexity, 20, 2, 11)
    skewed = np.zeros((VOCAB, VOCAB))
    skewed[:, 0] = 0.5
    assert evaluate_text(table(skewed), None, sequences(2, 11)).perplexity != pytest.approx(VOCAB, rel=1e-3)


def test_kl_of_a_known_pair() -> None:
    """Teacher: fair coin on two tokens; student: 3/4 and 1/4. KL = ln(2/sqrt(3)) exactly."""
    teacher, student = np.full((2, 2), 0.0), np.log(np.tile([0.75, 0.25], (2, 1)))
    ids = np.array([[0, 1, 1, 0]])
    quality = evaluate_text(table(student), table(teacher), ids)
    assert quality.kl_mean == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    swapped = evaluate_text(table(teacher), table(student), ids)  # the other direction is another number
    assert swapped.kl_mean == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert swapped.kl_mean != pytest.approx(quality.kl_mean, rel=1e-2)


def test_a_model_against_itself_and_a_constant_added() -> None:
    logits = random_logits(3)
    quality = evaluate_text(table(logits + 100), table(logits), sequences())
    assert quality.kl_mean == pytest.approx(0, abs=1e-5)
    assert quality.top1_agreement == 1.0
    assert quality.perplexity == pytest.approx(quality.teacher_perplexity, rel=1e-5)


def test_large_logits_stay_finite() -> None:
    quality = evaluate_text(table(random_logits(4, 3000.0)), table(random_logits(5)), sequences())
    assert math.isfinite(quality.kl_mean or math.nan)


def test_a_few_bad_predictions_show_in_p99_and_not_in_agreement_alone() -> None:
    teacher = random_logits(6)
    student = teacher.copy()
    student[0] = -teacher[0]
    quality = evaluate_text(table(student), table(teacher), sequences(4, 200))
    assert quality.kl_p99 is not None
    assert quality.kl_mean is not None
    assert quality.top1_agreement is not None
    assert quality.kl_p99 > 10 * quality.kl_mean
    assert 0.9 < quality.top1_agreement < 1


def small_decoder(seed: int) -> Decoder:
    spec = ModelSpec(
        name="tiny",
        family="llama",
        vocab=VOCAB,
        hidden=16,
        head_dim=8,
        heads_per_group=2,
        layers=(LayerSpec(1, 24), LayerSpec(1, 24)),
        ropes=(RopeSpec((1.0, 0.1, 0.01, 0.001)),),
        norm_eps=1e-5,
        activation="silu",
        tied=True,
        attention_scale=8**-0.5,
    )
    torch.manual_seed(seed)
    return build_decoder(spec, {name: v.clone() for name, v in named_weights(Decoder(spec)).items()})


def test_decoders_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_quality, "CHUNK_VALUES", 6 * VOCAB)
    student, teacher = small_decoder(0), small_decoder(1)
    ids = torch.from_numpy(sequences())
    with torch.no_grad():
        log_q, log_p = (m(ids)[:, :-1].double().log_softmax(-1) for m in (student, teacher))
    quality = evaluate_text(student, teacher, sequences())
    nll = -log_q.gather(-1, ids[:, 1:, None]).mean()
    assert quality.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    assert quality.kl_mean == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert quality.kl_mean != pytest.approx(evaluate_text(student, small_decoder(2), sequences()).kl_mean, rel=1e-2)
    assert torch.is_grad_enabled()  # two sources side by side once left gradients off for the whole process


def test_remembered_models_side_by_side_leave_gradients_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_quality, "CHUNK_VALUES", 6 * VOCAB)
    evaluate_text(Remembered(small_decoder(0)), Remembered(small_decoder(1)), sequences())
    assert torch.is_grad_enabled()


def test_sources_may_give_chunks_of_different_sizes() -> None:
    student, teacher = random_logits(1), random_logits(2)
    in_threes, in_sevens = (lambda ids, _n: table(student)(ids, 3)), (lambda ids, _n: table(teacher)(ids, 7))
    assert_close(evaluate_text(in_threes, in_sevens, sequences()), slow_quality(student, teacher, sequences()))


def test_progress_counts_windows() -> None:
    seen = []
    evaluate_text(table(random_logits(1)), None, sequences(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = random_logits(1)
    logits[sequences()[1, 4]] = bad
    with pytest.raises(ModelError, match=r"window \d: logits are not finite"):
        evaluate_text(table(logits), table(random_logits(2)), sequences())


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match="37 tokens, the teacher 38"):
        evaluate_text(table(random_logits(1)), table(np.zeros((VOCAB, VOCAB + 1))), sequences())


def test_sources_that_do_not_cover_the_window_are_refused() -> None:
    def short(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
        yield np.zeros((min(size, len(ids)), VOCAB), np.float32)[: max(1, len(ids) - 1)]

    with pytest.raises(ValueError, match="19 positions, expected 20"):
        evaluate_text(short, None, sequences())
    with pytest.raises(ValueError, match="at least one window"):
        evaluate_text(short, None, sequences(1, 1))
