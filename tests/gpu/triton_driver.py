"""Makes `kernel[grid](cpu_tensors)` run on the PTX emulator: a driver for Triton whose device is emulator.launch.

Triton specialises and compiles as it does on a GPU; instead of loading the cubin, the PTX is executed. Autotuning
works: the benchmarker returns a cost modelled from counters, the same on every machine. Tied to the driver protocol
of the Triton versions named here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulator import Counters, EmulatorError, Kernel, Pointer, TensorMap, launch

from sparsekern.triton.plan import CACHE, FLOPS

VERSIONS = ((3, 9), (3, 10))  # first supported, first not supported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def missing() -> str | None:
    """Why Triton kernels cannot be emulated here, None if they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    first, end = VERSIONS
    if not first <= version < end:
        known = f"{_dotted(first)} up to, not including, {_dotted(end)}"
        return f"the emulator's Triton driver is for {known}; this is {triton.__version__}"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates of a GPU that the cost of a launch is modelled with (per second), and what Triton asks a device for."""

    sms: int
    shared: int
    tensor: float  # dense FLOPs of 16-bit matrix instructions
    fma: float
    sectors: float  # 32-byte sectors through the L2 cache
    issue: float  # warp instructions
    wavefronts: float  # of shared memory


# A100 SXM and H100 SXM: data sheets, and the rates that plans are made with.
GPUS = {
    80: Gpu(108, 166912, FLOPS[8], 9.75e12, CACHE[8] / 32, 108 * 4 * 1.41e9, 108 * 1.41e9),
    90: Gpu(132, 232448, FLOPS[9], 33.5e12, CACHE[9] / 32, 132 * 4 * 1.755e9, 132 * 1.755e9),
}


def modelled_seconds(arch: int, counters: Counters) -> dict[str, float]:
    """What a launch takes of each unit of the GPU if that is never idle: a model for ranking, not a measurement."""
    gpu = GPUS[arch]
    return {
        "tensor": counters.mma_flops / gpu.tensor * (2 if any("tf32" in name for name in counters.mma) else 1),
        "fma": counters.fma / gpu.fma,
        "L2": (counters.load_sectors + counters.store_sectors) / gpu.sectors,
        "issue": counters.warp_instructions / gpu.issue,
        "shared": counters.shared_wavefronts / gpu.wavefronts,
    }


class Driver:
    """Triton's view of the emulated device. `launches` lists (kernel name, Counters) in order."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[tuple[str, Counters]] = []
        self.ptx_path: str | None = None  # of the kernel that Triton is about to load
        self.utils = self
        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device: one cache per architecture

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, type: str) -> str:
        return type

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None: ...

    def get_benchmarker(self) -> Callable[..., Any]:
        def benchmark(function: Callable[[], object], quantiles: Sequence[float] | None = None, **_: object) -> Any:
            driver = active_driver()  # an autotuner keeps its benchmarker
            before = len(driver.launches)
            function()
            costs = [modelled_seconds(driver.arch, counters) for _, counters in driver.launches[before:]]
            cost = 1e3 * sum(max(seconds.values()) for seconds in costs)
            del driver.launches[before:]
            return [cost] * len(quantiles) if quantiles else cost

        return benchmark

    # The part that Triton calls `utils`.
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, object, int, int, int]:
        if self.ptx_path is None:
            raise EmulatorError("Triton did not say where the PTX is")
        kernel = Kernel(Path(self.ptx_path).read_text())
        # No module handle: Triton would unload it when the kernel is collected, with whatever driver is active by then.
        return None, (kernel, shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        gpu = GPUS[self.arch]
        return {
            "max_shared_mem": gpu.shared,
            "multiprocessor_count": gpu.sms,
            "warpSize": 32,
            "max_num_regs": 65536,
            "sm_clock_rate": 1_410_000,
            "mem_clock_rate": 1_215_000,
            "mem_bus_width": 5120,
        }


class Launcher:
    """Translates Triton's launch arguments. Triton keeps one per compiled kernel, beyond the driver that was active
    then.
    """

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.metadata = metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        packed: object,
        launch_metadata: object,
        enter: object,
        leave: object,
        *args: Any,
    ) -> None:
        kernel, shared = function
        if (
            tuple(getattr(self.metadata, "cluster_dims", None) or (1,)) not in ((1,), (1, 1, 1))
            or getattr(self.metadata, "num_ctas", 1) != 1
        ):
            raise EmulatorError("clusters are not modelled")
        if getattr(self.metadata, "global_scratch_size", 0):
            raise EmulatorError("kernels with global scratch memory (device-side tensor descriptors) are not modelled")
        values = self._arguments(self.types, args)
        scratch = len(kernel.parameters) - len(values)  # Triton's global and profiling scratch, unused here
        if scratch < 0:
            raise EmulatorError(f"{kernel.name} has {len(kernel.parameters)} parameters, Triton passes {len(values)}")
        warps = max(self.metadata.num_warps, kernel.required_block[0] // 32 if kernel.required_block else 0)
        counters = launch(kernel, (x, y, z), (warps * 32,), [*values, *[0] * scratch], shared)
        active_driver().launches.append((kernel.name, counters))

    def _arguments(self, types: Sequence[Any], args: Sequence[Any]) -> list[object]:
        values: list[object] = []
        descriptors = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for type, arg in zip(types, args, strict=True):
            if type == "constexpr":
                continue
            if isinstance(type, tuple):
                values += self._arguments(type, arg)
                continue
            if isinstance(arg, torch.Tensor):
                values.append(pointer(arg))
            elif isinstance(type, str) and type.startswith("tensordesc"):
                values += self._descriptor(arg, next(descriptors, None))
            elif arg is None:
                values.append(0)
            elif isinstance(arg, bool | int | float):
                values.append(arg if isinstance(arg, float) else int(arg))
            else:
                raise EmulatorError(f"Triton argument of type {type}: {arg!r} is not modelled")
        return values

    def _descriptor(self, arg: Any, meta: Any) -> list[object]:
        shape, strides = list(arg.shape), list(arg.strides)
        if meta is None:
            raise EmulatorError("tensor descriptors before sm_90 are not modelled")
        size = meta["elem_size"]
        base = pointer(arg.base)
        if meta.get("fp4_padded") or meta.get("is_im2col") or arg.padding != "zero" or arg.round_f32_to_tf32:
            raise EmulatorError("tensor descriptors with nan padding, im2col, fp4 or rounding are not modelled")
        swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
        byte_strides = [stride * size for stride in strides[::-1]]
        tensor = TensorMap(
            base.storage, base.offset, size, shape[::-1], byte_strides, list(meta["block_size"])[::-1], swizzle
        )
        return [tensor, *shape, *strides]


def pointer(tensor: torch.Tensor) -> Pointer:
    """A CPU tensor's address, with the bytes of its storage that a kernel may touch."""
    if tensor.device.type != "cpu":
        raise EmulatorError(f"the emulator takes CPU tensors, got one on {tensor.device}")
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return Pointer(np.zeros(0, np.uint8))
    raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return Pointer(np.frombuffer(raw, np.uint8), tensor.data_ptr() - storage.data_ptr())


@contextlib.contextmanager
def emulated(arch: int) -> Iterator[Driver]:
    """Inside, Triton kernels launched on CPU tensors run on the emulator as on a GPU of this architecture (80 or
    90).
    """
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    if arch not in GPUS:
        raise ValueError(f"arch: one of {sorted(GPUS)} expected, got {arch}")
    from triton import knobs
    from triton.runtime.driver import driver as slot

    driver = Driver(arch)

    def remember(module: object, function: object, name: str, group: dict[str, object], hash: str) -> None:
        driver.ptx_path = next(str(path) for file, path in group.items() if file.endswith(".ptx"))

    before, slot._active = slot._active, driver
    knobs.runtime.kernel_load_start_hook.add(remember)
    try:
        yield driver
    finally:
        slot._active = before
        knobs.runtime.kernel_load_start_hook.remove(remember)


def active_driver() -> Driver:
    from triton.runtime.driver import driver as slot

    if not isinstance(slot._active, Driver):
        raise EmulatorError("an emulated kernel was launched outside `with emulated(...)`")
    return slot._active
