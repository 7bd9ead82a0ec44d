"""What the kernels would take on a GPU that is not here: a model of its data sheet, no measurement.

Four resources are taken by themselves, as if each worked at its data-sheet rate all the time, and the slowest is the
time: the tensor cores; memory, which moves every number once; the second-level cache, which hands every tile its
operands; and shared memory, from which the tensor cores read them. Instructions, latency, launches and the tail of a
grid are left out: the model flatters small problems. Tiles are those that ``tuning.py`` chooses.

``backend="auto"`` asks :func:`expected` whether a layer is too dense for its blocks; ``bench --device cuda`` shows the
rest where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .plan import BALANCE, CACHE, FLOPS, Product, best_group, best_strip
from .tuning import PROGRAMS, Config, Kind, choose_config

TOKENS = 8192  # rows of a layer's input that choices are made for


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
    def balance(self) -> float:
        return BALANCE[self.arch // 10]


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


def itemsize(kind: Kind) -> int:
    """Bytes of a number."""
    return 2 if kind.endswith("16") else 4


def gather(
    gpu: Gpu,
    kind: Kind,
    product: Product,
    tokens: int,
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    group: int,
    entries: float,
    blocks: float,
) -> Times:
    """Seconds that forward or dgrad takes of each resource; their maximum is the modelled time.

    Args:
        shape, blocksize: of the product at hand, along the outputs first.
        group: block rows per tile; ``entries``: columns of blocks that the tiles have, of all ``blocks`` blocks.
    """
    (outputs, inputs), (height, width) = shape, blocksize
    rows = min(math.ceil(math.ceil(outputs / height) / group), PROGRAMS)
    stored = blocksize if product == "forward" else (width, height)
    config = choose_config(product, stored, tokens, kind, gpu.arch, group, rows)
    tile_n, tiles, size = group * height, math.ceil(tokens / config.tile_t), itemsize(kind)
    # What the rows of a tile have in common is loaded, and multiplied, once for all of them.
    columns = tiles * entries * width
    executed = 2 * columns * config.tile_t * tile_n
    loaded = size * (columns * config.tile_t + tiles * blocks * height * width)
    read = columns * _reads(gpu, config.tile_t, tile_n, config, size)
    moved = size * (tokens * (inputs + outputs) + blocks * height * width) + 4 * (1 + group) * entries
    return _times(gpu, kind, executed, moved, loaded, read)


def sampled(
    gpu: Gpu,
    kind: Kind,
    tokens: int,
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    strip: int,
    strips: float,
    blocks: float,
) -> Times:
    """The same for wgrad. ``strip``: blocks that a strip has room for; ``strips``: how many there are."""
    (height, width), size = blocksize, itemsize(kind)
    tile_k = strip * width
    config = choose_config("wgrad", blocksize, tokens, kind, gpu.arch, strip)
    positions = strips * tokens
    executed, loaded = 2 * positions * tile_k * height, size * positions * (tile_k + height)
    read = positions * _reads(gpu, tile_k, height, config, size)
    return _times(gpu, kind, executed, size * (tokens * sum(shape) + blocks * height * width), loaded, read)


def dense(gpu: Gpu, kind: Kind, tokens: int, shape: tuple[int, int]) -> Times:
    """The same for a dense product by a kernel like ours: tiles of 256 x 128, nothing left out."""
    (outputs, inputs), size = shape, itemsize(kind)
    config = choose_config("forward", (128, 128), tokens, kind, gpu.arch)
    tiles = math.ceil(tokens / config.tile_t) * math.ceil(outputs / 128) * inputs
    executed, loaded = 2 * tiles * config.tile_t * 128, size * tiles * (config.tile_t + 128)
    moved = size * (tokens * sum(shape) + inputs * outputs)
    return _times(gpu, kind, executed, moved, loaded, tiles * _reads(gpu, config.tile_t, 128, config, size))


def expected(
    gpu: Gpu, kind: Kind, shape: tuple[int, int], blocksize: tuple[int, int], density: float
) -> tuple[float, float]:
    """Seconds of a training step's three products for TOKENS tokens: dense, and sparse with blocks at random."""
    grid = (math.ceil(shape[0] / blocksize[0]), math.ceil(shape[1] / blocksize[1]))
    blocks = density * grid[0] * grid[1]
    sparse = 0.0
    products: tuple[Product, ...] = ("forward", "dgrad")
    for product in products:
        whole, (rows, columns), (height, width) = (
            pair if product == "forward" else (pair[1], pair[0]) for pair in (shape, grid, blocksize)
        )

        def entries(group: int, rows: int = rows, columns: int = columns) -> float:
            return math.ceil(rows / group) * columns * (1 - (1 - density) ** group)

        def per_block(group: int, entries: Callable[[int], float] = entries) -> float:
            return entries(group) / max(blocks, 1.0)

        group = best_group(height, rows, gpu.balance, per_block)
        times = gather(gpu, kind, product, TOKENS, whole, (height, width), group, entries(group), blocks)
        sparse += max(times.values())

    def strips(size: int) -> float:
        return grid[0] * (density * grid[1] / size + (size > 1) / 2)

    strip = best_strip(blocksize[1], strips, blocks)
    sparse += max(sampled(gpu, kind, TOKENS, shape, blocksize, strip, strips(strip), blocks).values())
    outputs, inputs = shape
    forward, dgrad = (max(dense(gpu, kind, TOKENS, s).values()) for s in (shape, (inputs, outputs)))
    return 2 * forward + dgrad, sparse


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
