"""Faults planted in the text of the kernels: the checks of the linear products have to find each of them.

What was tried and can't be seen, and why: dropping ``other=0.0`` from loads that are copied asynchronously (the copy
fills with zeros anyway).
"""

import needs_triton  # noqa: F401, I001 -- first: skips where there is no Triton
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulator import EmulatorError
from linear_cases import REAL, Case, Problem, check, make_problem, on, run

from sparsekern.pattern import BlockPattern
from sparsekern.triton import kernels, linear

pytestmark = pytest.mark.skipif(REAL, reason="a real GPU would read and write wherever the faults tell it to")

RAGGED = Case("forward", blocksize=(32, 32), shape=(50, 77), density="full", tokens=39, layout="sliced", epilogue="all")
NARROW = Case(
    "forward", blocksize=(16, 16), shape=(64, 176), density="third", tokens=40, kind="float32", epilogue="gelu", group=2
)
EVEN = Case("forward", blocksize=(16, 16), shape=(48, 128), density="holes", tokens=33, epilogue="bias", group=1)
WIDE = Case(
    "forward",
    blocksize=(32, 128),
    shape=(64, 256),
    density="full",
    tokens=48,
    kind="float32",
    epilogue="none",
    integers=False,
)
DGRAD = Case("dgrad", blocksize=(32, 16), shape=(64, 50), density="third", tokens=40, layout="transposed")
GROUPED = Case("dgrad", blocksize=(32, 16), shape=(96, 64), density="third", tokens=40, group=4)
DECODE = Case("forward", blocksize=(16, 32), shape=(40, 512), density="full", tokens=3, epilogue="all")
TILES = Case("forward", blocksize=(64, 32), shape=(128, 32), density="full", tokens=600, kind="float32")
WGRAD = Case("wgrad", blocksize=(32, 16), shape=(50, 77), density="full", tokens=40, group=4)
CHUNKS = Case("wgrad", blocksize=(16, 16), shape=(20, 40), density="full", tokens=520)


class Mutation(NamedTuple):
    name: str
    case: Case
    old: str
    new: str


