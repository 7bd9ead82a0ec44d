"""The thesis's networks: small ones for 28x28 grey images, two for 32x32 colour images, ten classes: :func:`build`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import cifar

__all__ = ["COLOUR_NAMES", "NAMES", "build", "image_shape", "init_"]

IMAGE = (1, 28, 28)
N_CLASSES = 10
# Standard deviation of a unit normal cut off at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


def build(name: str, width: float = 1.0, generator: torch.Generator | None = None) -> nn.Sequential:
    """A network with fresh weights (:func:`init_`), output logits [N, 10].

    Args:
        name: for input [N, 1, 28, 28] or flattened [N, 784] (:data:`NAMES`): "lenet-300-100" (266,610 parameters),
            "lenet-5-caffe" (431,080, no ReLU after its convolutions), both as in SNIP (Lee et al., 2019), or
            "simple-cnn" (62,346, Lee et al., 2021). For input [N, 3, 32, 32] (:data:`COLOUR_NAMES`): "vgg-d"
            (15,245,130 without batch normalisation, as in SNIP) or "resnet-18" (11,173,962, the variant for CIFAR).
        width: factor on every hidden width (rounded, at least 1); input and output keep theirs.
        generator: draws the weights; torch's default generator where None.

    Raises:
        ValueError: an unknown name, or a width that is not positive.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(_BUILDERS)}, got {name!r}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be positive, got {width}")
    model = _BUILDERS[name](lambda units: max(1, round(units * width)))
    init_(model, generator)
    return model


def image_shape(name: str) -> tuple[int, int, int]:
    """(channels, height, width) of the images that ``build(name)`` is for."""
    return cifar.IMAGE if name in COLOUR_NAMES else IMAGE


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


class Images(nn.Module):
    """[N, 784] or [N, 1, 28, 28] to [N, 1, 28, 28]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, IMAGE) if x.dim() == 2 else x


def _lenet_300_100(scaled: Callable[[int], int]) -> nn.Sequential:
    h1, h2 = scaled(300), scaled(100)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(IMAGE), h1),
            relu1=nn.ReLU(),
            fc2=nn.Linear(h1, h2),
            relu2=nn.ReLU(),
            fc3=nn.Linear(h2, N_CLASSES),
        )
    )


def _lenet_5_caffe(scaled: Callable[[int], int]) -> nn.Sequential:
    c1, c2, h = scaled(20), scaled(50), scaled(500)
    return nn.Sequential(
        OrderedDict(
            images=Images(),
            conv1=nn.Conv2d(1, c1, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(c1, c2, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * c2, h),
            relu1=nn.ReLU(),
            fc2=nn.Linear(h, N_CLASSES),
        )
    )


def _simple_cnn(scaled: Callable[[int], int]) -> nn.Sequential:
    c1, c2 = scaled(32), scaled(64)
    return nn.Sequential(
        OrderedDict(
            images=Images(),
            conv1=nn.Conv2d(1, c1, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(c1, c2, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * c2, N_CLASSES),
        )
    )


_BUILDERS: dict[str, Callable[[Callable[[int], int]], nn.Sequential]] = {
    "lenet-300-100": _lenet_300_100,
    "lenet-5-caffe": _lenet_5_caffe,
    "simple-cnn": _simple_cnn,
    "vgg-d": cifar.vgg_d,
    "resnet-18": cifar.resnet_18,
}
COLOUR_NAMES = ("vgg-d", "resnet-18")
NAMES = tuple(name for name in _BUILDERS if name not in COLOUR_NAMES)
