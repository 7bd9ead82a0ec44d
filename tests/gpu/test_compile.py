"""Every kernel compiled ahead of time for every GPU: what the machine code must have, and must not have.

By default a pairwise cover of product, kind of numbers, blocksize and GPU, at most BUDGET compilations; ``slow`` adds
the full product. What code does is tested elsewhere, on an emulator; how fast it is, nowhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import needs_triton  # noqa: F401 -- first: skips where there is no Triton
import pytest
import torch
import triton
from compile_driver import DEVICES, Compiled, compiling_for
from pairwise import pairwise

from sparsekern.pattern import BlockPattern
from sparsekern.triton import linear
from sparsekern.triton.plan import BALANCE, make_plan

BUDGET = 60
TOKENS = 512  # as many as fill tiles, and so few that wgrad sums them up in one go
PRODUCTS = ("forward", "dgrad", "wgrad")
KINDS = ("float16", "bfloat16", "tf32", "float32")
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (16, 64), (32, 128))
MIN_WARPS = 4  # side by side on a multiprocessor, one for each of its parts
# Instructions of machine code: products on tensor cores, of a whole warp and of larger tiles; loads of 16 bytes.
WARP_PRODUCT, MFMA = r"\bHMMA\.", r"\bv_mfma_"
TENSOR = {
    "sm_80": WARP_PRODUCT,
    "sm_86": WARP_PRODUCT,
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTC\w*MMA\b",
    "gfx942": MFMA,
}
WIDE = r"\bLDGSTS\.[\w.]*128|\bLDG\.[\w.]*128|\bUTMALDG\b|(?:global|buffer)_load_dwordx4|global_load_lds_dwordx4"


class Case(NamedTuple):
    product: str
    kind: str
    blocksize: tuple[int, int]
    gpu: str

    def __str__(self) -> str:
        return f"{self.product}-{self.kind}-{self.blocksize[0]}x{self.blocksize[1]}-{self.gpu}"


AXES = {"product": PRODUCTS, "kind": KINDS, "blocksize": BLOCKSIZES, "gpu": tuple(DEVICES)}
COVER = [Case(**row) for row in pairwise(AXES)]
REST = [case for case in (Case(*values) for values in itertools.product(*AXES.values())) if case not in COVER]


def launch(case: Case, tokens: int = TOKENS, **options: Any) -> list[Compiled]:
    """The kernels that the product of a layer of 512 x 512, at density 0.3, launches."""
    device = DEVICES[case.gpu]
    generator = torch.Generator().manual_seed(0)
    grid = (512 // case.blocksize[0], 512 // case.blocksize[1])
    pattern = options.pop("pattern", None)
    if pattern is None:
        mask = torch.rand(grid, generator=generator).argsort(1) < max(0.3 * grid[1], 1)  # rows of equal length
        pattern = BlockPattern.from_mask(mask, case.blocksize)
    major = device.target.arch // 10 if isinstance(device.target.arch, int) else 8
    balance = BALANCE[min(max(major, min(BALANCE)), max(BALANCE))]
    plan = make_plan(pattern, case.product, balance=balance)
    tf32, dtype = case.kind == "tf32", torch.float32 if case.kind == "tf32" else getattr(torch, case.kind)
    outputs, inputs = pattern.shape
    x = torch.empty(tokens, outputs if case.product == "dgrad" else inputs, dtype=dtype)
    values, grad = torch.empty(pattern.values_shape, dtype=dtype), torch.empty(tokens, outputs, dtype=dtype)
    crow, col = pattern.crow_indices, pattern.col_indices
    with compiling_for(device) as compiled:
        if case.product == "forward":
            linear.linear(x, values, None, crow, col, plan, outputs, tf32, **options)
        elif case.product == "dgrad":
            linear.linear_dgrad(x, values, crow, col, plan, inputs, tf32)
        else:
            linear.linear_wgrad(grad, x, crow, col, plan, case.blocksize, options.pop("bias", False), tf32)
    return compiled


def stage_bytes(kernel: Compiled, case: Case) -> int:
    """What one buffer of the pipeline holds: a step's tiles of both factors."""
    c, size = kernel.constants, 2 if case.kind.endswith("16") else 4
    if kernel.name == "gather":
        return (c["TILE_T"] + c["BLOCK_N"] * c["GROUP"]) * c["TILE_K"] * size
    return (c["STRIP"] * c["BLOCK_K"] + c["BLOCK_N"]) * c["TILE_T"] * size


