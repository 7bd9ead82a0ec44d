"""What launches cost, counted by the emulator: products, bank conflicts, sectors of global memory. No timings."""

import needs_triton  # noqa: F401 -- first: skips where there is no Triton
import pytest
import torch
from emulator import Counters
from linear_cases import DTYPES, REAL, Case, Problem, check, make_problem, on, run
from triton_driver import modelled_seconds

from sparsekern.pattern import BlockPattern
from sparsekern.triton import linear
from sparsekern.triton.plan import BALANCE, Product, launch, make_plan
from sparsekern.triton.tuning import Kind, choose_config

pytestmark = pytest.mark.skipif(REAL, reason="a real GPU counts nothing")

TOKENS, SHORT, LONG = 256, 256, 1024  # the long side is the one that is summed over
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 64))


@pytest.fixture(autouse=True)
def large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as for a layer that fills the GPU: these are pieces of one."""
    monkeypatch.setattr(linear, "choose_config", lambda *arguments: choose_config(*arguments[:6]))


def pattern(product: Product, blocksize: tuple[int, int]) -> BlockPattern:
    """Rows (of dgrad: columns) of none, a quarter and half of all blocks: whole steps and strips, nothing to pad."""
    generator = torch.Generator().manual_seed(1)
    height, width = blocksize[::-1] if product == "dgrad" else blocksize
    mask = torch.zeros(SHORT // height, LONG // width, dtype=torch.bool)
    for i, row in enumerate(mask):
        row[torch.randperm(len(row), generator=generator)[: (i % 3) * len(row) // 4]] = True
    return BlockPattern.from_mask(mask.T if product == "dgrad" else mask, blocksize)


def measure(
    product: Product, blocksize: tuple[int, int], machine: int, group: int | None, kind: Kind
) -> tuple[Problem, Counters]:
    made = pattern(product, blocksize)
    case = Case(product, "none", blocksize, made.shape, tokens=TOKENS, kind=kind, group=group)
    problem = make_problem(case, made)
    with on(machine) as driver:
        check(problem, run(problem))
    ((name, counters),) = driver.launches
    assert name == ("sampled" if product == "wgrad" else "gather")
    return problem, counters


@pytest.mark.parametrize("machine", [80, 90])
@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=lambda b: f"{b[0]}x{b[1]}")
def test_only_stored_blocks_cost(blocksize: tuple[int, int], product: Product, machine: int) -> None:
    kind: Kind = "tf32" if blocksize == (32, 32) else "bfloat16"
    problem, counters = measure(product, blocksize, machine, None if product == "wgrad" else 1, kind)
    blocks, (height, width), size = problem.pattern.nnz_blocks, blocksize, DTYPES[kind].itemsize
    assert counters.mma_flops == 2 * blocks * height * width * TOKENS
    assert counters.bank_conflict_ratio <= 1.05

    # A perfect schedule of these tiles reads per tile each of its blocks and what it multiplies, and writes each result
    # once. Indices and what is read twice at the edges of sectors are extra.
    if product == "wgrad":
        strips, per_strip = problem.plan.shape[0], problem.plan.shape[1] - 2
        read = strips * TOKENS * (height + per_strip * width) * size
        written = blocks * height * width * size
    else:
        along, across = (height, width) if product == "forward" else (width, height)
        config = choose_config(product, blocksize, TOKENS, kind, machine, 1)
        tiles = TOKENS // config.tile_t
        read = blocks * (across * TOKENS + along * across * tiles) * size
        written = TOKENS * SHORT * size
    assert counters.load_sectors <= 1.1 * read / 32, counters.load_sectors / (read / 32)
    assert counters.store_sectors == written / 32


@pytest.mark.parametrize("product", ["forward", "dgrad"])
@pytest.mark.parametrize("machine, group, extra, shared", [(80, 4, 1.15, 0.95), (90, 8, 1.3, 0.7)])
def test_rows_of_blocks_share_what_they_read(
    product: Product, machine: int, group: int, extra: float, shared: float
) -> None:
    """Products are those of the entries in the plan, zeros included; X is read once per entry. Indices are extra."""
    blocksize = (16, 16)
    problem, counters = measure(product, blocksize, machine, group, "bfloat16")
    todo = launch(problem.plan.shape, SHORT, blocksize, problem.pattern.nnz_blocks, False)
    units = problem.plan.flatten()[: 4 * todo.units].view(-1, 4)
    entries = int((units[:, 2] - units[:, 1]).sum())
    assert counters.mma_flops == 2 * entries * group * 16 * 16 * TOKENS
    assert counters.bank_conflict_ratio <= 1.05
    config = choose_config(product, blocksize, TOKENS, "bfloat16", machine, group)
    read = (entries * 16 * TOKENS + problem.pattern.nnz * TOKENS // config.tile_t) * 2
    assert counters.load_sectors <= extra * read / 32, counters.load_sectors / (read / 32)
    alone = problem.pattern.nnz_blocks * 16 * TOKENS * 2
    assert counters.load_sectors < shared * alone / 32


@pytest.mark.parametrize("machine", [80, 90])
@pytest.mark.parametrize("blocksize", BLOCKSIZES[:4], ids=lambda b: f"{b[0]}x{b[1]}")
def test_instructions_do_not_bind(blocksize: tuple[int, int], machine: int) -> None:
    """Why there are no tensor descriptors on sm_90: they save instructions of copies, and something else is slower."""
    made = pattern("forward", blocksize)
    group = make_plan(made, "forward", balance=BALANCE[machine // 10]).shape[0]
    _, counters = measure("forward", blocksize, machine, group, "bfloat16")
    seconds = modelled_seconds(machine, counters)
    assert seconds["issue"] < 0.85 * max(seconds.values()), seconds
