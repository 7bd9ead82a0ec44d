"""Connection sensitivity: against finite differences, and that scoring leaves no trace."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader, TensorDataset

from sparsekern import prune
from sparsekern.prune.units import units


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Many tiny tensors run faster so, above all beside other test processes; conftest puts it back."""
    torch.set_num_threads(1)


def small_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4)
    )
    return net.double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64), torch.randint(4, (n,))


def score(model: nn.Module, batches: object, **keywords: bool) -> dict[str, Tensor]:
    return prune.scores.snip(model, batches, cross_entropy, **keywords)


def test_scores_are_the_effect_of_a_small_change_of_each_indicator() -> None:
    model, batches = small_net(), [batch(5), batch(3)]

    def effect(parameter: Tensor, index: tuple[int, ...], eps: float = 1e-6) -> float:
        """|∂L/∂c| at c = 1 of the indicator c that multiplies one entry, L being the sum over the batches."""
        value, losses = parameter[index].item(), []
        for factor in (1 + eps, 1 - eps):
            parameter[index] = value * factor
            losses.append(sum(cross_entropy(model(x), y).item() for x, y in batches))
        parameter[index] = value
        return abs(losses[0] - losses[1]) / (2 * eps)

    scores = score(model, batches, biases=True)
    assert set(scores) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            effects = [effect(parameter, index) for index in np.ndindex(*parameter.shape)]
            found = [scores[name][index].item() for index in np.ndindex(*parameter.shape)]
            np.testing.assert_allclose(found, effects, rtol=1e-5, atol=1e-9)


def test_biases_are_left_out_unless_asked_for() -> None:
    assert set(score(small_net(), batch())) == {"0.weight", "2.weight", "5.weight"}


def test_one_pair_a_list_and_a_loader_are_the_same_batches() -> None:
    model, (x, y) = small_net(), batch(6)
    for other in ([x, y], [(x, y)], iter([(x, y)]), DataLoader(TensorDataset(x, y), batch_size=6)):
        expected, found = score(model, (x, y)), score(model, other)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    two = score(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    whole = {name: 2 * value for name, value in score(model, (x, y)).items()}  # two means, each of half the examples
    torch.testing.assert_close(two, whole)


def test_frozen_weights_are_scored_without_gradient_mode() -> None:
    model, data = small_net(), batch()
    expected = score(model, data)
    model.requires_grad_(False)
    with torch.no_grad():
        found = score(model, data)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_models_are_scored_in_float32() -> None:
    model = nn.Linear(8, 4).bfloat16()
    x, y = torch.randn(64, 8).bfloat16(), torch.randint(4, (64,))
    weight = model.weight.detach().clone().requires_grad_()
    total = torch.zeros(4, 8)
    for part, target in zip(x.split(1), y.split(1), strict=True):
        total += torch.autograd.grad(cross_entropy(linear(part, weight, model.bias), target), weight)[0].float()
    expected = (weight.detach().double() * total.double()).abs()
    found = score(model, zip(x.split(1), y.split(1), strict=True))["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


class Stateful(nn.Module):
    """Everything that scoring could disturb: batch norm, dropout, a frozen weight, gradients, mixed modes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.frozen = nn.BatchNorm1d(8).eval()
        self.head = nn.Linear(8, 4).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.head(self.frozen(self.body(x)))


def bad_loss(kind: str) -> Callable[[Tensor, Tensor], object]:
    def loss(output: Tensor, target: Tensor) -> object:
        torch.rand(3)
        match kind:
            case "raises":
                raise RuntimeError("boom")
            case "vector":
                return output.sum(0)
            case "number":
                return 1.0
            case "constant":
                return output.detach().sum()
            case "not finite":
                return output.sum() / 0
            case "zero":
                return output.sum() * 0
            case _:
                return cross_entropy(output, target)

    return loss


@pytest.mark.parametrize(
    "kind, error, match",
    [
        ("fine", None, ""),
        ("raises", RuntimeError, "boom"),
        ("vector", ValueError, "scalar, got shape"),
        ("number", TypeError, "must return a tensor, got float"),
        ("constant", ValueError, "depends on the model's weights"),
        ("not finite", ValueError, "'body.0.weight' has scores that are not finite"),
        ("zero", ValueError, "scores must not all be zero"),
    ],
)
def test_scoring_leaves_no_trace(kind: str, error: type[Exception] | None, match: str) -> None:
    model = Stateful()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def trace() -> list[object]:
        return [
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            {name: (id(p), p.requires_grad, p.grad.clone(), p._version) for name, p in model.named_parameters()},
            {name: (id(b), b._version) for name, b in model.named_buffers()},
            [module.training for module in model.modules()],
            torch.get_rng_state(),
            random.getstate(),
            torch.is_grad_enabled(),
        ]

    data = DataLoader(TensorDataset(torch.randn(20, 6), torch.randint(4, (20,))), batch_size=10, shuffle=True)
    before = trace()
    if error is None:
        prune.snip(model, data, bad_loss(kind), 0.5)
    else:
        with pytest.raises(error, match=match):
            prune.snip(model, data, bad_loss(kind), 0.5)
    after = trace()
    for was, now in zip(before, after, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0)


def test_bad_batches_are_named() -> None:
    model, (x, y) = small_net(), batch()
    for batches, error, match in [
        ([], ValueError, "at least one"),
        ([x], TypeError, "pairs, got Tensor"),
        ([(x, y, y)], TypeError, "pairs, got tuple of length 3"),
        ([{"x": x}], TypeError, "pairs, got dict"),
    ]:
        with pytest.raises(error, match=match):
            score(model, batches)


def test_a_non_finite_weight_is_named() -> None:
    model = small_net()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'0\.weight'"):  # NaN reaches every gradient; the first layer is named
        prune.snip(model, batch(), cross_entropy)


def test_a_layer_that_the_loss_does_not_reach_scores_zero() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    data = (torch.randn(3, 4), torch.randint(4, (3,)))
    assert not score(Spare(), data)["spare.weight"].any()
    assert prune.snip(Spare(), data, cross_entropy, 0.5, (1, 1))["spare"].nnz == 1


@pytest.mark.parametrize("rows, columns", [(5, 7), (8, 8), (3, 1)])
@pytest.mark.parametrize("bh, bw", [(1, 1), (2, 3), (4, 4), (9, 9)])
def test_scores_of_blocks_count_true_entries_only(rows: int, columns: int, bh: int, bw: int) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    rules = {
        "mean": lambda block: block.mean(),
        "l2": lambda block: np.sqrt((block**2).mean()),
        "gate": lambda block: abs(block.mean()),
    }
    for rule, of_block in rules.items():
        grid = units(nn.Linear(columns, rows), matrix, (bh, bw), block_score=rule)
        assert grid.scores.shape == grid.sizes.shape == (-(-rows // bh), -(-columns // bw))
        for i, j in np.ndindex(*grid.scores.shape):
            block = matrix.numpy()[i * bh : (i + 1) * bh, j * bw : (j + 1) * bw]
            assert grid.sizes[i, j] == block.size
            assert grid.scores[i, j].item() == pytest.approx(of_block(block), rel=1e-12)


def test_model_is_not_copied_into_the_scores() -> None:
    model, data = small_net(), batch()
    before = copy.deepcopy(model.state_dict())
    for matrix in score(model, data).values():
        matrix.fill_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
