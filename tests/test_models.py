"""The thesis's networks: sizes, shapes, structure, initialisation; the residual ones further in test_models_resnet."""

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import models, prune

# Weights and biases without batch norm, as the papers print them or as derived from their descriptions.
SIZES = {
    "mlp-3": 89_610, "mlp-5": 109_810, "mlp-7": 130_010,
    "lenet-300-100": 266_610, "lenet-5-caffe": 431_080, "simple-cnn": 62_346,
    "alexnet-s": 5_070_218, "alexnet-b": 8_490_378,
    "vgg-c": 10_526_538, "vgg-16": 10_526_538, "vgg-d": 15_245_130, "vgg-like": 14_982_474,
    "resnet-8": 75_050, "resnet-20": 269_034, "resnet-32": 463_018, "resnet-56": 850_986, "resnet-110": 1_723_914,
    "wrn-16-6": 6_170_090, "wrn-16-8": 10_958_666, "wrn-16-10": 17_113_258, "wrn-22-8": 17_153_610,
    "resnet-18": 11_164_362,
}  # fmt: skip
GREY_NAMES = models.NAMES + models.MLP_NAMES
# All names at a width that makes them quick, one of each family.
SAMPLES = {
    **dict.fromkeys(GREY_NAMES, 0.3),
    "alexnet-s": 0.05, "vgg-c": 0.05, "vgg-like": 0.05, "resnet-8": 0.5, "resnet-20": 0.3, "wrn-16-8": 0.05,
    "resnet-18": 0.05,
}  # fmt: skip


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def size(model: nn.Module) -> int:
    return sum(p.numel() for layer in layers_of(model) for p in layer.parameters())


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


def on_meta(name: str, **options) -> nn.Sequential:
    with torch.device("meta"):
        return models.build(name, **options)


def test_every_network_has_the_size_of_the_papers():
    assert {name: size(on_meta(name)) for name in GREY_NAMES + models.COLOUR_NAMES} == SIZES


@pytest.mark.parametrize("name", GREY_NAMES)
def test_images_and_flattened_images_give_the_same(name):
    model = models.build(name)
    x = torch.randn(3, 1, 28, 28)
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(model(x), model(x.flatten(1)), rtol=0, atol=0)


