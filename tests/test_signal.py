"""Orthogonal convolutions, rescaling by fan-in, Jacobians layer by layer: each by another way to compute it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from sparsekern import isometry, sparsify_
from sparsekern.isometry import jacobian as jacobians
from sparsekern.pattern import BlockPattern
from sparsekern.weights import weight_matrix


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def circular(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    kh, kw = weight.shape[2:]
    return F.conv2d(F.pad(x, (kw - 1, 0, kh - 1, 0), mode="circular"), weight, groups=groups)


@pytest.mark.parametrize("init", [isometry.orthogonal_, isometry.delta_orthogonal_, isometry.block_orthogonal_])
def test_half_precision_is_drawn_in_single(init) -> None:
    model, twin = (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 6)) for _ in range(2))
    init(model.bfloat16(), generator=torch.Generator().manual_seed(0))
    init(twin, generator=torch.Generator().manual_seed(0))
    for half, single in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(half, single.bfloat16())


INITIALISERS = (isometry.delta_orthogonal_, isometry.block_orthogonal_)


@pytest.mark.parametrize("init", INITIALISERS)
@pytest.mark.parametrize(
    "inputs, outputs, k, groups", [(5, 5, 3, 1), (3, 8, 5, 1), (8, 3, 3, 1), (6, 12, 2, 3), (4, 4, 1, 1), (1, 6, 3, 1)]
)
def test_orthogonal_convolutions_change_no_norm(init, inputs: int, outputs: int, k: int, groups: int) -> None:
    """Of any image, or, where there are fewer outputs, of any gradient."""
    layer = nn.Conv2d(inputs, outputs, k, groups=groups, dtype=torch.float64)
    init(nn.Sequential(layer), gain=1.5, generator=torch.Generator().manual_seed(0))
    assert not layer.bias.any()
    weight = layer.weight.detach()
    x = torch.randn(2, inputs, 7, 6, dtype=torch.float64, requires_grad=True)
    y = circular(x, weight, groups)
    if outputs >= inputs:
        torch.testing.assert_close(y.norm(), 1.5 * x.norm(), rtol=1e-10, atol=0)
    else:
        gradient = torch.randn_like(y)
        (back,) = torch.autograd.grad(y, x, gradient)
        torch.testing.assert_close(back.norm(), 1.5 * gradient.norm(), rtol=1e-10, atol=0)
    if k > 1 and init is isometry.block_orthogonal_ and inputs // groups > 1:
        assert (weight.abs().amax((0, 1)) > 1e-3).all()  # every tap has a part in it
    if init is isometry.delta_orthogonal_:
        taps = weight.abs().amax((0, 1))
        assert taps[k // 2, k // 2] > 0 and int((taps > 0).sum()) == 1


@pytest.mark.parametrize("init", INITIALISERS)
def test_linear_layers_are_orthogonal_and_draws_repeat(init) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 6))
    for _ in range(2):
        init(model, generator=torch.Generator().manual_seed(3))
        weights = [p.detach().clone() for p in model.parameters()]
    twin = copy.deepcopy(model)
    init(twin, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), weights, strict=True))
    torch.testing.assert_close(model[2].weight @ model[2].weight.T, torch.eye(6))
    init(twin, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(twin[0].weight, weights[0])


def test_kernels_that_are_not_square_are_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, (3, 1)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer '1' must have a square kernel, got 3x1"):
        isometry.block_orthogonal_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for init in INITIALISERS:
        with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Conv2d that can be sparse"):
            init(nn.ReLU())


# ---- fan-in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(30, 12), lambda: nn.Conv2d(4, 6, 3), lambda: nn.Conv2d(6, 9, 3, groups=3)]
)
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4)])
def test_kept_weights_are_scaled_by_their_share(make, blocksize: tuple[int, int]) -> None:
    """Output by output; dense and sparse models alike; an output that keeps nothing stays at nothing."""
    torch.manual_seed(0)
    dense = nn.Sequential(make()).double()
    shape = tuple(weight_matrix(dense[0].weight).shape)
    blocks = torch.rand(-(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1])) < 0.4
    blocks[0] = False
    pattern = BlockPattern.from_mask(blocks, blocksize, shape)
    before, mask = weight_matrix(dense[0].weight.detach()).clone(), pattern.to_element_mask()
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, {"0": pattern})
    isometry.fan_in_rescale_(dense, {"0": pattern})
    isometry.fan_in_rescale_(sparse)
    expected = before.clone()
    for row in range(shape[0]):
        for column in range(shape[1]):
            if mask[row, column]:
                expected[row, column] *= (shape[1] / int(mask[row].sum())) ** 0.5
    torch.testing.assert_close(weight_matrix(dense[0].weight.detach()), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sparse[0].pattern.scatter(sparse[0].values), expected * mask, rtol=1e-12, atol=0)
    with torch.no_grad():
        dense[0].weight[-1].fill_(float("nan"))
    if bool(mask[-1].any()):
        with pytest.raises(ValueError, match="layer '0' has weights that are not finite"):
            isometry.fan_in_rescale_(dense, {"0": pattern})


# ---- Jacobians ------------------------------------------------------------------------------------------------------


def test_layers_have_the_jacobians_of_their_definition() -> None:
    """D W of each layer of tanh; the product of all of them is that of the network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    found = isometry.layer_jacobian_singular_values(model, x)
    assert list(found) == ["0", "2", "4"] and [tuple(v.shape) for v in found.values()] == [(4, 5), (4, 5), (4, 3)]
    a = x
    for name, width in (("0", 5), ("2", 6), ("4", 3)):
        layer = model.get_submodule(name)
        h = a @ layer.weight.T + layer.bias
        slopes = 1 - h.tanh() ** 2 if width != 3 else torch.ones_like(h)
        expected = torch.linalg.svdvals(slopes[:, :, None] * layer.weight)
        torch.testing.assert_close(found[name], expected.detach())
        a = h.tanh()


