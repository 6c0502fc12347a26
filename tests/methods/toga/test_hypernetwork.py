"""The hypernetwork on a toy supernet whose best masks are known, and its masks' formula."""

import pytest

torch = pytest.importorskip("torch")

from jpq_export.methods.toga.hypernetwork import BASE, TEMPERATURE, Hypernetwork, sample, straight_through  # noqa: E402
from jpq_export.methods.toga.train import Training, train  # noqa: E402

LAYERS, ROWS = 3, 16


class Toy:
    """Losing the high precision of a row costs its planted worth; every row has the same size."""

    def __init__(self, worth):
        self.worth = worth

    def loss(self, masks, step):
        del step
        return sum(((1 - masks[name]) * worth).sum() for name, worth in self.worth.items())

    def size(self, masks):
        return torch.cat(list(masks.values())).mean()


def planted(seed):
    """Rows that matter and rows that do not, unlike numbers of them in each layer: 12 of 48 matter."""
    generator = torch.Generator().manual_seed(seed)
    worth = {}
    for i, count in enumerate((1, 8, 3)):
        order = torch.randperm(ROWS, generator=generator)
        worth[f"layers.{i}"] = torch.where(order < count, 4.0, 0.02)
    return worth


def trained(toy, steps, fractions=(0.25, 0.25)):
    network = Hypernetwork([{name: ROWS} for name in toy.worth], seed=0)
    losses = train(network, toy, Training(steps, rate=1e-2, fractions=fractions), seed=1)
    with torch.no_grad():
        logits = network(sum(fractions) / 2)
    return torch.cat(list(logits.values())), losses


def test_the_planted_optimum_is_reached():
    toy = Toy(planted(0))
    logits, losses = trained(toy, 300)
    matters = torch.cat(list(toy.worth.values())) > 1
    assert torch.equal(logits + BASE > 0, matters)
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])


def test_twin_untrained_it_is_not():
    toy = Toy(planted(0))
    logits, _ = trained(toy, 0)
    assert not torch.equal(logits + BASE > 0, torch.cat(list(toy.worth.values())) > 1)


def test_one_training_answers_a_range_of_sizes():
    """Worths fall evenly over the rows: at every size asked for, the most valuable rows should be the kept ones."""
    order = torch.randperm(LAYERS * ROWS, generator=torch.Generator().manual_seed(3))
    values = 0.1 + 4 * order.float() / len(order)
    toy = Toy({f"layers.{i}": values[i * ROWS : (i + 1) * ROWS] for i in range(LAYERS)})
    network = Hypernetwork([{name: ROWS} for name in toy.worth], seed=0)
    train(network, toy, Training(600, rate=5e-3, fractions=(0.25, 0.75)), seed=1)
    for fraction in (0.3, 0.5, 0.7):
        with torch.no_grad():
            logits = torch.cat(list(network(fraction).values()))
        kept = logits.argsort(descending=True)[: round(fraction * len(values))]
        best = values.sort(descending=True).values[: len(kept)].sum()
        assert values[kept].sum() > 0.93 * best  # a random choice of half the rows has two thirds of the best


def test_masks_follow_the_published_formula():
    logits = {"a": torch.tensor([-3.0, 0.0, 3.0])}
    soft = sample(logits, torch.Generator().manual_seed(0))["a"]
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(0))
    expected = 1 / (1 + torch.exp(-(logits["a"] - torch.log(-torch.log(uniform)) + 3.0) / 0.4))
    torch.testing.assert_close(soft, expected)
    assert (BASE, TEMPERATURE) == (3.0, 0.4)


def test_rounding_is_straight_through():
    mask = torch.tensor([0.2, 0.7], requires_grad=True)
    hard = straight_through({"a": mask})["a"]
    hard.sum().backward()
    assert hard.tolist() == [0.0, 1.0]
    assert mask.grad is not None
    assert mask.grad.tolist() == [1.0, 1.0]
