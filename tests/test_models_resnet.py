"""Residual networks: their sizes by formulas, their blocks against plain tensor code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern import models
from sparsekern.models.resnet import PreActivation, Residual, ZeroPad


def size(name: str) -> int:
    with torch.device("meta"):
        model = models.build(name)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return sum(p.numel() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("depth", [20, 32, 56, 110])
def test_size_of_the_first_version(depth):
    """In units of w = 16 channels: 2n convolutions of w, 2w and 4w, two of which start from half the width."""
    n, w = (depth - 2) // 6, 16
    weights = 9 * w * w * (2 * n * (1 + 4 + 16) - 2 - 8)
    biases = 2 * n * (w + 2 * w + 4 * w)
    assert size(f"resnet-{depth}") == (27 * w + w) + weights + biases + (4 * w + 1) * 10


@pytest.mark.parametrize(("depth", "k"), [(16, 6), (16, 8), (16, 10), (22, 8)])
def test_size_of_wide_networks(depth, k):
    """In units of w = 16k channels: as above, but for the first convolution from 16, and three projections."""
    n, w = (depth - 4) // 6, 16 * k
    weights = 9 * w * w * (2 * n * (1 + 4 + 16) - 1 - 2 - 8) + 9 * 16 * w
    projections = 16 * w + 2 * w * w + 8 * w * w
    biases = (2 * n + 1) * (w + 2 * w + 4 * w)
    assert size(f"wrn-{depth}-{k}") == 28 * 16 + weights + projections + biases + (4 * w + 1) * 10


@pytest.mark.parametrize(
    ("name", "n_blocks", "kind"),
    [("resnet-20", 3, Residual), ("resnet-8", 1, PreActivation), ("wrn-22-8", 3, PreActivation)],
)
def test_groups_halve_the_image_and_double_the_channels(name, n_blocks, kind):
    shapes = []
    with torch.device("meta"):
        model, image = models.build(name).eval(), torch.empty(1, 3, 32, 32)
    for block in [m for m in model if isinstance(m, kind)]:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(image)
    w = 128 if name == "wrn-22-8" else 16
    assert shapes == [s for s in ((w, 32, 32), (2 * w, 16, 16), (4 * w, 8, 8)) for _ in range(n_blocks)]


def test_resnet_18_is_the_one_for_cifar():
    with torch.device("meta"):
        model, image = models.build("resnet-18"), torch.empty(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    shapes = []
    for block in [m for m in model if isinstance(m, Residual)]:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model.eval()(image)
    assert shapes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("average", [False, True])
def test_shortcut_shrinks_and_pads_with_zeros(average, side):
    x = torch.randn(2, 3, side, side)
    half = -(-side // 2)
    expected = torch.zeros(2, 5, half, half)
    for i in range(half):
        for j in range(half):
            window = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            expected[:, :3, i, j] = window.mean((2, 3)) if average else window[:, :, 0, 0]
    torch.testing.assert_close(ZeroPad(3, 5, 2, average)(x), expected)


def test_shortcut_of_equal_shapes_is_the_identity():
    x = torch.randn(2, 3, 4, 4)
    assert ZeroPad(3, 3, 1)(x).equal(x)


def conv(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding=weight.shape[2] // 2)


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    mean, var, scale, shift = (
        state[f"{name}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * scale + shift


def by_hand(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """The whole network in evaluation mode, from its state alone."""
    state = model.state_dict()
    wide, plain = name.startswith("wrn"), name == "resnet-8"
    eps = 1e-5 if name == "resnet-18" else 1e-3

    def bn(key: str, y: Tensor) -> Tensor:
        return y if plain else norm(state, key, y, eps)

    x = conv(state, "conv1", x)
    if not (wide or plain):
        x = bn("norm1", x).relu()
    blocks = sorted({key.split(".")[0] for key in state if key.startswith("block")})
    for block in blocks:
        stride = 2 if block.endswith("_1") and not block.startswith("block1") else 1
        c_out, c_in = state[f"{block}.conv1.weight"].shape[:2]
        a = bn(f"{block}.norm1", x).relu() if wide or plain else x
        y = conv(state, f"{block}.conv1", a, stride)
        y = conv(state, f"{block}.conv2", bn(f"{block}.norm2" if wide or plain else f"{block}.norm1", y).relu())
        shortcut = x
        if wide and f"{block}.shortcut.weight" in state:
            shortcut = conv(state, f"{block}.shortcut", a, stride)
        elif name == "resnet-18" and f"{block}.shortcut.conv.weight" in state:
            shortcut = bn(f"{block}.shortcut.norm", conv(state, f"{block}.shortcut.conv", x, stride))
        elif stride == 2:
            n, _, height, width = x.shape
            corners = x.view(n, c_in, height // 2, 2, width // 2, 2)
            shortcut = corners.mean((3, 5)) if plain else corners[:, :, :, 0, :, 0]
            shortcut = torch.cat([shortcut, shortcut.new_zeros(n, c_out - c_in, *shortcut.shape[2:])], 1)
        x = y + shortcut if wide or plain else (bn(f"{block}.norm2", y) + shortcut).relu()
    if wide:
        x = bn("norm", x)
    x = x.relu() if wide or plain else x
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("name", ["resnet-8", "resnet-20", "wrn-16-6", "wrn-22-8", "resnet-18"])
def test_network_computes_what_the_paper_says(name):
    torch.manual_seed(0)
    model = models.build(name, 0.25 if name.startswith("resnet-") else 0.05).double().eval()
    for key, value in model.state_dict().items():
        if value.dtype == torch.double and not key.endswith("weight"):
            value.uniform_(0.5, 1.5) if key.endswith("running_var") else value.normal_(std=0.3)
        elif "norm" in key and value.dtype == torch.double:
            value.uniform_(0.5, 1.5)
    x = torch.randn(3, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(name, model, x), rtol=1e-10, atol=1e-10)
