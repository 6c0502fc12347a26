"""A rotated stream computes the same; what forbids it; what the spec says and counts."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from jpq_export.compress import statistics
from jpq_export.compress.apply import all_kept, prune_layer
from jpq_export.compress.cost import CostModel
from jpq_export.compress.decoder import KVCache, build_decoder, named_weights
from jpq_export.compress.heldout import Heldout, PartialForward
from jpq_export.compress.load import load_model
from jpq_export.compress.rotated import can_rotate, rotated, trial_error
from jpq_export.compress.rotation import make_rotation
from jpq_export.compress.statistics import plain_statistics
from jpq_export.compress.teaching import SharedHeldout
from jpq_export.format.spec import ModelSpec, rotation_sizes
from jpq_export.format.target import load_target

ROTATED = ("llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (2, 24)))


@pytest.fixture
def model(request, tiny_folder):
    return load_model(str(tiny_folder(request.param))).model


def with_scales(model):
    """Norms of a random model are all ones, which would hide that they are forgotten."""
    weights, generator = dict(named_weights(model)), torch.Generator().manual_seed(1)
    for name in model.spec.vectors():
        weights[name] = weights[name] + 0.3 * torch.rand(weights[name].shape, generator=generator)
    return build_decoder(model.spec, weights)


@pytest.mark.parametrize("hidden", [16, 64, 192, 576, 640, 2048, 100])
def test_a_rotation_is_orthogonal_and_its_factors_small(hidden):
    outer, inner = make_rotation(hidden, 3)
    a, b = rotation_sizes(hidden)
    assert (outer.shape, inner.shape, a * b) == ((a, a), (b, b), hidden)
    whole = np.kron(outer, inner)
    np.testing.assert_allclose(whole @ whole.T, np.eye(hidden), atol=1e-12)
    np.testing.assert_allclose(np.abs(inner), b**-0.5)
    assert not np.array_equal(make_rotation(hidden, 4)[1], inner)


@pytest.mark.parametrize("model", ROTATED, indirect=True)
def test_the_rotated_model_computes_the_same(model):
    model = with_scales(model)
    other = rotated(model, seed=0)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        for kind in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(other(IDS, **kind), model(IDS, **kind), rtol=1e-4, atol=1e-4)
        cache = KVCache()
        steps = torch.cat([other(IDS[:, :20], cache=cache), other(IDS[:, 20:], cache=cache)], 1)
        torch.testing.assert_close(steps, model(IDS), rtol=1e-4, atol=1e-4)
        stream, before = other.embed_tokens(IDS), model.embed_tokens(IDS)
        stays = model.spec.post_norms  # and what is read of it is turned
        torch.testing.assert_close(stream, before if stays else other.rotation(before), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.rotation.back(other.rotation(before)), before, rtol=1e-5, atol=1e-5)
        assert torch.allclose(stream, before, atol=1e-2) == stays
        read = [each.layers[0].mlp_in(each.embed_tokens(IDS)) for each in (model, other)]
        assert not torch.allclose(*read, atol=1e-2)
        weights = dict(named_weights(other))
        weights["rotation.inner"] = weights["rotation.inner"].roll(1)
        assert not torch.allclose(build_decoder(other.spec, weights)(IDS), model(IDS), atol=1e-2)


@pytest.mark.parametrize("model", ["llama", "qwen2"], indirect=True)
def test_values_have_another_basis_and_columns_of_down_one_norm(model):
    model = with_scales(model)
    other, spec = rotated(model, seed=0), model.spec
    before, after = (dict(named_weights(each)) for each in (model, other))
    for i, layer in enumerate(spec.layers):
        norms = after[f"layers.{i}.mlp.down"].norm(dim=0)
        torch.testing.assert_close(norms, norms.mean().expand_as(norms))
        assert before[f"layers.{i}.mlp.down"].norm(dim=0).std() > 0.01 * norms.mean()  # they were not before
        # What the stream's basis alone makes of it, [values, hidden].
        turned = other.rotation(before[f"layers.{i}.attn.o"].T)
        o = after[f"layers.{i}.attn.o"].T
        assert not torch.allclose(o, turned, atol=1e-3)
        for head in range(layer.kv_heads * spec.heads_per_group):
            rows = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
            torch.testing.assert_close(o[rows].T @ o[rows], turned[rows].T @ turned[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_removed_sub_layer_and_biases_of_what_is_added(model):
    weights, spec = dict(named_weights(with_scales(model))), model.spec
    spec = replace(spec, o_bias=True, mlp_bias=True)
    for name, size in spec.vectors().items():
        weights.setdefault(name, torch.linspace(-1, 1, size))
    layers = (replace(spec.layers[0], kv_heads=0), *spec.layers[1:])
    weights = {name: value for name, value in weights.items() if not name.startswith("layers.0.attn")}
    model = build_decoder(spec.with_layers(layers), weights)
    with torch.no_grad():
        torch.testing.assert_close(rotated(model, seed=0)(IDS), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_layer_norms_forbid_it(model):
    assert not can_rotate(model.spec)


@pytest.mark.parametrize("model", ["llama_tied"], indirect=True)
def test_the_spec_says_so_and_counts_its_bytes_but_no_parameters(model):
    spec = rotated(model, seed=0).spec
    a, b = rotation_sizes(spec.hidden)
    assert can_rotate(model.spec)
    assert not can_rotate(spec)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "rotated" not in json.loads(model.spec.to_json())  # an older identity stays
    assert sum(spec.vectors().values()) == sum(model.spec.vectors().values()) + a * a + b * b
    assert spec.parameters() == model.spec.parameters()


@pytest.mark.parametrize("model", ["llama_tied"], indirect=True)
def test_statistics_do_not_depend_on_the_basis(model, monkeypatch):
    """What layers compute inside is the same, and so is what errors there cost; the head's moment is turned."""
    monkeypatch.setattr(statistics, "autocast", lambda _: nullcontext())  # bf16's error differs, and is a tenth
    monkeypatch.setattr(statistics, "head_table", lambda model: model.embed.weight)
    model = with_scales(model)
    plain, other = (statistics.collect(each, IDS.numpy(), seed=0) for each in (model, rotated(model, seed=0)))
    norm = dict(named_weights(model))["layers.1.mlp.down"].norm(dim=0)  # what `up` has taken over
    factor = norm / norm.mean()
    moment = plain.hessians["layers.1.mlp.down"] * factor[:, None] * factor
    torch.testing.assert_close(other.hessians["layers.1.mlp.down"], moment, rtol=1e-3, atol=1e-4)
    moments = (stats.hessians["layers.0.attn.o"].double() for stats in (plain, other))
    torch.testing.assert_close(*map(torch.linalg.eigvalsh, moments), rtol=1e-3, atol=1e-3)  # turned
    torch.testing.assert_close(other.rows, plain.rows, rtol=1e-3, atol=1e-4)
    traces = [stats.hessians["embed"].trace() for stats in (plain, other)]
    torch.testing.assert_close(*traces, rtol=1e-3, atol=0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("model", ["llama_tied", "gemma3"], indirect=True)
def test_a_layer_by_itself_has_the_basis_too(model, monkeypatch, fast):
    monkeypatch.setattr("jpq_export.compress.heldout.fast_bf16", lambda _: fast)
    other = rotated(with_scales(model), seed=0)
    forward = PartialForward(other, Heldout(other, IDS.numpy()))
    for i, kept in enumerate(all_kept(other.spec)):
        alone = prune_layer(other, i, kept)
        assert forward.kl(i, other.layers[i]) == pytest.approx(0, abs=2e-3)  # bf16 where fast
        assert forward.kl(i, alone) == pytest.approx(0, abs=2e-3)
    alone.turn = ()  # the twin
    assert model.spec.post_norms == (forward.kl(i, alone) > 0.1)


@pytest.mark.parametrize("model", ["gemma3"], indirect=True)
def test_the_embeddings_moment_is_in_the_basis_of_its_table(model, monkeypatch):
    monkeypatch.setattr(statistics, "autocast", lambda _: nullcontext())
    monkeypatch.setattr(statistics, "head_table", lambda model: model.embed.weight)
    model = with_scales(model)
    other = rotated(model, seed=0)
    plain, turned = (statistics.collect(each, IDS.numpy(), seed=0) for each in (model, other))
    R = other.rotation(torch.eye(model.spec.hidden))
    both = plain.hessians["embed"], turned.hessians["embed"]
    off = ~torch.eye(len(R), dtype=bool)
    # What the look-up adds is a diagonal, of another basis in each: of what is left all is turned.
    side = (
        plain_statistics(model, IDS.numpy()).hessians["embed"],
        plain_statistics(other, IDS.numpy()).hessians["embed"],
    )
    torch.testing.assert_close((R.T @ side[0] @ R)[off], both[1][off], rtol=1e-3, atol=1e-3)
    gradients = [moment - head for moment, head in zip(both, side, strict=True)]
    assert not torch.allclose(gradients[0].diagonal(), gradients[1].diagonal(), rtol=0.1)
    torch.testing.assert_close(gradients[0].trace(), gradients[1].trace(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", ["gemma3"], indirect=True)
def test_every_turn_of_a_read_is_launched(model):
    costs = [CostModel(spec, load_target("jetson"), 64) for spec in (model.spec, replace(model.spec, rotated=True))]
    turn = 2 * load_target("jetson").op_overhead_us
    for part in ("attention_rest", "mlp_rest"):
        plain, turned = (getattr(cost, part)(0, 1)[1] for cost in costs)
        assert turned - plain == pytest.approx(turn)
        assert getattr(costs[1], part)(0, 0)[1] == 0


@pytest.mark.parametrize("model", ["llama_tied"], indirect=True)
def test_the_trial_prefers_the_rotation_where_a_channel_stands_out(model):
    weights = dict(named_weights(model))
    for name, value in weights.items():
        if name.endswith((".q", ".k", ".v", ".gate", ".up")):
            weights[name] = value.clone()
            weights[name][:, 5] *= 40
        elif name.endswith((".attn_norm", ".mlp_norm")):
            weights[name] = value.clone()
            weights[name][5] /= 40
    massive = build_decoder(model.spec, weights)
    with torch.no_grad():
        torch.testing.assert_close(massive(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    heldout = SharedHeldout(massive, IDS.numpy())
    plain, turned = (trial_error(heldout, each) for each in (massive, rotated(massive, seed=0)))
    assert turned < 0.8 * plain
    assert turned > 0
