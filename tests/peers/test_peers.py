"""Peers get the same bytes, the same model and the same tokens; one that cannot run leaves a row that says why."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from jpq_export.comparison_report import markdown, page
from jpq_export.compress.decoder import build_decoder, named_weights
from jpq_export.compress.load import load_model
from jpq_export.errors import BudgetError, ModelError
from jpq_export.numerics.scheme import Scheme
from jpq_export.peers import run
from jpq_export.peers.layout import PEERS, Peer, layout_bytes, layout_for
from jpq_export.peers.run import PeerError, peer_model, saved_model
from jpq_export.peers.transformer import TAKEN, names, transformers_model

PYTHON = {name: peer for name, peer in PEERS.items() if not peer.program}
UNIFORM = {name: peer for name, peer in PYTHON.items() if not peer.mixed}
MIXED = {name: peer for name, peer in PYTHON.items() if peer.mixed}
TOKENS = np.random.default_rng(0).integers(0, 250, (8, 32))


@pytest.fixture(scope="module")
def loaded(save_tiny, tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("models") / "m", "llama_tied")))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "gemma3"])
def test_the_translated_model_computes_the_same(name, tiny_folder):
    model = load_model(str(tiny_folder(name))).model
    ids = torch.from_numpy(TOKENS[:2])
    weights = dict(named_weights(model))
    theirs = transformers_model(model.spec, weights)
    with torch.no_grad():
        ours = model(ids)
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)
        weights["layers.1.attn.k"] = weights["layers.1.attn.k"].roll(1, 0)
        twin = transformers_model(model.spec, weights)(ids).logits
    assert not torch.allclose(twin, ours, rtol=1e-4, atol=1e-4)


def test_a_family_that_is_not_translated_is_refused(tiny_folder):
    model = load_model(str(tiny_folder("phi3"))).model
    assert model.spec.family not in TAKEN
    with pytest.raises(ModelError, match="phi3"):
        transformers_model(model.spec, named_weights(model))


def test_every_weight_has_one_foreign_name(loaded):
    found = names(loaded.spec)
    assert sorted(found.values()) == sorted([*loaded.spec.matrices(), *loaded.spec.vectors()])


@pytest.mark.parametrize("name", UNIFORM)
def test_a_layout_fills_its_budget_and_counts_what_the_peer_stores(name, loaded):
    spec, peer = loaded.spec, PEERS[name]
    for bits in (3.5, 5.0):
        budget = int(spec.parameters() * bits / 8)
        layout = layout_for(spec, peer, budget)
        assert 0.85 * budget < layout.bytes <= budget
    by_hand = 4 * sum(spec.vectors().values()) + layout.table.weight_bytes(*spec.matrices()["embed"])
    for key, (rows, columns) in spec.matrices().items():
        if key == "embed":
            continue
        group = peer.group_size(columns, layout.group_size)
        zeros = 2 * columns // group if peer.zero_bits else -(-columns // group * layout.bits // 8)
        by_hand += rows * (-(-columns * layout.bits // 8) + 2 * columns // group + zeros)
    widths = dict.fromkeys(spec.matrices(), layout.bits)
    assert layout_bytes(spec, peer, widths, layout.group_size, layout.table) == by_hand
    with pytest.raises(BudgetError, match="no uniform layout"):
        layout_for(spec, peer, 1000)


def test_a_mixed_layout_leaves_linears_and_table_about_the_same_bits(loaded):
    spec, peer = loaded.spec, PEERS["auto-scheme"]
    linears = {key: shape for key, shape in spec.matrices().items() if key != "embed"}
    for bits in (3.9, 4.5, 6.0):
        layout = layout_for(spec, peer, budget := int(spec.parameters() * bits / 8))
        table = layout.table.weight_bytes(*spec.matrices()["embed"])
        room = sum(rows * columns for rows, columns in linears.values()) * layout.bits / 8
        assert layout.bytes == budget == pytest.approx(room + table + 4 * sum(spec.vectors().values()))
        assert abs(8 * table / (spec.vocab * spec.hidden) - layout.bits) < 1
        assert all(columns % layout.group_size == 0 for _, columns in linears.values())
    full = layout_for(spec, peer, spec.parameters() * 4)
    assert full.bytes == layout_bytes(spec, peer, dict.fromkeys(linears, 8), full.group_size, full.table)
    with pytest.raises(BudgetError, match="no mixed layout"):
        layout_for(spec, peer, 1000)


def test_groups_are_divisors_that_the_peers_kernels_take():
    sizes = {name: [peer.group_size(columns, 128) for columns in (576, 1536, 640)] for name, peer in PYTHON.items()}
    assert sizes["gptqmodel"] == [64, 128, 128]
    assert sizes["hqq"] == sizes["auto-round"] == [144, 128, 128]


def test_a_table_of_positions_is_refused_by_name(tiny_folder, tmp_path):
    teacher = load_model(str(tiny_folder("gpt2"))).model
    for name in PEERS:
        with pytest.raises(PeerError, match=f"{name}: gpt2 has a table of positions"):
            peer_model(name, teacher, np.zeros((1, 4), np.int64), 100_000, tmp_path)


def test_a_peer_that_is_not_installed_says_so(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "magic", Peer("magic-quantizer", (3, 4), None))
    with pytest.raises(PeerError, match=r"magic-quantizer is not installed; pip install 'jpq-export\[peers\]'"):
        peer_model("magic", loaded.model, TOKENS, budget(loaded), tmp_path / "cell")


def test_a_peer_that_fails_says_its_last_line(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "magic", Peer("numpy", (3, 4), None))  # installed, and no quantizer
    with pytest.raises(PeerError, match=r"magic: ModuleNotFoundError: .*by_numpy|magic: KeyError"):
        peer_model("magic", loaded.model, TOKENS, budget(loaded), tmp_path / "cell")


def test_what_a_peer_gives_back_is_checked(loaded, tmp_path, monkeypatch):
    linears = {k: v for k, v in named_weights(loaded.model).items() if ".attn." in k or ".mlp." in k}
    assert set(run._checked("hqq", linears, loaded.model)) == set(linears)
    with pytest.raises(PeerError, match=r"layers\.0\.attn\.q is missing"):
        run._checked("hqq", {k: v for k, v in linears.items() if k != "layers.0.attn.q"}, loaded.model)
    with pytest.raises(PeerError, match="not finite"):
        run._checked("hqq", linears | {"layers.1.mlp.up": linears["layers.1.mlp.up"] * float("nan")}, loaded.model)


@pytest.mark.parametrize("name", UNIFORM)
def test_a_peer_rounds_every_linear_to_its_codes(name, loaded, tmp_path):
    if importlib.util.find_spec(PEERS[name].package.replace("-", "_")) is None:
        pytest.skip(f"{PEERS[name].package} is not installed")
    made = peer_model(name, loaded.model, TOKENS, budget(loaded), tmp_path / "cell")
    before, after = named_weights(loaded.model), named_weights(made.model)
    for key, (rows, columns) in loaded.spec.matrices().items():
        scheme = Scheme(made.layout.bits, PEERS[name].group_size(columns, made.layout.group_size))
        scheme = made.layout.table if key == "embed" else scheme
        groups = after[key].view(rows, -1, scheme.group_size)
        assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 1 << scheme.bits
        error = (after[key] - before[key]).square().mean() / before[key].square().mean()
        assert 0 < error < 4.0 ** (1 - scheme.bits)
    for key in loaded.spec.vectors():
        assert torch.equal(before[key], after[key])
    assert made.done["seconds"] > 0
    again = named_weights(saved_model(tmp_path / "cell", loaded.spec))
    assert all(torch.equal(again[key], after[key]) for key in after)
    assert [path.name for path in (tmp_path / "cell").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_peer_chooses_widths_within_its_bytes(name, loaded, tmp_path):
    if importlib.util.find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed")
    made = peer_model(name, loaded.model, TOKENS, budget(loaded), tmp_path / "cell")
    widths = json.loads((tmp_path / "cell" / "widths.json").read_text())
    before, after = named_weights(loaded.model), named_weights(made.model)
    assert len(set(widths.values())) > 1
    assert 0.9 * budget(loaded) < made.layout.bytes <= budget(loaded)
    for key, bits in widths.items():
        groups = after[key].view(len(after[key]), -1, made.layout.group_size)
        assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 1 << bits
        error = (after[key] - before[key]).square().mean() / before[key].square().mean()
        assert 0 < error < 4.0 ** (1 - bits) * (4 if PEERS[name].iterations else 1)  # training moves codes by a step


MADE = {"commit": "abc1234", "date": "2026-11-29", "machine": "a processor, 2 cores"}


def test_a_failed_row_stays_in_the_table_and_the_page():
    quality = {"kl_mean": 0.5, "kl_p99": 2.0, "perplexity": 20.0, "top1_agreement": 0.7}
    good = {"asked_bits": 3.0, "bits_per_weight": 2.99, "weight_bytes": 5, "seconds": 1.0, "peak_rss_bytes": 7}
    good |= MADE
    rows = [
        good | {"method": "worse", "texts": {"t": quality | {"kl_mean": 0.6}}},
        MADE | {"asked_bits": 3.0, "method": "broken", "error": "it <broke>"},
        good | {"method": "best", "texts": {"t": quality}},
    ]
    table = markdown(rows)
    assert "| 3 | broken | did not run: it <broke> |" in table
    assert "**0.5000**" in table
    assert "**0.6000**" not in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    shown = page(rows, "m")
    assert "it &lt;broke&gt;" in shown
    assert "commit abc1234, 2026-11-29, a processor, 2 cores: worse, broken, best" in shown
    assert shown.count("<circle") == 2


def test_shares_of_right_answers_have_intervals():
    right = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "acc_norm_stderr": 0.05}
    quality = {"kl_mean": 0.5, "kl_p99": 2.0, "perplexity": 20.0, "top1_agreement": 0.7}
    good = {"asked_bits": 3.0, "bits_per_weight": 2.99, "weight_bytes": 5, "seconds": 1.0, "peak_rss_bytes": 7}
    good |= MADE
    good |= {"texts": {"t": quality}}
    asked = {"tasks": {"piqa": right, "boolq": {"acc": 1.0}}, "teacher_tasks": {"piqa": right, "boolq": {"acc": 0.5}}}
    rows = [
        good | {"method": "a"},
        good | asked | {"method": "b"},
        MADE | {"asked_bits": 3.0, "method": "c", "error": "no"},
    ]
    lines = markdown(rows).splitlines()
    assert lines[0].endswith("| piqa acc_norm (original 25.0% ± 9.8) | boolq acc (original 50.0%) |")
    assert lines[2].endswith("| - | - |")
    assert lines[3].endswith("| 25.0% ± 9.8 | 100.0% |")
    assert len({line.count("|") for line in lines}) == 1
    assert "25.0% ± 9.8" in page(rows, "m")


def budget(loaded):
    return int(loaded.spec.parameters() * 4.7 / 8)


def test_the_decoder_is_rebuilt_from_all_weights(loaded):
    weights = dict(named_weights(loaded.model))
    del weights["layers.0.attn.q"]
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q"):
        build_decoder(loaded.spec, weights)
