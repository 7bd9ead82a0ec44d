"""Small Triton kernels whose PTX the emulator's own tests run and damage."""

import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C[M, N] = A[M, K] B[K, N], pointers and masks: cp.async, ldmatrix, mma.sync (sm_80) or wgmma (sm_90)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rows[:, None] * K + (k + inner)[None, :], mask=rows[:, None] < M, other=0.0)
        y = tl.load(b + (k + inner)[:, None] * N + columns[None, :], mask=columns[None, :] < N, other=0.0)
        sums = tl.dot(x, y, sums)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], sums.to(c.dtype.element_ty), mask=mask)


@triton.jit
def matmul_tma(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same with tensor descriptors: TMA loads and stores, mbarriers (sm_90)."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        sums = tl.dot(a.load([row, k]), b.load([k, column]), sums)
    c.store([row, column], sums.to(tl.float16))


@triton.jit
def softmax_atomic(x, y, total, N, B: tl.constexpr):
    """A softmax over one row, reductions across warps, and an atomic sum."""
    i = tl.arange(0, B)
    v = tl.load(x + i, mask=i < N, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    s = tl.sum(e, 0)
    tl.store(y + i, e / s, mask=i < N)
    tl.atomic_add(total, s)


@triton.autotune([triton.Config({"B": 32}, num_warps=1), triton.Config({"B": 256}, num_warps=4)], key=["N"])
@triton.jit
def scale(x, y, factor, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < N) * factor, mask=i < N)
