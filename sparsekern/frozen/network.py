"""What a frozen network computes, before anything is packed: activations, and products and pools in their order.

Every linear step is a convolution here: a linear layer one of 1x1 images, a linear layer behind a flattened image one
whose kernel is the whole image, an average pool or a batch norm by itself one with a weight per channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import nn

from ..nn import SparseConv2d, SparseLayer, SparseLinear
from ..weights import weight_matrix

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Pair = tuple[int, int]

Layer = nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d

STRIP_ROWS = 4  # rows of W that share one load of activations


@dataclass(eq=False)
class Value:
    """Activations of one sample, [channels, height, width]."""

    channels: int
    height: int
    width: int
    step: Product | Pool | None = None  # what computes them; None for the network's input

    @property
    def numbers(self) -> int:
        return self.channels * self.height * self.width

    @property
    def size(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


@dataclass
class Weights:
    """A sparse W by entry, sorted by row: output ``row`` adds ``value`` times input ``channel`` through ``tap`` (i, j).

    Rows from one entry of ``starts`` to the next, at most 4, read the same inputs; ``alone`` where no two do.
    """

    row: Ints
    channel: Ints
    tap: tuple[Ints, Ints]
    value: Floats
    starts: Ints

    @property
    def alone(self) -> bool:
        return bool((np.diff(self.starts) == 1).all())


@dataclass(eq=False)
class Product:
    """output = relu(W * input + bias + residual), with W's window."""

    name: str
    input: Value
    output: Value
    weights: Weights
    bias: Floats
    wide: bool  # its result has no pixels: three vectors of samples at once
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    residual: Value | None = None
    relu: bool = False

    @property
    def multiply_adds(self) -> int:
        return len(self.weights.row) * self.output.height * self.output.width


@dataclass(eq=False)
class Pool:
    """output = relu(max of the input over windows); what lies outside does not count."""

    name: str
    input: Value
    output: Value
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    relu: bool = False


@dataclass
class Network:
    input: Value
    output: Value
    steps: list[Product | Pool] = field(default_factory=list)

    @property
    def multiply_adds(self) -> int:
        """Of stored weights, per sample."""
        return sum(step.multiply_adds for step in self.steps if isinstance(step, Product))

    def add(self, step: Product | Pool) -> Value:
        self.steps.append(step)
        step.output.step = step
        return step.output


def layer_weights(module: Layer, image: Value) -> Weights:
    """The weights of a linear layer on ``image``, flattened, or of a convolution."""
    bh: int
    if isinstance(module, SparseLayer):
        pattern = module.pattern
        bh, bw = pattern.blocksize
        shape = pattern.values_shape
        block_rows, block_cols = pattern.block_rows().long().numpy(), pattern.col_indices.long().numpy()
        every = (
            block_rows[:, None, None] * bh + np.arange(bh)[:, None],
            block_cols[:, None, None] * bw + np.arange(bw),
        )
        rows, cols = (np.broadcast_to(index, shape).reshape(-1) for index in every)
        value = module.values.detach().double().numpy().reshape(-1)
        (outputs, columns) = pattern.shape
        inside = (rows < outputs) & (cols < columns)  # blocks may overhang the edge
        rows, cols, value = rows[inside], cols[inside], value[inside]
    else:
        matrix = weight_matrix(module.weight.detach())
        outputs, columns = bh, _ = matrix.shape
        rows, cols = (index.reshape(-1) for index in np.indices((outputs, columns)))
        value = matrix.double().numpy().reshape(-1)
    order = np.lexsort((cols, rows))
    rows, cols, value = rows[order], cols[order], value[order]
    cuts = np.arange(0, outputs, max(bh, 1))
    if isinstance(module, (nn.Conv2d, SparseConv2d)):
        (kh, kw), groups = module.kernel_size, module.groups
        inputs, rows_of_group = columns // (kh * kw), max(outputs // groups, 1)
        tap, channel = np.divmod(cols, max(inputs, 1))
        channel = channel + rows // rows_of_group * inputs
        i, j = np.divmod(tap, kw)
        cuts = np.union1d(cuts, np.arange(groups) * rows_of_group)
    else:
        channel, pixel = np.divmod(cols, image.height * image.width)
        i, j = np.divmod(pixel, image.width)
    return Weights(rows, channel, (i, j), value, _starts(cuts, outputs))


def per_channel(channels: int, kernel: Pair, value: Floats) -> Weights:
    """Each output reads its own channel through every tap, with weight ``value`` [channels]."""
    taps = kernel[0] * kernel[1]
    row = np.repeat(np.arange(channels), taps)
    i, j = np.divmod(np.tile(np.arange(taps), channels), kernel[1])
    return Weights(row, row, (i, j), np.repeat(value, taps), np.arange(channels + 1))


def per_number(image: Value, value: Floats) -> Weights:
    """Each output reads one number of the flattened ``image``, with weight ``value`` [numbers]."""
    row = np.arange(image.numbers)
    channel, pixel = np.divmod(row, image.height * image.width)
    i, j = np.divmod(pixel, image.width)
    return Weights(row, channel, (i, j), value.copy(), np.arange(image.numbers + 1))


def _starts(cuts: Ints, rows: int) -> Ints:
    """First rows of the strips, and the number of rows: the runs that begin at ``cuts``, cut to 4 rows, evenly."""
    lengths = np.diff(np.append(cuts, rows))
    parts = -(-lengths // STRIP_ROWS)
    which = np.repeat(np.arange(len(cuts)), parts)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = cuts[which] + -(-lengths[which] * nth // np.maximum(parts[which], 1))
    return np.append(starts, rows).astype(np.int64)
