"""Warp-wide and matrix instructions against explicit loops over the tables of the PTX ISA."""

import numpy as np
import pytest
from emulator import launch
from ptx_text import evaluate, fill_shared, kernel, run

RNG = np.random.default_rng(1)
LANES = range(32)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("distance", [0, 1, 5, 16])
def test_shfl(mode: str, width: int, distance: int) -> None:
    """__shfl_*_sync of CUDA, whose definition is in terms of segments of `width` lanes."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    value = RNG.integers(0, 2**32, 64, np.uint32)
    body = f"shfl.sync.{mode}.b32 %r30|%p1, %r10, {distance}, {clamp}, -1;\nselp.b32 %r31, 1, 0, %p1;"
    got, valid = evaluate(body, [value], [np.uint32] * 2)
    for warp in range(2):
        for lane in LANES:
            segment = lane // width * width
            other = {
                "up": lane - distance,
                "down": lane + distance,
                "bfly": lane ^ distance,
                "idx": segment + distance % width,
            }[mode]
            inside = other >= segment if mode == "up" else other < segment + width
            assert bool(valid[warp * 32 + lane]) == inside
            assert got[warp * 32 + lane] == value[warp * 32 + (other if inside else lane)]


def test_votes_and_reductions() -> None:
    x = np.concatenate([np.arange(32), np.full(32, 7), np.zeros(32)]).astype(np.int32) - 3
    body = """setp.gt.s32 %p1, %r10, 0;
    vote.sync.ballot.b32 %r30, %p1, -1;
    vote.sync.all.pred %p2, %p1, -1;  selp.b32 %r31, 1, 0, %p2;
    vote.sync.any.pred %p2, !%p1, -1; selp.b32 %r32, 1, 0, %p2;
    vote.sync.uni.pred %p2, %p1, -1;  selp.b32 %r33, 1, 0, %p2;
    redux.sync.add.s32 %r34, %r10, -1;
    redux.sync.min.s32 %r35, %r10, -1;
    match.any.sync.b32 %r36, %r10, -1;
    elect.sync %r37|%p3, -1; selp.b32 %r38, 1, 0, %p3;"""
    ballot, every, some_not, uniform, total, least, same, _, elected = evaluate(
        body.replace("match.any.sync", "match.sync.any"), [x], [np.uint32] * 9
    )
    for warp in range(3):
        part = slice(32 * warp, 32 * warp + 32)
        positive = x[part] > 0
        assert ballot[part].tolist() == [sum(1 << i for i in LANES if positive[i])] * 32
        assert (
            every[part].tolist() == [int(positive.all())] * 32
            and some_not[part].tolist() == [int((~positive).any())] * 32
        )
        assert uniform[part].tolist() == [int(positive.all() or not positive.any())] * 32
        assert (
            total[part].view(np.int32).tolist() == [x[part].sum()] * 32
            and least[part].view(np.int32).tolist() == [x[part].min()] * 32
        )
        assert same[part].tolist() == [sum(1 << j for j in LANES if x[part][j] == x[part][i]) for i in LANES]
        assert elected[part].sum() == 1


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count: int, transpose: str) -> None:
    """Rows in a shuffled order, so that addresses matter."""
    data = RNG.integers(0, 2**16, (4 * 8, 8), np.uint16)
    order = RNG.permutation(32).astype(np.uint32)
    got, back = np.zeros((count, 32, 2), np.uint16), np.zeros((32, 8), np.uint16)
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    body = f"""{fill_shared("%d0", 512, 32)}
    mad.wide.u32 %d10, %r0, 4, %d1; ld.global.b32 %r3, [%d10];
    mov.u32 %r4, smem; mad.lo.u32 %r5, %r3, 16, %r4;
    ldmatrix.sync.aligned.m8n8.x{count}{transpose}.shared.b16 {{{registers}}}, [%r5];
    mad.wide.u32 %d11, %r0, 4, %d2;
    {"".join(f"st.global.b32 [%d11+{128 * k}], %r{10 + k};" for k in range(count))}
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x{count}{transpose}.shared.b16 [%r5], {{{registers}}};
    bar.sync 0;
    mad.lo.u32 %r6, %r0, 16, %r4; mad.wide.u32 %d12, %r0, 16, %d3;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r6]; st.global.v4.b32 [%d12], {{%r20, %r21, %r22, %r23}};"""
    run(body, [data, order, got, back], shared=512)
    for k in range(count):
        matrix = data[order[8 * k : 8 * k + 8]]
        matrix = matrix.T if transpose else matrix
        for lane in LANES:
            for half in range(2):
                assert got[k, lane, half] == matrix[lane // 4, lane % 4 * 2 + half]
    np.testing.assert_array_equal(back, data)  # what was read goes back to where it was


def encode(x: np.ndarray, element: str) -> np.ndarray:
    if element == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return bits if element == "tf32" else (bits >> 16).astype(np.uint16)


def small_numbers(*shape: int) -> np.ndarray:
    """Multiples of 1/4: exact in every format, and so are their products and sums."""
    return RNG.integers(-8, 9, shape) / 4


MMA = [(8, "f16"), (16, "f16"), (8, "bf16"), (16, "bf16"), (4, "tf32"), (8, "tf32")]


@pytest.mark.parametrize("k, element", MMA)
def test_mma_fragments(k: int, element: str) -> None:
    """The fragment tables of "Matrix fragments for mma.m16n8k*" of the PTX ISA, element by element, in two warps."""
    per = 1 if element == "tf32" else 2  # elements per register
    quarter = 4 * per
    a, b, c = small_numbers(2, 16, k), small_numbers(2, k, 8), small_numbers(2, 16, 8).astype(np.float32)
    a_bits, b_bits = encode(a, element), encode(b, element)
    dtype = a_bits.dtype
    a_registers, b_registers = k // (2 * per), k // quarter
    a_registers = 2 * b_registers
    A, B = np.zeros((a_registers, 64, per), dtype), np.zeros((b_registers, 64, per), dtype)
    C = np.zeros((4, 64), np.float32)
    for warp in range(2):
        for lane in LANES:
            group, thread = lane >> 2, lane % 4
            for i in range(a_registers * per):
                row = group + 8 * ((i // per) % 2)
                column = thread * per + i % per + quarter * (i // (2 * per))
                A[i // per, warp * 32 + lane, i % per] = a_bits[warp, row, column]
            for i in range(b_registers * per):
                B[i // per, warp * 32 + lane, i % per] = b_bits[
                    warp, thread * per + i % per + quarter * (i // per), group
                ]
            for i in range(4):
                C[i, warp * 32 + lane] = c[warp, group + 8 * (i // 2), 2 * thread + i % 2]
    D = np.zeros((4, 64), np.float32)
    names = [
        [f"%r{base + i}" for i in range(n)] for base, n in ((10, a_registers), (20, b_registers), (30, 4), (40, 4))
    ]
    loads = "".join(
        f"mad.wide.u32 %d10, %r0, 4, %d{p}; "
        + "".join(f"ld.global.b32 {r}, [%d10+{256 * i}];\n" for i, r in enumerate(names[p]))
        for p in range(3)
    )
    text = [f"{{{', '.join(x)}}}" for x in names]
    body = f"""{loads}
    mma.sync.aligned.m16n8k{k}.row.col.f32.{element}.{element}.f32 {text[3]}, {text[0]}, {text[1]}, {text[2]};
    mad.wide.u32 %d10, %r0, 4, %d3;
    {"".join(f"st.global.b32 [%d10+{256 * i}], {r};" for i, r in enumerate(names[3]))}"""
    counters = run(body, [A, B, C, D], block=64)
    assert counters.mma == {f"m16n8k{k}.{element}": 2} and counters.mma_flops == 2 * 2 * 16 * 8 * k
    want = np.matmul(a, b) + c
    for warp in range(2):
        for lane in LANES:
            for i in range(4):
                assert D[i, warp * 32 + lane] == want[warp, (lane >> 2) + 8 * (i // 2), 2 * (lane % 4) + i % 2]


def shared_image(x: np.ndarray, mn_major: bool, swizzle: int) -> tuple[np.ndarray, int, int]:
    """Bytes of a wgmma operand x[mn, k] in shared memory, and the descriptor's leading and stride byte offsets.

    "Shared memory matrix layout" of the PTX ISA: 8 rows of `swizzle` bytes make an atom, in which 16-byte chunk j of
    row r lies in place j ^ (r * swizzle / 128); without swizzle an atom is a core matrix of 8 rows of 16 bytes.
    """
    size, (mn, k) = x.itemsize, x.shape
    span = swizzle or 16
    image = np.zeros(x.nbytes, np.uint8)
    atom = 8 * span
    per = span // size  # elements of an atom's row
    for i in range(mn):
        for j in range(k):
            major, minor = (j, i) if mn_major else (i, j)  # rows of atoms, position along a row
            minors = (mn if mn_major else k) // per
            r, byte = major % 8, minor % per * size
            chunk = byte // 16 ^ (r * swizzle // 128 if swizzle else 0)
            place = (major // 8 * minors + minor // per) * atom + r * span + chunk * 16 + byte % 16
            image[place : place + size] = x[i, j : j + 1].view(np.uint8)
    minors = (mn if mn_major else k) // per
    step_minor, step_major = atom, atom * minors
    if swizzle or not mn_major:
        return image, step_minor, step_major
    return image, step_major, step_minor  # unswizzled MN-major: the leading offset is along k


def descriptor(address: int, leading: int, stride: int, swizzle: int) -> int:
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {0: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62


WGMMA = [
    (e, n, s, ma, mb)
    for e in ("f16", "tf32")
    for n in (8, 64)
    for s in (0, 32, 64, 128)
    for ma, mb in ((0, 0), (1, 0), (0, 1))
]
WGMMA = [case for case in WGMMA if not (case[0] == "tf32" and (case[3] or case[4]))]  # tf32 is always K-major


@pytest.mark.parametrize("element, n, swizzle, mn_a, mn_b", [c for c in WGMMA if not (c[4] and c[1] * 2 < c[2])])
def test_wgmma_layouts(element: str, n: int, swizzle: int, mn_a: int, mn_b: int) -> None:
    """D = A B + D for k = two atoms' rows: operands laid out by an independent formula, results by the ISA's table."""
    size = 4 if element == "tf32" else 2
    k = max(32, swizzle) // size
    step = 32 // size
    a, b, d = small_numbers(64, k), small_numbers(n, k), small_numbers(64, n).astype(np.float32)
    images = [shared_image(encode(x, element), bool(m), swizzle) for x, m in ((a, mn_a), (b, mn_b))]
    start_b = -(-len(images[0][0]) // 1024) * 1024
    total = -(-(start_b + len(images[1][0])) // 2048) * 2048
    memory = np.zeros(total, np.uint8)
    memory[: len(images[0][0])], memory[start_b : start_b + len(images[1][0])] = images[0][0], images[1][0]
    registers = [f"%r{20 + i}" for i in range(n // 2)]
    fragments = np.zeros((n // 2, 128), np.float32)
    for t in range(128):
        for i in range(n // 2):
            row, column = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), i // 4 * 8 + t % 4 * 2 + i % 2
            fragments[i, t] = d[row, column]
    out = np.zeros_like(fragments)
    steps = []
    for s in range(k // step):
        descriptors = []
        for (_, leading, stride), mn, start in zip(images, (mn_a, mn_b), (0, start_b), strict=True):
            rows = s * step // 8 * (stride if swizzle else leading)  # the next rows of k
            shift = rows if mn else s * (32 if swizzle else 2 * leading)  # or the next 32 bytes of each row
            descriptors.append(descriptor(start + shift, leading, stride, swizzle))
        steps.append(
            f"mov.u64 %d20, {descriptors[0]}; mov.u64 %d21, {descriptors[1]};\n"
            f"wgmma.mma_async.sync.aligned.m64n{n}k{step}.f32.{element}.{element} {{{', '.join(registers)}}},"
            " %d20, %d21, 1, 1, 1" + (f", {mn_a}, {mn_b};" if size == 2 else ";")
        )
    body = f"""{fill_shared("%d0", total, 128)}
    mad.wide.u32 %d10, %r0, 4, %d1; mad.wide.u32 %d11, %r0, 4, %d2;
    {"".join(f"ld.global.b32 {r}, [%d10+{512 * i}];" for i, r in enumerate(registers))}
    wgmma.fence.sync.aligned;
    {"".join(steps)}
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    {"".join(f"st.global.b32 [%d11+{512 * i}], {r};" for i, r in enumerate(registers))}"""
    counters = run(body, [memory, fragments, out], block=128, shared=total)
    assert counters.mma == {f"m64n{n}k{step}.{element}": k // step}
    want = a @ b.T + d
    for t in range(128):
        for i in range(n // 2):
            row, column = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), i // 4 * 8 + t % 4 * 2 + i % 2
            assert out[i, t] == want[row, column]


def test_wgmma_with_a_in_registers_and_scales() -> None:
    """A in registers (bf16), D overwritten (scale-d 0), A negated."""
    a, b = small_numbers(64, 16), small_numbers(8, 16)
    image, leading, stride = shared_image(encode(b, "bf16"), False, 32)
    A, out = np.zeros((4, 128, 2), np.uint16), np.zeros((4, 128), np.float32)
    for t in range(128):
        for i in range(8):
            row, column = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), t % 4 * 2 + i % 2 + 8 * (i // 4)
            A[i // 2, t, i % 2] = encode(a, "bf16")[row, column]
    memory = np.zeros(2048, np.uint8)
    memory[: len(image)] = image
    body = f"""{fill_shared("%d0", 2048, 128)}
    mad.wide.u32 %d10, %r0, 4, %d1; mad.wide.u32 %d11, %r0, 4, %d2;
    {"".join(f"ld.global.b32 %r{10 + i}, [%d10+{512 * i}]; mov.b32 %r{20 + i}, 0f7FC00000;" for i in range(4))}
    mov.u64 %d20, {descriptor(0, leading, stride, 32)}; setp.ne.b32 %p1, 0, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}}, %d20, %p1, -1, 1, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    {"".join(f"st.global.b32 [%d11+{512 * i}], %r{20 + i};" for i in range(4))}"""
    run(body, [memory, A, out], block=128, shared=2048)
    want = -(a @ b.T)
    for t in range(128):
        for i in range(4):
            assert out[i, t] == want[t // 32 * 16 + t % 32 // 4 + 8 * (i // 2), t % 4 * 2 + i % 2]


def test_atomics() -> None:
    """Threads meet at addresses; every kind is compared with Python."""
    values = RNG.integers(0, 1000, 64).astype(np.int32)
    where = (np.arange(64) % 5).astype(np.uint32)
    body = """mad.wide.u32 %d10, %r0, 4, %d0; ld.global.b32 %r2, [%d10];
    mad.wide.u32 %d10, %r0, 4, %d1; ld.global.b32 %r3, [%d10];
    mad.wide.u32 %d11, %r3, 4, %d2;  mad.wide.u32 %d12, %r3, 4, %d3; mad.wide.u32 %d13, %r3, 4, %d4;
    atom.global.gpu.acq_rel.add.u32 %r4, [%d11], %r2;
    red.global.gpu.relaxed.max.s32 [%d12], %r2;
    cvt.rn.f32.s32 %r5, %r2;
    red.global.add.f32 [%d13], %r5;
    mad.wide.u32 %d10, %r0, 4, %d5; st.global.b32 [%d10], %r4;"""
    total, most, floats, before = (
        np.zeros(5, np.int32),
        np.zeros(5, np.int32),
        np.zeros(5, np.float32),
        np.zeros(64, np.int32),
    )
    launch(kernel(body, pointers=6), (1,), (64,), [values, where, total, most, floats, before])
    for place in range(5):
        mine = values[where == place]
        assert total[place] == mine.sum() == floats[place] and most[place] == mine.max()
        assert sorted(before[where == place]) == sorted(np.cumsum(mine) - mine)


def test_compare_and_swap() -> None:
    lock, got = np.int32([5]), np.zeros(32, np.int32)
    run("mad.wide.u32 %d2, %r0, 4, %d1; atom.global.cas.b32 %r2, [%d0], 5, 9; st.global.b32 [%d2], %r2;", [lock, got])
    assert lock[0] == 9 and sorted(got) == [5] + [9] * 31


def test_vector_atomics() -> None:
    sums, before = np.zeros(4, np.float32), np.zeros((32, 4), np.float32)
    body = """mov.b32 %r10, 0f3F800000; mov.b32 %r11, 0f40000000; mov.b32 %r12, 0f40400000; mov.b32 %r13, 0f40800000;
    atom.global.gpu.acq_rel.add.v4.f32 {%r20, %r21, %r22, %r23}, [%d0], {%r10, %r11, %r12, %r13};
    mad.wide.u32 %d5, %r0, 16, %d1; st.global.v4.b32 [%d5], {%r20, %r21, %r22, %r23};"""
    run(body, [sums, before])
    assert sums.tolist() == [32, 64, 96, 128]
    assert sorted(before[:, 3]) == [4 * i for i in LANES]
