"""Networks without batch norm for small grey images: multi-layer perceptrons, the LeNets and Simple-CNN."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from .net import Images, Net


def perceptron(net: Net, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with an activation between them; ``hidden`` are the widths between input and output."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    units = math.prod(net.image)
    for i, width in enumerate(hidden, 1):
        layers[f"fc{i}"] = nn.Linear(units, net.scaled(width))
        layers[f"act{i}"] = net.activation()
        units = net.scaled(width)
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(units, net.classes)
    return nn.Sequential(layers)


def lenet_5_caffe(net: Net) -> nn.Sequential:
    """Two convolutions without an activation after them, each pooled, and a 500-10 head; no padding."""
    c1, c2, h = net.scaled(20), net.scaled(50), net.scaled(500)
    return nn.Sequential(
        OrderedDict(
            images=Images(net.image),
            conv1=nn.Conv2d(net.image[0], c1, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(c1, c2, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(c2 * _pixels_left(net), h),
            act1=net.activation(),
            fc2=nn.Linear(h, net.classes),
        )
    )


def simple_cnn(net: Net) -> nn.Sequential:
    """Two convolutions, each with an activation and pooled, and a linear layer; no padding."""
    c1, c2 = net.scaled(32), net.scaled(64)
    return nn.Sequential(
        OrderedDict(
            images=Images(net.image),
            conv1=nn.Conv2d(net.image[0], c1, 5),
            act1=net.activation(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(c1, c2, 5),
            act2=net.activation(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(c2 * _pixels_left(net), net.classes),
        )
    )


def _pixels_left(net: Net) -> int:
    """Height times width after two convolutions 5x5 without padding, each pooled by 2."""
    sides = [((size - 4) // 2 - 4) // 2 for size in net.image[1:]]
    if min(sides) < 1:
        raise ValueError(f"image_shape must be at least 16x16 for two convolutions without padding, got {net.image}")
    return math.prod(sides)
