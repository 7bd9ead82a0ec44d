"""The three products of a linear layer, launched. Patterns and plans are trusted: ``functional.py`` is the way in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import kernels
from .plan import Launch, Product, launch
from .tuning import DECODE_TOKENS, PROGRAMS, Config, Kind, choose_config

WGRAD_PROGRAMS, WGRAD_TOKENS = 512, 512  # programs wanted at least, and tokens that make a chunk worth one


def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    out_features: int,
    allow_tf32: bool,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """act(X W^T + bias + residual): [*, in] -> [*, out].

    Args:
        x: [*, in], any strides, float16, bfloat16 or float32; ``values``, ``bias`` and ``residual`` have its dtype.
        values: [nnz_blocks, bh, bw].
        bias: [out] or None.
        crow_indices, col_indices: not read, the plan holds them.
        plan: ``make_plan(pattern, "forward")``.
        allow_tf32: float32 products may round their factors to TF32.
        activation: "none", "relu" or "gelu" (of the exact error function).
        residual: [*, out], any strides, or None.
    """
    y = x.new_empty((*x.shape[:-1], out_features))
    bh, bw = values.shape[1:]
    _gather(x, values, bias, residual, y, plan, (bh, bw), False, allow_tf32, activation)
    return y


def linear_dgrad(
    grad_output: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    in_features: int,
    allow_tf32: bool,
) -> Tensor:
    """dY W: [*, out] -> [*, in]; the plan is ``make_plan(pattern, "dgrad")``, the rest as in :func:`linear`."""
    y = grad_output.new_empty((*grad_output.shape[:-1], in_features))
    bh, bw = values.shape[1:]
    _gather(grad_output, values, None, None, y, plan, (bw, bh), True, allow_tf32, "none")
    return y


def linear_wgrad(
    grad_output: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    blocksize: Sequence[int],
    bias: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """dY^T X at the stored blocks, and the sum of dY over tokens if ``bias``: -> [nnz_blocks, bh, bw], [out] or [0].

    The plan is ``make_plan(pattern, "wgrad")``. Entries that overhang the edge are 0.
    """
    bh, bw = blocksize
    dvalues = x.new_empty((col_indices.shape[0], bh, bw))
    dbias = x.new_empty(grad_output.shape[-1] if bias else 0)
    x, grad = _matrix(x), _matrix(grad_output)
    tokens, (strips, width) = x.shape[0], plan.shape
    if tokens == 0:
        return dvalues.zero_(), dbias.zero_()
    kind = _kind(x, allow_tf32)
    config = choose_config("wgrad", (bh, bw), tokens, kind, _arch(), width - 2)
    with torch.cuda.device_of(x):
        if strips:
            chunks, chunk = _chunks(tokens, strips, config.tile_t)
            sums = dvalues if chunks == 1 else x.new_empty((chunks, *dvalues.shape), dtype=torch.float32)
            kernels.sampled[(strips, chunks)](
                grad, x, sums, plan, tokens, grad.shape[1], x.shape[1], *grad.stride(), *x.stride(), chunk,
                dvalues.numel(), BLOCK_N=bh, BLOCK_K=bw, STRIP=width - 2, PRECISION=_precision(kind),
                TILE_T=config.tile_t, GRAD_ALIGN=_align(grad), X_ALIGN=_align(x), SINGLES=_singles(kind),
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            _add_chunks(sums, dvalues)
        if dbias.numel():
            tile_n, tile_t = 64, 32
            programs = triton.cdiv(grad.shape[1], tile_n)
            chunks, chunk = _chunks(tokens, programs, tile_t)
            sums = dbias if chunks == 1 else x.new_empty((chunks, *dbias.shape), dtype=torch.float32)
            kernels.sum_tokens[(programs, chunks)](
                grad, sums, tokens, grad.shape[1], *grad.stride(), chunk, TILE_N=tile_n, TILE_T=tile_t
            )
            _add_chunks(sums, dbias)
    return dvalues, dbias


def _gather(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    plan: Tensor,
    blocksize: tuple[int, int],
    transposed: bool,
    allow_tf32: bool,
    activation: str,
) -> None:
    """``blocksize`` is (along the outputs, along the inputs) of the product at hand."""
    if y.numel() == 0:
        return
    x, values, rows = _matrix(x), values.contiguous(), y.shape[-1]
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _matrix(residual)
    residual_strides = (0, 0) if residual is None else residual.stride()
    tokens, columns = x.shape
    group, kind = plan.shape[0], _kind(x, allow_tf32)
    stored = blocksize[::-1] if transposed else blocksize
    todo: Launch = launch(plan.shape, rows, blocksize, values.shape[0], tokens <= DECODE_TOKENS)
    product: Product = "dgrad" if transposed else "forward"
    config: Config = choose_config(product, stored, tokens, kind, _arch(), group, min(todo.units, PROGRAMS))
    tile_n = blocksize[0] * group
    partial = x.new_empty((todo.slots, tokens, tile_n), dtype=torch.float32) if todo.slots else None
    tiles = triton.cdiv(tokens, config.tile_t)
    with torch.cuda.device_of(x):
        kernels.gather[(tiles * todo.units,)](
            x, values, bias, residual, y, partial, plan, tokens, columns, rows, *x.stride(), *residual_strides,
            todo.units, todo.units_at, todo.entries_at,
            BLOCK_N=blocksize[0], BLOCK_K=blocksize[1], GROUP=group, TRANSPOSED=transposed, ACTIVATION=activation,
            PRECISION=_precision(kind), TILE_T=config.tile_t, TILE_K=config.tile_k, ORDER=config.order,
            X_ALIGN=_align(x), Y_ALIGN=math.gcd(rows, 16), SINGLES=_singles(kind), num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        if todo.reductions:
            tile_t = 16
            # In one dimension: the second of a grid ends at 65,535.
            kernels.add_parts[(todo.reductions * triton.cdiv(tokens, tile_t),)](
                partial, bias, residual, y, plan, tokens, rows, *residual_strides, todo.reductions_at,
                TILE_N=tile_n, ACTIVATION=activation, TILE_T=tile_t,
            )  # fmt: skip


def _chunks(tokens: int, programs: int, tile_t: int) -> tuple[int, int]:
    """Number of chunks, and tokens in each (a multiple of ``tile_t``): by shape alone, so that sums repeat."""
    chunks = max(min(triton.cdiv(WGRAD_PROGRAMS, programs), triton.cdiv(tokens, WGRAD_TOKENS)), 1)
    chunk = triton.cdiv(triton.cdiv(tokens, chunks), tile_t) * tile_t
    return triton.cdiv(tokens, chunk), chunk


def _add_chunks(sums: Tensor, out: Tensor) -> None:
    if sums is not out:
        tile = 1024
        size = out.numel()
        kernels.add_chunks[(triton.cdiv(size, tile),)](sums, out, size, sums.shape[0], TILE=tile)


def _matrix(x: Tensor) -> Tensor:
    """[*, features] as [tokens, features]: a view where strides allow one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _align(x: Tensor) -> int:
    """A divisor of the length of rows and of the distance between them, where their entries are neighbours."""
    return math.gcd(x.shape[1], x.stride(0), 16) if x.stride(1) == 1 else 1


def _kind(x: Tensor, allow_tf32: bool) -> Kind:
    if x.dtype == torch.float32:
        return "tf32" if allow_tf32 else "float32"
    return "float16" if x.dtype == torch.float16 else "bfloat16"


def _singles(kind: Kind) -> bool:
    """Whether tiles whose rows are not what is summed over are to be copied element by element.

    Hopper's matrix instructions want TF32 with the summed dimension innermost, so the copy transposes and can't be made
    of vectors. Triton would still give neighbouring elements to one thread, and each warp touch 4 times the sectors.
    """
    arch = _arch()
    return kind == "tf32" and isinstance(arch, int) and arch >= 90


def _precision(kind: Kind) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def _arch() -> int | str:
    arch: int | str = triton.runtime.driver.active.get_current_target().arch
    return arch
