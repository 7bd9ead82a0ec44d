"""Approximate isometry, orthogonal initialisation and their measures, against autograd and NumPy."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsekern import isometry, prune, sparsify_
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.pattern import BlockPattern
from sparsekern.weights import weight_matrix

LAYERS = {
    "wide": lambda: nn.Linear(30, 12),
    "tall": lambda: nn.Linear(7, 20),
    "conv": lambda: nn.Conv2d(4, 6, (3, 2)),
    "tall conv": lambda: nn.Conv2d(2, 20, 2),
    "grouped conv": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise conv": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "tall groups": lambda: nn.Conv2d(2, 8, (1, 3), groups=2),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Thousands of tiny products run faster so, above all beside other test processes; conftest puts it back."""
    torch.set_num_threads(1)


def model_of(layer: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(layer).to(dtype)


def half_pattern(layer: nn.Module, blocksize: tuple[int, int] = (1, 1)) -> BlockPattern:
    shape = tuple(weight_matrix(layer.weight).shape)
    grid = [-(-n // b) for n, b in zip(shape, blocksize, strict=True)]
    return BlockPattern.from_mask(torch.rand(grid) < 0.5, blocksize, shape)


def norms(weight: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    """The definition, differentiable: ‖(C⊙W)(C⊙W)ᵀ − I‖_F with one Gram matrix per group."""
    kept = (weight * mask).flatten(1)
    total = kept.new_zeros(())
    for part in kept.chunk(groups):
        total = total + (part @ part.T - torch.eye(len(part), dtype=part.dtype)).square().sum()
    return total.sqrt()


def mask_of(layer: nn.Module, pattern: BlockPattern) -> torch.Tensor:
    """The element mask in the shape of the weight, by asking for each element where it stands in the matrix."""
    matrix, weight = pattern.to_element_mask(), layer.weight
    if weight.dim() == 2:
        return matrix
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for o, c, y, x in np.ndindex(*weight.shape):
        mask[o, c, y, x] = matrix[o, (y * weight.shape[3] + x) * weight.shape[1] + c]
    return mask


@pytest.mark.parametrize("kind", LAYERS)
def test_step_is_gradient_descent_on_the_norm(kind: str) -> None:
    layer = LAYERS[kind]()
    model = model_of(layer)
    pattern, groups = half_pattern(layer), getattr(layer, "groups", 1)
    mask, before = mask_of(layer, pattern), layer.weight.detach().clone()
    leaf = before.clone().requires_grad_()
    norm = norms(leaf, mask, groups)
    (gradient,) = torch.autograd.grad(norm, leaf)

    assert isometry.orthogonality_score(model, {"0": pattern}) == pytest.approx(norm.item(), rel=1e-12)
    bias = layer.bias.detach().clone()
    report = isometry.approximate_isometry_(model, {"0": pattern}, mode="paper", lr=0.05, steps=1)
    torch.testing.assert_close(layer.weight.detach(), before - 0.05 * gradient, rtol=1e-12, atol=1e-14)
    assert torch.equal(layer.weight[~mask], before[~mask])
    assert torch.equal(layer.bias, bias)
    assert report.before == pytest.approx(norm.item(), rel=1e-12)
    assert report.after == pytest.approx(norms(layer.weight, mask, groups).item(), rel=1e-12)
    assert report.steps == {"0": 1}


@pytest.mark.parametrize("mode", ["fast", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sparse_and_dense_models_agree(dtype: torch.dtype, mode: isometry.Mode) -> None:
    dense = nn.Sequential(nn.Conv2d(4, 18, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 13)).to(dtype)
    patterns = {"0": half_pattern(dense[0], (4, 2)), "3": half_pattern(dense[3], (3, 4))}
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, patterns)
    expected = isometry.approximate_isometry_(dense, patterns, mode=mode, steps=30)
    report = isometry.approximate_isometry_(sparse, mode=mode, steps=30)
    assert report == expected
    assert report.after < report.before
    for name, pattern in patterns.items():
        layer = sparse.get_submodule(name)
        assert isinstance(layer, SparseConv2d | SparseLinear)
        assert torch.equal(layer.values, pattern.gather(weight_matrix(dense.get_submodule(name).weight)))
        assert not layer.values[~pattern.edge_mask()].any()


def test_overhang_is_never_read_and_ends_as_zero() -> None:
    dense = model_of(nn.Linear(10, 10))
    pattern = BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), (8, 8), (10, 10))
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, {"0": pattern})
    with torch.no_grad():
        sparse[0].values[~pattern.edge_mask()] = math.nan
    expected = isometry.approximate_isometry_(dense, {"0": pattern}, steps=5)
    assert isometry.approximate_isometry_(sparse, steps=5) == expected
    assert torch.equal(sparse[0].values, pattern.gather(dense[0].weight))


@pytest.mark.parametrize("mode", ["fast", "paper"])
def test_reaches_isometry_where_the_mask_allows(mode: isometry.Mode) -> None:
    model = nn.Sequential(nn.Linear(40, 10), nn.Linear(10, 5)).double()
    full = {name: BlockPattern.from_dense(torch.ones_like(model.get_submodule(name).weight), (1, 1)) for name in "01"}
    report = isometry.approximate_isometry_(model, full, mode=mode, lr=2e-3, steps=1500)
    assert report.after < 0.02 < 1 < report.before
    # A dead row is 1 away from the identity whatever the others do.
    mask = torch.ones(10, 40, dtype=torch.bool)
    mask[3:7] = False
    dead = {"0": BlockPattern.from_dense(mask, (1, 1))}
    report = isometry.approximate_isometry_(model, dead, mode=mode, lr=2e-3, steps=1500)
    assert report.after == pytest.approx(2, abs=1e-3)


def test_fast_stops_each_layer_by_itself() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 8))
    patterns = prune.random(model, 0.7, (1, 1))
    paper = copy.deepcopy(model)
    report = isometry.approximate_isometry_(model, patterns)
    assert all(0 < taken <= 500 and taken % 25 == 0 for taken in report.steps.values())
    assert isometry.orthogonality_score(model, patterns) == pytest.approx(report.after)
    assert isometry.approximate_isometry_(paper, patterns, mode="paper", steps=7).steps == {"0": 7, "1": 7}
    assert isometry.approximate_isometry_(paper, patterns, steps=30).steps == {"0": 30, "1": 30}


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["orthogonal", "as built"])
def test_fast_ends_no_higher_than_the_paper(kind: str, blocksize: tuple[int, int], sparsity: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.Flatten(), nn.Linear(64, 40))
    if kind == "orthogonal":
        isometry.orthogonal_(model)
    paper, patterns = copy.deepcopy(model), prune.random(model, sparsity, blocksize)
    fast = isometry.approximate_isometry_(model, patterns)
    slow = isometry.approximate_isometry_(paper, patterns, mode="paper", steps=1000)
    assert fast.before == slow.before
    # A tenth of a percent: where two descents from one point go to different valleys, they are as deep as that.
    assert fast.after <= 1.001 * slow.after


