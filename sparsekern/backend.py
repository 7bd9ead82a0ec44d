"""What computes: the choice of ``backend`` that every function and layer makes (:func:`resolve`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch

from . import ops, triton

Backend = Literal["auto", "cpu", "triton", "dense", "reference"]
Runs = Literal["cpu", "triton", "dense", "reference"]  # what "auto" can end in

BACKENDS: tuple[str, ...] = get_args(Backend)
OF_CONVOLUTIONS = tuple(name for name in BACKENDS if name != "triton")

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does; that would import torch's compiler here."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def resolve(
    backend: Backend, device_type: str, dtype: torch.dtype, blocksize: tuple[int, int], convolution: bool = False
) -> Runs:
    """What ``backend`` means for tensors of that device type and dtype; only "auto" leaves a choice.

    Raises:
        ValueError: an unknown backend, or one without kernels for these tensors.
        RuntimeError: "cpu" and no kernels are built, or "triton" and Triton cannot run here.
    """
    if backend == "reference" or backend == "dense":
        return backend
    if backend == "auto":
        return automatic(device_type, dtype, blocksize, convolution)[0]
    known = OF_CONVOLUTIONS if convolution else BACKENDS
    if backend not in known:
        *names, last = (f'"{name}"' for name in known)
        what = " for a convolution" if convolution else ""
        raise ValueError(f"backend must be {', '.join(names)} or {last}{what}, got {backend!r}")
    if backend == "triton":
        # What no machine can do comes first: nobody should look for a GPU in vain.
        refused = triton.supports(blocksize, dtype)
        if refused:
            raise ValueError(f'backend="triton" has no kernel for these tensors: {refused}')
        missing = triton_missing()
        if missing:
            raise RuntimeError(f'backend="triton" cannot run here: {missing}')
        if device_type != "cuda" and device_type != _triton_device():
            raise ValueError(f'backend="triton" needs tensors on a GPU, got x on {device_type}')
        return "triton"
    if ops.CPU_KERNELS_MISSING:
        raise RuntimeError(f'backend="cpu" needs the compiled kernels: {ops.CPU_KERNELS_MISSING}')
    if device_type != "cpu":
        raise ValueError(f'backend="cpu" needs tensors on the CPU, got x on {device_type}')
    return "cpu"


def automatic(
    device_type: str, dtype: torch.dtype, blocksize: tuple[int, int], convolution: bool = False
) -> tuple[Runs, str | None]:
    """What "auto" means for a function, and why that is not the sparse kernels (None where it is).

    On GPUs, NVIDIA's and AMD's, the kernels of Triton, or torch's dense product where there are none. Elsewhere the
    kernels of the CPU, or "reference" where there are none.
    """
    if device_type == "cuda":  # torch's name for AMD's, too
        if convolution:
            return "dense", "convolutions have no GPU kernels yet"
        reason = triton_missing() or triton.supports(blocksize, dtype)
        return ("dense", reason) if reason else ("triton", None)
    if device_type != "cpu":
        return "reference", None if device_type == "meta" else f"there are no kernels for {device_type} devices"
    return ("reference", ops.CPU_KERNELS_MISSING) if ops.CPU_KERNELS_MISSING else ("cpu", None)


@constant_in_graphs
def triton_missing() -> str | None:
    return triton.missing()


@constant_in_graphs
def _triton_device() -> str:
    return ops.triton_device()