def test_sparse_convolutions_with_norm_and_pooling() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    sparsify_(model, {"0": BlockPattern.from_mask(torch.rand(2, 9) < 0.7, (2, 2), (4, 18))})
    model.eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    found = isometry.layer_jacobian_singular_values(model, x)
    for i in range(3):
        first = jacobian(lambda one: model[:5](one[None])[0], x[i]).flatten(1)
        torch.testing.assert_close(found["0"][i], torch.linalg.svdvals(first))
    torch.testing.assert_close(found["5"], torch.linalg.svdvals(model[5].weight.detach()).expand(3, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x * 1) + self.right(x * 2)


class SideBySide(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_what_is_no_chain_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    for model, words in (
        (Branches(), "layer 'left' must lead to the layer that runs next"),
        (Twice(), "layer 'layer' runs twice"),
        (SideBySide(), "layer 'left' must lead to the layer that runs next"),
        (nn.Tanh(), "model runs no nn.Linear"),
    ):
        with pytest.raises(ValueError, match=words):
            isometry.layer_jacobian_singular_values(model, x)
        assert all(not module._forward_pre_hooks for module in model.modules())
    monkeypatch.setattr(jacobians, "LARGEST", 11)
    with pytest.raises(ValueError, match="layer '0' has a Jacobian of 12 elements an example, over 11"):
        isometry.layer_jacobian_singular_values(nn.Sequential(nn.Linear(4, 3)), x)


def test_what_changes_its_input_and_inference_mode_are_no_obstacle() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 3))
    plain = nn.Sequential(nn.LeakyReLU(0.5), model[1])
    expected = isometry.jacobian_singular_values(plain, x)
    before = x.clone()
    torch.testing.assert_close(isometry.jacobian_singular_values(model, x), expected)
    assert torch.equal(x, before)
    with torch.inference_mode():
        torch.testing.assert_close(isometry.jacobian_singular_values(plain, x.clone()), expected)
        assert isometry.layer_jacobian_singular_values(model, x.clone())["1"].shape == (2, 3)
    scalar = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    torch.testing.assert_close(isometry.jacobian_singular_values(scalar, x)[0], scalar[0].weight.detach().norm()[None])
    for of in (isometry.jacobian_singular_values, isometry.layer_jacobian_singular_values):
        with pytest.raises(ValueError, match=r"x must be floating point, got torch\.int64"):
            of(model, torch.ones(2, 4, dtype=torch.long))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += self.inner(x)
        return x


def test_an_input_that_is_changed_later_and_half_precision() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Residual(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"input of layer '1\.inner' must not be changed in place"):
        isometry.layer_jacobian_singular_values(model, torch.randn(2, 3))
    layer = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    for of in (isometry.jacobian_singular_values, lambda m, x: isometry.layer_jacobian_singular_values(m, x)["0"]):
        expected = of(layer.float(), x)
        torch.testing.assert_close(of(layer.bfloat16(), x.bfloat16()), expected, rtol=0.05, atol=0.02)
    for init in (isometry.orthogonal_, *INITIALISERS):
        with pytest.raises(ValueError, match="gain must be finite, got nan"):
            init(layer, gain=float("nan"))
    with pytest.raises(TypeError, match="steps must be an integer, got float"):
        isometry.approximate_isometry_(layer, steps=2.5)
    half = nn.Sequential(nn.Linear(400, 2)).half()
    half[0].weight.data.fill_(6e4)
    pattern = BlockPattern.from_mask(torch.arange(800).view(2, 400) % 400 == 0, (1, 1), (2, 400))
    with pytest.raises(ValueError, match="not finite, or would be after scaling"):
        isometry.fan_in_rescale_(half, {"0": pattern})


def test_rescaling_a_dense_model_needs_patterns() -> None:
    with pytest.raises(ValueError, match="patterns must be given for a model without sparse layers"):
        isometry.fan_in_rescale_(nn.Sequential(nn.Linear(4, 3)))


def test_statistics() -> None:
    found = isometry.singular_value_statistics(torch.tensor([[1.0, 4.0], [2.0, 5.0]]))
    assert found == isometry.Statistics(3.0, pytest.approx((10 / 3) ** 0.5), 1.0, 5.0, 5.0)
    tiny = isometry.singular_value_statistics(torch.tensor([1e-38, 1e-40]))  # below what float32 divides
    assert tiny.condition == pytest.approx(100, rel=1e-3)
    assert isometry.singular_value_statistics(torch.tensor([0.0, 1.0])).condition == float("inf")
    assert isometry.singular_value_statistics(torch.tensor([2.0])).std == 0
    with pytest.raises(ValueError, match="values must not be empty"):
        isometry.singular_value_statistics(torch.empty(0))