def test_an_empty_layer_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    before = model[0].weight.detach().clone()
    empty = {"0": BlockPattern.from_mask(torch.zeros(4, 6, dtype=torch.bool), (1, 1))}
    report = isometry.approximate_isometry_(model, empty)
    assert report.after == report.before == 2 and report.steps == {"0": 0}
    assert torch.equal(model[0].weight, before)


def test_runs_repeat_and_layers_do_not_mix() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 8))
    patterns = prune.random(model, 0.7, (1, 1))
    first, second, alone = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    isometry.approximate_isometry_(first, patterns, steps=50)
    isometry.approximate_isometry_(second, patterns, steps=50)
    isometry.approximate_isometry_(alone, {"1": patterns["1"]}, steps=50)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(alone[1].weight, first[1].weight)
    assert torch.equal(alone[0].weight, model[0].weight)


@pytest.mark.parametrize("mode", ["fast", "paper"])
def test_orthogonal_weights_stay(mode: isometry.Mode) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4)[[2, 0, 3, 1]])
    full = {"0": BlockPattern.from_dense(torch.ones(4, 4), (1, 1))}
    before = model[0].weight.detach().clone()
    assert isometry.approximate_isometry_(model, full, mode=mode, steps=20).after == 0
    assert torch.equal(model[0].weight, before)
    # A norm that becomes exactly 0 on the way: d|w² - 1|/dw is -1 at 0.5, so the first step lands on 1.
    single = nn.Sequential(nn.Linear(1, 1)).double()
    with torch.no_grad():
        single[0].weight.fill_(0.5)
    whole = {"0": BlockPattern.from_dense(torch.ones(1, 1), (1, 1))}
    isometry.approximate_isometry_(single, whole, mode=mode, lr=0.5, steps=40)
    assert single[0].weight.item() == pytest.approx(1, abs=0 if mode == "paper" else 1e-12)


