"""Convolutions with batch norm, and a head of linear layers with batch norm: the VGGs and AlexNets of SNIP."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .net import EPS, Net

# (kernel sizes, channels) of each group; a pooling comes after it.
VGG_C = ((3, 3), 64), ((3, 3), 128), ((3, 3, 1), 256), ((3, 3, 1), 512), ((3, 3, 1), 512)
VGG_D = ((3, 3), 64), ((3, 3), 128), ((3, 3, 3), 256), ((3, 3, 3), 512), ((3, 3, 3), 512)
ALEXNET = (11, 96), (5, 256), (3, 384), (3, 384), (3, 256)  # (kernel size, channels), stride 2


def vgg(net: Net, groups: tuple[tuple[tuple[int, ...], int], ...], head: tuple[int, ...]) -> nn.Sequential:
    """A 16-layer VGG, padded; ``head`` are the hidden widths behind the convolutions.

    Poolings round odd sizes up, as the authors' padded ones do: 28x28 images shrink to 14, 7, 4, 2 and 1.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    (channels, *sides), stride = net.image, net.first_stride
    for group, (kernels, width) in enumerate(groups, 1):
        for i, kernel in enumerate(kernels, 1):
            layers[f"conv{group}_{i}"] = nn.Conv2d(channels, net.scaled(width), kernel, stride, padding=kernel // 2)
            channels = net.scaled(width)
            layers[f"norm{group}_{i}"] = nn.BatchNorm2d(channels, EPS)
            layers[f"act{group}_{i}"] = net.activation()
            sides, stride = [-(-side // stride) for side in sides], 1
        layers[f"pool{group}"] = nn.MaxPool2d(2, ceil_mode=any(side % 2 for side in sides))
        sides = [-(-side // 2) for side in sides]
    return _with_head(net, layers, channels * sides[0] * sides[1], head)


def alexnet(net: Net, head: tuple[int, ...]) -> nn.Sequential:
    """Five convolutions of stride 2 and no pooling: 32x32 images shrink to 1x1."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, *sides = net.image
    for i, (kernel, width) in enumerate(ALEXNET, 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, net.scaled(width), kernel, 2, padding=kernel // 2)
        channels = net.scaled(width)
        layers[f"norm{i}"] = nn.BatchNorm2d(channels, EPS)
        layers[f"act{i}"] = net.activation()
        sides = [-(-side // 2) for side in sides]
    return _with_head(net, layers, channels * sides[0] * sides[1], head)


def _with_head(net: Net, layers: OrderedDict[str, nn.Module], units: int, head: tuple[int, ...]) -> nn.Sequential:
    layers["flatten"] = nn.Flatten()
    for i, width in enumerate(head, 1):
        layers[f"fc{i}"] = nn.Linear(units, net.scaled(width))
        units = net.scaled(width)
        layers[f"norm_fc{i}"] = nn.BatchNorm1d(units, EPS)
        layers[f"act_fc{i}"] = net.activation()
    layers[f"fc{len(head) + 1}"] = nn.Linear(units, net.classes)
    return nn.Sequential(layers)
