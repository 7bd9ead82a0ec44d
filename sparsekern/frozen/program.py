"""Packs a :class:`~sparsekern.frozen.network.Network` for the kernels: layouts, offsets and weights in their order.

The program is one int32 array, mirrored in ``csrc/frozen.h``: header, packed indices, steps. Offsets count vectors of
samples, and their strides depend on how many bytes a vector has: a program fits one length of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .network import Floats, Ints, Network, Pair, Pool, Product, Value

MAGIC = 0x5F21  # changes with the format
HEADER = 9
INPUT, OUTPUT, CLEAR, POOL, PRODUCT = range(5)
INT32_MAX = 2**31 - 1
VECTORS = 3  # of samples in a tile
LINE = 64  # bytes of a cache line
ALIGN = 8  # vectors that places in the arena are multiples of
NOWHERE = (0, 0, 0, 0, 0)
SPAN_BYTES = 24 * 1024  # activations that stay in the first-level cache beside the outputs
SPAN_STEPS = 20  # below, a span's prologue weighs more than misses do: it may be twice as long
PIECE = 512  # terms of one sum; pieces are summed up, so that rounding errors grow as those of dense products do


def pack(network: Network, dtype: torch.dtype, vector_bytes: int) -> tuple[Tensor, Tensor]:
    """The program [int32] and the constants [``dtype``] of ``network`` for vectors of ``vector_bytes``.

    Raises:
        ValueError: the network needs more than int32 can count.
    """
    lanes = vector_bytes // dtype.itemsize
    steps, fused = _schedule(network)
    narrow = sum(not _is_wide(step) for step in steps)
    layouts = _layouts(network, steps, fused, narrow, vector_bytes, lanes)
    arena = _place(list(layouts.values()))
    writer = _Writer()
    writer.clear(layouts[network.input])
    writer.step(INPUT, network.input, layouts[network.input].view())
    wide = 0
    for index, step in enumerate(steps):
        if step in fused:
            writer.clear(layouts[steps[index + 1].output])  # where its rows end up
        elif index == 0 or steps[index - 1] not in fused:
            writer.clear(layouts[step.output])
        if isinstance(step, Pool):
            writer.pool(step, layouts)
        else:
            writer.product(step, layouts, step in fused, vector_bytes)
        if index == narrow - 1:
            wide = len(writer.table) + (not layouts[network.output].panel)
            if wide > len(writer.table):
                writer.step(OUTPUT, network.output, layouts[network.output].view())
    if layouts[network.output].panel:
        writer.step(OUTPUT, network.output, layouts[network.output].view())
    return writer.finish(network, lanes, arena, wide, dtype)


def _is_wide(step: Product | Pool) -> bool:
    return isinstance(step, Product) and step.wide


def _schedule(network: Network) -> tuple[list[Product | Pool], set[Product | Pool]]:
    """The steps in their order, those with pixels first, and the products whose pool follows and takes their rows."""
    uses: dict[Value, int] = {network.output: 1}
    for step in network.steps:
        for value in _reads(step):
            uses[value] = uses.get(value, 0) + 1
    fused: set[Product | Pool] = set()
    ordered: list[Product | Pool] = []
    for step in network.steps:
        source = step.input.step
        if isinstance(step, Pool) and isinstance(source, Product) and uses[step.input] == 1:
            plain = step.padding == (0, 0) and step.dilation == (1, 1) and step.stride[0] >= step.kernel[0]
            if plain and (step.output.height - 1) * step.stride[0] + step.kernel[0] <= step.input.height:
                fused.add(source)
                ordered.remove(source)
                ordered.append(source)
        ordered.append(step)
    # What has pixels never reads what has none.
    return sorted(ordered, key=_is_wide), fused


def _reads(step: Product | Pool) -> list[Value]:
    residual = step.residual if isinstance(step, Product) else None
    return [step.input] if residual is None else [step.input, residual]


# ---- layouts --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Layout:
    """Where a value lies in the arena: strides and places in vectors until :meth:`finish`, in numbers from then on."""

    value: Value
    first: int  # steps between which it lives
    last: int = 0
    panel: bool = False  # the three vectors of a tile side by side
    zeros: bool = False  # one channel more, of zeros, for what pads SELL
    border: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # rows above and below, columns left and right
    height: int = 0  # rows that there is room for
    base: int = 0  # in vectors
    lanes: int = 1

    def finish(self, vector_bytes: int, lanes: int) -> None:
        """Set the strides, once the fields above are final."""
        above, below, left, right = self.border
        width = left + self.value.width + right
        self.lanes = lanes
        self.pixel = VECTORS if self.panel else 1
        self.channel = width * self.pixel
        if width > 1:  # an odd number of cache lines: neighbouring channels lie in different sets
            line = LINE // vector_bytes
            self.channel += (line - self.channel) % (2 * line)
        self.row = self.channel * (self.value.channels + self.zeros)
        self.origin = above * self.row + left * self.pixel
        self.size = self.row * (above + self.height + below)

    def view(self, padding: Pair = (0, 0), whole: bool = False) -> list[int]:
        """As ``View`` of csrc/frozen.h; with ``padding``, the pixel that tap (0, 0) of output pixel (0, 0) reads."""
        base = self.base + self.origin - padding[0] * self.row - padding[1] * self.pixel
        group = 1 if self.panel and not whole else 0
        return [n * self.lanes for n in (base, self.row, self.channel, self.pixel, group)]


def _layouts(
    network: Network, steps: list[Product | Pool], fused: set[Product | Pool], narrow: int, vector_bytes: int,
    lanes: int,
) -> dict[Value, Layout]:  # fmt: skip
    """The layout of every value, placed in the arena; the first ``narrow`` steps run once per vector of samples."""
    layouts = {network.input: Layout(network.input, 0, height=network.input.height)}
    for index, step in enumerate(steps):
        follows = index > 0 and steps[index - 1] in fused
        layout = layouts[step.output] = Layout(step.output, index - follows, index, height=step.output.height)
        if step in fused:
            layout.height = steps[index + 1].kernel[0]
        for value in _reads(step):
            layouts[value].last = index
        if isinstance(step, Product):
            for value in (*_reads(step), step.output):
                layouts[value].panel |= step.wide
            source = layouts[step.input]
            source.zeros |= step.weights.alone
            source.border = [max(pair) for pair in zip(source.border, _border(step), strict=True)]
    layouts[network.output].last = len(steps)
    for layout in layouts.values():
        if layout.panel and layout.first < narrow:
            layout.first = 0  # its vectors come one by one, while all else is overwritten
        layout.finish(vector_bytes, lanes)
    return layouts


def _border(step: Product) -> list[int]:
    """Rows above and below the input, columns left and right of it, that windows reach."""
    before = list(step.padding)
    after = []
    for d, (size, out) in enumerate(
        ((step.input.height, step.output.height), (step.input.width, step.output.width))
    ):  # fmt: skip
        end = (out - 1) * step.stride[d] + (step.kernel[d] - 1) * step.dilation[d] + 1 - before[d]
        after.append(max(end - size, 0))
    return [before[0], after[0], before[1], after[1]]


def _place(layouts: list[Layout]) -> int:
    """Put every value at the lowest place that is free as long as it lives; the vectors that takes."""
    placed: list[Layout] = []
    end = 0
    for layout in sorted(layouts, key=lambda one: (one.first, -one.size)):
        others = sorted(
            (o for o in placed if o.first <= layout.last and layout.first <= o.last), key=lambda one: one.base
        )
        for other in others:
            if layout.base + layout.size <= other.base:
                break
            layout.base = max(layout.base, -(-(other.base + other.size) // ALIGN) * ALIGN)
        placed.append(layout)
        end = max(end, layout.base + layout.size)
    return end


# ---- products -------------------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """A product's work in the order of the kernels."""

    spans: list[int] = field(default_factory=lambda: [0])  # groups before each span
    groups: list[tuple[int, ...]] = field(default_factory=list)  # steps, rows, four row numbers
    offsets: list[Ints] = field(default_factory=list)
    weights: list[Floats] = field(default_factory=list)


