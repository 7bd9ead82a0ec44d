"""What a layer will cost, dense or sparse, before it runs: :func:`choose`, on which ``backend="auto"`` rests.

A small model (``model.py``) predicts seconds on one thread of the CPU from coefficients (``table.py``) that
``sparsekern calibrate`` measures (``calibrate.py``); ``sparsekern advise`` shows its predictions (``advise.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import triton
from ..backend import Runs, automatic
from ..plan import Kernel
from .model import Work
from .table import Table, current

# The batch that a choice is made for. A choice must not depend on the batch: a layer has one backend for all of them.
ROWS = 128  # of a linear layer's input
IMAGES, SIDE = 32, 16  # of a convolution's output; its stride is taken to be 1
NOMINAL = f"{ROWS} rows or {IMAGES} images of {SIDE}x{SIDE}"


class Choice(NamedTuple):
    """What is to compute, and the predicted seconds of a training step at the batch above; None where not modelled."""

    backend: Runs
    why: str | None = None  # not the sparse kernels, though they are not expected to be slower than dense
    seconds: float | None = None  # of what is chosen
    dense_layer: float | None = None  # of torch's own layer


def choose(
    device_type: str,
    dtype: torch.dtype,
    blocksize: tuple[int, int],
    shape: tuple[int, int],
    density: float,
    kernel: Kernel | None = None,
    table: Table | None = None,
) -> Choice:
    """What ``backend="auto"`` means for a layer: a pure function of these arguments, fit to be called for every layer.

    "dense" where the model expects torch's dense products, the writing of the dense weight included, to be faster for a
    training step (forward, and both products of the backward) at a nominal batch: 128 rows for a linear layer, 32
    images of 16 x 16 pixels for a convolution. Threads do not matter: all times are those of one.

    float32 on the CPU is modelled, without groups. For everything else the kernels are chosen where they exist; where
    they do not, "dense" on GPUs and "reference" elsewhere, with the reason. On NVIDIA's GPUs also "dense" where the
    layer is too dense for its blocks, by :func:`sparsekern.triton.model.expected`: data sheets, not measurements, and
    16-bit types, in which autocast computes.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: of the values.
        blocksize, shape, density: of the pattern; ``shape`` is that of the weight as a matrix.
        kernel: (kh, kw, groups) of a convolution, None for a linear layer.
        table: coefficients; by default those of this machine's calibration, or else the ones that come with the package
            (:func:`sparsekern.cost.table.current`).
    """
    backend, why = automatic(device_type, dtype, blocksize, kernel is not None)
    if backend == "triton" and all(shape):
        why = triton.too_dense(blocksize, shape, density)
        return Choice("dense" if why else "triton", why)
    modelled = dtype == torch.float32 and all(shape) and (kernel is None or kernel[2] == 1)
    if backend != "cpu" or not modelled:
        return Choice(backend, why)
    table = table or current()
    work = nominal(shape, kernel)
    layer = table.predict(work.dense())
    dense, sparse = layer + table.predict(work.scatter(density)), table.predict(work.sparse(blocksize, density))
    return Choice("dense", None, dense, layer) if dense < sparse else Choice("cpu", None, sparse, layer)


def nominal(shape: tuple[int, int], kernel: Kernel | None) -> Work:
    """A layer at the batch that choices are made for."""
    outputs, columns = shape
    if kernel is None:
        return Work.linear(outputs, columns, ROWS)
    side, inputs = (SIDE, SIDE), columns // (kernel[0] * kernel[1])
    return Work.conv2d(outputs, inputs, kernel[:2], IMAGES, side, side, strided=False)
