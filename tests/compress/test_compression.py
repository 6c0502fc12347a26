"""Statistics, pruning, layer-wise rounding, recovery and permutation on a tiny random decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jpq_export.compress import apply, statistics
from jpq_export.compress import prepare as preparation
from jpq_export.compress.apply import Compressor, LayerChoice, Recipe, all_kept, prune, prune_layer
from jpq_export.compress.decoder import Decoder, build_decoder, named_weights
from jpq_export.compress.heldout import Heldout, PartialForward
from jpq_export.compress.permute import permuted
from jpq_export.compress.prepared import Prepared, load_prepared, save_prepared
from jpq_export.compress.prices import PriceList, RoundedCache, measure_prices, round_all
from jpq_export.compress.student import dequantized, to_compressed, to_student
from jpq_export.compress.training import TuneSettings, schedule
from jpq_export.compress.tune import (
    distil_step,
    heldout_kl,
    start_training,
    teacher_hidden,
    tune,
)
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.numerics.levels import normal_bytes
from jpq_export.numerics.scheme import BIT_WIDTHS, TERNARY, Scheme
from jpq_export.progress import Stages

SPEC = ModelSpec(
    name="tiny", family="llama", vocab=96, hidden=64, head_dim=16, heads_per_group=2, layers=(LayerSpec(2, 128),) * 3,
    ropes=(RopeSpec(tuple(float(f) for f in 1 / 10000 ** (np.arange(0, 16, 2) / 16))),), norm_eps=1e-5,
    activation="silu",
    tied=True, attention_scale=0.25, bos_id=1, eos_ids=(2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Decoder:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) * 0.15 for n, s in SPEC.matrices().items()}
    weights |= {n: torch.ones(k) + 0.1 * torch.randn(k, generator=generator) for n, k in SPEC.vectors().items()}
    return build_decoder(SPEC, weights)


@pytest.fixture(scope="module")
def sequences() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SPEC.vocab, (12, 48))


@pytest.fixture(scope="module")
def stats(teacher: Decoder, sequences: np.ndarray) -> statistics.Statistics:
    return statistics.collect(teacher, sequences, seed=0)


def kl(teacher: Decoder, student: Decoder, sequences: np.ndarray) -> float:
    return heldout_kl(teacher, student, sequences)


def test_price_predicts_the_kl_of_a_small_random_error(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray
) -> None:
    generator = torch.Generator().manual_seed(1)
    name = "layers.1.mlp.up"
    weights = dict(named_weights(teacher))
    E = 0.02 * torch.randn(weights[name].shape, generator=generator)
    predicted = 0.5 * float(((E @ stats.hessians[name]) * E).sum())
    measured = kl(teacher, build_decoder(SPEC, weights | {name: weights[name] + E}), sequences)
    assert 0.5 < predicted / measured < 2.0
    doubled = kl(teacher, build_decoder(SPEC, weights | {name: weights[name] + 4 * E}), sequences)
    assert not 0.5 < predicted / doubled < 2.0


def test_row_weights_are_mean_probabilities(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray
) -> None:
    mean = F.softmax(teacher(torch.from_numpy(sequences)), -1).mean((0, 1))
    assert torch.allclose(stats.rows, mean, atol=2e-3)
    assert float(stats.rows.sum()) == pytest.approx(1, abs=1e-3)
    assert not torch.allclose(stats.rows.roll(1), mean, atol=2e-3)


def test_gates_rank_a_dead_channel_and_a_dead_head_last(teacher: Decoder, sequences: np.ndarray) -> None:
    weights = {n: v.clone() for n, v in named_weights(teacher).items()}
    weights["layers.1.mlp.down"][:, 7] = 0
    weights["layers.2.attn.o"][:, :32] = 0  # both query heads of key/value group 0
    found = statistics.collect(build_decoder(SPEC, weights), sequences, seed=0)
    assert int(found.gates["layers.1.mlp"][1:].argmin()) == 7
    assert float(found.gates["layers.1.mlp"][1:].min()) == 0
    assert float(found.gates["layers.2.attn"][1]) == 0 < float(found.gates["layers.2.attn"][2])


def test_statistics_do_not_depend_on_the_batch(teacher: Decoder, sequences: np.ndarray) -> None:
    one, four = (statistics.plain_statistics(teacher, sequences[:n]) for n in (4, 8))
    assert not torch.allclose(one.hessians["embed"], four.hessians["embed"])
    again = statistics.plain_statistics(teacher, sequences[:4])
    assert torch.equal(one.hessians["embed"], again.hessians["embed"])


def test_targets_are_drawn_by_their_probability() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.0, 0.2, 0.0])
    found = statistics.sample(p.expand(20000, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(found.flatten(), minlength=6) / 20000
    assert torch.allclose(share, p, atol=0.015)  # four standard deviations
    assert not torch.allclose(share, p.roll(1), atol=0.1)
    assert float(share[p == 0].sum()) == 0  # the last as well, where the sums end


def test_pruning_equals_zeroing(teacher: Decoder, sequences: np.ndarray) -> None:
    choices = list(all_kept(SPEC))
    kept = tuple(c for c in range(128) if c % 4)
    choices[0] = LayerChoice((1,), kept)
    choices[1] = LayerChoice((), choices[1].channels)
    choices[2] = LayerChoice(choices[2].kv_heads, ())
    weights = {n: v.clone() for n, v in named_weights(teacher).items()}
    weights["layers.0.mlp.down"][:, [c for c in range(128) if c % 4 == 0]] = 0
    weights["layers.0.attn.o"][:, :32] = 0
    weights["layers.1.attn.o"][:] = 0
    weights["layers.2.mlp.down"][:] = 0
    ids = torch.from_numpy(sequences[:2])
    narrow = prune(teacher, tuple(choices))
    assert torch.allclose(narrow(ids), build_decoder(SPEC, weights)(ids), atol=1e-4)
    choices[0] = LayerChoice((0,), kept)
    assert not torch.allclose(prune(teacher, tuple(choices))(ids), build_decoder(SPEC, weights)(ids), atol=1e-4)
    layer, x = prune_layer(teacher, 0, choices[0]), torch.randn(1, 5, 64)
    context = teacher.context(torch.zeros(1, 5, dtype=torch.long))
    assert torch.equal(layer(x, context), prune(teacher, tuple(choices)).layers[0](x, context))


def test_permuted_model_computes_the_same_with_other_weights(teacher: Decoder, sequences: np.ndarray) -> None:
    ids = torch.from_numpy(sequences[:2])
    other = permuted(teacher, seed=3)
    assert torch.allclose(other(ids), teacher(ids), atol=1e-4)
    for name in ("embed", "layers.0.mlp.down", "layers.1.attn.v", "layers.2.attn.o"):
        assert not torch.equal(named_weights(other)[name], named_weights(teacher)[name])


def schemes(bits: int) -> dict[str, Scheme]:
    return {name: Scheme(bits, 32) for name in SPEC.matrices()}


def test_layer_by_layer_rounding_beats_nearest_and_stores_what_it_computes(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray
) -> None:
    kls = {}
    for method in ("rtn", "gptq", "jpq"):
        recipe = Recipe(all_kept(SPEC), schemes(3), method)
        student = Compressor(teacher, recipe, stats, sequences).run()
        stored = to_compressed(student, schemes(3))
        ids = torch.from_numpy(sequences[:2])
        assert torch.allclose(dequantized(stored)(ids), student(ids), atol=1e-4)
        kls[method] = kl(teacher, dequantized(stored), sequences)
    assert kls["jpq"] < kls["rtn"]
    assert kls["gptq"] < kls["rtn"]


def test_pruned_weights_are_refit(teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray) -> None:
    order = stats.gates["layers.1.mlp"][1:].argsort().tolist()
    choices = list(all_kept(SPEC))
    choices[1] = LayerChoice(choices[1].kv_heads, tuple(sorted(order[64:])))
    recipe = Recipe(tuple(choices), {name: Scheme(8, 32) for name in prune(teacher, tuple(choices)).spec.matrices()})
    refit = Compressor(teacher, recipe, stats, sequences).run()
    assert kl(teacher, refit, sequences) < kl(teacher, prune(teacher, tuple(choices)), sequences)


def test_the_refit_is_ridge_regression_to_the_teachers_outputs(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what arrives, pruned columns included."""
    seen, stacks = [], []
    linears, rounding = Compressor._linears, Compressor._round
    monkeypatch.setattr(Compressor, "_linears", lambda self, *asked: seen.append(asked) or linears(self, *asked))
    monkeypatch.setattr(Compressor, "_round", lambda self, W, *rest: stacks.append(W) or rounding(self, W, *rest))
    choices = list(all_kept(SPEC))
    choices[1] = LayerChoice((0,), tuple(range(0, 128, 2)))
    names = prune(teacher, tuple(choices)).spec.matrices()
    Compressor(teacher, Recipe(tuple(choices), {n: Scheme(3, 16) for n in names}), stats, sequences).run()
    found = dict(zip([(i, parts) for i, parts, *_ in seen], stacks[-len(seen) :], strict=True))
    for i, parts, old_in, new_in in seen:
        x, arriving = (torch.cat([t.flatten(0, 1) for t in stream]).double() for stream in (old_in, new_in))
        rows = apply.kept_rows(teacher, i, choices[i])
        wanted = []
        for part in parts:
            full = named_weights(teacher)[f"layers.{i}.{part}"].double()
            own = apply.pruned_weights(teacher, i, choices[i])[part].double()
            full = full if (index := rows.get(apply.ROWS_OF.get(part, ""))) is None else full[index]
            H = arriving.T @ arriving / len(x)
            missing = (x @ full.T - arriving @ own.T).T @ arriving / len(x)
            level = H.diagonal().mean() * apply.REFIT_RIDGE
            wanted.append(own + missing @ torch.linalg.inv(H + level * torch.eye(len(H), dtype=torch.float64)))
        moved = torch.cat(wanted) - torch.cat([apply.pruned_weights(teacher, i, choices[i])[p].double() for p in parts])
        assert float((found[i, parts] - torch.cat(wanted)).norm()) <= 1e-3 * float(moved.norm()) + 1e-5
        assert i == 0 or float(moved.norm()) > 0.01  # something arrives changed