def pack_product(step: Product, source: Layout, vector_bytes: int) -> Packed:
    """Rows of W in groups of up to 4, longest first so that loops end alike, span by span of the inputs.

    Every row is in the first span and in the last, where its sum begins and ends.
    """
    w, rows = step.weights, len(step.bias)
    alone = w.alone
    offset = w.channel * source.channel + w.tap[0] * (step.dilation[0] * source.row)
    offset += w.tap[1] * (step.dilation[1] * source.pixel)
    zero = step.input.channels * source.channel
    if alone:
        span = w.channel // _span_channels(step, vector_bytes)
    else:
        first = np.searchsorted(w.row, np.arange(rows))
        span = np.zeros_like(w.row)
        by_offset = np.lexsort((offset, w.row))
        span[by_offset] = (np.arange(len(w.row)) - first[w.row]) // PIECE
    spans = int(span.max(initial=0)) + 1
    order = np.lexsort((offset, w.row, span))
    offset, value = offset[order], w.value[order]
    length = np.bincount(span * rows + w.row, minlength=spans * rows).reshape(spans, rows)
    begin = (np.cumsum(length) - length.reshape(-1)).reshape(spans, rows)

    packed = Packed()
    for s in range(spans):
        if alone:
            by_length = np.argsort(-length[s], kind="stable")
            members = [by_length[i : i + 4] for i in range(0, rows, 4)]
        else:
            strips = [np.arange(low, high) for low, high in pairwise(w.starts.tolist())]
            members = sorted(strips, key=lambda strip: -length[s, strip[0]])
        for group in members:
            steps = int(length[s, group].max())
            if steps == 0 and 0 < s < spans - 1:
                continue
            nth = np.arange(steps)[:, None]
            real = nth < length[s, group]
            at = np.where(real, begin[s, group] + nth, 0)
            packed.groups.append((steps, len(group), *group.tolist(), *[0] * (4 - len(group))))
            if steps:
                reads = np.where(real, offset[at], zero)
                packed.offsets.append((reads if alone else reads[:, 0]).reshape(-1))
                packed.weights.append(np.where(real, value[at], 0.0).reshape(-1))
        packed.spans.append(len(packed.groups))
    return packed


