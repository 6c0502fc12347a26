"""llama.cpp as a row: names, its importance matrix against one by hand, dry runs, and a real run where it is there."""

import shutil

import gguf
import numpy as np
import pytest
import torch

from jpq_export.compress.decoder import build_decoder, named_weights
from jpq_export.compress.load import load_model
from jpq_export.errors import BudgetError
from jpq_export.peers import by_llama_cpp as peer
from jpq_export.peers.layout import PEERS
from jpq_export.peers.run import PeerError, peer_model
from jpq_export.peers.worker import Job

TOKENS = np.random.default_rng(0).integers(0, 250, (3, 16))
DRY_RUN = """
warning: blk.0.attn_k.weight - ncols 576 not divisible by 256 (required for type q2_K) -> falling back to q4_0
[   1/ 211] token_embd.weight      - [ 576, 49152, 1, 1], type =    f32, size =   108.00 MiB ->    28.69 MiB (q8_0)
[ 210/ 211] blk.29.ffn_gate.weight - [ 576,  1536, 1, 1], type =    f32, size =     3.38 MiB ->     0.47 MiB (q4_0)
[ 211/ 211] blk.29.ffn_up.weight   - [ 576,  1536, 1, 1], type =    f32, size =     3.38 MiB
"""


@pytest.fixture(scope="module")
def loaded(save_tiny, tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("models") / "m", "llama_tied")))


@pytest.fixture
def job(loaded, tmp_path):
    weights = {name: value.contiguous() for name, value in named_weights(loaded.model).items()}
    return Job(loaded.spec, PEERS["llama.cpp"], tmp_path, 10**6, 0, 0, weights, TOKENS)


def tensors(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_the_file_holds_every_matrix_in_our_order(job, tmp_path):
    peer._write_model(job, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    assert sorted(found) == sorted(peer.theirs(name) for name in job.spec.matrices())
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], job.weights["layers.1.mlp.down"].numpy())
    assert not np.array_equal(found["blk.1.ffn_down.weight"], job.weights["layers.0.mlp.down"].numpy())


def test_importance_is_the_sum_of_squares_of_the_inputs(job, tmp_path):
    peer._write_importance(job, tmp_path / "importance.gguf")
    found = tensors(tmp_path / "importance.gguf")
    model, seen = build_decoder(job.spec, job.weights), []
    model.get_submodule("layers.1.mlp.down").register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    with torch.no_grad():
        for row in torch.from_numpy(TOKENS):
            model(row[None])
    expected = torch.cat(seen).square().sum((0, 1)).numpy()
    np.testing.assert_allclose(found["blk.1.ffn_down.weight.in_sum2"][0], expected, rtol=1e-5)
    assert not np.allclose(found["blk.1.ffn_down.weight.in_sum2"][0], np.roll(expected, 1), rtol=1e-2)
    assert found["blk.1.ffn_down.weight.counts"].item() == TOKENS.size
    assert len(found) == 2 * len(job.linears())


def test_a_dry_run_is_read_with_types_that_stay():
    lines = peer.TENSOR.findall(DRY_RUN)
    assert [(name, (after or before).upper()) for name, before, after in lines] == [
        ("token_embd.weight", "Q8_0"),
        ("blk.29.ffn_gate.weight", "Q4_0"),
        ("blk.29.ffn_up.weight", "F32"),
    ]


def test_sizes_count_blocks_and_vectors(job):
    choice = peer.Choice("Q4_0", None, {peer.theirs(name): "Q4_0" for name in job.spec.matrices()})
    weights = {name: n * k for name, (n, k) in job.spec.matrices().items()}
    linear = sum(weights[name] for name in job.linears()) * 18 // 32
    assert choice.sizes(job) == (linear, linear + weights["embed"] * 18 // 32 + 4 * sum(job.spec.vectors().values()))


def test_a_table_narrower_than_all_linears_is_left_out():
    types = {"token_embd.weight": "Q2_0", "blk.0.attn_q.weight": "Q5_0", "blk.0.ffn_down.weight": "Q4_K"}
    assert not peer.Choice("Q4_K_S", "Q2_0", types).balanced()
    assert peer.Choice("Q4_K_S", "Q4_0", types | {"token_embd.weight": "Q4_0"}).balanced()


def test_without_the_program_the_row_says_so(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("jpq_export.peers.run.shutil.which", lambda _: None)
    with pytest.raises(PeerError, match=r"llama\.cpp: llama-quantize is not on the PATH; build llama\.cpp"):
        peer_model("llama.cpp", loaded.model, TOKENS, 10**6, tmp_path / "cell")


def test_nothing_fits(job, tmp_path, monkeypatch):
    types = {peer.theirs(name): "Q4_0" for name in job.spec.matrices()}
    monkeypatch.setattr(peer, "_dry_run", lambda _, preset, table: peer.Choice(preset, table, types))
    small = Job(job.spec, job.peer, tmp_path, 1000, 0, 0, job.weights, TOKENS)
    with pytest.raises(BudgetError, match=r"llama\.cpp: its smallest file has 0\.0\d MB, asked for 0\.00 MB"):
        peer._choose(small, tmp_path)
    assert peer._choose(job, tmp_path).types == types


def test_a_real_run_rounds_every_matrix(loaded, tmp_path):
    if shutil.which(peer.PROGRAM) is None:
        pytest.skip(f"{peer.PROGRAM} is not on the PATH")
    budget = int(loaded.spec.parameters() * 5.8 / 8)
    made = peer_model("llama.cpp", loaded.model, TOKENS, budget, tmp_path / "cell")
    before, after = named_weights(loaded.model), named_weights(made.model)
    assert 0.7 * budget < made.layout.bytes <= budget
    for key in loaded.spec.matrices():
        error = (after[key] - before[key]).square().mean() / before[key].square().mean()
        assert 0 < error < 4.0**-3  # four bits of 32 normal weights: 1%
    assert made.done["version"] != "unknown"
