"""One generator of samples for the six ops: every generic test runs over these problems.

A :class:`Problem` is one layer with its activations and gradient, in awkward layouts; ``problem.args(op)`` are the
arguments of one op. Data are small integers unless asked otherwise, so that sums are exact in any order and results can
be compared bit for bit. Entries of the values that overhang the edge hold NaN, which must never show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern import functional, ops
from sparsekern.pattern import BlockPattern

LINEAR_OPS = ("bsr_linear", "bsr_linear_dgrad", "bsr_linear_wgrad")
CONV_OPS = ("bsr_conv2d", "bsr_conv2d_dgrad", "bsr_conv2d_wgrad")
OPS = LINEAR_OPS + CONV_OPS

BLOCKSIZES = (
    (1, 1), (4, 1), (8, 1), (16, 1), (1, 4), (1, 8), (4, 4), (8, 8), (16, 16), (3, 5), (5, 2), (7, 3), (32, 32),
)  # fmt: skip
BATCHES = ((), (1,), (3,), (7,), (8,), (9,), (23,), (24,), (25,), (100,), (200,), (300,), (0,), (2, 3, 5), (4, 0, 2))
SHAPES = ((37, 53), (64, 96), (1, 1), (5, 130), (130, 5), (261, 520), (1, 70), (70, 1), (0, 6), (6, 0))
DENSITIES = ("third", "full", "none", "one", "holes", "sparse")
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced", "scalar")
IMAGE_LAYOUTS = ("nchw", "channels_last", "x_last", "grad_last", "transposed", "expanded", "sliced", "scalar")


@dataclass(frozen=True)
class Geometry:
    """A convolution, its images' height and width included."""

    c_in: int
    c_out: int
    kernel_size: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (6, 7)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.c_out, self.kernel_size[0] * self.kernel_size[1] * self.c_in // self.groups

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.c_out, self.c_in // self.groups, *self.kernel_size

    @property
    def kernel(self) -> tuple[int, int, int]:
        return *self.kernel_size, self.groups

    @property
    def conv(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """In the order of the ops' arguments."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = ops.output_size(self.size, *self.conv[:4])
        return height, width


GEOMETRIES = {
    "3x3": Geometry(6, 10, padding=(1, 1)),
    "5x5-valid": Geometry(3, 8, (5, 5), (9, 8)),
    "lenet": Geometry(1, 20, (5, 5), (28, 28)),
    "wide": Geometry(40, 140, (3, 3), (5, 4), padding=(1, 1)),
    "1x1": Geometry(12, 9, (1, 1)),
    "1x1-strided": Geometry(8, 8, (1, 1), (7, 6), stride=(2, 2)),
    "1x1-padded": Geometry(4, 6, (1, 1), (2, 3), padding=(2, 1)),
    "strided": Geometry(8, 16, stride=(2, 2), padding=(1, 1)),
    "odd-stride": Geometry(5, 7, stride=(2, 1), padding=(0, 2)),
    "stride-over-kernel": Geometry(4, 4, (2, 2), (10, 11), stride=(3, 4)),
    "7x7-stride4": Geometry(3, 9, (7, 7), (17, 15), stride=(4, 4), padding=(3, 3)),
    "dilated": Geometry(4, 8, size=(9, 10), padding=(2, 2), dilation=(2, 2)),
    "odd-dilation": Geometry(5, 6, (3, 2), (8, 11), stride=(2, 1), padding=(2, 1), dilation=(1, 3)),
    "groups": Geometry(8, 12, padding=(1, 1), groups=2),
    "odd-groups": Geometry(9, 21, (2, 3), stride=(1, 2), padding=(1, 0), groups=3),
    "depthwise": Geometry(11, 11, padding=(1, 1), groups=11),
    "depthwise-2": Geometry(6, 12, stride=(2, 2), padding=(1, 1), groups=6),
    "even": Geometry(6, 5, (2, 2)),
    "even-same": Geometry(4, 4, (4, 2), (7, 6), padding=(2, 1)),
    "kernel-over-image": Geometry(4, 6, (5, 5), (2, 3), padding=(3, 2)),
    "tap-outside": Geometry(2, 4, (3, 3), (1, 2), padding=(4, 5), dilation=(3, 4)),
    "pixel": Geometry(7, 8, (1, 1), (1, 1)),
    "pixel-3x3": Geometry(7, 8, (3, 3), (1, 1), padding=(1, 1)),
    "row": Geometry(4, 5, (1, 3), (1, 40), padding=(0, 1)),
    "column": Geometry(4, 5, (3, 1), (40, 1), padding=(1, 0)),
    "large": Geometry(4, 8, (3, 3), (33, 31), padding=(1, 1)),
    "large-strided": Geometry(5, 8, (3, 3), (19, 21), stride=(2, 2), padding=(1, 1)),
    "large-mixed": Geometry(6, 9, (3, 2), (12, 40), stride=(1, 3), padding=(2, 1), dilation=(1, 2), groups=3),
    "large-tall": Geometry(20, 6, (3, 3), (90, 40), padding=(1, 2)),
}


@dataclass(frozen=True)
class Problem:
    """One layer (linear if ``geometry`` is None) with activations ``x`` and gradient ``grad`` of its output."""

    name: str
    pattern: BlockPattern
    x: Tensor
    values: Tensor
    bias: Tensor | None
    grad: Tensor
    geometry: Geometry | None = None
    channels_last: bool = False

    @property
    def ops(self) -> tuple[str, ...]:
        return CONV_OPS if self.geometry else LINEAR_OPS

    def args(self, op: str) -> tuple[object, ...]:
        """Arguments of ``torch.ops.sparsekern.<op>`` and of ``sparsekern.reference.<op>``."""
        plans = functional.prepare(self.pattern, self.geometry.kernel if self.geometry else None)
        crow, col = plans.crow_indices, plans.col_indices
        outputs, inputs = self.pattern.shape
        if self.geometry:
            conv, last = self.geometry.conv, self.channels_last
            size = list(self.x.shape[2:])
            channels = self.x.shape[1]
        match op:
            case "bsr_linear":
                return self.x, self.values, self.bias, crow, col, plans.forward, outputs
            case "bsr_linear_dgrad":
                return self.grad, self.values, crow, col, plans.dgrad, inputs
            case "bsr_linear_wgrad":
                return self.grad, self.x, crow, col, plans.wgrad, self.pattern.blocksize, self.bias is not None
            case "bsr_conv2d":
                return self.x, self.values, self.bias, crow, col, plans.forward, outputs, *conv, last
            case "bsr_conv2d_dgrad":
                return self.grad, self.values, crow, col, plans.dgrad, channels, size, *conv, last
            case "bsr_conv2d_wgrad":
                bias = self.bias is not None
                return self.grad, self.x, crow, col, plans.wgrad, self.pattern.blocksize, *conv, bias
        raise ValueError(op)

    def call(self, x: Tensor, values: Tensor, bias: Tensor | None, backend: functional.Backend) -> Tensor:
        """The public function on these tensors."""
        if not self.geometry:
            return functional.bsr_linear(x, values, self.pattern, bias, backend=backend)
        kernel_size, *conv = self.geometry.conv
        return functional.bsr_conv2d(x, values, self.pattern, bias, *conv, kernel_size=kernel_size, backend=backend)


def draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, integers: bool) -> Tensor:
    """Integers in [-4, 4], or normal numbers."""
    if integers:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """``tensor`` with other strides; the expanded layouts repeat its first sample ("scalar": its first number)."""
    if tensor.dim() == 0 or layout in ("contiguous", "nchw") or not tensor.numel():
        return tensor.contiguous()
    if layout == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "scalar":  # what sum().backward() hands back
        return tensor.new_full((), 2.0).expand(tensor.shape)
    if layout == "sliced":
        wide = tensor.new_full([2 * n + 1 for n in tensor.shape], torch.nan)
        part = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return part.copy_(tensor)
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    raise ValueError(layout)


def make_pattern(
    shape: tuple[int, int], blocksize: tuple[int, int], density: str, generator: torch.Generator
) -> BlockPattern:
    """third, tenth, sparse: at random; full; none; one: a block in the corner; holes: rows and columns left empty."""
    grid = tuple(-(-n // b) for n, b in zip(shape, blocksize, strict=True))
    odds = {"third": 0.33, "tenth": 0.1, "holes": 0.6, "sparse": 0.03}
    mask = torch.rand(grid, generator=generator) < odds.get(density, 1.0)
    if density == "none":
        mask[:] = False
    elif density == "one":
        mask[:] = False
        mask[-1:, -1:] = True
    elif density == "holes":
        mask[::2] = False
        mask[:, 1::3] = False
    return BlockPattern.from_mask(mask, blocksize, shape)


def make_problem(
    name: str,
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    density: str,
    batch: tuple[int, ...],
    layout: str = "contiguous",
    *,
    geometry: Geometry | None = None,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    integers: bool = True,
) -> Problem:
    generator = torch.Generator().manual_seed(len(name))
    pattern = make_pattern(shape, blocksize, density, generator)
    values = draw(pattern.values_shape, generator, dtype, integers)
    values[~pattern.edge_mask()] = torch.nan
    if geometry:
        x_shape = (*batch, geometry.c_in, *geometry.size)
        grad_shape = (*batch, geometry.c_out, *geometry.output_size)
    else:
        x_shape, grad_shape = (*batch, shape[1]), (*batch, shape[0])
    x, grad = draw(x_shape, generator, dtype, integers), draw(grad_shape, generator, dtype, integers)
    x_layout, grad_layout = {
        "x_last": ("channels_last", "nchw"),
        "grad_last": ("nchw", "channels_last"),
    }.get(layout, (layout, layout))
    return Problem(
        name,
        pattern,
        lay_out(x, x_layout),
        lay_out(values, "sliced" if layout == "sliced" else "contiguous"),
        draw(shape[:1], generator, dtype, integers) if bias else None,
        lay_out(grad, grad_layout),
        geometry,
        layout in ("channels_last", "x_last"),
    )


def linear_problems(dtype: torch.dtype = torch.float64, full: bool = False, integers: bool = True) -> Iterator[Problem]:
    """Every value of every axis at least once; with ``full``, the product of all axes but the layout."""
    if full:
        cases = itertools.product(BLOCKSIZES, SHAPES, DENSITIES, BATCHES)
    else:
        rounds = range(3)
        cases = (
            (blocksize, SHAPES[(i + 3 * r) % 6], DENSITIES[(i // 2 + r) % 6], BATCHES[(i + 5 * r) % len(BATCHES)])
            for r in rounds
            for i, blocksize in enumerate(BLOCKSIZES)
        )
        cases = itertools.chain(cases, [((2, 2), shape, "full", (3,)) for shape in SHAPES[6:]])
    for i, (blocksize, shape, density, batch) in enumerate(cases):
        layout = LAYOUTS[i % len(LAYOUTS)]
        name = f"{i}-{blocksize}-of-{shape}-{density}-batch{batch}-{layout}"
        yield make_problem(
            name, shape, blocksize, density, batch, layout, dtype=dtype, bias=i % 3 > 0, integers=integers
        )


def conv_problems(dtype: torch.dtype = torch.float64, full: bool = False, integers: bool = True) -> Iterator[Problem]:
    """Every geometry, block size, density and layout; with ``full``, the product of geometries and block sizes."""
    if full:
        pairs = list(itertools.product(GEOMETRIES, BLOCKSIZES))
        cases = [(g, b, d, layout) for g, b in pairs for d, layout in zip(DENSITIES, IMAGE_LAYOUTS[:6], strict=True)]
        cases += [(g, b, "third", layout) for g, b in pairs for layout in IMAGE_LAYOUTS[1:]]
    else:
        rounds = range(2)
        cases = [
            (
                g,
                BLOCKSIZES[(i + 6 * r) % len(BLOCKSIZES)],
                ("third", "full", "holes", "third", "one", "third", "none")[(i + r) % 7],
                IMAGE_LAYOUTS[(i + 3 * r) % len(IMAGE_LAYOUTS)],
            )
            for r in rounds
            for i, g in enumerate(GEOMETRIES)
        ]
    for i, (key, blocksize, density, layout) in enumerate(cases):
        geometry = GEOMETRIES[key]
        batch = ((3,), (1,), (2,), (5,), (0,))[i % 5]
        name = f"{i}-{key}-{blocksize}-{density}-batch{batch}-{layout}"
        yield make_problem(
            name, geometry.shape, blocksize, density, batch, layout,
            geometry=geometry, dtype=dtype, bias=i % 3 > 0, integers=integers,
        )  # fmt: skip


def wide_problems(dtype: torch.dtype = torch.float64, full: bool = False, integers: bool = True) -> Iterator[Problem]:
    """Blocks 16 and more high or wide, which have kernels of their own; with ``full``, every layout of each case."""
    cases: list[tuple[tuple[int, int] | Geometry, tuple[int, int], tuple[int, ...]]] = [
        ((48, 32), (16, 16), (7,)),
        ((50, 70), (16, 16), (3, 5)),
        ((33, 17), (32, 16), (25,)),
        ((64, 600), (16, 1), (13,)),
        ((600, 64), (1, 16), (50,)),
        ((40, 30), (16, 3), (6,)),
        ((30, 40), (3, 32), (1,)),
        ((16, 16), (16, 16), ()),
        ((20, 20), (48, 48), (100,)),
        (Geometry(16, 32, size=(5, 4), padding=(1, 1)), (16, 16), (3,)),
        (Geometry(32, 16, size=(7, 9), stride=(2, 2), padding=(1, 1)), (16, 16), (2,)),
        (Geometry(16, 20, (1, 1), (6, 5)), (16, 16), (4,)),
        (Geometry(20, 40, (1, 1), (6, 5), stride=(2, 3)), (32, 16), (1,)),
        (Geometry(32, 64, (2, 3), (6, 7), stride=(1, 3), padding=(1, 2), dilation=(2, 1), groups=2), (16, 16), (2,)),
        (Geometry(16, 16, (5, 5), (2, 3), padding=(4, 3)), (16, 8), (2,)),
        (Geometry(64, 48, (3, 3), (4, 4), stride=(3, 2), padding=(1, 0)), (8, 32), (3,)),
        (Geometry(300, 16, (1, 2), (2, 9)), (16, 1), (1,)),
        (Geometry(32, 8, (7, 7), (4, 3), padding=(3, 3)), (4, 4), (2,)),
        (Geometry(64, 8, (7, 5), (7, 9), stride=(2, 2), padding=(3, 2), groups=2), (16, 6), (1,)),
        ((5, 0), (16, 16), (3,)),
        ((0, 5), (16, 16), (3,)),
    ]
    for i, (layer, blocksize, batch) in enumerate(cases):
        geometry = layer if isinstance(layer, Geometry) else None
        shape = layer.shape if isinstance(layer, Geometry) else layer
        layouts = IMAGE_LAYOUTS if geometry else LAYOUTS
        for layout in layouts if full else (layouts[i % len(layouts)], "channels_last" if geometry else "contiguous"):
            name = f"wide{i}-{shape}-{blocksize}-batch{batch}-{layout}"
            yield make_problem(
                name, shape, blocksize, ("third", "full", "holes")[i % 3], batch, layout,
                geometry=geometry, dtype=dtype, bias=i % 3 > 0, integers=integers,
            )  # fmt: skip


def plane_problems(dtype: torch.dtype = torch.float64, full: bool = False, integers: bool = True) -> Iterator[Problem]:
    """Images large enough to be copied as planes, widths that are multiples of a vector and not."""
    cases: list[tuple[Geometry, tuple[int, int], tuple[int, ...]]] = [
        (Geometry(6, 5, (3, 3), (16, 16), padding=(1, 1)), (1, 1), (2,)),
        (Geometry(5, 9, (3, 3), (32, 32), padding=(1, 1)), (4, 1), (1,)),
        (Geometry(9, 6, (5, 5), (16, 8), padding=(2, 2)), (2, 3), (9,)),
        (Geometry(6, 4, (3, 3), (12, 28), padding=(1, 1), groups=2), (1, 2), (2,)),
        (Geometry(4, 3, (3, 2), (18, 17), padding=(0, 0), dilation=(1, 1)), (4, 4), (3,)),
        (Geometry(4, 3, (3, 3), (16, 24), padding=(3, 4), dilation=(2, 3)), (1, 1), (8,)),
        (Geometry(3, 2, (1, 5), (9, 16), padding=(0, 2)), (3, 1), (2,)),
        (Geometry(3, 2, (3, 3), (10, 14), padding=(1, 1)), (1, 4), (2,)),
        (Geometry(130, 7, (3, 3), (8, 8), padding=(1, 1)), (1, 1), (3,)),
    ]
    for i, (geometry, blocksize, batch) in enumerate(cases):
        for layout in IMAGE_LAYOUTS if full else (IMAGE_LAYOUTS[i % len(IMAGE_LAYOUTS)], "contiguous"):
            name = f"planes{i}-{geometry.shape}-{blocksize}-batch{batch}-{layout}"
            yield make_problem(
                name, geometry.shape, blocksize, ("third", "full", "holes")[i % 3], batch, layout,
                geometry=geometry, dtype=dtype, bias=i % 3 > 0, integers=integers,
            )  # fmt: skip


def problems(dtype: torch.dtype = torch.float64, full: bool = False, integers: bool = True) -> Iterator[Problem]:
    yield from linear_problems(dtype, full, integers)
    yield from conv_problems(dtype, full, integers)
    yield from wide_problems(dtype, full, integers)
    yield from plane_problems(dtype, full, integers)


def small_problems(dtype: torch.dtype = torch.float64) -> Iterator[Problem]:
    """Few and tiny: what gradcheck and opcheck can afford in every run."""
    for i, (blocksize, density, batch, layout) in enumerate(
        [
            ((1, 1), "third", (3,), "contiguous"),
            ((1, 1), "holes", (2, 2), "transposed"),
            ((4, 1), "third", (5,), "expanded"),
            ((3, 5), "full", (2,), "sliced"),
            ((2, 2), "one", (), "contiguous"),
            ((2, 4), "none", (3,), "scalar"),
            ((4, 4), "third", (0,), "contiguous"),
        ]
    ):
        name = f"linear{i}-{blocksize}-{density}-batch{batch}-{layout}"
        yield make_problem(name, (7, 9), blocksize, density, batch, layout, dtype=dtype)
    small = {
        "3x3": Geometry(3, 4, (3, 3), (4, 3), padding=(1, 1)),
        "strided": Geometry(4, 6, (2, 3), (5, 4), stride=(2, 1), padding=(1, 2), groups=2),
        "dilated": Geometry(2, 3, (2, 2), (4, 5), padding=(1, 0), dilation=(2, 1)),
        "depthwise": Geometry(4, 4, (3, 3), (3, 3), padding=(1, 1), groups=4),
    }
    for i, (key, blocksize, density, batch, layout) in enumerate(
        [
            ("3x3", (1, 1), "third", (2,), "nchw"),
            ("3x3", (4, 1), "full", (2,), "x_last"),
            ("strided", (4, 4), "third", (1,), "channels_last"),
            ("strided", (2, 1), "holes", (2,), "grad_last"),
            ("dilated", (2, 2), "full", (2,), "transposed"),
            ("depthwise", (3, 5), "full", (2,), "expanded"),
            ("3x3", (2, 3), "none", (2,), "scalar"),
            ("dilated", (1, 4), "third", (0,), "sliced"),
        ]
    ):
        geometry = small[key]
        name = f"{key}{i}-{blocksize}-{density}-batch{batch}-{layout}"
        yield make_problem(name, geometry.shape, blocksize, density, batch, layout, geometry=geometry, dtype=dtype)
