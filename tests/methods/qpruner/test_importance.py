"""Taylor importance against finite differences of the loss, and which units go."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jpq_export.compress.apply import LayerChoice, prune_layer  # noqa: E402
from jpq_export.compress.load import load_model  # noqa: E402
from jpq_export.format.spec import LayerSpec, ModelSpec  # noqa: E402
from jpq_export.methods.qpruner.importance import derivatives, keep  # noqa: E402

STEP = 1e-2
UNITS = 4  # channels looked at


@pytest.fixture(scope="module")
def model(save_tiny, tmp_path_factory):
    """Float64, so that differences are not rounding; a head small enough that removals are small changes."""
    folder = tmp_path_factory.mktemp("importance")
    made = load_model(str(save_tiny(folder, "llama", num_key_value_heads=4))).model.double()
    made.head.weight.data = made.head.weight / 4
    return made


@pytest.fixture(scope="module")
def ids(model):
    """Text that the model itself would write: there its gradient is nothing on average and its Fisher the Hessian."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (384, 1), generator=generator)
    with torch.no_grad():
        for _ in range(12):
            chance = torch.softmax(model(rows)[:, -1], -1)
            rows = torch.cat([rows, torch.multinomial(chance, 1, generator=generator)], 1)
    return rows.numpy()


@torch.no_grad()
def loss(model, ids):
    logits = model(torch.from_numpy(ids))[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten()))


def scaled_loss(model, ids, name, unit, factor):
    """With one unit's output scaled: a head's or a channel's columns of the output projection."""
    i, sub = int(name.split(".")[1]), name.rsplit(".", 1)[-1]
    linear = model.layers[i].attn.o if sub == "attn" else model.layers[i].mlp.down
    width = model.spec.head_dim * model.spec.heads_per_group if sub == "attn" else 1
    whole = linear.weight.data
    changed = whole.clone()
    changed[:, unit * width : (unit + 1) * width] *= factor
    linear.weight.data = changed
    try:
        return loss(model, ids)
    finally:
        linear.weight.data = whole


def difference(model, ids, name, unit):
    up, down = (scaled_loss(model, ids, name, unit, 1 + side * STEP) for side in (1, -1))
    return (up - down) / (2 * STEP)


def cases():
    return [(f"layers.{i}.{sub}", unit) for i in range(2) for sub in ("attn", "mlp") for unit in range(UNITS)]


@pytest.fixture(scope="module")
def found(model, ids):
    return derivatives(model, ids)


def test_the_slope_is_the_losss(model, ids, found):
    """Norms compute in fp32: differences over a step of 1e-2 are exact to about 1e-5."""
    for name, unit in cases():
        slope = float(found.first[name][unit]) / found.tokens
        assert slope == pytest.approx(difference(model, ids, name, unit), rel=1e-2, abs=2e-5)


def test_twin_of_another_unit_it_is_not(model, ids, found):
    name, unit = cases()[0]
    wrong = float(found.first[name][unit + 1]) / found.tokens
    assert wrong != pytest.approx(difference(model, ids, name, unit), rel=1e-2, abs=2e-5)


def removals(model, ids):
    whole = loss(model, ids)
    return np.array([scaled_loss(model, ids, name, unit, 0.0) - whole for name, unit in cases()])


def test_two_orders_predict_a_removal_better_than_one(model, ids, found):
    """Measured: an error of 97% of the removals' size with one order, of 15% with two; correlations 0.33, 0.996."""
    real = removals(model, ids)
    errors = []
    for order in (1, 2):
        predicted = np.array([float(found.change(order)[name][unit]) for name, unit in cases()])
        errors.append(float(np.linalg.norm(predicted - real) / np.linalg.norm(real)))
    assert errors[1] < 0.3 < 0.8 < errors[0]


def test_a_removal_is_the_pruned_models(model, ids):
    """The columns that are scaled to nothing are what `prune` takes away."""
    whole = model.spec.layers[0]
    kept = LayerChoice(tuple(range(1, whole.kv_heads)), tuple(range(whole.ffn)))
    old, changed = model.layers[0], prune_layer(model, 0, kept)
    expected = scaled_loss(model, ids, "layers.0.attn", 0, 0.0)
    model.layers[0] = changed
    try:
        assert loss(model, ids) == pytest.approx(expected, rel=1e-9)
    finally:
        model.layers[0] = old


SPEC = ModelSpec(
    name="s",
    family="llama",
    vocab=320,
    hidden=64,
    head_dim=16,
    heads_per_group=1,
    layers=(LayerSpec(4, 256), LayerSpec(4, 256)),
    ropes=(),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=0.25,
)


def planted():
    """Layer 0's heads and last channels matter least."""
    return {
        "layers.0.attn": torch.tensor([3.0, 1.0, 2.0, 4.0]),
        "layers.1.attn": torch.tensor([30.0, 10.0, 20.0, 40.0]),
        "layers.0.mlp": torch.arange(256.0, 0, -1),
        "layers.1.mlp": torch.arange(1000.0, 1256.0),
    }


def test_the_least_important_of_the_whole_model_go():
    first, second = keep(SPEC, planted(), 0.25)
    assert first.kv_heads == (0, 3)
    assert second.kv_heads == (0, 1, 2, 3)
    assert first.channels == tuple(range(128))  # whole groups of 64
    assert second.channels == tuple(range(256))


def test_every_sub_layer_keeps_something():
    first, second = keep(SPEC, planted(), 0.5)
    assert first.kv_heads == (3,)
    assert second.kv_heads == (0, 2, 3)
    assert first.channels == tuple(range(64))
    assert len(second.channels) == 192


def test_nothing_goes_at_rate_zero():
    for layer, choice in zip(SPEC.layers, keep(SPEC, planted(), 0.0), strict=True):
        assert (len(choice.kv_heads), len(choice.channels)) == (layer.kv_heads, layer.ffn)
