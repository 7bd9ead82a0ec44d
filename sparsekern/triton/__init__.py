"""Block-sparse products on GPUs. Triton itself is imported by ``linear.py``, when a layer first runs on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache

import torch

OLDEST = (3, 6)  # what torch 2.10 brings
SIDES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why Triton can't be used here, or None."""
    # Not by the name of a distribution: torch's builds for AMD, and its nightly ones, bring Triton under others.
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    version: str = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


def supports(blocksize: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why the kernels can't compute with such blocks and numbers, or None."""
    if any(side not in SIDES for side in blocksize):
        return f"blocks of {blocksize[0]}x{blocksize[1]}: tensor cores need sides of {', '.join(map(str, SIDES))}"
    if dtype not in DTYPES:
        return f"{dtype}: only {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    return None