@pytest.mark.parametrize("image", [None, (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 17, 30)], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_trains_on_images_of_any_size_dense_and_sparse(name, image):
    model = models.build(name, SAMPLES[name], image_shape=image, classes=7)
    x = torch.randn(4, *(image or models.image_shape(name)), requires_grad=True)
    patterns = prune.random(model, 0.5, (1, 1), generator=torch.Generator().manual_seed(0))
    assert len(patterns) == len(layers_of(model))
    for converted in (False, True):
        if converted:
            sk.sparsify_(model, patterns)
        logits = model(x)
        assert logits.shape == (4, 7)
        x.grad = None
        logits.square().sum().backward()
        assert x.grad.any()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_perceptron_is_matrices_and_activations():
    model = models.build("mlp-3", 0.1).double()
    x = torch.randn(5, 784, dtype=torch.double)
    y = x
    for i in (1, 2, 3):
        layer = model.get_submodule(f"fc{i}")
        nn.init.normal_(layer.bias)
        y = y @ layer.weight.T + layer.bias
        y = y.tanh() if i < 3 else y
    torch.testing.assert_close(model(x), y)


def test_lenet_5_caffe_has_no_relu_after_its_convolutions():
    model = models.build("lenet-5-caffe")
    assert " ".join(kinds(model)) == "Images Conv2d MaxPool2d Conv2d MaxPool2d Flatten Linear ReLU Linear"


@pytest.mark.parametrize(
    ("name", "kernels", "head"),
    [
        ("vgg-c", "3 3 | 3 3 | 3 3 1 | 3 3 1 | 3 3 1", 3),
        ("vgg-16", "3 3 | 3 3 | 3 3 1 | 3 3 1 | 3 3 1", 3),
        ("vgg-d", "3 3 | 3 3 | 3 3 3 | 3 3 3 | 3 3 3", 3),
        ("vgg-like", "3 3 | 3 3 | 3 3 3 | 3 3 3 | 3 3 3", 2),
    ],
)
def test_vgg_is_groups_of_convolutions_and_a_head(name, kernels, head):
    model = on_meta(name)
    marks = {nn.Conv2d: lambda m: str(m.kernel_size[0]), nn.MaxPool2d: lambda m: "|"}
    found = " ".join(marks[type(m)](m) for m in model.children() if type(m) in marks)
    assert found == kernels + " |"
    layers = layers_of(model)
    assert [isinstance(m, nn.Linear) for m in layers] == [False] * 13 + [True] * head
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert [m.num_features for m in norms] == [m.weight.shape[0] for m in layers[:-1]]  # everywhere
    assert all(m.eps == 1e-3 for m in norms)
    assert kinds(model).count("ReLU") == len(norms)


def sides(name: str, side: int) -> list[int]:
    """Height of what every layer and pooling of the network gives, to the flattening."""
    model, found = models.build(name, 0.02, image_shape=(1, side, side)).eval(), [side]
    x = torch.randn(1, 1, side, side)
    for module in model[: kinds(model).index("Flatten")]:
        x = module(x)
        assert x.shape[2] == x.shape[3]
        if x.shape[2] != found[-1]:
            found.append(x.shape[2])
    return found


def test_images_shrink_as_with_padded_poolings_and_strides():
    for name in ("vgg-c", "vgg-like", "alexnet-s"):
        assert sides(name, 28) == [28, 14, 7, 4, 2, 1]
        assert sides(name, 32) == [32, 16, 8, 4, 2, 1]
    assert sides("vgg-c", 64) == [64, 32, 16, 8, 4, 2, 1]  # a first convolution of stride 2 besides
    assert sides("alexnet-s", 64) == [64, 32, 16, 8, 4, 2]
    for name in ("resnet-8", "resnet-20", "wrn-16-6"):
        assert sides(name, 28) == [28, 14, 7, 1]  # in the end their mean
        assert sides(name, 64) == [64, 32, 16, 8, 1]


def test_poolings_of_odd_sizes_leave_out_no_pixel():
    pool = models.build("vgg-c", 0.02, image_shape=(1, 28, 28)).pool3
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 6, 6] = 1
    assert pool(x)[0, 0, 3, 3] == 1
    assert not models.build("vgg-c", 0.02).pool3.ceil_mode  # nothing to round


