"""What the kernels would take on GPUs that are not here: a model, no measurement.

Five resources are taken by themselves, as if each worked at its data-sheet rate all the time, and the slowest is the
time: the tensor cores; memory, which moves every number once; the second-level cache, which hands every tile its
operands; shared memory, from which the tensor cores read them; and instructions, which are left out (so are latency,
launches and the tail of a grid: the model flatters small problems). Tiles, groups and strips are those that
``sparsekern.triton`` would really launch on that GPU for that pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsekern.pattern import BlockPattern
from sparsekern.triton.plan import BALANCE, CACHE, FLOPS, Product, make_plan
from sparsekern.triton.tuning import PROGRAMS, Config, Kind, choose_config

from .cases import Case


@dataclass(frozen=True)
class Gpu:
    """Rates of the data sheets, per second."""

    name: str
    arch: int
    flops: dict[Kind, float]
    memory: float  # bytes
    cache: float  # bytes from the second-level cache to the multiprocessors
    shared: float  # bytes from all shared memories: 128 per clock and multiprocessor

    @property
    def major(self) -> int:
        return self.arch // 10


# NVIDIA's data sheets.
A100 = Gpu(
    "A100-SXM-80", 80, {"float16": FLOPS[8], "bfloat16": FLOPS[8], "tf32": 156e12, "float32": 19.5e12},
    2.039e12, CACHE[8], 108 * 128 * 1.41e9,
)  # fmt: skip
H100 = Gpu(
    "H100-SXM5", 90, {"float16": FLOPS[9], "bfloat16": FLOPS[9], "tf32": 494.7e12, "float32": 66.9e12},
    3.35e12, CACHE[9], 132 * 128 * 1.755e9,
)  # fmt: skip
GPUS = (H100, A100)

Times = dict[str, float]  # seconds by resource


def floor(gpu: Gpu, case: Case, density: float, kind: Kind, nnz_blocks: int = 0) -> float:
    """Seconds that no kernel can undercut at the data sheet's rates: arithmetic, or every number moved once."""
    t, n, k, size = case.tokens, case.outputs, case.inputs, itemsize(kind)
    moved = size * (t * k + density * n * k + t * n) + 4 * nnz_blocks
    return max(2 * t * n * k * density / gpu.flops[kind], moved / gpu.memory)


def predict(gpu: Gpu, case: Case, pattern: BlockPattern, product: Product, kind: Kind) -> Times:
    """Seconds that the product takes of each resource; their maximum is the modelled time."""
    if product == "wgrad":
        return _sampled(gpu, case, pattern, kind)
    wanted = pattern if product == "forward" else pattern.transposed()[0]
    (height, width), blocks = wanted.blocksize, wanted.nnz_blocks
    group = make_plan(pattern, product, balance=BALANCE[gpu.major]).shape[0]
    rows = min(math.ceil(wanted.grid[0] / group), PROGRAMS)
    config = choose_config(product, pattern.blocksize, case.tokens, kind, gpu.arch, group, rows)
    # What the rows of a tile have in common is loaded, and multiplied, once for all of them.
    entries = int(torch.unique(wanted.block_rows() // group * wanted.grid[1] + wanted.col_indices).numel())
    tile_n, tiles, size = group * height, math.ceil(case.tokens / config.tile_t), itemsize(kind)
    columns = tiles * entries * width
    executed = 2 * columns * config.tile_t * tile_n
    loaded = size * (columns * config.tile_t + tiles * blocks * height * width)
    read = columns * _reads(gpu, config.tile_t, tile_n, config, size)
    moved = size * (case.tokens * (case.inputs + case.outputs) + blocks * height * width) + 4 * (1 + group) * entries
    return _times(gpu, kind, executed, moved, loaded, read)


def dense(gpu: Gpu, case: Case, kind: Kind) -> Times:
    """The same for a dense product by a kernel like ours: tiles of 256 x 128, nothing left out."""
    config, size = choose_config("forward", (128, 128), case.tokens, kind, gpu.arch), itemsize(kind)
    t, n, k = math.ceil(case.tokens / config.tile_t), math.ceil(case.outputs / 128), case.inputs
    executed, loaded = 2 * t * n * k * config.tile_t * 128, size * t * n * k * (config.tile_t + 128)
    moved = size * (case.tokens * (k + case.outputs) + k * case.outputs)
    return _times(gpu, kind, executed, moved, loaded, t * n * k * _reads(gpu, config.tile_t, 128, config, size))


def binding(times: Times) -> str:
    """The resource that takes longest."""
    return max(times, key=lambda name: times[name])


def itemsize(kind: Kind) -> int:
    """Bytes of a number."""
    return 2 if kind.endswith("16") else 4


def _sampled(gpu: Gpu, case: Case, pattern: BlockPattern, kind: Kind) -> Times:
    (height, width), size = pattern.blocksize, itemsize(kind)
    strips, columns = make_plan(pattern, "wgrad").shape
    tile_k = (columns - 2) * width
    config = choose_config("wgrad", pattern.blocksize, case.tokens, kind, gpu.arch, columns - 2)
    positions = strips * case.tokens
    executed, loaded = 2 * positions * tile_k * height, size * positions * (tile_k + height)
    read = positions * _reads(gpu, tile_k, height, config, size)
    numbers = case.tokens * (case.inputs + case.outputs) + math.prod(pattern.values_shape)
    return _times(gpu, kind, executed, size * numbers, loaded, read)


def _times(gpu: Gpu, kind: Kind, executed: float, moved: float, loaded: float, read: float) -> Times:
    return {
        "tensor" if kind != "float32" else "FMA": executed / gpu.flops[kind],
        "HBM": moved / gpu.memory,
        "L2": loaded / gpu.cache,
        "shared": read / gpu.shared,
    }


def _reads(gpu: Gpu, tile_m: int, tile_n: int, config: Config, size: int) -> float:
    """Bytes that the warps of a program read from shared memory for one step of depth one."""
    if gpu.arch >= 90 and tile_m >= 64:  # wgmma: 64 rows and up to 256 columns at a time, both from shared memory
        return size * (tile_m * math.ceil(tile_n / 256) + tile_n * tile_m / 64)
    # mma: each warp loads the part of both tiles that it needs; how Triton divides a tile among warps.
    down = across = 1
    while down * across < config.warps:
        if tile_m / (16 * down) >= tile_n / (16 * across) and down < tile_m / 16:
            down *= 2
        else:
            across *= 2
    return float(size * (tile_m * across + tile_n * down))
