"""Every plan, read back in plain NumPy, is the matrix: each weight exactly once, no overhang, each row in one place."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from samples import Problem, problems

from sparsekern import functional, plan
from sparsekern.pattern import BlockPattern


class Read(NamedTuple):
    """A plan taken apart: (row, k, value index) of every weight, and the header's numbers."""

    kind: int
    rows: int
    ks: int
    size: int
    overhang: int
    weights: list[tuple[int, int, int]]
    wide: list[tuple[int, int, int]]  # the same of the WIDE plan
    second: torch.Tensor | None  # another plan


def read(tensor: torch.Tensor, channels: int | None = None) -> Read:
    numbers = tensor.numpy()
    assert tensor.dtype == torch.int32
    header, rest = numbers[: plan.HEADER].tolist(), numbers[plan.HEADER :]
    magic, kind, rows, ks, size, overhang, row_stride = header[:7]
    assert magic == plan.MAGIC
    wide_counts = header[13:16]

    def take(n: int) -> np.ndarray:
        nonlocal rest
        part, rest = rest[:n], rest[n:]
        assert len(part) == n
        return part.astype(np.int64)

    counts = header[7:11]
    take_weights = {plan.STRIP: read_strips, plan.SELL: read_sell, plan.NONE: lambda *_: []}[kind]
    weights = take_weights(take, rows, ks, row_stride, counts, channels or ks)
    wide = read_wide(take, *wide_counts) if wide_counts[0] else []
    second = torch.from_numpy(rest) if header[17] else None
    assert header[17] or len(rest) == 0
    return Read(kind, rows, ks, size, overhang, weights, wide, second)


def read_strips(take, rows, ks, row_stride, counts, channels):
    strips, entries, spans, span = counts
    first, lengths, pointer = take(strips), take(strips), take(spans * strips + 1)
    pairs = take(2 * entries).reshape(-1, 2)
    assert ((lengths >= 1) & (lengths <= plan.STRIP_ROWS)).all()
    covered = [first[s] + i for s in range(strips) for i in range(lengths[s])]
    assert covered == list(range(rows))
    assert pointer[0] == 0
    assert pointer[-1] == entries
    weights = []
    for place in range(spans * strips):
        nth, s = divmod(place, strips)
        mine = pairs[pointer[place] : pointer[place + 1]]
        assert (np.diff(mine[:, 0]) > 0).all(), "k in ascending order, each once"
        of_span = min(span, channels - nth * span)
        for k, index in mine:
            tap, channel = divmod(k, of_span)
            k = tap * channels + nth * span + channel
            weights += [(first[s] + i, k, index + i * row_stride) for i in range(lengths[s])]
    return weights


