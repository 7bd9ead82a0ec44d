"""What the CPU kernels need beyond the indices, planned once per pattern and stored in one int32 tensor per op.

A plan is a pure function of (pattern, op, convolution shape): never of instruction set, threads or batch. It describes
a product ``Y[row] = sum over k of W[row, k] * X[k]``. In forward the rows are the layer's outputs and the k are the
rows of its activations, ``tap * channels + channel`` (tap is 0 for linear); in dgrad inputs and outputs change places.
Two formats, told apart by the header (mirrored in ``csrc/bsr.h``):

STRIP  up to 4 neighbouring rows that read the same k and whose weights lie ``row_stride`` apart in the values::

           strip:   first row, number of rows, first entry          entry:   k, index of the first row's weight

SELL   rows that share nothing (blocks one row high), 4 at a time. Rows are cut into segments, k into spans that stay in
       the first-level cache; within both, rows are sorted by length, so that 4 rows of like length make a group, padded
       with k = K (a row of zeros) and weight index -1::

           (segment, span): first group     group: 4 rows, first step     step: 4 k, 4 weight indices

WIDE   a second plan behind the first, where blocks are a multiple of 16 rows high: strips of 16 rows, computed side by
       side in the lanes of vectors straight from activations whose channels are neighbours in memory (linear and
       channels_last); otherwise like STRIP.

dgrad of a convolution is a product of the same kind: its rows are the input channels and its k the (tap, output). Where
strides or missing padding make that wasteful, its rows are the (tap, input channel) and its k the outputs: that plan
stands behind the others, for kernels of several taps.

wgrad reads the STRIP format (with strips of one row where blocks are one row high): entry by entry it is a dot product.
There the channels are cut into spans whose activations stay in a cache: the entries are sorted by span, then strip, and
k counts within the span, ``tap * its channels + channel``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .pattern import INT32_MAX, BlockPattern

MAGIC = 0x5B53  # changes with the format
HEADER = 18
BLOCKSIZE = slice(11, 13)  # where in the header it stands
STRIP, SELL, NONE = 0, 1, 2
STRIP_ROWS = 4  # rows that share one load of X: the register tile of the kernels
SEGMENT_ROWS = 128  # rows whose outputs stay in the first-level cache
WIDE_ROWS = 16
# Kernels keep rows of X as 32-bit offsets in bytes; a row has 3 vectors of at most 64 bytes.
MAX_ROWS_OF_X = 2**32 // (3 * 64) - 1
SPAN = 256  # rows of X that stay in the first-level cache; longer where rows of W are so empty that starting them rules
# Of wgrad: X of so many rows stays in the second-level cache, for as many pixels as make a long sum; where weights come
# in vectors of neighbours (of at least 8), which need no long sums, more rows are worth more.
WGRAD_SPAN, WGRAD_SPAN_VECTORS = 256, 1024

Ints = npt.NDArray[np.int64]
Kernel = tuple[int, int, int]  # kernel height, kernel width, groups


class Plans(NamedTuple):
    """The tensors that go with a pattern to the three products; all int32, on the pattern's device."""

    crow_indices: Tensor
    col_indices: Tensor
    forward: Tensor
    dgrad: Tensor
    wgrad: Tensor


