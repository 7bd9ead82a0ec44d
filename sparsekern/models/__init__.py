"""The networks of the thesis, with its exact numbers of parameters, for images of any size: :func:`build`.

Parameters are counted as the papers do: weights and biases of convolutions and linear layers, batch norm left out.

===================  ==========  ====================================================================================
name                 parameters  with the paper's images and ten classes
===================  ==========  ====================================================================================
mlp-3, -5, -7            89,610  (109,810, 130,010) layers of 100 units, tanh by default (Lee et al., 2020: "SPP")
lenet-300-100           266,610  (Lee et al., 2019: "SNIP")
lenet-5-caffe           431,080  no activation after its convolutions (SNIP)
simple-cnn               62,346  (Lee et al., 2021: "DPS")
alexnet-s, -b         5,070,218  (8,490,378) head of 1,024 (2,048) units; five convolutions of stride 2 (SNIP)
vgg-c, vgg-16        10,526,538  1x1 as the third convolution of a group, head 512-512 (SNIP; SPP calls it VGG16)
vgg-d                15,245,130  3x3 in its place (SNIP)
vgg-like             14,982,474  VGG-D with a head of 512 (SNIP)
resnet-8                 75,050  no batch norm (DPS)
resnet-20, -32          269,034  (463,018) zero-padded shortcuts, convolutions with biases (SPP)
resnet-56, -110         850,986  (1,723,914) likewise
wrn-16-6              6,170,090  (SPP)
wrn-16-8, -16-10     10,958,666  (17,113,258) (SNIP)
wrn-22-8             17,153,610  (SNIP)
resnet-18            11,173,962  with batch norm (11,164,362 without) and no biases; not of the thesis (He et al., 2016)
===================  ==========  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from . import resnet, small, vgg
from .net import ACTIVATIONS, COLOUR, GREY, Image, Images, Net

__all__ = ["COLOUR_NAMES", "MLP_NAMES", "NAMES", "Images", "build", "image_shape", "init_"]

# Standard deviation of a unit normal cut off at two standard deviations.
TRUNCATED_STD = 0.87962566103423978

_BUILDERS: dict[str, Callable[[Net], nn.Sequential]] = {
    "lenet-300-100": partial(small.perceptron, hidden=(300, 100)),
    "lenet-5-caffe": small.lenet_5_caffe,
    "simple-cnn": small.simple_cnn,
    **{f"mlp-{depth}": partial(small.perceptron, hidden=(100,) * (depth - 1)) for depth in (3, 5, 7)},
    "vgg-d": partial(vgg.vgg, groups=vgg.VGG_D, head=(512, 512)),
    "resnet-18": resnet.resnet_18,
    "vgg-c": partial(vgg.vgg, groups=vgg.VGG_C, head=(512, 512)),
    "vgg-16": partial(vgg.vgg, groups=vgg.VGG_C, head=(512, 512)),
    "vgg-like": partial(vgg.vgg, groups=vgg.VGG_D, head=(512,)),
    "alexnet-s": partial(vgg.alexnet, head=(1024, 1024)),
    "alexnet-b": partial(vgg.alexnet, head=(2048, 2048)),
    "resnet-8": resnet.resnet_8,
    **{f"resnet-{depth}": partial(resnet.resnet_v1, depth=depth) for depth in (20, 32, 56, 110)},
    **{
        f"wrn-{depth}-{factor}": partial(resnet.wide_resnet, depth=depth, factor=factor)
        for depth, factor in ((16, 6), (16, 8), (16, 10), (22, 8))
    },
}
NAMES = ("lenet-300-100", "lenet-5-caffe", "simple-cnn")
MLP_NAMES = ("mlp-3", "mlp-5", "mlp-7")
COLOUR_NAMES = tuple(name for name in _BUILDERS if name not in NAMES + MLP_NAMES)


def build(
    name: str,
    width: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    activation: str | None = None,
    image_shape: Image | None = None,
    classes: int = 10,
) -> nn.Sequential:
    """A network with fresh weights (:func:`init_`), output logits [N, classes].

    Batch norm has eps 1e-3 as in the authors' code (but for "resnet-18", which has torch's 1e-5), and torch's momentum.

    Args:
        name: of :data:`NAMES` (grey images; ReLU, no batch norm), :data:`MLP_NAMES` (grey images) or
            :data:`COLOUR_NAMES` (colour images); the module's text describes them. The networks for grey images also
            take them flattened: [N, C*H*W].
        width: factor on every hidden width (rounded, at least 1); input and output keep theirs.
        generator: draws the weights; torch's default generator where None.
        activation: "linear", "tanh", "relu", "leaky-relu" (slope 0.2, as TensorFlow's) or "selu", wherever the network
            has one. Default: "tanh" for :data:`MLP_NAMES`, "relu" for the others.
        image_shape: (channels, height, width) of the images; by default those of the paper, :func:`image_shape`. Where
            both sides are at least 64, the first convolution of a VGG or residual network has stride 2, as SNIP has it
            for Tiny-ImageNet. Linear layers behind convolutions grow with the image, as far as it is not shrunk to 1x1.
        classes: number of outputs.

    Raises:
        ValueError: an unknown name or activation, a width that is not positive, a shape that is not three whole numbers
            of at least 1, images too small for the network, or ``classes`` below 1.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(_BUILDERS)}, got {name!r}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be positive, got {width}")
    if activation is None:
        activation = "tanh" if name in MLP_NAMES else "relu"
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    image = _default_image(name) if image_shape is None else image_shape
    if len(image) != 3 or not all(isinstance(size, int) and size >= 1 for size in image):
        raise ValueError(
            f"image_shape must be (channels, height, width), whole numbers of at least 1, got {image_shape}"
        )
    if not (isinstance(classes, int) and classes >= 1):
        raise ValueError(f"classes must be a whole number of at least 1, got {classes!r}")
    model = _BUILDERS[name](Net(image, classes, width, ACTIVATIONS[activation]))
    init_(model, generator)
    return model


def image_shape(name: str) -> Image:
    """(channels, height, width) of the images that ``build(name)`` is for."""
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(_BUILDERS)}, got {name!r}")
    return _default_image(name)


def _default_image(name: str) -> Image:
    return COLOUR if name in COLOUR_NAMES else GREY


@torch.no_grad()
def init_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fresh weights in place, as the authors draw them: truncated normal of variance 1 / fan_in, biases zero.

    Source: ``tf.variance_scaling_initializer()`` with its defaults, which the code of SNIP uses; no He factor 2.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            std = math.sqrt(1 / fan_in) / TRUNCATED_STD
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