MUTATIONS = [
    Mutation("X not masked beyond its columns", RAGGED,
             "x_column), mask=inside[None, :]", "x_column), mask=k[None, :] >= 0"),
    Mutation("W not masked beyond its columns", RAGGED, "mask=inside[None, :] & (block >= 0)", "mask=block >= 0"),
    Mutation("W not masked in dgrad", DGRAD, "mask=inside[:, None] & (block >= 0)", "mask=k[:, None] >= 0"),
    Mutation("rows without a block in a tile not masked", NARROW, "inside[None, :] & (block >= 0)", "inside[None, :]"),
    Mutation("tokens after the last one are read", EVEN, "tl.minimum(t, tokens - 1)", "t"),
    Mutation("a tile's rows all take the first row's block", NARROW,
             "tl.load(place + n // BLOCK_N)", "tl.load(place + n * 0)"),
    Mutation("a tile's rows all take one row's block in dgrad", GROUPED, "n // BLOCK_N == g", "n // BLOCK_N >= 0"),
    Mutation("blocks not transposed in dgrad", DGRAD,
             "inner_k[:, None] * BLOCK_N + inner_n[None, :]", "inner_k[:, None] + inner_n[None, :] * BLOCK_K"),
    Mutation("blocks transposed in forward", RAGGED,
             "inner_n[:, None] * BLOCK_K + inner_k[None, :]", "inner_n[:, None] + inner_k[None, :] * BLOCK_N"),
    Mutation("last step skipped", EVEN,
             "(last - first) * BLOCK_K // TILE_K)", "(last - first) * BLOCK_K // TILE_K - 1)"),
    Mutation("first block of a step used for all", EVEN,
             "block = tl.where(is_next[:, None] if", "block = block if True else tl.where(is_next[:, None] if"),
    Mutation("next step's entries not loaded", EVEN, "entry + ahead, n", "entry, n"),
    Mutation("parts of wide blocks mixed up", WIDE, "inner_k += step % (BLOCK_K // TILE_K) * TILE_K", "inner_k += 0"),
    Mutation("strides of X ignored", DGRAD, "(column.to(tl.int64) * x_column)", "column.to(tl.int64)"),
    Mutation("empty rows not written", EVEN,
             "if row < 0:\n        return\n\n    t = tile", "if first == last:\n        return\n\n    t = tile"),
    Mutation("tile of another token", TILES, "abreast = min(tiles - first_tile, ORDER)", "abreast = ORDER"),
    Mutation("products in TF32 unasked", WIDE,
             "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)",
             'acc = tl.dot(x_tile, w_tile, acc, input_precision="tf32")'),
    Mutation("sums not carried on", EVEN, "tl.dot(x_tile, w_tile, acc, input", "tl.dot(x_tile, w_tile, input"),
    Mutation("bias dropped", EVEN, "acc += tl.load(bias + n", "acc += 0 * tl.load(bias + n"),
    Mutation("residual dropped", RAGGED, "acc += tl.load(residual + at", "acc += 0 * tl.load(residual + at"),
    Mutation("ReLU dropped", RAGGED, "tl.where(acc < 0, 0.0, acc)", "acc"),
    Mutation("GELU of tanh", NARROW,
             "tl.math.erf(acc * 0.7071067811865476)",
             "(2 * tl.sigmoid(1.5957691216 * (acc + 0.044715 * acc * acc * acc)) - 1)"),
    Mutation("outputs beyond the edge written", RAGGED,
             "acc.to(y.dtype.element_ty), mask=inside)", "acc.to(y.dtype.element_ty), mask=t[:, None] < tokens)"),
    Mutation("one part left out", DECODE, "for part in range(number)", "for part in range(1, number)"),
    Mutation("parts overwrite each other", DECODE,
             "at = (slot.to(tl.int64) * tokens + t)", "at = (slot.to(tl.int64) * 0 + t)"),
    Mutation("a part finishes alone", DECODE, "if slot >= 0:", "if slot > 0:"),
    Mutation("wgrad: tokens after the chunk counted", WGRAD, "mask=is_column & (t < end)[None, :]", "mask=is_column"),
    Mutation("wgrad: columns beyond the edge read", WGRAD, "mask=is_column & (t", "mask=(t"),
    Mutation("wgrad: outputs beyond the edge read", WGRAD, "mask=is_output & (t", "mask=(t"),
    Mutation("wgrad: overhang not zeroed", WGRAD, "tl.where(is_column & is_output, acc, 0.0)", "acc"),
    Mutation("wgrad: missing blocks of a strip written", WGRAD,
             "mask=(col < grid_columns)[:, None]", "mask=k[:, None] >= 0"),
    Mutation("wgrad: block transposed", WGRAD,
             "places = (block + k % BLOCK_K)[:, None] + (n * BLOCK_K)[None, :]",
             "places = (block + k % BLOCK_K * BLOCK_N)[:, None] + n[None, :]"),
    Mutation("wgrad: strip of one column", WGRAD, "tl.load(strip + 2 + k // BLOCK_K)", "tl.load(strip + 2 + k * 0)"),
    Mutation("wgrad: a chunk overwrites another", CHUNKS, "tl.program_id(1).to(tl.int64) * chunk_size", "0"),
    Mutation("wgrad: last chunk not added", CHUNKS, "for c in range(chunks)", "for c in range(chunks - 1)"),
    Mutation("bias' gradient: tokens after the last one counted", CHUNKS,
             "(t < end)[:, None] & (n < rows)", "(n < rows)"),
]  # fmt: skip


@lru_cache
def problem(case: Case) -> Problem:
    made = make_problem(case, pattern(case))
    if case is WGRAD:  # what the overhang of dW must not show
        made.x[0, 0] = torch.nan
    return made


def pattern(case: Case) -> BlockPattern | None:
    if case is not NARROW:
        return None
    mask = torch.zeros(4, 11, dtype=torch.bool)
    mask[0, ::2] = mask[1, 1::3] = mask[2, 4] = True
    return BlockPattern.from_mask(mask, case.blocksize, case.shape)


def outcome(case: Case) -> str | None:
    """What the check finds wrong."""
    try:
        with on(80):
            check(problem(case), run(problem(case)))
    except (AssertionError, EmulatorError) as error:
        return str(error) or "wrong"
    return None


@lru_cache
def sound(case: Case) -> bool:
    return outcome(case) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_fault_is_found(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sound(mutation.case)
    source = Path(kernels.__file__).read_text()
    assert source.count(mutation.old) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(mutation.old, mutation.new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec and spec.loader
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(linear, "kernels", mutant)
    found = outcome(mutation.case)
    assert found, "the check saw nothing"