def test_bad_calls_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 6))
    patterns = prune.random(model, 0.5, (1, 1))
    before = copy.deepcopy(model.state_dict())

    def refused(error: type[Exception], match: str, given: object = patterns, **keywords: object) -> None:
        with pytest.raises(error, match=match):
            isometry.approximate_isometry_(model, given, **keywords)
        after = model.state_dict()
        assert all(torch.equal(after[key].nan_to_num(7), value.nan_to_num(7)) for key, value in before.items())

    refused(ValueError, "without sparse layers", None)
    refused(ValueError, "no layer to work on", {})
    refused(ValueError, "'9': no dense layer", {"9": patterns["0"]})
    refused(ValueError, r"layer '1' must have shape \(6, 10\)", {"1": patterns["0"]})
    refused(TypeError, "BlockPattern, got Tensor", {"1": torch.ones(6, 10)})
    refused(ValueError, "lr must be positive", lr=0)
    refused(ValueError, "steps must not be negative", steps=-1)
    refused(ValueError, r"mode must be one of \('fast', 'paper'\), got 'slow'", mode="slow")
    refused(ValueError, "layer '0' does not stay finite with lr=1", mode="paper", lr=1e20)
    with torch.no_grad():
        model[1].weight[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    refused(ValueError, "layer '1' has weights that are not finite")


def test_score_of_a_dense_model_is_over_its_whole_weights() -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Conv2d(3, 30, 2)).double()
    expected = []
    for layer in model:
        matrix = layer.weight.detach().flatten(1).numpy()
        expected.append(np.linalg.norm(matrix @ matrix.T - np.eye(len(matrix))))
    assert isometry.orthogonality_score(model) == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_orthogonal_init(kind: str) -> None:
    layer = LAYERS[kind]()
    model = model_of(layer)
    isometry.orthogonal_(model, gain=1.5, generator=torch.Generator().manual_seed(3))
    for part in layer.weight.detach().flatten(1).chunk(getattr(layer, "groups", 1)):
        gram = part @ part.T if part.shape[0] <= part.shape[1] else part.T @ part
        torch.testing.assert_close(gram, 1.5**2 * torch.eye(len(gram), dtype=gram.dtype))
    assert not layer.bias.any()
    first = layer.weight.detach().clone()
    isometry.orthogonal_(model, gain=1.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.weight, first)


def test_orthogonal_init_refuses_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        isometry.orthogonal_(nn.Sequential(nn.ReLU()))


def test_jacobian_of_linear_layers_is_their_product() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(5, 3)).double()
    expected = np.linalg.svd((model[2].weight @ model[0].weight).detach().numpy(), compute_uv=False)
    values = isometry.jacobian_singular_values(model, torch.randn(4, 6, dtype=torch.float64))
    np.testing.assert_allclose(values.numpy(), np.tile(expected, (4, 1)), rtol=1e-10)


def test_jacobian_of_a_sparse_convolutional_model() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5)).double()
    sparsify_(model, prune.random(model, 0.5, (2, 2)))
    model.eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        values = isometry.jacobian_singular_values(model, x)
    assert values.shape == (3, 5)
    for example, expected in zip(x, values, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], example).flatten(1)
        torch.testing.assert_close(torch.linalg.svdvals(jacobian), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_jacobian_leaves_buffers() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    before = copy.deepcopy(model.state_dict())
    isometry.jacobian_singular_values(model, torch.randn(4, 6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_jacobian_refuses_other_batch_sizes_and_constants() -> None:
    with pytest.raises(ValueError, match="batch of 4"):
        isometry.jacobian_singular_values(nn.Flatten(0), torch.randn(4, 6))
    with pytest.raises(ValueError, match="batch of 4"):
        isometry.jacobian_singular_values(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 12))), torch.randn(4, 6))

    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(x)

    with pytest.raises(ValueError, match="depend on x"):
        isometry.jacobian_singular_values(Constant(), torch.randn(4, 6))
