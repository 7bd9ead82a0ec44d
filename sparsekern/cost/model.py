"""The time of a layer as a sum of what it does times what each unit of that takes: :class:`Work`.

Each product (forward, and dgrad and wgrad of the backward) has terms of its own. Their names, which are those of the
coefficients, too, say whose they are: ``linear`` or ``conv2d``, then

``dense``, torch's own layer
    call; in, out (numbers read and written); weight (weights); fma (multiply-adds, channels rounded up to vectors of
    8); of convolutions also strided or thin in place of fma (a stride; in forward, fewer than 8 input channels), load
    (inputs that multiply-adds read) and line (as fma, but lines of pixels in place of pixels)
``sparse``, the kernels
    call; in, out; value (stored weights); fma1, fma2, fma4, fma16 (multiply-adds of stored weights, by the rows that
    share an activation: the height of blocks in forward and wgrad, their width in dgrad); pack (activations copied for
    each tap; in its place gather where strided, copy for kernels of 1x1, wide where 16 rows of a linear layer share
    them); line (as pack, but lines of pixels)
``scatter``, what ``backend="dense"`` does beside the dense layer
    call; weight; value

and the product, or ``backward`` for a call of autograd. Padding counts as work. Times are those of one thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PRODUCTS = ("forward", "dgrad", "wgrad")
VECTOR = 8  # channels that dense convolutions take at a time

Terms = dict[str, float]


@dataclass(frozen=True)
class Work:
    """A layer and the batch it sees, as far as its time depends on them."""

    kind: str  # "linear" or "conv2d"
    outputs: int
    inputs: int  # channels
    taps: int  # of a convolution's kernel
    positions: int  # of the output: rows or pixels
    points: int  # of the input
    lines: int = 0  # of pixels of the output
    strided: bool = False

    @classmethod
    def linear(cls, outputs: int, inputs: int, rows: int) -> Work:
        """A linear layer on ``rows`` rows."""
        return cls("linear", outputs, inputs, 1, rows, rows)

    @classmethod
    def conv2d(
        cls,
        outputs: int,
        inputs: int,
        kernel_size: tuple[int, int],
        images: int,
        in_size: tuple[int, int],
        out_size: tuple[int, int],
        strided: bool,
    ) -> Work:
        """A convolution without groups of images of height and width ``in_size``, which become ``out_size``."""
        positions, points = images * out_size[0] * out_size[1], images * in_size[0] * in_size[1]
        taps = kernel_size[0] * kernel_size[1]
        return cls("conv2d", outputs, inputs, taps, positions, points, images * out_size[0], strided)

    @property
    def weights(self) -> int:
        """Of the dense layer."""
        return self.outputs * self.inputs * self.taps

    def dense(self, products: Iterable[str] = PRODUCTS) -> Terms:
        """Terms of torch's dense layer."""
        named = {}
        for product in products:
            # Torch's backward fills the channels of a thin input up with zeros, its forward does not.
            thin = product == "forward" and self.kind == "conv2d" and self.inputs < VECTOR
            rounded = (self.inputs if thin else _up(self.inputs)) * _up(self.outputs) * self.taps
            terms = {"call": 1.0, "in": self.points * self.inputs, "out": self.positions * self.outputs}
            terms["weight"] = self.weights
            terms["thin" if thin else "strided" if self.strided else "fma"] = rounded * self.positions
            if self.kind == "conv2d":
                terms |= {"load": self.inputs * self.taps * self.positions, "line": rounded * self.lines}
            named[product] = terms
        return self._named("dense", named)

    def scatter(self, density: float, products: Iterable[str] = PRODUCTS) -> Terms:
        """Terms of writing the dense weight, and of reading the gradient of the values from its gradient."""
        terms = {"call": 1.0, "weight": self.weights, "value": density * self.weights}
        return self._named("scatter", {product: terms for product in products if product != "dgrad"})

    def sparse(self, blocksize: tuple[int, int], density: float, products: Iterable[str] = PRODUCTS) -> Terms:
        """Terms of the kernels, for blocks of ``blocksize`` and the fraction ``density`` of the weights."""
        kept, columns = density * self.weights, self.inputs * self.taps
        heights = {"forward": blocksize[0], "dgrad": blocksize[1], "wgrad": blocksize[0]}
        named = {}
        for product in products:
            rows = _shared(heights[product])
            terms = {"call": 1.0, "value": kept, "out": self.positions * self.outputs}
            terms[f"fma{rows}"] = kept * self.positions
            if self.kind == "linear":
                terms["wide" if rows == 16 and product != "wgrad" else "pack"] = columns * self.positions
            else:
                way = "gather" if self.strided else "pack" if self.taps > 1 else "copy"
                terms[way] = columns * self.positions
                terms |= {"in": self.points * self.inputs, "line": columns * self.lines if self.taps > 1 else 0}
            named[product] = terms
        return self._named("sparse", named)

    def _named(self, what: str, of_products: dict[str, Terms]) -> Terms:
        if len(of_products) > 1 and what != "scatter":
            of_products = of_products | {"backward": {"call": 1.0}}
        return {
            f"{self.kind}.{what}.{product}.{name}": amount
            for product, terms in of_products.items()
            for name, amount in terms.items()
        }


def _up(channels: int) -> int:
    return -(-channels // VECTOR) * VECTOR


def _shared(height: int) -> int:
    """Rows that share an activation in the kernels for blocks of that height: 1, 2 (or 3), 4, or 16."""
    return 16 if height % 16 == 0 else max(n for n in (1, 2, 4) if n <= height)


def _names() -> frozenset[str]:
    """Every coefficient there is."""
    layers = [
        Work.linear(1, 1, 1),
        *(
            Work.conv2d(1, channels, (kernel, kernel), 1, (1, 1), (1, 1), strided)
            for channels in (1, VECTOR)
            for kernel in (1, 3)
            for strided in (False, True)
        ),
    ]
    blocks = [(height, height) for height in (1, 2, 4, 16)]
    names = {name for work in layers for block in blocks for name in work.sparse(block, 1.0)}
    return frozenset(names.union(*(work.dense() | work.scatter(1.0) for work in layers)))


NAMES = _names()
