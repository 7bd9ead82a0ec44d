"""What every network is built from: its image, its classes, its widths and its activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

Image = tuple[int, int, int]

GREY: Image = (1, 28, 28)
COLOUR: Image = (3, 32, 32)
LARGE = 64  # images at least this high and wide, Tiny-ImageNet's, are halved by the first convolution
EPS = 1e-3  # of batch norm, the default of TensorFlow, with which the authors train

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky-relu": partial(nn.LeakyReLU, 0.2),  # the slope that TensorFlow takes by default
    "selu": nn.SELU,
}


@dataclass(frozen=True)
class Net:
    """What is asked of a network: ``image`` (channels, height, width), ``classes``, factor on widths, activation."""

    image: Image
    classes: int
    width: float
    activation: Callable[[], nn.Module]

    def scaled(self, units: int) -> int:
        """A hidden width: rounded, at least 1."""
        return max(1, round(units * self.width))

    @property
    def first_stride(self) -> int:
        """Of the first convolution: 2 for large images, as SNIP (Lee et al., 2019) has it for Tiny-ImageNet."""
        return 2 if min(self.image[1:]) >= LARGE else 1


class Images(nn.Module):
    """[N, C*H*W] or [N, C, H, W] to [N, C, H, W]."""

    def __init__(self, image: Image = GREY) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.image) if x.dim() == 2 else x
