"""What runs here, and what does not and why: :func:`collect`, shown by ``sparsekern info`` and kept with results."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, ops, triton


def collect() -> dict[str, Any]:
    """Versions, processor, threads, which ops have a compiled kernel, and the GPU, as JSON-ready values.

    Returns:
        - ``sparsekern``, ``torch``, ``numpy``, ``python``, ``platform``: versions
        - ``cpu``: ``model``; ``cores`` that this process may use; ``features`` {name: bool} of the processor and
          ``compiler``, both None where the module ``sparsekern._native`` is not built; ``isa``, the instruction set of
          the kernels in use, None without kernels; ``isa_chosen``, ``"automatically"``, ``"by SPARSEKERN_CPU_ISA"`` or
          the reason why there is none; ``isas``, of the sets that are compiled in, the best first: {name:
          ``"supported"``, ``"supported, only by SPARSEKERN_CPU_ISA"`` or ``"not supported by this CPU"``}
        - ``threads``: how many torch uses
        - ``ops``: {op: "cpu", or the reason why plain torch answers}
        - ``triton``: its version, where the GPU kernels can run, or the reason why not
        - ``gpu``: name and compute capability of each device, or the reason why there is none

    Raises:
        ValueError: the environment variable ``SPARSEKERN_CPU_ISA`` names no instruction set that this CPU has.
    """
    native = native_module()
    return {
        "sparsekern": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "cores": usable_cores(),
            "features": native.cpu_features() if native else None,
            "compiler": native.compiler() if native else None,
            **_instruction_sets(),
        },
        "threads": torch.get_num_threads(),
        "ops": {name: _op_backend(name) for name in ops.SCHEMAS},
        "triton": triton.missing() or importlib.metadata.version("triton"),
        "gpu": _gpu(),
    }


def _instruction_sets() -> dict[str, Any]:
    if ops.CPU_KERNELS_MISSING:
        return {"isa": None, "isa_chosen": None, "isas": {}}
    asked = bool(os.environ.get("SPARSEKERN_CPU_ISA"))
    try:
        isa, chosen = torch.ops.sparsekern.cpu_isa(), "by SPARSEKERN_CPU_ISA" if asked else "automatically"
    except RuntimeError as error:
        if asked:
            raise ValueError(str(error)) from None
        isa, chosen = None, str(error)
    states = {}
    for name, supported, automatic in zip(*torch.ops.sparsekern.cpu_isas(), strict=True):
        states[name] = "supported" if supported else "not supported by this CPU"
        if supported and not automatic:
            states[name] += ", only by SPARSEKERN_CPU_ISA"
    return {"isa": isa, "isa_chosen": chosen, "isas": states}


def cpu_model() -> str:
    """The processor's name as the system gives it, the architecture where it gives none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/sparsekern, by default ~/.cache/sparsekern."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsekern"


def native_module() -> Any:
    """The compiled module, typed Any because a type checker cannot see into it; None where it is not built."""
    try:
        return importlib.import_module("sparsekern._native")
    except ImportError:
        return None


def _op_backend(name: str) -> str:
    if ops.CPU_KERNELS_MISSING:
        return f"reference: {ops.CPU_KERNELS_MISSING}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{name}", "CPU"):
        return "reference: no instruction set is in use (isa_chosen says why)"
    return "cpu"


def _gpu() -> list[dict[str, Any]] | str:
    if not torch.cuda.is_available():
        return "none: this torch is built without CUDA" if torch.version.cuda is None else "none: no device is visible"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": device.name, "capability": f"{device.major}.{device.minor}"} for device in devices]