def _span_channels(step: Product, vector_bytes: int) -> int:
    """How many input channels a span of SELL has: what their windows touch should stay in the first-level cache."""
    channels, (kh, kw) = max(step.input.channels, 1), step.kernel
    columns = VECTORS * kw if step.wide else (kw - 1) * step.dilation[1] + 1 + (VECTORS - 1) * step.stride[1]
    fit = max(SPAN_BYTES // (kh * columns * vector_bytes), 1)
    steps = len(step.weights.row) / max(len(step.bias), 1) / channels * fit
    if steps < SPAN_STEPS:
        fit = int(fit * min(SPAN_STEPS / max(steps, 0.1), 2))
    spans = -(-channels // fit)
    return -(-channels // spans)


# ---- the program ----------------------------------------------------------------------------------------------------


class _Writer:
    """Collects steps, arrays and constants; arrays lie behind the header, steps behind the arrays."""

    def __init__(self) -> None:
        self.table: list[list[int]] = []
        self._arrays: list[Ints] = []
        self._constants: list[Floats] = []
        self._next, self._next_constant = HEADER, 0

    def array(self, values: Ints) -> int:
        at = self._next
        self._arrays.append(values)
        self._next += len(values)
        return at

    def constant(self, values: Floats) -> int:
        at = self._next_constant
        self._constants.append(np.pad(values, (0, -len(values) % 16)))  # so that each begins a cache line
        self._next_constant += len(self._constants[-1])
        return at

    def step(
        self, kind: int, value: Value, out: list[int], source: Sequence[int] = NOWHERE, *, stride: Pair = (1, 1),
        relu: bool = False, kernel: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1),
        inside: Pair = (1, 1), border: Sequence[int] = (0, 0, 0, 0), zeros: bool = False, fused: bool = False,
        residual: list[int] | None = None, product: Sequence[int] = (0,) * 10,
    ) -> None:  # fmt: skip
        """One ``FrozenStep``, in its order."""
        add = residual is not None
        self.table.append(
            [kind, *value.size, *source, *out, *stride, relu, *kernel, *padding, *dilation, *inside, *border, zeros,
             fused, add, *(residual or NOWHERE), *product]
        )  # fmt: skip

    def clear(self, layout: Layout) -> None:
        if any(layout.border) or layout.zeros:
            out = layout.view(whole=True)
            self.step(CLEAR, layout.value, out, border=layout.border, zeros=layout.zeros)

    def pool(self, step: Pool, layouts: dict[Value, Layout]) -> None:
        self.step(
            POOL, step.output, layouts[step.output].view(), layouts[step.input].view(), stride=step.stride,
            relu=step.relu, kernel=step.kernel, padding=step.padding, dilation=step.dilation,
            inside=(step.input.height, step.input.width),
        )  # fmt: skip

    def product(self, step: Product, layouts: dict[Value, Layout], fused: bool, vector_bytes: int) -> None:
        source = layouts[step.input]
        packed = pack_product(step, source, vector_bytes)
        offsets = np.concatenate([np.zeros(0, np.int64), *packed.offsets])
        sell = step.weights.alone
        short = sell and int(offsets.max(initial=0)) < 1 << 16
        if short:
            offsets = np.pad(offsets, (0, len(offsets) % 2)).astype(np.uint16).view(np.int32).astype(np.int64)
        last = [(k - 1) * d for k, d in zip(step.kernel, step.dilation, strict=True)]
        product = [
            sell, short, len(packed.spans) - 1, self.array(np.array(packed.spans)),
            self.array(np.array(packed.groups, dtype=np.int64).reshape(-1)), self.array(offsets),
            self.constant(step.bias), self.constant(np.concatenate([np.zeros(0), *packed.weights])),
            step.input.channels, (last[0] * source.row + last[1] * source.pixel) * source.lanes,
        ]  # fmt: skip
        self.step(
            PRODUCT, step.output, layouts[step.output].view(), source.view(step.padding), stride=step.stride,
            relu=step.relu, fused=fused, product=product,
            residual=None if step.residual is None else layouts[step.residual].view(),
        )  # fmt: skip

    def finish(self, network: Network, lanes: int, arena: int, wide: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        work = min(network.multiply_adds, INT32_MAX)
        header = [
            MAGIC, lanes, network.input.numbers, network.output.numbers, arena * lanes, work, self._next,
            len(self.table), wide,
        ]  # fmt: skip
        program = np.concatenate([np.array(header), *self._arrays, np.array(self.table, dtype=np.int64).reshape(-1)])
        if max(int(program.max()), len(program), self._next_constant) > INT32_MAX:
            raise ValueError("model is too large to be frozen: its activations or weights are more than int32 counts")
        constants = torch.from_numpy(np.concatenate([np.zeros(0), *self._constants])).to(dtype)
        return torch.from_numpy(program.astype(np.int32)), constants
