"""The emulator must notice damage to what Triton emits: every barrier, wait and fence dropped in turn, operands
swapped, addresses shifted, counts changed. What survives is listed with the reason why a GPU would not mind
either."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
import triton_driver

if reason := triton_driver.missing():
    pytest.skip(reason, allow_module_level=True)

import emulator_kernels as kernels
from emulator import EmulatorError, TensorMap, launch
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_driver import emulated, pointer

M, N = 128, 128


@dataclasses.dataclass(frozen=True)
class Case:
    arch: int
    dtype: torch.dtype
    tma: bool = False

    @property
    def k(self) -> int:
        """So many turns of the loop that buffers are reused, also by the result."""
        return 256 if self.tma else 224


CASES = {
    "sm_80 fp16": Case(80, torch.float16),
    "sm_80 tf32": Case(80, torch.float32),
    "sm_90 fp16": Case(90, torch.float16),
    "sm_90 TMA": Case(90, torch.float16, tma=True),
}


@functools.cache
def compiled(name: str) -> tuple[str, int]:
    """PTX and bytes of shared memory."""
    case = CASES[name]
    a, b, c = data(case)
    with emulated(case.arch):
        if case.tma:
            descriptors = [TensorDescriptor.from_tensor(x, [64, 64]) for x in (a, b, c)]
            kernel = kernels.matmul_tma[(2, 2)](*descriptors, case.k, 64, 64, 64, num_warps=4, num_stages=3)
        else:
            kernel = kernels.matmul[(2, 2)](a, b, c, M, N, case.k, 64, 64, 32, num_warps=4, num_stages=3)
    return kernel.asm["ptx"], kernel.metadata.shared


def data(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(case.dtype) for shape in ((M, case.k), (case.k, N)))
    return a, b, torch.full((M, N), float("nan"), dtype=case.dtype)


def verdict(name: str, ptx: str) -> str | None:
    """How a mutant was caught: by the emulator's error or by wrong numbers. None: not at all."""
    case = CASES[name]
    a, b, c = data(case)
    if case.tma:
        args: list[object] = []
        for x in (a, b, c):
            at = pointer(x)
            tensor = TensorMap(at.storage, at.offset, 2, x.shape[::-1], (2, 2 * x.stride(0)), (64, 64), 128)
            args += [tensor, *x.shape, *x.stride()]
        args += [case.k, 0, 0]
    else:
        args = [pointer(a), pointer(b), pointer(c), M, N, case.k, 0, 0]
    try:
        launch(ptx, (2, 2), (128,), args, compiled(name)[1])
    except EmulatorError as error:
        return str(error)
    worst = (c.double() - a.double() @ b.double()).abs().max().item()
    return None if worst < 0.1 else f"wrong numbers: {worst}"


SYNCHRONISATION = [
    r"bar\.sync\s+0;",
    r"cp\.async\.wait_group\s+\d+;",
    r"cp\.async\.bulk\.wait_group\s+\d+;",
    r"wgmma\.wait_group\S*\s+\d+;",
    r"wgmma\.fence\S*;",
    r"wgmma\.commit_group\S*;",
    r"fence\.proxy\S*;",
    r"(@%p\d+ )?mbarrier\.init[^;]*;",
    r"@!complete bra\.uni waitLoop;",
]


def sites(ptx: str, patterns: list[str]) -> list[tuple[int, int]]:
    """Where the statements are, in order."""
    return sorted((m.start(), m.end()) for pattern in patterns for m in re.finditer(pattern, ptx))


def without(ptx: str, spans: list[tuple[int, int]]) -> str:
    for start, end in sorted(spans, reverse=True):
        ptx = ptx[:start] + ptx[end:]
    return ptx


@dataclasses.dataclass(frozen=True)
class Redundant:
    """Synchronisation, numbered in order of appearance, of which each can go alone."""

    numbers: tuple[int, ...]
    reason: str
    together: bool  # all can go at once; else at least one is needed


