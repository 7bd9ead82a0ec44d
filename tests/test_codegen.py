"""What compilers make of the micro-kernels: no spill, and as few loads per FMA as the kernel's `Codegen:` line states.

Each micro-kernel is compiled as a function of its own with the project's flags (``native/micro_kernels.cpp``) and
disassembled; what counts is its innermost loop around FMAs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import native_driver
import pytest

import sparsekern

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "native" / "micro_kernels.cpp"
VECTOR_BYTES = {"avx2": 32, "avx512": 64, "neon": 16}
CLANG = next(
    (name for name in ("clang++", *(f"clang++-{n}" for n in range(30, 13, -1))) if shutil.which(name)), "clang++"
)
CROSS = "aarch64-linux-gnu-g++"
TARGETS = [
    ("g++", "avx2"),
    pytest.param("g++", "avx512", marks=pytest.mark.slow),
    pytest.param(CLANG, "avx2", marks=pytest.mark.slow),
    pytest.param(CLANG, "avx512", marks=pytest.mark.slow),
    pytest.param(CROSS, "neon", marks=pytest.mark.slow),
]

FMA = re.compile(r"vfn?m(add|sub)\d+p[sd]$|fml[as]$")
BRANCH = re.compile(r"(j[a-z]+|b|b\.[a-z]+|cbn?z|tbn?z)$")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @cached_property
    def is_fma(self) -> bool:
        return bool(FMA.match(self.name))

    @cached_property
    def jumps_to(self) -> int | None:
        target = re.search(r"\b([0-9a-f]+)$", self.operands) if BRANCH.match(self.name) else None
        return int(target[1], 16) if target else None

    @cached_property
    def loads(self) -> int:
        """Vectors, or numbers for one, that it reads from memory (memory operands and broadcasts included)."""
        if self.name.startswith("v"):  # x86; a store has its memory operand first
            return int("[" in self.operands and "[" not in self.operands.split(",")[0])
        if re.match(r"ld[1-4]", self.name):
            first, _, last = self.operands[1:].partition("}")[0].replace(" ", "").partition("-")
            return int(last[1:].split(".")[0]) - int(first[1:].split(".")[0]) + 1 if last else first.count("v")
        if re.match(r"ld(u?r|n?p)$", self.name) and re.match(r"[qdsv]\d", self.operands):
            return 2 if self.name.endswith("p") else 1
        return 0

    @cached_property
    def stores(self) -> bool:
        """Whether it writes a vector to memory."""
        if self.name.startswith("v"):
            return "[" in self.operands.split(",")[0]
        return bool(re.match(r"st(u?r|n?p|[1-4])$", self.name) and re.match(r"[{qdsv]", self.operands))


def disassemble(binary: Path, objdump: str = "objdump") -> dict[str, list[Instruction]]:
    """Instructions of each function, by its demangled name."""
    syntax = [] if "aarch64" in objdump else ["-M", "intel"]
    command = [objdump, "-d", "-C", *syntax, "--no-show-raw-insn", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    functions: dict[str, list[Instruction]] = {}
    name = ""
    for line in text.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = header[1]
        elif part := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            operands = re.split(r"\s*(?: <|#|//)", part[3])[0]
            functions.setdefault(name, []).append(Instruction(int(part[1], 16), part[2], operands))
    return functions


def reach(start: int, steps: dict[int, list[int]], stop: int | None = None) -> set[int]:
    found, waiting = set(), [start]
    while waiting:
        if (address := waiting.pop()) not in found:
            found.add(address)
            waiting += steps.get(address, []) if address != stop else []
    return found


def fma_loops(function: list[Instruction]) -> list[list[Instruction]]:
    """The loops around FMAs that have no such loop inside."""
    if not any(i.is_fma for i in function):
        return []
    after: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {}
    for this, following in zip(function, [*function[1:], None], strict=True):
        falls_through = following and this.name not in ("jmp", "b", "ret")
        for target in (this.jumps_to, following.address if falls_through else None):
            if target is not None:
                after.setdefault(this.address, []).append(target)
                before.setdefault(target, []).append(this.address)
    fmas = {i.address for i in function if i.is_fma}
    loops = []
    for jump in function:
        if jump.jumps_to is not None and jump.jumps_to <= jump.address:
            # Not every jump back is one to a head: what it jumps to must lead here again.
            inside = reach(jump.address, before, stop=jump.jumps_to) & reach(jump.jumps_to, after)
            if {jump.address, jump.jumps_to} <= inside and fmas & inside:
                loops.append(inside)
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    return [[i for i in function if i.address in loop] for loop in innermost]


def spills(function: list[Instruction], loop: list[Instruction]) -> int:
    """Vectors that the loop reads from the stack or writes to it."""
    has_frame_pointer = any(i.name == "mov" and i.operands == "rbp,rsp" for i in function)
    stack = re.compile(r"\[(rsp|sp|x29|rbp)\b" if has_frame_pointer else r"\[(rsp|sp|x29)\b")
    return sum(bool((i.loads or i.stores) and stack.search(i.operands)) for i in loop)


def statements() -> dict[str, tuple[list[str], str, str]]:
    """{micro-kernel: (template parameters, FMAs, loads)} as the sources state them."""
    line = r"// Codegen: (.+) FMAs, (.+) loads, no spill\.\ntemplate <([^>]*)>\n[^(]*?(\w+)\("
    found = {}
    for path in (ROOT / "csrc" / "cpu").glob("*.inl"):
        text = path.read_text()
        matches = re.findall(line, text)
        assert len(matches) == text.count("// Codegen:"), f"{path.name}: a Codegen line that cannot be read"
        for fmas, loads, parameters, kernel in matches:
            found[kernel] = [parameter.split()[-1] for parameter in parameters.split(",")], fmas, loads
    return found


def complaints(functions: dict[str, list[Instruction]]) -> Iterator[str]:
    """What is worse than stated, of every micro-kernel among the functions."""
    stated = statements()
    for name, function in functions.items():
        tile = re.search(r"(\w+_kernel)<([^>]*)>", name)
        if not tile:
            continue
        if tile[1] not in stated:
            yield f"{tile[0]}: no Codegen line"
            continue
        parameters, *formulas = stated[tile[1]]
        values = {"float": 4, "double": 8}
        arguments = [int(a) if a.isdigit() else values.get(a) for a in tile[2].split(", ")]
        names = dict(zip(parameters, arguments, strict=True), sizeof=int)
        fmas, loads = (eval(formula, {}, names) for formula in formulas)
        loops = fma_loops(function)
        if not loops:
            yield f"{tile[0]}: no loop with FMAs"
        for loop in loops:
            count, read = sum(i.is_fma for i in loop), sum(i.loads for i in loop)
            if count % fmas or read * fmas > loads * count:
                yield f"{tile[0]}: {count} FMAs, {read} loads; stated are {fmas} and {loads:g}"
            # A sum kept in memory may also be stored through a pointer to the stack.
            if spills(function, loop) or any(i.stores for i in loop):
                yield f"{tile[0]}: a vector is spilled"


def compile_kernels(compiler: str, isa: str, folder: Path, *more: str) -> dict[str, list[Instruction]]:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    target = folder / "micro_kernels.o"
    defines = [f"-DSK_ISA={isa}", f"-DSK_VECTOR_BYTES={VECTOR_BYTES[isa]}", f"-I{ROOT / 'csrc'}"]
    common, of_set = native_driver.flags(isa)
    command = [compiler, *common, *of_set, "-fPIC", *defines, *more, "-c", SOURCE, "-o", target]
    subprocess.run(command, check=True, timeout=300)
    return disassemble(target, "aarch64-linux-gnu-objdump" if compiler == CROSS else "objdump")


@pytest.mark.parametrize("compiler, isa", TARGETS)
def test_micro_kernels_are_as_stated(compiler: str, isa: str, tmp_path: Path) -> None:
    found = compile_kernels(compiler, isa, tmp_path)
    assert {kernel for kernel in statements() if not any(f"{kernel}<" in name for name in found)} == set()
    assert list(complaints(found)) == []


def test_a_tile_with_more_sums_than_registers_is_seen(tmp_path: Path) -> None:
    found = compile_kernels("g++", "avx2", tmp_path, "-DTILES=TILE(strip_kernel,4,4)")
    tiles = {line.partition(": ")[0] for line in complaints(found) if line.endswith("spilled")}
    assert tiles == {"strip_kernel<float, 4, 4>", "strip_kernel<double, 4, 4>"}


def test_a_load_more_than_stated_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compile_kernels("g++", "avx2", tmp_path, "-DTILES=TILE(strip_kernel,4,3),TILE(dot_kernel,1,8)")
    fewer = {kernel: (names, fmas, f"{loads} - 1") for kernel, (names, fmas, loads) in statements().items()}
    monkeypatch.setattr(sys.modules[__name__], "statements", lambda: fewer)
    tiles = {line.partition(": ")[0] for line in complaints(found) if "loads; stated are" in line}
    assert len(tiles) == len(found) == 4


@pytest.mark.slow
def test_the_built_library_has_no_spill() -> None:
    """The micro-kernels as they are, inlined into what surrounds them."""
    library = Path(sparsekern.__file__).with_name("_C_cpu.so")
    functions = disassemble(library)
    found = {name: fma_loops(function) for name, function in functions.items()}
    if not any(found.values()):
        pytest.skip("built for a processor without FMA")
    assert sum(map(len, found.values())) > 20
    assert [name for name, loops in found.items() for loop in loops if spills(functions[name], loop)] == []