def read_sell(take, rows, ks, row_stride, counts, _):
    segments, spans, groups, steps = counts[:4]
    bounds, group_pointer = take(segments + 1), take(segments * spans + 1)
    members, step_pointer = take(4 * groups).reshape(-1, 4), take(groups + 1)
    step_k, step_value = take(4 * steps).reshape(-1, 4), take(4 * steps).reshape(-1, 4)
    assert (bounds[0], bounds[-1], group_pointer[0], group_pointer[-1]) == (0, rows, 0, groups)
    assert (step_pointer[0], step_pointer[-1]) == (0, steps)
    assert (np.diff(bounds) <= plan.SEGMENT_ROWS).all()
    assert (np.diff(step_pointer) > 0).all(), "no empty group"
    assert ((step_k == ks) == (step_value == -1)).all()
    weights, last = [], {}
    for place in range(segments * spans):
        low, high = bounds[place // spans], bounds[place // spans + 1]
        for g in range(group_pointer[place], group_pointer[place + 1]):
            assert (members[g] <= high - low).all()
            for step in range(step_pointer[g], step_pointer[g + 1]):
                for lane in range(4):
                    row, k, index = low + members[g, lane], step_k[step, lane], step_value[step, lane]
                    if index < 0:
                        continue
                    assert row < high, "a weight in the padding row"
                    assert last.get(row, -1) < k, "k ascend within a row, over all spans"
                    last[row] = k
                    weights.append((row, k, index))
    return weights


def read_wide(take, strips, entries, row_stride):
    lengths, pointer, pairs = take(strips), take(strips + 1), take(2 * entries).reshape(-1, 2)
    assert ((lengths == plan.WIDE_ROWS) | (np.arange(strips) == strips - 1)).all()
    assert (pointer[0], pointer[-1]) == (0, entries)
    weights = []
    for s in range(strips):
        mine = pairs[pointer[s] : pointer[s + 1]]
        assert (np.diff(mine[:, 0]) > 0).all(), "k in ascending order, each once"
        first = s * plan.WIDE_ROWS
        weights += [(first + i, k, index + i * row_stride) for k, index in mine for i in range(lengths[s])]
    return weights


def expected(p: Problem) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(row, k, value index) of every weight for forward (wgrad alike) and for dgrad, from the definitions.

    forward: row = output, k = (tap, input).   dgrad: row = input, k = (tap, output).
    """
    groups, taps = 1, 1
    if p.geometry:
        groups, taps = p.geometry.groups, p.geometry.kernel_size[0] * p.geometry.kernel_size[1]
    outputs, columns = p.pattern.shape
    per_group = columns // taps
    forward, dgrad = [], []
    # Number the weights by scattering their own index.
    index = torch.arange(1.0, 1 + p.values.numel(), dtype=torch.float64).view(p.pattern.values_shape)
    matrix = p.pattern.scatter(index).long().numpy() - 1
    for row, column in zip(*np.nonzero(matrix >= 0), strict=True):
        tap, channel = divmod(column, per_group)
        channel += row // (outputs // groups) * per_group
        place = tap * per_group * groups + channel
        forward.append((row, place, matrix[row, column]))
        dgrad.append((channel, tap * outputs + row, matrix[row, column]))
    return sorted(forward), sorted(dgrad)


def check(p: Problem) -> None:
    plans = functional.prepare(p.pattern, p.geometry.kernel if p.geometry else None)
    forward, dgrad = expected(p)
    outputs, columns = p.pattern.shape
    inputs, taps = columns, 1
    if p.geometry:
        inputs, taps = p.geometry.c_in, p.geometry.kernel_size[0] * p.geometry.kernel_size[1]
    for tensor, weights, rows, ks in (
        (plans.forward, forward, outputs, taps * inputs),
        (plans.wgrad, forward, outputs, taps * inputs),
        (plans.dgrad, dgrad, inputs, taps * outputs),
    ):
        found = read(tensor, inputs if tensor is plans.wgrad else None)
        if found.kind != plan.NONE:
            assert sorted(found.weights) == weights, p.name
        assert (found.rows, found.ks, found.size) == (rows, ks, p.values.numel())
        assert bool(found.overhang) == (p.pattern.nnz != p.values.numel())
    assert read(plans.wgrad).kind == plan.STRIP
    (bh, bw), groups = p.pattern.blocksize, p.geometry.groups if p.geometry else 1
    strips_or_sell = plan.STRIP if bh > 1 else plan.SELL, plan.STRIP if bw > 1 else plan.SELL
    group_outputs, group_inputs = outputs // groups, inputs // groups
    wide = outputs > 0 and bh % 16 == 0 and (groups == 1 or group_outputs % 16 == 0)
    assert read(plans.forward).kind == (plan.NONE if wide and not p.geometry else strips_or_sell[0])
    if wide:
        assert sorted(read(plans.forward).wide) == forward
    wide = inputs > 0 and bw % 16 == 0 and (taps * groups == 1 or group_inputs % 16 == 0)
    assert read(plans.dgrad).kind == (plan.NONE if wide and not p.geometry else strips_or_sell[1])
    if wide:
        assert sorted(read(plans.dgrad).wide) == dgrad
    second = read(plans.dgrad).second
    assert (second is not None) == (taps > 1)
    if second is not None:
        by_tap = sorted((k // outputs * inputs + row, k % outputs, v) for row, k, v in dgrad)
        found = read(second)
        assert sorted(found.weights) == by_tap
        assert (found.kind, found.rows, found.ks) == (strips_or_sell[1], taps * inputs, outputs)


def small_enough(p: Problem) -> bool:
    return p.pattern.nnz <= 20_000


def test_plans_are_the_matrix() -> None:
    cases = {(p.pattern, p.geometry): p for p in problems() if small_enough(p)}
    assert len(cases) > 60
    for p in cases.values():
        check(p)


@pytest.mark.slow
def test_plans_are_the_matrix_everywhere() -> None:
    for p in {(p.pattern, p.geometry): p for p in problems(full=True)}.values():
        check(p)


def test_plans_are_a_pure_function_kept_on_the_pattern() -> None:
    mask = torch.rand(4, 5) < 0.5
    one, other = BlockPattern.from_mask(mask, (2, 4)), BlockPattern.from_mask(mask, (2, 4))
    assert functional.prepare(one) is functional.prepare(one)
    for kernel in (None, (1, 1, 1), (2, 2, 1), (1, 5, 2)):
        for a, b in zip(functional.prepare(one, kernel), functional.prepare(other, kernel), strict=True):
            assert torch.equal(a, b)


def test_a_layer_too_large_for_the_kernels_is_refused() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    for shape, kernel in (((4, 2**25), None), ((2**25, 4), None), ((4, 9 * 2**22), (3, 3, 1))):
        with pytest.raises(ValueError, match="must be at most 22,369,620 each, got "):
            plan.make_plans(BlockPattern.from_mask(one, shape, shape), kernel)


def test_a_plan_of_many_blocks_spans_several_segments_and_spans() -> None:
    """The shared samples would not notice if these were always 1."""
    pattern = BlockPattern.from_mask(torch.rand(300, 700) < 0.1, (1, 1))
    header = plan.make_plans(pattern).forward[: plan.HEADER].tolist()
    assert header[7:9] == [3, 3]
