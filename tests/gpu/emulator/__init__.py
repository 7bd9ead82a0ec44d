"""A PTX emulator that checks kernels on a machine without a GPU: it runs what Triton and nvcc emit for sm_80 and
sm_90.

Model. A batch of CTAs runs at once; a register is a NumPy array with a place per thread; threads step lowest position
first, which brings the sides of a branch together again. Every instruction is compiled once to a closure
(operands.py); its name leads to the module that implements it.

Exact: integer, logic and conversion instructions; IEEE float arithmetic in float32 (fma through float64, whose double
rounding can be off by one unit in very rare cases); memory contents, bounds, alignment; matrix fragments and layouts;
barriers with ids and counts; mbarrier phases; asynchronous copies, which land at the latest moment the kernel allows.

Raised as EmulatorError, with PTX line and CTA: accesses out of bounds or misaligned; reads of shared memory that is
uninitialised or that an asynchronous copy has yet to fill; races between warps (vector clocks: clocks.py); ordinary
writes that reach wgmma or TMA without a proxy fence; writes to what an unfinished wgmma or TMA store reads; wgmma
registers touched too early or without a wgmma.fence; barriers, collectives and matrix instructions not reached by all
their threads; deadlocks; too many arrivals at an mbarrier; registers that a thread reads but, on its way
through the branches, never wrote; whatever is not modelled
(clusters and multicast, tcgen05, fp8 and integer matrix instructions, local and generic memory, calls, device-side
tensor maps, ...).

Not modelled, silently: races in global memory and the memory order between CTAs; races within a warp, also of a
copy with later stores of its own thread; what threads read that a predicate kept from writing; rounding inside
tensor cores (products are exact, sums are float32 in some order); approximate functions (.approx) are correctly
rounded; caches; register counts; time.
"""

from .counters import Counters
from .errors import EmulatorError
from .global_memory import Pointer, TensorMap
from .machine import launch
from .parser import Kernel

__all__ = ["Counters", "EmulatorError", "Kernel", "Pointer", "TensorMap", "launch"]