ROTATED = Redundant(
    (2, 3), "the head of the rotated loop repeats the wait and the barrier that end the previous turn", True
)
DOUBLED = Redundant((5, 6), "the same wait twice in a row", False)
REDUNDANT = {
    "sm_80 fp16": [ROTATED, DOUBLED],
    "sm_80 tf32": [ROTATED, DOUBLED],
    "sm_90 fp16": [],
    "sm_90 TMA": [
        Redundant((3, 4, 5, 6, 7, 8), "six barriers between mbarrier.init and the first wait by another warp", False),
        Redundant((10,), "the mbarrier orders what TMA wrote, the barriers 14 to 16 the reuse of the buffer", True),
        Redundant(
            (14, 15, 16),
            "three barriers between wgmma.wait_group and the last of the loads that reuse the buffer",
            False,
        ),
        Redundant((18, 19), "two barriers between the last wgmma and the reuse of its operands for the result", False),
        Redundant((23,), "nothing but ret follows", True),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_every_synchronisation_is_needed_or_redundant(name: str) -> None:
    ptx, _ = compiled(name)
    assert verdict(name, ptx) is None
    found = sites(ptx, SYNCHRONISATION)
    survivors = {i for i, span in enumerate(found) if verdict(name, without(ptx, [span])) is None}
    assert survivors == {i for group in REDUNDANT[name] for i in group.numbers}
    for group in REDUNDANT[name]:
        caught = verdict(name, without(ptx, [found[i] for i in group.numbers]))
        assert (caught is None) == group.together, (group, caught)


# What else is damaged, at every place where the pattern occurs, one place at a time.
DAMAGE = {
    "ldmatrix shifted by 16 bytes": (
        r"(ldmatrix[^;]*\[)(%r\d+)(\+(\d+))?\]",
        lambda m: f"{m[1]}{m[2]}+{int(m[4] or 0) + 16}]",
    ),
    "stmatrix shifted by 16 bytes": (
        r"(stmatrix[^;]*\[)(%r\d+)(\+(\d+))?\]",
        lambda m: f"{m[1]}{m[2]}+{int(m[4] or 0) + 16}]",
    ),
    "ld.shared shifted by 16 bytes": (
        r"(ld\.shared[^;]*\[)(%r\d+)(\+(\d+))?\]",
        lambda m: f"{m[1]}{m[2]}+{int(m[4] or 0) + 16}]",
    ),
    "copy shifted by 16 bytes": (
        r"(cp\.async\.cg[^;]*?\[\s*)(%r\d+)\s*\+\s*(\d+)",
        lambda m: f"{m[1]}{m[2]}+{int(m[3]) + 16}",
    ),
    "rows of A exchanged": (r"(mma\.sync[^;]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
    "halves of B exchanged": (r"(mma\.sync[^;]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
    "a product dropped": (r"mma\.sync[^;]*;|wgmma\.mma_async[^;]*;", ""),
    "wgmma operands exchanged": (r"(wgmma\.mma_async[^;]*\}, )(%rd\d+), (%rd\d+)", r"\1\3, \2"),
    "wgmma descriptor's stride": (r"(or\.b64[^;]*, )(46\d{17})", lambda m: f"{m[1]}{int(m[2]) + (8 << 32)}"),
    "a wait one group weaker": (
        r"(cp\.async\.wait_group|wgmma\.wait_group\S*)(\s+)(\d+)",
        lambda m: f"{m[1]}{m[2]}{int(m[3]) + 1}",
    ),
    "too few bytes expected": (r"(expect_tx[^;]*, )16384", r"\g<1>16368"),
    "too many bytes expected": (r"(expect_tx[^;]*, )16384", r"\g<1>16400"),
    "one arrival too many expected": (r"(mbarrier\.init[^;]*, )1", r"\g<1>2"),
    "an arrival too many": (r"(@%p\d+ mbarrier\.arrive)(\.expect_tx)([^;]*), 16384;", r"\1\2\3, 16384; \1\3;"),
    "parity never changes": (r"(try_wait[^;]*\], )%r\d+", r"\g<1>0"),
    "coordinates exchanged": (r"(bulk\.tensor[^;]*\{)(%r\d+), (%r\d+)\}", r"\1\3, \2}"),
    "result stored one element on": (r"(st\.global[^;]*\[\s*)(%rd\d+)\s*\+\s*0", r"\1\2 + 16"),
}
WEAKER = "a wait one group weaker"
LAST = "the group let go copies zeros, after the end of K, to a buffer of B that the result does not reuse"
# (kernel, damage): {place: why nothing is lost}
UNHARMED: dict[tuple[str, str], dict[int, str]] = {
    ("sm_80 fp16", WEAKER): {1: ROTATED.reason, 2: DOUBLED.reason, 3: DOUBLED.reason, 4: LAST},
    ("sm_80 tf32", WEAKER): {1: ROTATED.reason, 2: DOUBLED.reason, 3: DOUBLED.reason, 4: LAST},
    ("sm_90 fp16", WEAKER): {3: LAST},
}


def mutants(name: str, kind: str) -> dict[int, str]:
    ptx, _ = compiled(name)
    pattern, replacement = DAMAGE[kind]
    return {
        place: ptx[: m.start()] + (replacement(m) if callable(replacement) else m.expand(replacement)) + ptx[m.end() :]
        for place, m in enumerate(re.finditer(pattern, ptx))
    }


def unnoticed(name: str, everywhere: bool) -> dict[tuple[str, str], set[int]]:
    """The damage that was not caught: at every place, or at the first, the middle and the last of each kind."""
    found: dict[tuple[str, str], set[int]] = {}
    for kind in DAMAGE:
        damaged = mutants(name, kind)
        known = UNHARMED.get((name, kind), {})
        tried = set(damaged) if everywhere or known else {0, len(damaged) // 2, len(damaged) - 1} & damaged.keys()
        survivors = {place for place in tried if verdict(name, damaged[place]) is None}
        if survivors:
            found[name, kind] = survivors
    return found


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_damage_is_noticed(name: str, everywhere: bool) -> None:
    assert unnoticed(name, everywhere) == {key: set(known) for key, known in UNHARMED.items() if key[0] == name}


def test_every_kind_of_damage_is_done() -> None:
    for kind in DAMAGE:
        assert any(mutants(name, kind) for name in CASES), kind