def check(kernel: Compiled, case: Case, record: Callable[[str, object], None], tensor: str | None = None) -> None:
    resources = kernel.resources
    stated = (
        f"{resources['registers']} registers, {kernel.shared} bytes shared, {kernel.occupancy} x {kernel.warps} warps"
    )
    record(f"{kernel.name} {case}", stated)
    assert resources["spilled"] == 0, stated
    assert kernel.shared <= kernel.device.shared_of_program, stated
    assert kernel.occupancy * kernel.warps >= MIN_WARPS, stated
    if kernel.name not in ("gather", "sampled"):  # the others only add up
        return
    assert kernel.count(WIDE) > 0, stated
    # On NVIDIA, exact float32 is none of the tensor cores' formats.
    products = kernel.count(tensor or TENSOR[case.gpu])
    assert (products > 0) == (case.kind != "float32" or case.gpu == "gfx942"), stated
    buffers = kernel.shared / stage_bytes(kernel, case)
    # On AMD the second buffer is registers: loads are issued a step ahead, and written to shared memory when due.
    assert buffers >= (1 if case.gpu == "gfx942" else 2), f"{buffers:.2f} buffers, {stated}"


# What Triton 3.6, or the ptxas that it brings, spills: some 20 instructions, of products without tensor cores.
SPILLED_BY_3_6 = {"forward-float32-64x64-sm_80", "dgrad-float32-64x16-sm_90"}


def fault(case: Case) -> str | None:
    """Why a case fails today, or None."""
    if case.product == "wgrad" and case.kind == "tf32" and case.gpu in ("sm_90", "sm_100"):
        return "copies element by element: see linear._singles"
    if triton.__version__.startswith("3.6.") and str(case) in SPILLED_BY_3_6:
        return "spills"
    return None


def cases(chosen: list[Case]) -> list[Any]:
    """As parameters, those that fail today marked as such."""
    marks = {case: pytest.mark.xfail(strict=True, reason=reason) for case in chosen if (reason := fault(case))}
    return [pytest.param(case, id=str(case), marks=marks.get(case, ())) for case in chosen]


@pytest.mark.parametrize("case", cases(COVER))
def test_products(case: Case, record_property: Callable[[str, object], None]) -> None:
    (kernel,) = launch(case)
    check(kernel, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(REST))
def test_products_everywhere(case: Case, record_property: Callable[[str, object], None]) -> None:
    (kernel,) = launch(case)
    check(kernel, case, record_property)


# ---- few tokens, epilogues, and the kernels that add up ----------------------------------------------------------

SOME = ("sm_80", "sm_90", "gfx942")
some_gpus = pytest.mark.parametrize("gpu", SOME)


@some_gpus
def test_few_tokens(gpu: str, record_property: Callable[[str, object], None]) -> None:
    """Tiles of 16 tokens are too small for the instructions that several warps share."""
    case = Case("forward", "bfloat16", (64, 64), gpu)
    (kernel, *_) = launch(case, tokens=16)
    check(kernel, case, record_property, MFMA if gpu == "gfx942" else WARP_PRODUCT)


@some_gpus
def test_epilogue(gpu: str, record_property: Callable[[str, object], None]) -> None:
    case = Case("forward", "bfloat16", (32, 32), gpu)
    residual = torch.empty(TOKENS, 512, dtype=torch.bfloat16)
    (kernel,) = launch(case, activation="gelu", residual=residual)
    check(kernel, case, record_property)


@pytest.mark.parametrize("gpu", ["sm_80", "gfx942"])
def test_sums_of_parts_and_chunks(gpu: str, record_property: Callable[[str, object], None]) -> None:
    mask = torch.zeros(4, 256, dtype=torch.bool)
    mask[:, :4] = mask[1] = True  # a row that is cut into parts
    forward, wgrad = Case("forward", "bfloat16", (16, 16), gpu), Case("wgrad", "bfloat16", (32, 32), gpu)
    parts = launch(forward, pattern=BlockPattern.from_mask(mask, (16, 16)))
    assert {kernel.name for kernel in parts} == {"gather", "add_parts"}
    chunks = launch(wgrad, tokens=4 * TOKENS, bias=True)
    assert {kernel.name for kernel in chunks} == {"sampled", "add_chunks", "sum_tokens"}
    for case, kernels in ((forward, parts), (wgrad, chunks)):
        for kernel in kernels:
            check(kernel, case, record_property)


# ---- the gate itself ------------------------------------------------------------------------------------------------


def test_the_gate_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage, and tiles that do not fit the registers, are refused."""
    case = Case("forward", "float16", (64, 64), "sm_80")
    config = linear.choose_config("forward", (64, 64), TOKENS, "float16", 80, 1)
    for change, why in (({"stages": 2}, "buffers"), ({"tile_t": 256, "warps": 2, "stages": 3}, "registers")):
        monkeypatch.setattr(linear, "choose_config", lambda *_, change=change: config._replace(**change))
        (kernel,) = launch(case)
        with pytest.raises(AssertionError, match=why):
            check(kernel, case, lambda *_: None)


def test_the_cover_is_one_and_within_budget() -> None:
    names = list(AXES)
    for i, j in itertools.combinations(range(len(names)), 2):
        assert {(case[i], case[j]) for case in COVER} == set(itertools.product(AXES[names[i]], AXES[names[j]]))
    others = len(SOME) * (2 + 1) + 2 * 6 + 2  # kernels of the other tests, at most
    assert len(COVER) + others <= BUDGET
