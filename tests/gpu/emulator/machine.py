"""Runs a kernel: batches of CTAs, whose threads are stepped lowest position first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from . import arithmetic, async_copy, atomics, barriers, bits, conversions, matrix, mbarrier, memory, tma, warp, wgmma  # noqa: F401 -- each registers its instructions
from .clocks import Clocks
from .counters import Counters
from .errors import EmulatorError
from .formats import UNSIGNED
from .global_memory import GlobalMemory, Pointer, TensorMap
from .lanes import WARP, Lanes, merge
from .operands import SPECIAL, Builder, Compiled, Step, compile_kernel, instruction
from .parser import Instruction, Kernel
from .shared_memory import SharedMemory

THREADS_PER_BATCH = 8192
MAPS = 0x7F000000  # where the addresses of by-value tensor maps begin
GRID = (2**31 - 1, 65_535, 65_535)  # compute capabilities, technical specifications
STEPS = 30_000_000  # of one batch, then it counts as hanging


@instruction("bra ret exit", modifiers="uni")
def control(b: Builder, i: Instruction, types: list[str]) -> Step:
    return lambda m, lanes: None  # the scheduler does these


class Machine:
    """The state of one batch of CTAs."""

    def __init__(self, launch: Launch, ctas: np.ndarray) -> None:
        self.launch, self.ctas = launch, ctas
        kernel = launch.kernel
        self.counters, self.globals, self.symbols = launch.counters, launch.globals, launch.symbols
        self.parameters, self.maps = launch.parameters, launch.maps
        self.warps_per_cta = launch.threads // WARP
        self.warps = len(ctas) * self.warps_per_cta
        self.threads = self.warps * WARP
        # Poison: a NaN in every float format, an implausible integer.
        self.registers = [
            np.zeros((self.warps, WARP), bool)
            if width == 1
            else np.full((self.warps, WARP), -1, np.int64).astype(UNSIGNED[width // 8])
            for _, width in kernel.registers.values()
        ]
        self.defined = {number: np.zeros((self.warps, WARP), bool) for number in launch.builder.watched}
        self.special = self._special()
        self.clocks = Clocks(len(ctas), self.warps_per_cta)
        self.shared = SharedMemory(len(ctas), launch.shared_size, launch.cell, self.clocks)
        self.alive = np.ones(self.threads, bool)
        self.ready: dict[int, Lanes] = {}
        self.barriers = barriers.Barriers(self)
        self.mbarriers = mbarrier.Mbarriers(self)
        self.copies = async_copy.Groups(self.threads)
        self.bulk = async_copy.Groups(self.threads)
        self.wgmma = wgmma.Wgmma(self, launch.builder.matrix)

    def _special(self) -> dict[str, np.ndarray]:
        thread = np.arange(self.threads, dtype=np.uint32).reshape(self.warps, WARP)
        local = thread % self.launch.threads
        cta = self.ctas.astype(np.uint32)[thread // self.launch.threads]
        values = {name: np.zeros_like(thread) for name in SPECIAL}
        lane = local % WARP
        values |= {"%laneid": lane, "%warpid": local // WARP, "%nwarpid": np.full_like(thread, self.warps_per_cta)}
        one = np.ones_like(thread)
        values |= {"%lanemask_eq": one << lane, "%lanemask_lt": (one << lane) - one, "%cluster_nctarank": one}
        values["%lanemask_le"] = values["%lanemask_eq"] | values["%lanemask_lt"]
        for axis, extent, ctas in zip("xyz", self.launch.block, self.launch.grid, strict=True):
            values[f"%tid.{axis}"], local = local % extent, local // extent
            values[f"%ctaid.{axis}"], cta = cta % ctas, cta // ctas
            values[f"%ntid.{axis}"] = np.full_like(thread, extent)
            values[f"%nctaid.{axis}"] = np.full_like(thread, ctas)
            values[f"%cluster_nctaid.{axis}"] = one
        return values

    def make_ready(self, position: int, lanes: Lanes) -> None:
        self.ready[position] = merge(self.ready.get(position), lanes)

    def run(self) -> None:
        code = self.launch.builder.compiled
        self.executed = [0] * len(code)
        self.make_ready(0, Lanes(np.arange(self.threads), self.threads))
        self.steps = 0
        while self.ready or self.mbarriers.land_awaited():
            position = min(self.ready)
            lanes = self.ready.pop(position)
            self._advance(code, position, lanes, min(self.ready, default=len(code)))
        self.barriers.check_deadlock()
        self.mbarriers.check_deadlock()
        self.bulk.finish()
        self.wgmma.finish()
        for compiled, warps in zip(code, self.executed, strict=True):
            i = compiled.instruction
            self.counters.instructions[i.opcode] += warps
            self.counters.warp_instructions += warps

    def _advance(self, code: list[Compiled], position: int, lanes: Lanes, limit: int) -> None:
        """Step these threads until they reach others, split or are parked."""
        counters = self.counters
        while True:
            if position >= len(code):
                self.alive[lanes.ids] = False
                return
            if position >= limit:
                self.make_ready(position, lanes)
                return
            compiled = code[position]
            i = compiled.instruction
            active, rest = lanes, None
            self.executed[position] += len(lanes.warps)
            counters.thread_instructions += lanes.count
            self.steps += 1
            if self.steps > STEPS:
                raise EmulatorError(f"the kernel hangs: {STEPS} steps\n  PTX line {i.line}: {i.text}")
            for number in compiled.marks:
                self.defined[number][lanes.index] = True
            try:
                if i.predicate is not None:
                    if i.predicate in self.defined and not self.defined[i.predicate][lanes.index].all():
                        raise EmulatorError("the predicate was never written", ~self.defined[i.predicate][lanes.index])
                    taken = self.registers[i.predicate][lanes.index] ^ i.negated
                    if not taken.any():
                        position += 1
                        continue
                    if not taken.all():
                        active, rest = lanes.select(taken), lanes.select(~taken)
                if i.opcode == "bra":
                    if rest is not None:
                        self.make_ready(i.target, active)
                        self.make_ready(position + 1, rest)
                        return
                    position = i.target
                    continue
                if i.opcode in ("ret", "exit"):
                    self.alive[active.ids] = False
                    if rest is None:
                        return
                    lanes = rest
                elif compiled.step(self, active):
                    if rest is not None:
                        self.make_ready(position + 1, rest)
                    return
            except EmulatorError as error:
                raise EmulatorError(
                    f"{error}\n  PTX line {i.line}: {i.text}\n  {self._where(active, error.bad)}"
                ) from None
            if compiled.length > 1:
                for later in range(position + 1, position + compiled.length):
                    self.executed[later] += len(lanes.warps)
                counters.thread_instructions += lanes.count * (compiled.length - 1)
            position += compiled.length

    def _where(self, lanes: Lanes, bad: np.ndarray | None) -> str:
        thread = int(lanes.ids[0])
        if bad is not None:
            flat = np.asarray(bad)
            if flat.size != lanes.count and flat.ndim > 1:
                flat = flat.any(-1)
            if flat.size == lanes.count:
                thread = int(lanes.ids[np.flatnonzero(flat.reshape(-1))[0]])
        return self.describe(thread)

    def describe(self, thread: int) -> str:
        x, y, _ = self.launch.grid
        cta = int(self.ctas[thread // self.launch.threads])
        return f"CTA ({cta % x}, {cta // x % y}, {cta // (x * y)}), thread {thread % self.launch.threads}"


class Launch:
    """What all batches of a launch share: arguments, memory layout, counters."""

    def __init__(
        self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], args: Sequence[object], shared: int
    ) -> None:
        self.kernel = kernel
        self.grid, self.block = _three(grid), _three(block)
        self.threads = math.prod(self.block)
        for axis, extent, most in zip("xyz", self.grid, GRID, strict=True):
            if not 0 < extent <= most:
                raise EmulatorError(f"grid of {extent} in {axis}: 1 to {most} can be launched")
        if self.threads % WARP or not 0 < self.threads <= 1024:
            raise EmulatorError(f"block of {self.threads} threads: a multiple of 32 up to 1024 is modelled")
        if kernel.required_block and math.prod(kernel.required_block) != self.threads:
            raise EmulatorError(f"block {self.block}, the kernel requires {kernel.required_block}")
        if kernel.maximum_block and math.prod(kernel.maximum_block) < self.threads:
            raise EmulatorError(f"block {self.block}, the kernel allows {kernel.maximum_block}")
        if kernel.compiled is None:
            kernel.compiled = compile_kernel(kernel)
        self.builder = kernel.compiled
        ctas = math.prod(self.grid)
        self.counters = Counters(ctas=ctas, warps=ctas * self.threads // WARP)
        self._arguments(args)
        self._shared(shared)
        batch = max(1, THREADS_PER_BATCH // self.threads)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for first in range(0, ctas, batch):
                Machine(self, np.arange(first, min(ctas, first + batch))).run()
        self.globals.finish()

    def _arguments(self, args: Sequence[object]) -> None:
        parameters = self.kernel.parameters
        if len(args) != len(parameters):
            raise EmulatorError(f"{self.kernel.name} has {len(parameters)} parameters, got {len(args)} arguments")
        storages = [x.storage if isinstance(x, Pointer) else x.array if isinstance(x, TensorMap) else x for x in args]
        self.globals = GlobalMemory([x for x in storages if isinstance(x, np.ndarray)], self.counters)
        self.parameters: dict[str, int | float] = {}
        self.maps: list[tuple[TensorMap, int]] = []
        self.symbols: dict[str, int] = {}
        for parameter, arg in zip(parameters, args, strict=True):
            if (parameter.array > 0) != isinstance(arg, TensorMap):
                raise EmulatorError(
                    f"parameter {parameter.name}: a tensor map goes with a by-value struct, got {type(arg).__name__}"
                )
            if isinstance(arg, TensorMap):
                self.symbols[parameter.name] = MAPS + len(self.maps)
                self.maps.append((arg, self.globals.offset(arg.array) + arg.offset))
            elif isinstance(arg, np.ndarray):
                self.parameters[parameter.name] = self.globals.address(arg)
            elif isinstance(arg, Pointer):
                self.parameters[parameter.name] = self.globals.address(arg.storage) + arg.offset
            elif isinstance(arg, int | float | np.integer | np.floating):
                self.parameters[parameter.name] = arg.item() if isinstance(arg, np.generic) else arg
            else:
                raise EmulatorError(f"argument for {parameter.name}: {type(arg).__name__} is not modelled")

    def _shared(self, dynamic: int) -> None:
        at, narrowest = 0, 16
        for name, (alignment, size) in self.kernel.shared.items():
            if size:
                at = (at + alignment - 1) // alignment * alignment
                self.symbols[name], at = at, at + size
        at = (at + 1023) // 1024 * 1024 if at and dynamic else at
        for name, (_, size) in self.kernel.shared.items():
            if not size:
                self.symbols[name] = at
        self.shared_size = at + dynamic
        for i in self.kernel.code:
            narrowest = min(narrowest, memory.shared_access_size(i))
        self.cell = narrowest


def launch(
    ptx: str | Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[object],
    shared: int = 0,
    entry: str | None = None,
) -> Counters:
    """Run a kernel on `args` (arrays are updated in place) and say what it did.

    `args`: contiguous NumPy arrays, Pointer, TensorMap, numbers; one per kernel parameter. `shared`: bytes of dynamic
    shared memory. Raises EmulatorError with the PTX line, the CTA and the thread.
    """
    kernel = ptx if isinstance(ptx, Kernel) else Kernel(ptx, entry)
    return Launch(kernel, grid, block, args, shared).counters


def _three(extent: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*extent, 1, 1)[:3]
    return int(x), int(y), int(z)
