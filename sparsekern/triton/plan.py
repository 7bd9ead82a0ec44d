"""Which program of a Triton kernel computes what: one int32 tensor per product, built once per pattern.

A launch needs a few numbers on the host (how many programs, how much memory for partial sums) and must not wait for the
device to get them. They follow from the layer's shape and from the *shape* of the plan: nothing is read back, and the
launches of one shape are the same, as CUDA graphs need. The kernels read a plan as flat memory.

Gather products (forward, and dgrad through the index of the transposed matrix), shape [group, slots + 1, rest].
``group`` neighbouring block rows form one row of tiles and share what they load of X::

    block rows      . A . B      entry: block column, then where each row's block stands among the values (-1: none)
    (group = 2)     C D . .             0: (-1, C)   1: (A, D)   3: (B, -1)

    units      [rows of tiles + slots][4]     row of tiles, first entry, last entry, slot
    decode     [rows of tiles * parts][4]     the same for few tokens: every row cut into as many parts
    reductions [slots / 2][3]                 row of tiles, first slot, number of slots
    reductions of decode [rows of tiles][3]   (only if parts > 1)
    entries    [...][1 + group]               by row of tiles, then column; padded to whole steps of STEP columns

Rows longer than LONG times the mean are cut; each part of a cut row writes its sum to a slot of its own (slot -1: no
other part), and a second kernel adds the slots in order. Units are sorted longest first; row -1 means nothing to do.

wgrad, shape [strips, 2 + blocks per strip]: up to so many blocks that are neighbours in one block row, and therefore
neighbours among the values: block row, first block, then the block columns (the number of columns: no block).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..pattern import BlockPattern

Product = Literal["forward", "dgrad", "wgrad"]
Ints = npt.NDArray[np.int64]

SIDES = (16, 32, 64, 128)  # of blocks
STEP = 64  # columns of X in a step of the kernels, at most: row lists are padded to whole steps
TILE = 128  # columns of output in a tile, at most
LONG = 2  # times the mean: rows longer than that are cut ...
LONG_COLUMNS = 1024  # ... unless they are shorter than this
DECODE_PROGRAMS, DECODE_COLUMNS = 512, 128  # wanted at least; and columns of X that make a part worth a program
STRIP_WASTE = 1.25  # products with padding over products with blocks, in wgrad: at most
GROUP_GAIN = 1.1  # a larger group has to promise this much

# By the major number of the compute capability, those of A100 and H100: FLOP/s of bf16, by the data sheets, and bytes/s
# from the second-level cache. Nobody publishes the latter: 5120 bytes per clock are A100's by its white paper, H100 is
# taken to be equal per clock (measurements by others are lower).
FLOPS = {8: 312e12, 9: 989.4e12}
CACHE = {8: 5120 * 1.41e9, 9: 5120 * 1.755e9}
BALANCE = {major: FLOPS[major] / CACHE[major] for major in FLOPS}
TILE_T = 256  # tokens of a tile, for this estimate


class Launch(NamedTuple):
    """What the launch of a gather product needs to know; offsets count int32 from the start of the plan."""

    rows: int  # rows of tiles
    units: int  # number of units
    units_at: int
    slots: int
    reductions: int
    reductions_at: int
    entries_at: int


def make_plan(
    pattern: BlockPattern, product: Product, *, group: int | None = None, balance: float | None = None
) -> Tensor:
    """The plan of one product for a linear layer.

    Args:
        pattern: of the layer's weight, (outputs, inputs).
        product: "forward", "dgrad" or "wgrad".
        group: block rows per row of tiles (wgrad: blocks per strip), a power of two; chosen by the pattern if None.
        balance: as in BALANCE; by default of the pattern's device.

    Returns:
        int32, on the pattern's device.
    """
    if product == "wgrad":
        plan = _strips(pattern, group)
    else:
        if balance is None:
            major = torch.cuda.get_device_capability(pattern.device)[0] if pattern.device.type == "cuda" else 8
            balance = BALANCE[min(max(major, 8), 9)]
        if product == "forward":
            plan = _gather(pattern, np.arange(pattern.nnz_blocks), group, balance)
        else:
            transposed, index = pattern.transposed()
            plan = _gather(transposed, index.cpu().numpy(), group, balance)
    return torch.from_numpy(np.ascontiguousarray(plan, dtype=np.int32)).to(pattern.device)


def launch(shape: torch.Size, features: int, blocksize: tuple[int, int], blocks: int, decode: bool) -> Launch:
    """What a plan of that shape asks for. ``blocksize`` and ``features`` are those of the product's outputs first."""
    group, slots = shape[0], shape[1] - 1
    rows = -(-features // (blocksize[0] * group))
    parts = _decode_parts(rows, blocks, blocksize[1])
    decode_at = 4 * (rows + slots)
    reductions_at = decode_at + 4 * rows * parts
    decode_reductions_at = reductions_at + 3 * (slots // 2)
    decode_reductions = rows if parts > 1 else 0
    entries_at = decode_reductions_at + 3 * decode_reductions
    if decode:
        slots = rows * parts if parts > 1 else 0
        return Launch(rows, rows * parts, decode_at, slots, decode_reductions, decode_reductions_at, entries_at)
    return Launch(rows, rows + slots, 0, slots, slots // 2, reductions_at, entries_at)


def _decode_parts(rows: int, blocks: int, width: int) -> int:
    columns = blocks * width // max(rows, 1)
    return max(min(DECODE_PROGRAMS // max(rows, 1), columns // DECODE_COLUMNS), 1)


def _gather(pattern: BlockPattern, places: Ints, group: int | None, balance: float) -> Ints:
    """``places``: where the pattern's blocks stand among the values."""
    width, (grid_rows, grid_cols) = pattern.blocksize[1], pattern.grid
    block_rows = pattern.block_rows().cpu().numpy()
    cols = pattern.col_indices.cpu().numpy().astype(np.int64)
    if group is None:

        def entries_per_block(group: int) -> float:
            return len(np.unique(block_rows // group * grid_cols + cols)) / max(len(cols), 1)

        group = best_group(pattern.blocksize[0], grid_rows, balance, entries_per_block)

    rows = -(-grid_rows // group)
    keys, entry_of_block = np.unique(block_rows // group * grid_cols + cols, return_inverse=True)
    row_of_entry = keys // max(grid_cols, 1)
    counts = np.bincount(row_of_entry, minlength=rows)
    per_step = max(STEP // width, 1)
    lengths = -(-counts // per_step) * per_step
    first = _starts(lengths)
    at = first[row_of_entry] + np.arange(len(keys)) - _starts(counts)[row_of_entry]
    # One step more than there is: kernels load the entries of the next step ahead.
    entries = np.full((lengths.sum() + per_step, 1 + group), -1, dtype=np.int64)
    entries[:, 0] = grid_cols
    entries[at, 0] = keys % max(grid_cols, 1)
    entries[at[entry_of_block], 1 + block_rows % group] = places

    limit = max(LONG * int(lengths.mean()) if rows else 0, LONG_COLUMNS // width)
    limit = max(limit // per_step, 1) * per_step
    units, reductions = _units(first, lengths, -(-lengths // limit), per_step)
    slots = int(reductions[:, 2].sum())
    units = _pad(units, rows + slots)
    reductions = _pad(reductions, slots // 2)
    parts = _decode_parts(rows, pattern.nnz_blocks, width)
    decode, decode_reductions = _units(first, lengths, np.full(rows, parts), per_step)
    flat = np.concatenate([part.reshape(-1) for part in (units, decode, reductions, decode_reductions, entries)])
    rest = -(-len(flat) // (group * (slots + 1)))
    return np.pad(flat, (0, group * (slots + 1) * rest - len(flat))).reshape(group, slots + 1, rest)


def best_group(height: int, rows: int, balance: float, entries_per_block: Callable[[int], float]) -> int:
    """The number of block rows per tile at which the slower of two units is fastest.

    A tile of g block rows has the tensor cores multiply zeros where only some of its rows have a block: g * entries
    products for as many blocks. But it loads X once per entry, whatever the number of blocks in it.

    Args:
        height: of a block; ``rows``: of blocks.
        balance: as in BALANCE.
        entries_per_block: of tiles of so many rows.
    """

    def time(group: int) -> float:  # per block; of the tensor cores, 1 if no product is with zeros
        entries = entries_per_block(group)
        return max(group * entries, balance * (entries / height + 1 / TILE_T))

    best, group = 1, 2
    while group * height <= TILE and group < 2 * rows:
        if time(best) > GROUP_GAIN * time(group):
            best = group
        group *= 2
    return best


def best_strip(width: int, strips: Callable[[int], float], blocks: float) -> int:
    """The number of blocks in a strip of wgrad: the most that leave few places empty. ``strips``: of that size."""
    size = max(TILE // width, 1)
    while size > 1 and strips(size) * size > STRIP_WASTE * blocks:
        size //= 2
    return size


def _units(first: Ints, lengths: Ints, parts: Ints, per_step: int) -> tuple[Ints, Ints]:
    """Rows cut into ``parts`` of whole steps (an empty row is one part), longest first; and how to add them up."""
    parts = np.maximum(parts, 1)
    row = np.repeat(np.arange(len(lengths)), parts)
    nth = np.arange(len(row)) - np.repeat(_starts(parts), parts)
    size = (-(-lengths // (per_step * parts)) * per_step)[row]
    low = np.minimum(nth * size, lengths[row])
    high = np.minimum(low + size, lengths[row])
    cut = parts > 1
    slot_of_row = _starts(np.where(cut, parts, 0))
    slot = np.where(cut[row], slot_of_row[row] + nth, -1)
    units = np.stack([row, first[row] + low, first[row] + high, slot], axis=1)
    order = np.argsort(low - high, kind="stable")
    which = np.flatnonzero(cut)
    return units[order], np.stack([which, slot_of_row[which], parts[which]], axis=1)


def _strips(pattern: BlockPattern, size: int | None) -> Ints:
    cols = pattern.col_indices.cpu().numpy().astype(np.int64)
    counts = pattern.blocks_per_row().cpu().numpy()
    if size is None:
        size = best_strip(pattern.blocksize[1], lambda size: int((-(-counts // size)).sum()), len(cols))
    strips = -(-counts // size)
    row = np.repeat(np.arange(len(counts)), strips)
    nth = (np.arange(len(row)) - np.repeat(_starts(strips), strips)) * size
    first = _starts(counts)[row] + nth
    block = first[:, None] + np.arange(size)
    real = nth[:, None] + np.arange(size) < counts[row][:, None]
    columns = np.where(real, np.append(cols, 0)[np.where(real, block, -1)], pattern.grid[1])
    return np.concatenate([row[:, None], first[:, None], columns], axis=1)


def _starts(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


def _pad(records: Ints, length: int) -> Ints:
    return np.pad(records, ((0, length - len(records)), (0, 0)), constant_values=-1)