def make_plans(pattern: BlockPattern, kernel: Kernel | None = None) -> Plans:
    """Plans of the three products for a linear layer, or for a convolution of ``kernel`` = (kh, kw, groups).

    Raises:
        ValueError: a layer too large for the kernels' indices.
    """
    kh, kw, groups = kernel or (1, 1, 1)
    taps = kh * kw
    outputs, columns = pattern.shape
    group_outputs, group_inputs = outputs // groups, columns // taps
    inputs = group_inputs * groups
    bh, bw = pattern.blocksize
    if taps * max(inputs, outputs) > MAX_ROWS_OF_X:
        raise ValueError(
            f"inputs and outputs of a layer, times the taps of its kernel, must be at most {MAX_ROWS_OF_X:,} each, "
            f"got {taps * inputs:,} and {taps * outputs:,}"
        )

    # One (output, input, tap, index of its value) per weight.
    rows, cols, index = _weights(pattern)
    tap, channel = np.divmod(cols, max(group_inputs, 1))
    channel += rows // max(group_outputs, 1) * group_inputs

    # Rows may share a strip where no block and no group begins between them. A row of dgrad is (tap, channel).
    output_cuts = np.union1d(np.arange(0, outputs, bh), np.arange(groups) * group_outputs if outputs else 0)
    cuts = np.union1d(np.arange(0, columns, bw), np.arange(taps) * group_inputs if columns else 0)
    tap_of_cut, channel_of_cut = np.divmod(cuts, max(group_inputs, 1))
    of_group = np.arange(groups)[:, None] * group_inputs
    input_cuts = np.unique(of_group + channel_of_cut)  # between channels, in any tap
    tap_input_cuts = np.unique(of_group + tap_of_cut * inputs + channel_of_cut)  # between (tap, channel)

    # Strips of 16 rows that share a block, a group and, in dgrad, a tap.
    wide_outputs = outputs > 0 and bh % WIDE_ROWS == 0 and (groups == 1 or group_outputs % WIDE_ROWS == 0)
    wide_inputs = inputs > 0 and bw % WIDE_ROWS == 0 and (taps * groups == 1 or group_inputs % WIDE_ROWS == 0)
    size = pattern.nnz_blocks * bh * bw
    overhang = pattern.nnz != size
    by_output = (rows, tap * inputs + channel, index)
    by_input = (channel, tap * outputs + rows, index)
    by_tap_input = (tap * inputs + channel, rows, index)
    output_starts = _split(output_cuts, outputs)
    # How many neighbouring k always come together, with neighbouring weights.
    run = math.gcd(bw, group_inputs)
    width = WGRAD_SPAN_VECTORS if run >= 8 else WGRAD_SPAN
    unit = WIDE_ROWS if run >= 8 else run  # neighbours stay together
    span = max(width // taps // unit, 1) * unit
    wgrad = _strip_plan(
        by_output, output_starts, outputs, taps * inputs, bw, size, overhang, channels=inputs, span=span, run=run
    )
    if kernel is None and wide_outputs:
        forward = _no_plan(outputs, inputs, size, overhang)
    else:
        forward = (
            _strip_plan(by_output, output_starts, outputs, taps * inputs, bw, size, overhang)
            if bh > 1
            else _sell_plan(by_output, outputs, taps * inputs, size, overhang)
        )
    if kernel is None and wide_inputs:
        dgrad = _no_plan(inputs, outputs, size, overhang)
    else:
        dgrad = _dgrad_plan(by_input, input_cuts, inputs, taps * outputs, bw, size, overhang)
    if wide_outputs:
        forward = _add_wide(forward, by_output, outputs, bw)
    if wide_inputs:
        dgrad = _add_wide(dgrad, by_input, inputs, 1)
    if taps > 1:
        second = _dgrad_plan(by_tap_input, tap_input_cuts, taps * inputs, outputs, bw, size, overhang)
        dgrad[17] = 1
        dgrad = torch.cat([dgrad, second])
    for plan in (forward, dgrad, wgrad):
        plan[BLOCKSIZE] = torch.tensor([bh, bw], dtype=torch.int32)
    to = pattern.device
    return Plans(pattern._crow, pattern._col, forward.to(to), dgrad.to(to), wgrad.to(to))


def _dgrad_plan(
    weights: tuple[Ints, Ints, Ints], cuts: Ints, rows: int, ks: int, bw: int, size: int, overhang: bool
) -> Tensor:
    if bw == 1:
        return _sell_plan(weights, rows, ks, size, overhang)
    return _strip_plan(weights, _split(cuts, rows), rows, ks, 1, size, overhang)


def _weights(pattern: BlockPattern) -> tuple[Ints, Ints, Ints]:
    """(row, column, index among the values) of every weight, in the order of the values; overhang left out."""
    bh, bw = pattern.blocksize
    block_rows = pattern.block_rows().cpu().numpy()
    block_cols = pattern._col.cpu().numpy().astype(np.int64)
    shape = pattern.values_shape
    rows = np.broadcast_to((block_rows[:, None] * bh + np.arange(bh))[:, :, None], shape).reshape(-1)
    cols = np.broadcast_to((block_cols[:, None] * bw + np.arange(bw))[:, None, :], shape).reshape(-1)
    inside = np.flatnonzero((rows < pattern.shape[0]) & (cols < pattern.shape[1]))
    return rows[inside], cols[inside], inside


def _split(starts: Ints, length: int) -> Ints:
    """First rows of the strips: the runs of rows that begin at ``starts``, cut to at most 4 rows each."""
    lengths = np.diff(np.append(starts, length))
    parts = -(-lengths // STRIP_ROWS)
    which = np.repeat(np.arange(len(starts)), parts)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    # n rows in p parts, as equal as can be: 5 = 3 + 2, 10 = 4 + 3 + 3.
    return (starts[which] + -(-lengths[which] * nth // np.maximum(parts[which], 1))).astype(np.int64)


def _header(kind: int, rows: int, ks: int, size: int, overhang: bool, a: int, b: int, c: int, row_stride: int) -> Ints:
    header = np.zeros(HEADER, dtype=np.int64)
    header[:10] = (MAGIC, kind, rows, ks, size, int(overhang), row_stride, a, b, c)
    return header


def _as_tensor(*parts: Ints) -> Tensor:
    plan = np.concatenate([np.asarray(part, dtype=np.int64).reshape(-1) for part in parts])
    if plan.size and (plan.max() > INT32_MAX or plan.size > INT32_MAX):
        raise ValueError(f"a layer this large needs more than int32 indices ({plan.size} plan entries)")
    return torch.from_numpy(plan.astype(np.int32))


def _strip_plan(
    weights: tuple[Ints, Ints, Ints],
    starts: Ints,
    rows: int,
    ks: int,
    row_stride: int,
    size: int,
    overhang: bool,
    *,
    channels: int | None = None,
    span: int | None = None,
    run: int = 1,
) -> Tensor:
    """``span`` channels of ``channels`` at a time; by default all k together."""
    row, k, index = weights
    channels = ks if channels is None else channels
    span = max(channels, 1) if span is None else span
    spans = max(-(-channels // span), 1)
    tap, channel = np.divmod(k, max(channels, 1))
    nth = channel // span
    k = tap * np.minimum(span, channels - nth * span) + channel - nth * span

    strip_of_row = np.full(rows, -1, dtype=np.int64)
    strip_of_row[starts] = np.arange(len(starts))
    first = np.flatnonzero(strip_of_row[row] >= 0)  # the weights of each strip's first row stand for those below them
    place = (nth * len(starts) + strip_of_row[row])[first]
    order = np.lexsort((k[first], place))
    counts = np.bincount(place, minlength=len(starts) * spans)
    lengths = np.diff(np.append(starts, rows))
    entries = np.stack([k[first][order], index[first][order]], axis=1)
    header = _header(STRIP, rows, ks, size, overhang, len(starts), len(order), spans, row_stride)
    header[10], header[16] = span, run
    return _as_tensor(header, starts, lengths, _pointers(counts), entries)


def _sell_plan(weights: tuple[Ints, Ints, Ints], rows: int, ks: int, size: int, overhang: bool) -> Tensor:
    row, k, index = weights
    segments = max(-(-rows // SEGMENT_ROWS), 1)
    bounds = np.arange(segments + 1) * rows // segments
    density = len(index) / max(rows * ks, 1)
    spans = max(-(-ks // (SPAN if density > 0.07 else SPAN * 3 // 2 if density > 0.03 else SPAN * 2)), 1)
    width = max(-(-ks // spans), 1)  # equal spans: a short last one would be all prologue

    order = np.lexsort((k, row, k // width))
    row, k, index = row[order], k[order], index[order]
    length = np.bincount(k // width * rows + row, minlength=spans * rows).reshape(spans, rows)
    begin = (np.cumsum(length) - length.reshape(-1)).reshape(spans, rows)

    group_rows, group_steps, group_counts, ks_out, index_out = [], [], [], [], []
    for low, high in pairwise(bounds.tolist()):
        groups = -(-(high - low) // 4)
        for span in range(spans):
            by_length = np.argsort(-length[span, low:high], kind="stable")
            # The row after the segment's last takes what pads the last group.
            padding = (0, groups * 4 - (high - low))
            members = np.pad(by_length, padding, constant_values=high - low)
            lengths = np.pad(length[span, low:high][by_length], padding).reshape(-1, 4)
            begins = np.pad(begin[span, low:high][by_length], padding).reshape(-1, 4)
            steps = lengths[:, 0]
            kept = int((steps > 0).sum())
            group_counts.append(kept)
            group_rows.append(members.reshape(-1, 4)[:kept])
            group_steps.append(steps[:kept])
            group = np.repeat(np.arange(kept), steps[:kept])
            step = np.arange(len(group)) - np.repeat(np.cumsum(steps[:kept]) - steps[:kept], steps[:kept])
            at = begins[group] + step[:, None]
            real = step[:, None] < lengths[group]
            at = np.where(real, at, 0)
            ks_out.append(np.where(real, k[at] if len(k) else 0, ks))
            index_out.append(np.where(real, index[at] if len(k) else 0, -1))

    steps = np.concatenate(group_steps)
    header = _header(SELL, rows, ks, size, overhang, segments, spans, len(steps), 0)
    header[10] = steps.sum()
    columns = np.concatenate(ks_out).reshape(-1, 4)
    values = np.concatenate(index_out).reshape(-1, 4)
    pointers = _pointers(np.array(group_counts))
    return _as_tensor(header, bounds, pointers, np.concatenate(group_rows), _pointers(steps), columns, values)


def _no_plan(rows: int, ks: int, size: int, overhang: bool) -> Tensor:
    return _as_tensor(_header(NONE, rows, ks, size, overhang, 0, 0, 0, 0))


def _add_wide(plan: Tensor, weights: tuple[Ints, Ints, Ints], rows: int, row_stride: int) -> Tensor:
    """``plan`` with a WIDE plan behind it."""
    row, k, index = weights
    first = np.flatnonzero(row % WIDE_ROWS == 0)
    order = first[np.lexsort((k[first], row[first]))]
    starts = np.arange(0, rows, WIDE_ROWS)
    counts = np.bincount(row[order] // WIDE_ROWS, minlength=len(starts))
    header = plan[:HEADER].clone()
    header[13:16] = torch.tensor([len(starts), len(order), row_stride], dtype=torch.int32)
    entries = np.stack([k[order], index[order]], axis=1)
    wide = _as_tensor(np.minimum(WIDE_ROWS, rows - starts), _pointers(counts), entries)
    return torch.cat([header, plan[HEADER:], wide])


def _pointers(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)])
