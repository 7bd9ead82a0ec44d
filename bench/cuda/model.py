"""The package's model of GPUs (``sparsekern/triton/model.py``), asked about the very patterns that are timed here."""

from __future__ import annotations

import torch

from sparsekern.pattern import BlockPattern
from sparsekern.triton import model
from sparsekern.triton.model import Gpu, Times, itemsize
from sparsekern.triton.plan import Product, make_plan
from sparsekern.triton.tuning import Kind

from .cases import Case


def floor(gpu: Gpu, case: Case, density: float, kind: Kind, nnz_blocks: int = 0) -> float:
    """Seconds that no kernel can undercut at the data sheet's rates: arithmetic, or every number moved once."""
    t, n, k, size = case.tokens, case.outputs, case.inputs, itemsize(kind)
    moved = size * (t * k + density * n * k + t * n) + 4 * nnz_blocks
    return max(2 * t * n * k * density / gpu.flops[kind], moved / gpu.memory)


def predict(gpu: Gpu, case: Case, pattern: BlockPattern, product: Product, kind: Kind) -> Times:
    """Seconds that the product takes of each resource; their maximum is the modelled time."""
    if product == "wgrad":
        strips, columns = make_plan(pattern, "wgrad").shape
        return model.sampled(
            gpu, kind, case.tokens, pattern.shape, pattern.blocksize, columns - 2, strips, pattern.nnz_blocks
        )
    wanted = pattern if product == "forward" else pattern.transposed()[0]
    group = make_plan(pattern, product, balance=gpu.balance).shape[0]
    entries = int(torch.unique(wanted.block_rows() // group * wanted.grid[1] + wanted.col_indices).numel())
    return model.gather(
        gpu, kind, product, case.tokens, wanted.shape, wanted.blocksize, group, entries, wanted.nnz_blocks
    )


def dense(gpu: Gpu, case: Case, kind: Kind) -> Times:
    """The same for a dense product by a kernel like ours."""
    return model.dense(gpu, kind, case.tokens, (case.outputs, case.inputs))


def binding(times: Times) -> str:
    """The resource that takes longest."""
    return max(times, key=lambda name: times[name])
