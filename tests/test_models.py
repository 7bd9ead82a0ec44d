"""The thesis's networks: sizes, shapes, structure, initialisation."""

import pytest
import torch
from torch import nn

from sparsekern import models

SIZES = {"lenet-300-100": 266_610, "lenet-5-caffe": 431_080, "simple-cnn": 62_346}


@pytest.mark.parametrize("name", models.NAMES)
def test_sizes_of_the_papers(name):
    assert sum(p.numel() for p in models.build(name).parameters()) == SIZES[name]


@pytest.mark.parametrize("name", models.NAMES)
def test_images_and_flattened_images_give_the_same(name):
    model = models.build(name)
    x = torch.randn(3, 1, 28, 28)
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(model(x), model(x.flatten(1)), rtol=0, atol=0)


def test_lenet_5_caffe_has_no_relu_after_its_convolutions():
    kinds = [type(module).__name__ for module in models.build("lenet-5-caffe").children()]
    assert kinds == ["Images", "Conv2d", "MaxPool2d", "Conv2d", "MaxPool2d", "Flatten", "Linear", "ReLU", "Linear"]


def test_vgg_d_has_the_size_of_the_paper():
    with torch.device("meta"):
        model = models.cifar.vgg_d(int)
    kinds = [type(m).__name__ for m in model.children()]
    assert (kinds.count("Conv2d"), kinds.count("MaxPool2d"), kinds.count("Linear")) == (13, 5, 3)
    layers = [module for module in model if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == 15_245_130
    norms = [m.num_features for m in model if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert norms == [m.weight.shape[0] for m in layers[:-1]]  # "batch normalisation everywhere"


def test_resnet_18_is_the_one_for_cifar():
    with torch.device("meta"):
        model, image = models.cifar.resnet_18(int), torch.empty(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    shapes = []
    for block in [m for m in model if isinstance(m, models.cifar.Residual)]:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model.eval()(image)
    assert shapes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2


def test_residual_block_adds_its_input():
    block = models.cifar.Residual(4, 4, 1).eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert block(x).equal(x.relu())


@pytest.mark.parametrize("name", models.COLOUR_NAMES)
def test_colour_networks_narrower(name):
    narrow = models.build(name, 0.05)
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    weights = [m.weight for m in narrow.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {w.shape[0] for w in weights[:-1]} <= {3, 6, 13, 26} and weights[-1].shape[0] == 10


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
