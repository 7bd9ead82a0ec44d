"""Block-sparse products on GPUs. Triton itself is imported by ``linear.py``, when a layer first runs on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache

import torch

from . import model
from .plan import SIDES

OLDEST = (3, 6)  # what torch 2.10 brings
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why Triton can't be used here, or None."""
    # Not by the name of a distribution: torch's builds for AMD, and its nightly ones, bring Triton under others.
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without GPUs"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if reason := _too_old():
        return reason
    version: str = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


def _too_old() -> str | None:
    """Why this GPU is none that the kernels are compiled for in the tests, or None."""
    if torch.version.hip:
        arch: str = torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
        return None if arch in ("gfx942", "gfx950") else f"this GPU is {arch}; the kernels are for CDNA3 and later"
    major, minor = torch.cuda.get_device_capability(0)
    return None if major >= 8 else f"this GPU is sm_{major}{minor}; the kernels need Ampere (sm_80) or later"


def supports(blocksize: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why the kernels can't compute with such blocks and numbers, or None."""
    if any(side not in SIDES for side in blocksize):
        return f"blocks of {blocksize[0]}x{blocksize[1]}: tensor cores need sides of {', '.join(map(str, SIDES))}"
    if dtype not in DTYPES:
        return f"{dtype}: only {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    return None


@lru_cache(maxsize=1)
def gpu() -> model.Gpu | None:
    """The GPU by whose data sheet times are modelled here; None where there is none of NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    return model.A100 if torch.cuda.get_device_capability()[0] < 9 else model.H100


def too_dense(blocksize: tuple[int, int], shape: tuple[int, int], density: float) -> str | None:
    """Why a dense product is expected to be faster than the kernels, or None: the smaller the blocks, the sooner.

    Weighed in 16 bits whatever the type of the values: autocast computes in those, and a layer cannot know.
    """
    known = gpu()
    if known is None:
        return None
    dense, sparse = model.expected(known, "bfloat16", shape, blocksize, density)
    if sparse <= dense:
        return None
    size = "x".join(map(str, blocksize))
    return f"blocks of {size} at this density are slower than dense, by a model of {known.name} (not measured)"