def test_recovery_lowers_the_kl_and_keeps_the_codes(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray, tmp_path
) -> None:
    stored = to_compressed(Compressor(teacher, Recipe(all_kept(SPEC), schemes(2)), stats, sequences).run(), schemes(2))
    student = to_student(stored)
    before = kl(teacher, student, sequences)
    losses = tune(teacher, student, sequences, TuneSettings(steps=30, scale_rate=1e-2), seed=0)
    tuned = to_compressed(student, schemes(2))
    assert kl(teacher, dequantized(tuned), sequences) < 0.9 * before
    assert losses[-1] < losses[0]
    assert all(np.array_equal(tuned.quantized[n].packed, stored.quantized[n].packed) for n in stored.quantized)
    again = to_student(stored)
    tune(teacher, again, sequences, TuneSettings(steps=30, scale_rate=1e-2), seed=0)
    paths = tmp_path / "a", tmp_path / "b"
    tuned.save(paths[0])
    to_compressed(again, schemes(2)).save(paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert CompressedModel.load(paths[0]).weight_bytes == tuned.weight_bytes


def test_a_step_is_taught_by_the_sequences_that_it_sees(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray
) -> None:
    compressed = Compressor(teacher, Recipe(all_kept(SPEC), schemes(8)), stats, sequences).run()
    student = to_student(to_compressed(compressed, schemes(8)))
    settings = TuneSettings(steps=1)
    seen = next(schedule(len(sequences), settings, 0))
    assert len(seen) < len(sequences)
    assert sorted(seen) != list(range(len(seen)))  # nor are they the first
    expected = kl(teacher, student, sequences[seen])
    assert tune(teacher, student, sequences, settings, seed=0)[0] < 20 * expected + 1e-3


def test_scale_gradient_is_the_derivative_of_the_loss(
    teacher: Decoder, stats: statistics.Statistics, sequences: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jpq_export.compress.precision.fast_bf16", lambda _kind: False)
    monkeypatch.setattr("jpq_export.compress.tune.fast_bf16", lambda _kind: False)
    stored = to_compressed(Compressor(teacher, Recipe(all_kept(SPEC), schemes(3)), stats, sequences).run(), schemes(3))
    student = to_student(stored)
    start_training(student)
    ids = torch.from_numpy(sequences[:2])
    hidden = teacher_hidden(teacher, sequences[:2]).float()
    distil_step(teacher.embed.weight, student, ids, hidden)
    scales = student.layers[1].mlp.up.scales
    gradient = float(scales.grad[3, 1])
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            scales[3, 1] *= 1 + sign * 0.05
        losses.append(distil_step(teacher.embed.weight, student, ids, hidden))
        with torch.no_grad():
            scales[3, 1] /= 1 + sign * 0.05
    numeric = (losses[0] - losses[1]) / (0.1 * float(scales[3, 1].detach()))
    assert gradient == pytest.approx(numeric, rel=0.05, abs=1e-5)
    assert gradient != pytest.approx(2 * numeric, rel=0.05, abs=1e-7)


def test_heldout_error_is_the_same_under_autocast_and_nothing_for_nothing(
    teacher: Decoder, sequences: np.ndarray
) -> None:
    """Autocast would sum p·z in bf16, which is off by more than most prices."""
    heldout = Heldout(teacher, sequences[:4])
    hidden = teacher.hidden(heldout.ids, heldout.context).flatten(0, 1) * 1.02
    hidden[:, 0] += 0.1
    plain = heldout.final_kl(hidden, heldout.table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heldout.final_kl(hidden, heldout.table) == plain
    p, z = heldout.probability, hidden.to(heldout.table.dtype) @ heldout.table.T
    assert plain == pytest.approx(
        float(F.kl_div(z.float().log_softmax(-1), p, reduction="none").sum(1).mean()), abs=1e-5
    )
    forward = PartialForward(teacher, heldout)
    same = [forward.kl(i, forward.layers[i]) for i in range(3)]
    assert max(map(abs, same)) < 1e-5
    assert min(forward.kl(i, forward.layers[2 - i]) for i in (0, 2)) > 1e-2  # the twin: another layer


def test_price_list_orders_widths_and_structures(teacher: Decoder, sequences: np.ndarray, tmp_path) -> None:
    found = statistics.collect(teacher, sequences, seed=0)
    cache, raw = round_all(named_weights(teacher), SPEC, found, group_size=32)
    forward = PartialForward(teacher, Heldout(teacher, sequences[:4]))
    prices = measure_prices(teacher, found, raw, cache, forward, group_size=32)
    for per_width in prices.matrices.values():
        values = [per_width[b] for b in sorted(per_width)]
        assert values == sorted(values, reverse=True)
        assert values[0] > 2 * values[1]
    for structure in prices.structures.values():
        assert list(structure.removal) == sorted(structure.removal)
        assert sorted(structure.order) == list(range(len(structure.order)))
        assert structure.removal[0] == 0 < structure.removal[-1]
    prices.save(tmp_path / "prices.json")
    assert type(prices).load(tmp_path / "prices.json") == prices


def test_narrow_widths_are_priced_when_asked_for_each_by_its_own_measurement(
    teacher: Decoder, sequences: np.ndarray, tmp_path
) -> None:
    found = statistics.collect(teacher, sequences, seed=0)
    forward = PartialForward(teacher, Heldout(teacher, sequences[:4]))

    def priced(narrow: tuple[float, ...]) -> tuple[RoundedCache, PriceList]:
        cache, raw = round_all(named_weights(teacher), SPEC, found, group_size=32, narrow=narrow)
        return cache, measure_prices(teacher, found, raw, cache, forward, group_size=32)

    (_, usual), (cache, prices) = priced(()), priced((1, TERNARY))
    for name, per_width in prices.matrices.items():
        assert set(per_width) == set(usual.matrices[name]) | {1, TERNARY}
        assert [per_width[b] for b in BIT_WIDTHS] == pytest.approx([usual.matrices[name][b] for b in BIT_WIDTHS])
        assert per_width[1] > per_width[TERNARY] > per_width[2]
        assert int(cache.entries[name, TERNARY].codes.max()) == 2
        assert int(cache.entries[name, 1].codes.max()) == 1
    weights = dict(named_weights(teacher))
    names = [f"layers.1.mlp.{part}" for part in ("gate", "up", "down")]
    weights |= {name: cache.weight(name, TERNARY) for name in names}
    measured = heldout_kl(teacher, build_decoder(SPEC, weights), sequences[:4])
    for bits, near in ((TERNARY, True), (1, False)):
        total = sum(prices.matrices[name][bits] for name in names)
        assert (total == pytest.approx(measured, rel=0.05, abs=1e-3)) is near  # bf16 where the machine has it
    prices.save(tmp_path / "prices.json")
    assert PriceList.load(tmp_path / "prices.json") == prices
    folder = tmp_path / "kept"
    save_prepared(folder, Prepared(prices, cache, found))
    again = load_prepared(folder)
    assert again is not None
    for key, rounded in cache.entries.items():
        assert torch.equal(again.cache.entries[key].dequantize(), rounded.dequantize()), key


def test_normal_levels_are_priced_and_kept(teacher: Decoder, sequences: np.ndarray, tmp_path) -> None:
    found = statistics.collect(teacher, sequences, seed=0)
    forward = PartialForward(teacher, Heldout(teacher, sequences[:4]))

    def priced(normal: tuple[float, ...]) -> tuple[RoundedCache, PriceList]:
        cache, raw = round_all(named_weights(teacher), SPEC, found, group_size=32, normal=normal)
        return cache, measure_prices(teacher, found, raw, cache, forward, group_size=32, normal=normal)

    (even, usual), (cache, prices) = priced(()), priced((3, 4))
    assert (usual.normal, prices.normal) == ((), (3, 4))
    for (name, bits), rounded in cache.entries.items():
        if bits in (3, 4):
            assert set(rounded.codes.unique().tolist()) <= set(normal_bytes(bits).tolist())
        else:
            moved = rounded.codes != even.entries[name, bits].codes  # ties, and what rounding moves over them
            assert float(moved.float().mean()) < 1e-2
    prices.save(tmp_path / "prices.json")
    assert PriceList.load(tmp_path / "prices.json") == prices
    save_prepared(tmp_path / "kept", Prepared(prices, cache, found))
    again = load_prepared(tmp_path / "kept")
    assert again is not None
    for key, rounded in cache.entries.items():
        assert torch.equal(again.cache.entries[key].dequantize(), rounded.dequantize()), key


def test_prices_are_measured_on_the_beginnings_of_all_held_out_sequences(
    teacher: Decoder, sequences: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(PartialForward):
        def __init__(self, model: Decoder, heldout: Heldout) -> None:
            seen.append(heldout.ids.numpy())
            super().__init__(model, heldout)

    monkeypatch.setattr(preparation, "PartialForward", Watched)
    folder = tmp_path / "search"
    preparation.prepare(
        teacher, sequences[:8], sequences[8:], folder, seed=0, stages=Stages(), group_size=64, normal=()
    )
    assert [ids.tolist() for ids in seen] == [sequences[8:, :24].tolist()]


def test_partial_forward_measures_the_same_kl_as_the_gate(teacher: Decoder, sequences: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = dict(named_weights(teacher))
    name = "layers.1.mlp.down"
    weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=generator)
    other = build_decoder(SPEC, weights)
    exact = heldout_kl(teacher, other, sequences[:4])
    forward = PartialForward(teacher, Heldout(teacher, sequences[:4]))
    assert forward.heldout.kl_of(other) == pytest.approx(exact, rel=0.05, abs=1e-3)  # bf16 where the machine has it
    assert forward.kl(1, lambda x, c: other.layers[1](x, c)) == pytest.approx(exact, rel=0.05, abs=1e-3)
    assert forward.kl(0, lambda x, c: other.layers[1](x, c)) != pytest.approx(exact, rel=0.05, abs=1e-3)
    assert forward.heldout.kl_of(teacher) == pytest.approx(0, abs=1e-3)
