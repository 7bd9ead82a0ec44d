"""Residual networks: the first version with zero-padded shortcuts, ResNet-8 without batch norm, WRN and ResNet-18."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .net import EPS, Net

Block = Callable[[int, int, int], nn.Module]  # (c_in, c_out, stride)


def resnet_v1(net: Net, depth: int) -> nn.Sequential:
    """ResNet of He et al., 2016a, section 4.2: 6n + 2 layers, shortcuts without weights (A); biases as in SPP."""
    stem = OrderedDict(norm1=nn.BatchNorm2d(net.scaled(16), EPS), act1=net.activation())
    return _resnet(net, (16, 16, 32, 64), (depth - 2) // 6, partial(Residual, net.activation), stem)


def resnet_8(net: Net) -> nn.Sequential:
    """ResNet-8 of Lee et al., 2021: three pre-activation blocks, average-pooled shortcuts, no batch norm."""
    block = partial(PreActivation, net.activation, nn.Identity, False)
    return _resnet(net, (16, 16, 32, 64), 1, block, tail=OrderedDict(act=net.activation()))


def wide_resnet(net: Net, depth: int, factor: int) -> nn.Sequential:
    """WRN-depth-factor of Zagoruyko & Komodakis, 2016: 6n + 4 layers, projections where widths change; with biases."""
    block = partial(PreActivation, net.activation, partial(nn.BatchNorm2d, eps=EPS), True)
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    tail = OrderedDict(norm=nn.BatchNorm2d(net.scaled(widths[-1]), EPS), act=net.activation())
    return _resnet(net, widths, (depth - 4) // 6, block, tail=tail)


def resnet_18(net: Net) -> nn.Sequential:
    """ResNet-18 (He et al., 2016a) as used on CIFAR: a 3x3 stem without pooling, projections where shapes change."""

    def block(c_in: int, c_out: int, stride: int) -> nn.Module:
        shortcut: OrderedDict[str, nn.Module] = OrderedDict()  # the identity
        if stride != 1 or c_in != c_out:
            shortcut.update(conv=nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm=nn.BatchNorm2d(c_out))
        return Residual(net.activation, c_in, c_out, stride, nn.Sequential(shortcut), bias=False, eps=1e-5)

    stem = OrderedDict(norm1=nn.BatchNorm2d(net.scaled(64)), act1=net.activation())
    return _resnet(net, (64, 64, 128, 256, 512), 2, block, stem, bias=False)


def _resnet(
    net: Net,
    widths: tuple[int, ...],
    n_blocks: int,
    block: Block,
    stem: OrderedDict[str, nn.Module] | None = None,
    tail: OrderedDict[str, nn.Module] | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """A 3x3 convolution to ``widths[0]``, a group of blocks for each other width, the mean over pixels, a linear layer.

    Every group but the first halves the image. ``stem`` comes after the first convolution, ``tail`` after the blocks.
    """
    channels = net.scaled(widths[0])
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(net.image[0], channels, 3, net.first_stride, padding=1, bias=bias)
    )
    layers.update(stem or {})
    for group, width in enumerate(widths[1:], 1):
        for i in range(1, n_blocks + 1):
            layers[f"block{group}_{i}"] = block(channels, net.scaled(width), 2 if group > 1 and i == 1 else 1)
            channels = net.scaled(width)
    layers.update(tail or {})
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, net.classes))
    return nn.Sequential(layers)


class Residual(nn.Module):
    """act(norm(conv(act(norm(conv(x))))) + shortcut(x)), [N, c_in, H, W] to [N, c_out, H / stride, W / stride]."""

    def __init__(
        self,
        activation: Callable[[], nn.Module],
        c_in: int,
        c_out: int,
        stride: int,
        shortcut: nn.Module | None = None,
        bias: bool = True,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(c_out, eps)
        self.act = activation()
        self.shortcut = ZeroPad(c_in, c_out, stride) if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        result: Tensor = self.act(y + self.shortcut(x))
        return result


class PreActivation(nn.Module):
    """conv(act(norm(conv(a)))) + shortcut with a = act(norm(x)), [N, c_in, H, W] to [N, c_out, H / stride, W / stride].

    The shortcut is x itself where the shape stays. Else it is, with ``project``, a convolution 1x1 of a, and without,
    x averaged over its pixels and padded with channels of zeros.
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module],
        project: bool,
        c_in: int,
        c_out: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.act = activation()
        self.projects = project and (stride != 1 or c_in != c_out)
        self.shortcut = (
            nn.Conv2d(c_in, c_out, 1, stride) if self.projects else ZeroPad(c_in, c_out, stride, average=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.norm1(x))
        y: Tensor = self.conv2(self.act(self.norm2(self.conv1(a))))
        return y + self.shortcut(a if self.projects else x)


class ZeroPad(nn.Module):
    """Every ``stride``-th pixel (or the average of each stride x stride) of [N, c_in, H, W], then channels of zeros."""

    def __init__(self, c_in: int, c_out: int, stride: int, average: bool = False) -> None:
        super().__init__()
        self.channels, self.stride, self.average = c_out - c_in, stride, average

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            step = self.stride
            # Where a window sticks out at the edge, the average is of the pixels that there are.
            x = F.avg_pool2d(x, step, ceil_mode=True) if self.average else x[:, :, ::step, ::step]
        return F.pad(x, (0, 0, 0, 0, 0, self.channels)) if self.channels else x