def test_alexnet_is_strided_convolutions_and_a_head():
    model = on_meta("alexnet-b")
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size[0], m.out_channels, m.stride[0]) for m in convs] == [
        (11, 96, 2), (5, 256, 2), (3, 384, 2), (3, 384, 2), (3, 256, 2)
    ]  # fmt: skip
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [2048, 2048, 10]
    assert kinds(model) == ["Conv2d", "BatchNorm2d", "ReLU"] * 5 + ["Flatten"] + [
        "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "added"), [("wrn-16-6", 190 * 385), ("resnet-32", 190 * 65), ("vgg-d", 190 * 513)])
def test_tiny_imagenet_adds_outputs_alone(name, added):
    model = on_meta(name, image_shape=(3, 64, 64), classes=200)
    assert size(model) == SIZES[name] + added
    assert layers_of(model)[0].stride == (2, 2)
    assert {layer.stride for layer in layers_of(on_meta("vgg-d"))[:13]} == {(1, 1)}


ACTIVATIONS = {
    "linear": lambda x: x,
    "tanh": torch.tanh,
    "relu": lambda x: x.clamp(min=0),
    "leaky-relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SAMPLES)
def test_activation_stands_wherever_the_network_has_one(name, activation):
    default = "Tanh" if name in models.MLP_NAMES else "ReLU"
    options = {"width": SAMPLES[name], "image_shape": (1, 28, 28)}
    # Blocks share one module between their places, which counts as one in both.
    wanted = sum(type(m).__name__ == default for m in models.build(name, **options).modules())
    model = models.build(name, **options, activation=activation)
    known = (nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.SELU, nn.Identity)
    found = [m for key, m in model.named_modules() if isinstance(m, known) and "norm" not in key]
    assert len(found) == wanted > 0
    x = torch.randn(100)
    for module in found:
        torch.testing.assert_close(module(x), ACTIVATIONS[activation](x))


@pytest.mark.parametrize("name", [name for name in SAMPLES if name in models.COLOUR_NAMES])
def test_width_of_colour_networks(name):
    """Every hidden width is that of the whole network times the factor."""
    whole, half = layers_of(on_meta(name)), layers_of(on_meta(name, width=0.5))
    assert [m.weight.shape[0] for m in half[:-1]] == [m.weight.shape[0] // 2 for m in whole[:-1]]
    assert half[-1].weight.shape[0] == 10
    assert half[0].weight.shape[1] == 3


@pytest.mark.parametrize("name", models.NAMES)
def test_init_is_truncated_normal_of_variance_one_over_fan_in(name):
    model = models.build(name, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            scaled = module.weight.detach() * module.weight[0].numel() ** 0.5
            if scaled.numel() > 10_000:
                assert abs(float(scaled.var()) - 1) < 0.05
            assert float(scaled.abs().max()) <= 2 / models.TRUNCATED_STD + 1e-4
            assert not module.bias.any()


def test_generator_decides_the_weights_alone():
    def weights(seed: int) -> torch.Tensor:
        return models.build("simple-cnn", generator=torch.Generator().manual_seed(seed)).conv1.weight

    first = weights(1)
    torch.rand(3)
    assert first.equal(weights(1))
    assert not first.equal(weights(2))


def test_width_scales_hidden_layers_only():
    half = models.build("lenet-300-100", 0.5)
    assert [tuple(p.shape) for p in half.parameters()][::2] == [(150, 784), (50, 150), (10, 50)]
    tiny = models.build("lenet-5-caffe", 1e-6)
    assert tiny(torch.randn(2, 784)).shape == (2, 10)
    assert [tuple(p.shape) for p in tiny.parameters()][::2] == [(1, 1, 5, 5), (1, 1, 5, 5), (1, 16), (10, 1)]


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
def test_bad_width(width):
    with pytest.raises(ValueError, match="width must be positive"):
        models.build("simple-cnn", width)


def test_unknown_name():
    with pytest.raises(ValueError, match="lenet-300-100, lenet-5-caffe, simple-cnn"):
        models.build("lenet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of linear, tanh, relu, leaky-relu, selu, got 'gelu'"),
        ({"activation": ""}, "activation must be one of"),
        ({"image_shape": (28, 28)}, r"image_shape must be \(channels, height, width\).*got \(28, 28\)"),
        ({"image_shape": (1, 0, 28)}, r"image_shape must be .* got \(1, 0, 28\)"),
        ({"image_shape": (1, 28.0, 28)}, r"image_shape must be .* got \(1, 28.0, 28\)"),
        ({"image_shape": (1, 28, 15)}, r"image_shape must be at least 16x16 .* got \(1, 28, 15\)"),
        ({"classes": 0}, "classes must be a whole number of at least 1, got 0"),
        ({"classes": 2.5}, "classes must be a whole number of at least 1, got 2.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.build("simple-cnn", **options)


@pytest.mark.parametrize("name", ["lenet-5-caffe", "simple-cnn"])
def test_smallest_images(name):
    assert models.build(name, 0.1, image_shape=(1, 16, 16))(torch.randn(2, 256)).shape == (2, 10)
