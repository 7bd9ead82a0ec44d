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
from sparsekern.eligible import convertible
from sparsekern.prune.scores import block_means, connection_sensitivity


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


def score(model: nn.Module, batches: object, **keywords: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return connection_sensitivity(model, convertible(model)[0], batches, cross_entropy, **keywords)


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

    weights, biases = score(model, batches, biases=True)
    effects, scores = [], []
    with torch.no_grad():
        for name in ("0", "2", "5"):
            weight, bias = model.get_submodule(name).weight, model.get_submodule(name).bias
            for index in np.ndindex(*weight.shape):
                effects.append(effect(weight, index))
                o, c, *tap = index
                column = c if not tap else (tap[0] * weight.shape[3] + tap[1]) * weight.shape[1] + c
                scores.append(weights[name][o, column].item())
            for index in np.ndindex(*bias.shape):
                effects.append(effect(bias, index))
                scores.append(biases[name][index].item())
    assert sum(scores) == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(scores, np.array(effects) / sum(effects), rtol=1e-5, atol=1e-9)


def test_biases_are_left_out_unless_asked_for() -> None:
    weights, biases = score(small_net(), batch())
    assert not biases
    assert sum(float(matrix.sum()) for matrix in weights.values()) == pytest.approx(1, rel=1e-12)


def test_one_pair_a_list_and_a_loader_are_the_same_batches() -> None:
    model, (x, y) = small_net(), batch(6)
    for other in ([x, y], [(x, y)], iter([(x, y)]), DataLoader(TensorDataset(x, y), batch_size=6)):
        expected, found = score(model, (x, y))[0], score(model, other)[0]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    two = score(model, [(x[:3], y[:3]), (x[3:], y[3:])])[0]
    torch.testing.assert_close(two, score(model, (x, y))[0])


def test_frozen_weights_are_scored_without_gradient_mode() -> None:
    model, data = small_net(), batch()
    expected = score(model, data)[0]
    model.requires_grad_(False)
    with torch.no_grad():
        found = score(model, data)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_models_are_scored_in_float32() -> None:
    model = nn.Linear(8, 4).bfloat16()
    x, y = torch.randn(64, 8).bfloat16(), torch.randint(4, (64,))
    weight = model.weight.detach().clone().requires_grad_()
    total = torch.zeros(4, 8)
    for part, target in zip(x.split(1), y.split(1), strict=True):
        total += torch.autograd.grad(cross_entropy(linear(part, weight, model.bias), target), weight)[0].float()
    expected = (weight.detach().double() * total.double()).abs()
    found = score(model, zip(x.split(1), y.split(1), strict=True))[0][""]
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-6, atol=0)


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
        ("not finite", ValueError, "layer 'body.0' has scores that are not finite"),
        ("zero", ValueError, "positive, finite sum"),
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
    with pytest.raises(ValueError, match="layer '0'"):  # NaN reaches every gradient; the first layer is named
        score(model, batch())


def test_a_layer_that_the_loss_does_not_reach_scores_zero() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    data = (torch.randn(3, 4), torch.randint(4, (3,)))
    assert not score(Spare(), data)[0]["spare"].any()
    assert prune.snip(Spare(), data, cross_entropy, 0.5, (1, 1))["spare"].nnz == 1


@pytest.mark.parametrize("rows, columns", [(5, 7), (8, 8), (3, 1)])
@pytest.mark.parametrize("bh, bw", [(1, 1), (2, 3), (4, 4), (9, 9)])
def test_block_means_count_true_entries_only(rows: int, columns: int, bh: int, bw: int) -> None:
    matrix = torch.rand(rows, columns, dtype=torch.float64)
    means, sizes = block_means(matrix, (bh, bw))
    assert means.shape == sizes.shape == (-(-rows // bh), -(-columns // bw))
    for i, j in np.ndindex(*means.shape):
        block = matrix.numpy()[i * bh : (i + 1) * bh, j * bw : (j + 1) * bw]
        assert sizes[i, j] == block.size
        assert means[i, j].item() == pytest.approx(block.mean(), rel=1e-12)


def test_model_is_not_copied_into_the_scores() -> None:
    model, data = small_net(), batch()
    before = copy.deepcopy(model.state_dict())
    for matrix in score(model, data)[0].values():
        matrix.fill_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
