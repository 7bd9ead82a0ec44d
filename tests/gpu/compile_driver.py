"""Compile kernels for GPUs that are not there: :func:`compiling_for`, and what came of it, :class:`Compiled`.

The launches of ``sparsekern.triton`` run as they are, on CPU tensors; a driver that launches nothing stands for the one
of a GPU. So what is compiled is what would run there: the same tile sizes, stages and alignments.
"""

from __future__ import annotations

import re
import subprocess
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import needs_triton  # noqa: F401 -- first: skips where there is no Triton
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Device:
    """What a multiprocessor (NVIDIA) or compute unit (AMD) has, of the vendors' tables of compute capabilities.

    Registers are those of 4 bytes that its threads share; shared memory and what a program may have of it are bytes.
    """

    target: GPUTarget
    shared: int
    shared_of_program: int
    warps: int
    programs: int
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that a program takes besides its own


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 164 << 10, 163 << 10, 64, 32),
    "sm_86": Device(GPUTarget("cuda", 86, 32), 100 << 10, 99 << 10, 48, 16),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 228 << 10, 227 << 10, 64, 32),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 228 << 10, 227 << 10, 64, 32),
    # CDNA3: 4 SIMDs with 512 registers per lane for each of 64 lanes, and at most 8 wavefronts each.
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32, 32, registers=4 * 512 * 64, reserved=0),
}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel."""

    name: str
    device: Device
    constants: dict[str, Any]
    shared: int
    warps: int
    files: dict[str, Path]  # by suffix: "cubin", "ptx", "amdgcn", ...

    @cached_property
    def code(self) -> str:
        """Machine code as text."""
        if "amdgcn" in self.files:
            return self.files["amdgcn"].read_text()
        return _run("nvdisasm", "-c", self.files["cubin"])

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers of a thread ("registers"), bytes of its stack and numbers spilled ("spilled")."""
        if "amdgcn" in self.files:
            found = dict(re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", self.code))
            spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
            return {"registers": int(found["vgpr_count"]), "spilled": spilled}
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "-res-usage", self.files["cubin"])))
        moved = len(re.findall(r"\b(?:STL|LDL)\b", self.code))
        return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"]) + moved}

    @property
    def occupancy(self) -> int:
        """Programs that a multiprocessor can run side by side: by registers, shared memory and warps."""
        threads = self.warps * self.device.target.warp_size
        registers = -(-self.resources["registers"] // 8) * 8 * threads
        shared = self.shared + self.device.reserved
        by_shared = self.device.shared // shared if shared else self.device.programs
        return min(self.device.registers // registers, by_shared, self.device.warps // self.warps, self.device.programs)

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return len(re.findall(pattern, self.code))


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([BIN / tool, *arguments], check=True, capture_output=True, text=True).stdout


class _Driver:
    """What of Triton's driver protocol a launch asks for."""

    def __init__(self, device: Device, compiled: list[Compiled]) -> None:
        self.device, self.compiled = device, compiled
        self.launching: tuple[Any, Any] = (None, None)
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (None, None, 0, 0, 1024),  # no module: none to unload
            get_device_properties=lambda _: {"max_shared_mem": device.shared_of_program, "multiprocessor_count": 132},
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        self.launching = (src, metadata)
        return lambda *_: None

    def loading(self, module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        src, metadata = self.launching
        constants = {src.fn.arg_names[at[0]]: value for at, value in src.constants.items() if len(at) == 1}
        by_suffix = {file.rpartition(".")[2]: Path(path) for file, path in files.items()}
        self.compiled.append(
            Compiled(name, self.device, constants, metadata.shared, metadata.num_warps, by_suffix)
        )  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return self.device.target

    def get_current_device(self) -> str:
        return str(self.device.target.arch)  # the key of Triton's cache: one for each target

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(device: Device) -> Iterator[list[Compiled]]:
    """Launches within compile for ``device`` and run nothing; gives the list of what they compile."""
    compiled: list[Compiled] = []
    driver, config = _Driver(device, compiled), triton.runtime.driver
    before = config._active
    config.set_active(driver)
    knobs.runtime.kernel_load_end_hook.add(driver.loading)
    try:
        yield compiled
    finally:
        knobs.runtime.kernel_load_end_hook.remove(driver.loading)
        config._active = before
        for name in dir(_kernels()):
            kernel = getattr(_kernels(), name)
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.pop(driver.get_current_device(), None)


def _kernels() -> types.ModuleType:
    from sparsekern.triton import kernels

    return kernels
