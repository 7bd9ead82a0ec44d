"""Scores, densities, units and paths, each against another way to compute it."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekern import BlockPattern, prune
from sparsekern.prune.allocation import densities, exact_counts
from sparsekern.prune.placement import drawn_order


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def mlp(*sizes: int) -> nn.Sequential:
    layers = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def batch(features: int, classes: int, n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, features, dtype=torch.float64), torch.randint(classes, (n,))


def weights_of(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)]


def output(model: nn.Sequential, weights: list[Tensor], x: Tensor) -> Tensor:
    """The same network with other weights, written out."""
    biases = [layer.bias.detach() for layer in model if isinstance(layer, nn.Linear)]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight.T + bias
        x = x.tanh() if i < len(weights) - 1 else x
    return x


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
def test_grasp_is_the_weight_times_hessian_times_gradient(absolute: bool) -> None:
    model, batches = mlp(5, 4, 3), [batch(5, 3), batch(5, 3, 7)]
    weights = weights_of(model)
    sizes = [weight.numel() for weight in weights]

    def loss(flat: Tensor) -> Tensor:
        shaped = [part.view_as(weight) for part, weight in zip(flat.split(sizes), weights, strict=True)]
        return sum(cross_entropy(output(model, shaped, x) / 3.0, y) for x, y in batches)

    flat = torch.cat([weight.flatten() for weight in weights])
    gradient = torch.autograd.functional.jacobian(loss, flat)
    expected = flat * (torch.autograd.functional.hessian(loss, flat) @ gradient)
    found = prune.scores.grasp(model, batches, cross_entropy, absolute=absolute, temperature=3.0)
    assert list(found) == ["0.weight", "2.weight"]
    got = torch.cat([score.flatten() for score in found.values()])
    torch.testing.assert_close(got, expected.abs() if absolute else expected, rtol=1e-9, atol=1e-14)


def top(scores: list[np.ndarray], k: int) -> list[np.ndarray]:
    flat = np.concatenate([score.ravel() for score in scores])
    mask = np.zeros(flat.size)
    mask[np.argsort(-flat, kind="stable")[:k]] = 1
    cuts = np.cumsum([score.size for score in scores])[:-1]
    return [part.reshape(score.shape) for part, score in zip(np.split(mask, cuts), scores, strict=True)]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_synflow_is_the_product_of_absolute_matrices(rounds: int) -> None:
    model = mlp(6, 5, 4, 3)[::2]  # linear: paths multiply
    for layer in model:
        nn.init.zeros_(layer.bias)
    matrices = [np.abs(weight.numpy()) for weight in weights_of(model)]
    total = sum(matrix.size for matrix in matrices)
    masks = [np.ones_like(matrix) for matrix in matrices]
    for step in range(rounds):
        left = [matrix * mask for matrix, mask in zip(matrices, masks, strict=True)]
        scores = []
        for i, matrix in enumerate(left):
            reached, reaching = np.ones(6), np.ones(3)
            for other in left[:i]:
                reached = other @ reached
            for other in reversed(left[i + 1 :]):
                reaching = reaching @ other
            scores.append(matrix * np.outer(reaching, reached))
        masks = top(scores, round(total * 0.3 ** ((step + 1) / rounds)))
    found = prune.scores.synflow(model, (6,), 0.7, rounds=rounds)
    for score, expected in zip(found.values(), scores, strict=True):
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_synflow_neither_needs_nor_changes_a_state() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).train()
    before = copy.deepcopy(model.state_dict())
    found = prune.scores.synflow(model, (2, 4, 4), 0.5, rounds=3)
    assert all(score.dtype == torch.float64 for score in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("revive", [False, True])
@pytest.mark.parametrize("rounds", [1, 4])
def test_progressive_scores_are_those_of_a_plain_loop(rounds: int, revive: bool) -> None:
    model, pair = mlp(8, 7, 5, 3), batch(8, 3)
    weights = weights_of(model)
    total = sum(weight.numel() for weight in weights)
    masks = [np.ones(weight.shape) for weight in weights]
    for step in range(rounds):
        left = [(w * torch.from_numpy(m)).requires_grad_() for w, m in zip(weights, masks, strict=True)]
        gradients = torch.autograd.grad(cross_entropy(output(model, left, pair[0]), pair[1]), left)
        factors = weights if revive else [weight.detach() for weight in left]
        scores = [(w * g).abs().numpy() for w, g in zip(factors, gradients, strict=True)]
        masks = top(scores, round(total * 0.1 ** ((step + 1) / rounds)))
    method = prune.scores.force if revive else prune.scores.iterative_snip
    found = prune.scores.__dict__[method.__name__](model, pair, cross_entropy, 0.9, rounds=rounds)
    for score, expected in zip(found.values(), scores, strict=True):
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-10, atol=1e-16)
    if rounds == 1:
        snip = prune.scores.snip(model, pair, cross_entropy)
        assert all(torch.equal(found[name], snip[name]) for name in snip)


def test_magnitude_and_random() -> None:
    model = mlp(6, 5, 3)
    assert torch.equal(prune.scores.magnitude(model)["2.weight"], model[2].weight.detach().abs())
    first, again = prune.scores.random(model), prune.scores.random(model)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_losses_have_the_gradients_of_their_formulas() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    probabilities = logits.detach().softmax(1)
    guess = torch.eye(4, dtype=torch.float64)[probabilities.argmax(1)]
    log = probabilities.log()
    expected = {
        "uniform": probabilities - 0.25,
        "predicted": probabilities - guess,
        "entropy": -probabilities * (log - (probabilities * log).sum(1, keepdim=True)),
    }
    for name, gradient in expected.items():
        (found,) = torch.autograd.grad(getattr(prune.losses, name)(logits, None), logits)
        torch.testing.assert_close(found, gradient / 6, rtol=1e-10, atol=1e-12)


def test_batches_that_can_be_read_once_only_are_refused() -> None:
    model, pair = mlp(4, 3), batch(4, 3)
    for method in (prune.scores.grasp, lambda *args: prune.scores.force(*args, 0.5)):
        with pytest.raises(TypeError, match="batches must be a collection"):
            method(model, iter([pair]), cross_entropy)
    for rounds in (0, 2.0):
        with pytest.raises(ValueError, match="rounds must be"):
            prune.scores.force(model, pair, cross_entropy, 0.5, rounds=rounds)


# ---- how much -------------------------------------------------------------------------------------------------------

SHAPES = {"a": (300, 784), "b": (100, 300), "c": (10, 100), "d": (64, 32, 3, 3)}


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_erk_is_that_of_its_authors(density: float) -> None:
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in SHAPES.items()}
    dense: set[str] = set()
    while True:  # layers that would exceed 1 are dense, and the rest is solved again
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = left / sum(raw[name] * sizes[name] for name in raw if name not in dense)
        over = {name for name in raw if name not in dense and scale * raw[name] > 1}
        if not over:
            break
        dense |= over
    found = densities(SHAPES, "erk", density)
    for name in SHAPES:
        assert found[name] == pytest.approx(1 if name in dense else scale * raw[name], rel=1e-9)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.9])
def test_igq_has_one_constant_for_all_layers(density: float) -> None:
    found = densities(SHAPES, "igq", density)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    constants = [(1 / found[name] - 1) / sizes[name] for name in SHAPES]
    np.testing.assert_allclose(constants, constants[0], rtol=1e-6)
    assert sum(found[name] * sizes[name] for name in SHAPES) == pytest.approx(density * sum(sizes.values()), rel=1e-9)


def test_counts_are_exact_and_within_their_limits() -> None:
    counts = exact_counts({"a": 10.4, "b": 0.3, "c": 5.3}, 16, {"a": 0, "b": 2, "c": 0}, {"a": 8, "b": 9, "c": 9})
    assert counts == {"a": 8, "b": 2, "c": 6}
    with pytest.raises(ValueError, match="leave 2 to 26 weights, not 27"):
        exact_counts({"a": 1, "b": 1, "c": 1}, 27, {"a": 0, "b": 2, "c": 0}, {"a": 8, "b": 9, "c": 9})


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "igq"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_every_allocation_keeps_the_number_asked_for(allocation: str, sparsity: float) -> None:
    model = mlp(50, 40, 30, 10)
    patterns = prune.magnitude(model, sparsity, (1, 1), allocation=allocation, min_density=0.02, max_density=0.8)
    assert sum(p.nnz for p in patterns.values()) == round(3500 * (1 - sparsity))
    assert all(0.0199 <= p.density <= 0.8001 for p in patterns.values())


def test_densities_by_name_are_taken() -> None:
    model = mlp(50, 40, 30, 10)
    given = {"0": 0.1, "2": 0.25, "4": 0.5}
    patterns = prune.random(model, None, (1, 1), allocation=given)
    assert {name: p.density for name, p in patterns.items()} == given
    for wrong, words in (({"0": 0.1}, "missing or unknown: 2, 4"), (given | {"2": 2.0}, r"allocation\['2'\]")):
        with pytest.raises(ValueError, match=words):
            prune.random(model, None, (1, 1), allocation=wrong)
    with pytest.raises(ValueError, match="sparsity must be None where"):
        prune.random(model, 0.5, (1, 1), allocation=given)


def test_excluded_layers_stay_dense_and_do_not_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 20), nn.Linear(20, 5))
    assert list(prune.magnitude(model, 0.5, (1, 1), exclude=["3"])) == ["0", "2"]
    patterns = prune.magnitude(model, 0.5, (1, 1), exclude=[nn.Conv2d])
    assert list(patterns) == ["2", "3"] and sum(p.nnz for p in patterns.values()) == 370
    for wrong, error in ((["7"], ValueError), ("3", TypeError), ([3], TypeError), ([nn.Module], ValueError)):
        with pytest.raises(error, match="exclude"):
            prune.magnitude(model, 0.5, (1, 1), exclude=wrong)


# ---- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)])
def test_rows_and_columns_stay_even(rows: int, columns: int) -> None:
    for seed in range(20):
        scores = torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        order = drawn_order(scores, torch.Generator().manual_seed(seed), "both", rows * columns)
        assert sorted(order.tolist()) == list(range(rows * columns))
        for count in range(rows * columns + 1):
            per_row = torch.bincount(order[:count] // columns, minlength=rows)
            per_column = torch.bincount(order[:count] % columns, minlength=columns)
            assert int(per_row.max() - per_row.min()) <= 1
            # Where every column is still open to some row that has its turn, one more at most; else two.
            assert int(per_column.max() - per_column.min()) <= (1 if count <= columns else 2)


def test_kernels_and_channels_go_whole() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 24), nn.Linear(24, 20))
    kernels = prune.magnitude(model, 0.7, {"0": (4, 2), "2": (4, 4)}, granularity="kernel")
    per_tap = kernels["0"].to_mask().view(4, 9, 4)
    assert (per_tap == per_tap[:, :1]).all() and 0 < per_tap.sum() < per_tap.numel()
    channels = prune.magnitude(model, 0.7, {"0": (2, 8), "2": (1, 1)}, granularity="channel")
    for pattern in channels.values():
        rows = pattern.to_mask().float().mean(1)
        assert ((rows == 0) | (rows == 1)).all()
    best = model[2].weight.detach().abs().mean(1).argsort(descending=True)
    kept = channels["2"].to_mask().any(1).nonzero().flatten()
    assert set(kept.tolist()) == set(best[: len(kept)].tolist())
    with pytest.raises(ValueError, match="needs blocks within one tap"):
        prune.magnitude(model, 0.7, {"0": (4, 3)}, granularity="kernel")


def test_gates_rank_blocks_by_the_size_of_their_signed_mean() -> None:
    model, pair = mlp(12, 8, 4), batch(12, 4)
    signed = prune.scores.snip(model, pair, cross_entropy, signed=True)["0.weight"]
    means = signed.view(4, 2, 6, 2).mean((1, 3)).abs()
    pattern = prune.snip(
        model, pair, cross_entropy, None, {"0": (2, 2)}, allocation={"0": 0.25, "2": 1.0}, placement="best",
        block_score="gate",
    )["0"]  # fmt: skip
    expected = torch.zeros(24, dtype=torch.bool)
    expected[means.flatten().argsort(descending=True)[:6]] = True
    assert torch.equal(pattern.to_mask().flatten(), expected)


# ---- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_paths_are_those_of_boolean_products(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 4))
    masks = {name: torch.rand(model.get_submodule(name).weight.shape, generator=generator) < 0.3 for name in "024"}
    patterns = {name: BlockPattern.from_mask(mask, (1, 1)) for name, mask in masks.items()}
    found = prune.connectivity(model, patterns, (7,))
    a, b, c = (mask.numpy() for mask in masks.values())
    alive = [np.ones(7, bool), a.any(1), (b & a.any(1)).any(1)]
    used = [(c.any(0)[:, None] & b).any(0), c.any(0), np.ones(4, bool)]
    total = 0
    for name, mask, inputs, outputs in zip("024", (a, b, c), alive, used, strict=True):
        on_path = mask & inputs[None] & outputs[:, None]
        total += on_path.sum()
        assert (found[name].kept, found[name].effective) == (mask.sum(), on_path.sum())
        assert found[name].dead_outputs == tuple(np.flatnonzero(~on_path.any(1)))
        assert found[name].dead_inputs == tuple(np.flatnonzero(~on_path.any(0)))
        assert found[name].collapsed == (not on_path.any())
    assert found.effective_sparsity == pytest.approx(1 - total / 92)


def test_what_leads_nowhere_is_moved_to_where_it_leads() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    first, second = torch.zeros(6, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)
    first[:2] = True  # hidden units 0 and 1 get everything, 4 and 5 are read
    second[:, 4:] = True
    patterns = {"0": BlockPattern.from_mask(first, (1, 1)), "2": BlockPattern.from_mask(second, (1, 1))}
    before = copy.deepcopy(patterns)
    assert prune.connectivity(model, patterns, (6,)).collapsed == ["0", "2"]
    mended = prune.reconnect(model, patterns, (6,))
    after = prune.connectivity(model, mended, (6,))
    assert [layer.effective for layer in after.values()] == [12, 12] and after.collapsed == []
    assert patterns == before and prune.reconnect(model, mended, (6,)) == mended


def test_paths_through_convolutions_pooling_and_norms() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.Flatten(),
        nn.Linear(12, 2),
    ).train()  # fmt: skip
    whole = {
        name: torch.ones(shape, dtype=torch.bool) for name, shape in (("0", (4, 18)), ("4", (3, 4)), ("6", (2, 12)))
    }
    whole["4"][:, 1] = False  # nobody reads channel 1
    whole["4"][2] = False  # channel 2 behind it gets nothing
    patterns = {name: BlockPattern.from_mask(mask, (1, 1)) for name, mask in whole.items()}
    found = prune.connectivity(model, patterns, (2, 4, 4))
    assert (found["0"].effective, found["4"].effective, found["6"].effective) == (54, 6, 16)
    assert found["0"].dead_outputs == (1,) and found["4"].dead_outputs == (2,)
    assert all(module.training for module in model.modules())


def test_grasp_of_attention_which_torch_fuses_without_second_derivatives() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    torch.manual_seed(0)
    batch = torch.randn(8, 6, 16), torch.arange(8)
    found = prune.scores.grasp(Attention(), [batch], cross_entropy)
    assert all(bool(score.any()) for score in found.values())


def test_scores_in_inference_mode_are_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call this outside"):
        prune.snip(nn.Linear(4, 4), (torch.randn(2, 4), torch.arange(2)), cross_entropy, 0.5, (1, 1))
