"""Sizes of tiles and depth of pipelines: measured ones from ``tuning.json``, else by rule. No search at run time.

An entry of the table holds "product", "blocksize", "group", "kind", "arch", "tokens" (from, to), "config" (the fields
of :class:`Config`) and "source" (GPU, date, versions and command that measured it); the first that fits counts.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .plan import SIDES, STEP, Product

Kind = Literal["float16", "bfloat16", "tf32", "float32"]

TABLE = Path(__file__).with_name("tuning.json")
# So many programs keep a large GPU busy: tiles are cut for that, down to the least that Hopper's wgmma takes.
PROGRAMS, SMALL_TILE = 256, 64
DECODE_TOKENS = 32  # so few tokens leave no parallelism but that of the weights: their rows are cut
# Bytes of shared memory that a program may use, by CUDA architecture; of AMD's CDNA3, 64 KB.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_OTHER = 64


class Config(NamedTuple):
    tile_t: int  # tokens of a tile (wgrad: of a step)
    tile_k: int  # columns of X in a step (wgrad: unused)
    warps: int
    stages: int
    order: int = 8  # tiles of tokens that run abreast


@lru_cache(maxsize=1024)
def choose_config(
    product: Product,
    blocksize: tuple[int, int],
    tokens: int,
    kind: Kind,
    arch: int | str,
    group: int = 1,
    rows: int = PROGRAMS,
) -> Config:
    """The configuration of one launch: a pure function of its arguments and the table.

    Args:
        product: "forward", "dgrad" or "wgrad".
        blocksize: of the values.
        tokens: rows of X.
        kind: type of the products; "tf32" is float32 on tensor cores, "float32" is not on them.
        arch: compute capability times ten, or AMD's name.
        group: block rows in a tile, blocks in a strip (the plan's).
        rows: rows of tiles, if they are few.
    """
    for entry in _table():
        named = (entry["product"], tuple(entry["blocksize"]), entry["group"], entry["kind"], entry["arch"])
        if named == (product, blocksize, group, kind, arch) and entry["tokens"][0] <= tokens <= entry["tokens"][1]:
            return Config(**entry["config"])
    return rule(product, blocksize, tokens, kind, arch, group, rows)


def rule(
    product: Product,
    blocksize: tuple[int, int],
    tokens: int,
    kind: Kind,
    arch: int | str,
    group: int = 1,
    rows: int = PROGRAMS,
) -> Config:
    """:func:`choose_config` without the table."""
    size = 2 if kind.endswith("16") else 4
    step = 128 // size  # a line of the cache per token and step
    shared = 1024 * (SHARED.get(arch, SHARED_OTHER) if isinstance(arch, int) else SHARED_OTHER)
    if product == "wgrad":
        tile_t, width = step, blocksize[1] * group + blocksize[0]
        warps = 4 if blocksize[1] * group * blocksize[0] < 128 * 128 else 8
        # No more threads than loads of 16 bytes in the narrower tile; AMD's warps have 64 of them.
        loads = min(blocksize[1] * group, blocksize[0]) * step * size // 16
        warps = min(warps, loads // (32 if isinstance(arch, int) else 64))
    else:
        tile_n = (blocksize[0] if product == "forward" else blocksize[1]) * group
        # Wide tiles of tokens where the tile is narrow: what is read per product falls with both.
        largest = 64 if kind == "float32" else 256 if tile_n <= 64 or arch == 90 else 128
        tile_t = min(max(_power_of_two(tokens), 16), largest)
        while tile_t > SMALL_TILE and (
            rows * -(-tokens // tile_t) < PROGRAMS or 2 * (tile_t + tile_n) * step * size > shared
        ):
            tile_t //= 2
        width = tile_t + tile_n
        warps = 8 if tile_t * tile_n >= 128 * (64 if kind == "float32" else 128) else 4
        if tile_t <= DECODE_TOKENS:
            warps = max(tile_n // (16 if kind == "float32" else 32), 1)
    # With Hopper's and Blackwell's matrix instructions Triton keeps as many buffers as stages, else one less.
    spare = 0 if isinstance(arch, int) and arch // 10 in (9, 10) else 1
    return Config(tile_t, step, warps, min(shared // (width * step * size) + spare, 4))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=1)
def _table() -> list[dict[str, Any]]:
    """The entries of ``tuning.json``; a ValueError names the one that no kernel can run with, or run rightly."""
    entries: list[dict[str, Any]] = json.loads(TABLE.read_text())["entries"]
    for number, entry in enumerate(entries):
        try:
            _check(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{TABLE}, entry {number}: {type(error).__name__}: {error}") from error
    return entries


def _check(entry: dict[str, Any]) -> None:
    (first, last), config = entry["tokens"], Config(**entry["config"])
    height, width = entry["blocksize"]
    # Lists of blocks are padded to whole steps of STEP columns; a longer step would leave their ends out.
    longest = max(STEP, height if entry["product"] == "dgrad" else width)
    numbers = all(type(n) is int and n >= 1 for n in (*config, entry["group"]))
    rules = {
        "product": entry["product"] in get_args(Product),
        "kind": entry["kind"] in get_args(Kind),
        "blocksize": height in SIDES and width in SIDES,
        "tokens": 0 <= first <= last,
        "group and config: whole numbers of at least 1": numbers,
        "config: tile_t, tile_k and warps are powers of two, tile_t from 16, warps up to 32": numbers
        and all(n & (n - 1) == 0 for n in (config.tile_t, config.tile_k, config.warps))
        and config.tile_t >= 16
        and config.warps <= 32,
        f"config: tile_k 16 to {longest}": entry["product"] == "wgrad" or (numbers and 16 <= config.tile_k <= longest),
    }
    for rule_, holds in rules.items():
        if not holds:
            raise ValueError(f"{rule_}, got {entry}")
