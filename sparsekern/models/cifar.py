"""Networks for 32x32 colour images and ten classes, with batch normalisation: VGG-D and ResNet-18."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

IMAGE = (3, 32, 32)
N_CLASSES = 10
VGG_D = (2, 64), (2, 128), (3, 256), (3, 512), (3, 512)  # (convolutions, channels) of each group, a pooling after it
RESNET_18 = (64, 1), (128, 2), (256, 2), (512, 2)  # (channels, stride of the first) of each pair of blocks


def vgg_d(scaled: Callable[[int], int]) -> nn.Sequential:
    """13 convolutions 3x3 and a 512-512-10 head, as in the code of SNIP (Lee et al., 2019)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = IMAGE[0]
    for group, (count, width) in enumerate(VGG_D, 1):
        for i in range(1, count + 1):
            layers[f"conv{group}_{i}"] = nn.Conv2d(channels, scaled(width), 3, padding=1)
            layers[f"norm{group}_{i}"] = nn.BatchNorm2d(scaled(width))
            layers[f"relu{group}_{i}"] = nn.ReLU()
            channels = scaled(width)
        layers[f"pool{group}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()  # of images of 1x1
    for i in (1, 2):
        layers[f"fc{i}"] = nn.Linear(channels, scaled(512))
        layers[f"norm_fc{i}"] = nn.BatchNorm1d(scaled(512))
        layers[f"relu_fc{i}"] = nn.ReLU()
        channels = scaled(512)
    layers["fc3"] = nn.Linear(channels, N_CLASSES)
    return nn.Sequential(layers)


def resnet_18(scaled: Callable[[int], int]) -> nn.Sequential:
    """ResNet-18 (He et al., 2016) as used on CIFAR: a 3x3 stem without pooling, projections where shapes change."""
    channels = scaled(64)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(IMAGE[0], channels, 3, padding=1, bias=False), norm1=nn.BatchNorm2d(channels), relu1=nn.ReLU()
    )
    for group, (width, stride) in enumerate(RESNET_18, 1):
        for i in (1, 2):
            layers[f"block{group}_{i}"] = Residual(channels, scaled(width), stride if i == 1 else 1)
            channels = scaled(width)
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, N_CLASSES))
    return nn.Sequential(layers)


class Residual(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), [N, c_in, H, W] to [N, c_out, H / stride, W / stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()  # the identity
        if stride != 1 or c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(c_out)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        result: Tensor = self.relu(y + self.shortcut(x))
        return result
