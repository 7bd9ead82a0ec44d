"""Asynchronous copies: cp.async, mbarrier phases, TMA boxes; and the counters of memory accesses."""

import numpy as np
import pytest
from emulator import EmulatorError, Pointer, TensorMap, launch
from ptx_text import kernel, run

RNG = np.random.default_rng(2)


@pytest.mark.parametrize("size, kind", [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_cp_async_fills_with_zeros(size: int, kind: str) -> None:
    """Each thread copies a different number of bytes; the rest of its piece is zero."""
    data = RNG.integers(1, 255, (32, size), np.uint8)
    given = (np.arange(32) % (size + 1)).astype(np.uint32)
    out = np.full_like(data, 77)
    piece = {4: "b32 %r20", 8: "b64 %d20", 16: "v2.b64 {%d20, %d21}"}[size]
    kind_of, _, value = piece.partition(" ")
    run(
        f"""mad.wide.u32 %d10, %r0, {size}, %d0; mad.wide.u32 %d11, %r0, 4, %d1; ld.global.b32 %r3, [%d11];
        mov.u32 %r4, smem; mad.lo.u32 %r4, %r0, {size}, %r4;
        cp.async.{kind}.shared.global [%r4], [%d10], {size}, %r3;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.{kind_of} {value}, [%r4]; mad.wide.u32 %d12, %r0, {size}, %d2;
    st.global.{kind_of} [%d12], {value};""",
        [data, given, out],
        shared=512,
    )
    for thread in range(32):
        n = int(given[thread])
        assert out[thread].tolist() == data[thread, :n].tolist() + [0] * (size - n)


def test_cp_async_groups_complete_in_order() -> None:
    """wait_group 1 completes the older of two groups, the younger stays pending."""
    copies = """mad.wide.u32 %d10, %r0, 4, %d0; mov.u32 %r4, smem; mad.lo.u32 %r4, %r0, 4, %r4;
    mad.wide.u32 %d11, %r0, 4, %d1;
    cp.async.ca.shared.global [%r4], [%d10], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r4+128], [%d10], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.b32 %r5, [%r4+{0}]; st.global.b32 [%d11], %r5;"""
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run(copies.replace("{0}", "0"), [data, out], shared=256)
    assert out.tolist() == data.tolist()
    with pytest.raises(EmulatorError, match=r"before an asynchronous copy(.|\n)*ld\.shared\.b32 %r5"):
        run(copies.replace("{0}", "128"), [data, out], shared=256)


WAIT = """{ .reg .pred complete;
loop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], PARITY; @!complete bra loop; }
"""


def test_mbarrier_phases() -> None:
    """Two warps hand a counter back and forth: each store is seen because each wait waits for the right phase."""
    out = np.zeros(4, np.uint32)
    body = f"""mov.u32 %r3, smem; add.u32 %r4, %r3, 16; setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 32;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 1; bar.sync 0;
    @!%p2 bra second;
    @%p1 st.shared.b32 [%r4], 41;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];
    {WAIT.replace("PARITY", "1").replace("loop", "back")}
    ld.shared.b32 %r5, [%r4];
    @%p1 st.global.b32 [%d0], %r5;
    bra done;
second:
    setp.eq.u32 %p3, %r0, 32;
    {WAIT.replace("PARITY", "0").replace("loop", "first")}
    ld.shared.b32 %r5, [%r4]; add.u32 %r5, %r5, 1;
    bar.warp.sync -1;
    @%p3 st.shared.b32 [%r4], %r5;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [%r3];
done:"""
    run(body, [out], block=64, shared=32)
    assert out[0] == 42


def tma_load(
    tensor: TensorMap, corner: tuple[int, ...], out_bytes: int, wait: bool = True, expect: int | None = None
) -> np.ndarray:
    """Load one box by thread 0 and return the bytes of shared memory."""
    out = np.full(out_bytes, 99, np.uint8)
    coordinates = ", ".join(f"%r{10 + i}" for i in range(len(corner)))
    body = f"""mov.u32 %r2, smem; add.u32 %r3, %r2, {out_bytes}; setp.eq.u32 %p1, %r0, 0; mov.b64 %d5, map0;
    cvta.param.u64 %d6, %d5;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
    {"".join(f"mov.b32 %r{10 + i}, {x};" for i, x in enumerate(corner))}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {out_bytes if expect is None else expect};
    @%p1 cp.async.bulk.tensor.{len(corner)}d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r2], [%d6, {{{coordinates}}}], [%r3];
    {WAIT.replace("PARITY", "0") if wait else ""}
    mad.lo.u32 %r4, %r0, 4, %r2; mad.wide.u32 %d7, %r0, 4, %d0;
    {"".join(f"ld.shared.b32 %r5, [%r4+{i}]; st.global.b32 [%d7+{i}], %r5;" for i in range(0, out_bytes, 128))}"""
    run(body, [out, tensor], shared=out_bytes + 8)
    return out


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0), (8, 3), (-8, -2), (40, 18), (35, 0), (100, 100)])
def test_tma_box(swizzle: int, corner: tuple[int, int]) -> None:
    """Rows of the box one after the other, elements outside the tensor zero, 16-byte chunks swizzled within 128-byte
    lines.
    """
    tensor = RNG.integers(1, 2**16, (20, 48), np.uint16)
    columns, rows = 46, 20  # the tensor ends before its storage's row does
    width = (swizzle or 64) // 2
    got = tma_load(TensorMap(tensor, 0, 2, (columns, rows), (2, 96), (width, 16), swizzle), corner, width * 2 * 16)
    for i in range(16):
        for j in range(width):
            x, y = corner[0] + j, corner[1] + i
            want = int(tensor[y, x]) if 0 <= x < columns and 0 <= y < rows else 0
            line, byte = divmod((i * width + j) * 2, 128)
            chunk = byte // 16 ^ line % {0: 1, 32: 2, 64: 4, 128: 8}[swizzle]
            place = line * 128 + chunk * 16 + byte % 16
            assert int(got[place : place + 2].view(np.uint16)[0]) == want


def test_tma_in_three_dimensions() -> None:
    tensor = RNG.integers(0, 2**32, (3, 4, 8), np.uint32)
    got = (
        tma_load(TensorMap(tensor, 0, 4, (8, 4, 3), (4, 32, 128), (4, 2, 4)), (4, 1, 2), 128)
        .view(np.uint32)
        .reshape(4, 2, 4)
    )
    np.testing.assert_array_equal(got[0], tensor[2, 1:3, 4:])
    assert not got[1:].any()  # beyond the last plane


def test_tma_load_must_be_waited_for() -> None:
    tensor = np.zeros((16, 32), np.uint16)
    box = TensorMap(tensor, 0, 2, (32, 16), (2, 64), (32, 16), 64)
    with pytest.raises(EmulatorError, match="before an asynchronous copy"):
        tma_load(box, (0, 0), 1024, wait=False)
    for expected in (1008, 1040):
        with pytest.raises(EmulatorError, match=r"deadlock: an mbarrier waits for 0 arrivals and -?16 bytes"):
            tma_load(box, (0, 0), 1024, expect=expected)
    with pytest.raises(EmulatorError, match="2 coordinates for a tensor map of 1 dimensions"):
        tma_load(TensorMap(tensor.reshape(-1), 0, 2, (512,), (2,), (32,), 64), (0, 0), 1024)


def test_tensor_map_is_checked() -> None:
    tensor = np.zeros((16, 32), np.uint16)
    with pytest.raises(EmulatorError, match="multiples of 16 bytes"):
        TensorMap(tensor, 0, 2, (31, 16), (2, 62), (8, 8))
    with pytest.raises(EmulatorError, match="swizzle 32"):
        TensorMap(tensor, 0, 2, (32, 16), (2, 64), (32, 8), 32)
    with pytest.raises(EmulatorError, match="out of bounds"):  # a map that claims more than its storage holds
        tma_load(TensorMap(tensor, 0, 2, (32, 99), (2, 64), (32, 16), 64), (0, 15), 1024)


def test_tma_store_leaves_what_is_outside() -> None:
    target = np.zeros((6, 16), np.uint16)
    body = """mov.u32 %r2, smem; mad.lo.u32 %r3, %r0, 16, %r2; mov.b32 %r10, 8; mov.b32 %r11, 4;
    setp.eq.u32 %p1, %r0, 0;
    mov.b64 %d5, map0; cvta.param.u64 %d6, %d5;
    mul.lo.u32 %r4, %r0, 65537;
    st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4};
    fence.proxy.async.shared::cta; bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d6, {%r10, %r11}], [%r2];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"""
    run(body, [TensorMap(target, 0, 2, (14, 6), (2, 32), (16, 16))], shared=512)
    want = np.zeros_like(target)
    want[5, 8:14] = 2  # thread 2 wrote columns 0-7 of the box's row 1; only rows 0, 1 and columns 0-5 of it are inside
    np.testing.assert_array_equal(target, want)


def test_counters_of_global_memory() -> None:
    """One warp: 4 bytes a thread dense (4 sectors), spread by 32 bytes (32), the same word (1); 16 bytes a thread
    (16).
    """
    data, out = np.zeros(1024, np.uint32), np.zeros(1024, np.uint32)
    cases = [
        ("b32 %r5", 4, 4, 128),
        ("b32 %r5", 32, 32, 128),
        ("b32 %r5", 0, 1, 4),
        ("v4.b32 {%r5, %r6, %r7, %r8}", 16, 16, 512),
    ]
    for access, stride, sectors, unique in cases:
        kind, _, registers = access.partition(" ")
        counters = run(f"mad.wide.u32 %d5, %r0, {stride}, %d0; ld.global.{kind} {registers}, [%d5];", [data])
        assert (counters.load_sectors, counters.load_bytes_unique, counters.store_sectors) == (sectors, unique, 0)
    counters = run("mad.wide.u32 %d5, %r0, 8, %d0; st.global.b32 [%d5], %r0;", [out])
    assert (counters.store_sectors, counters.store_bytes_unique, counters.store_bytes) == (8, 128, 128)
    assert counters.instructions["st"] == 1 and counters.warps == 1 and counters.ctas == 1


@pytest.mark.parametrize(
    "stride, kind, wavefronts, ideal",
    [
        (4, "b32", 1, 1),
        (8, "b32", 2, 1),
        (128, "b32", 32, 1),
        (0, "b32", 1, 1),
        (8, "v2.b32", 2, 2),
        (16, "v4.b32", 4, 4),
        (32, "v4.b32", 8, 4),
    ],
)
def test_counters_of_bank_conflicts(stride: int, kind: str, wavefronts: int, ideal: int) -> None:
    registers = {"b32": "%r0", "v2.b32": "{%r1, %r1}", "v4.b32": "{%r1, %r1, %r1, %r1}"}[kind]
    store = f"mov.u32 %r2, smem; mad.lo.u32 %r3, %r0, {stride}, %r2; st.shared.{kind} [%r3], {registers};"
    counters = run(store, shared=4096)
    assert (counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (wavefronts, ideal)


def test_arguments() -> None:
    """Scalars, pointers into storage, and batches of CTAs with indices in three dimensions."""
    storage = np.zeros(4096, np.uint8)
    body = """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.x;
    mov.u32 %r6, %nctaid.y;
    mad.lo.u32 %r7, %r4, %r6, %r3; mad.lo.u32 %r7, %r7, %r5, %r2; mad.wide.u32 %d5, %r7, 4, %d0;
    add.u32 %r8, %r7, %r300;
    setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%d5], %r8;"""
    launch(kernel(body, pointers=1, numbers=1), (3, 5, 30), (32,), [Pointer(storage, 256), 1000])
    assert storage.view(np.uint32)[64 : 64 + 450].tolist() == list(range(1000, 1450)) and not storage[:256].any()
    with pytest.raises(EmulatorError, match="2 parameters, got 1"):
        launch(kernel(body, pointers=1, numbers=1), (1,), (32,), [Pointer(storage)])
    with pytest.raises(EmulatorError, match="block of 33 threads"):
        launch(kernel("", pointers=1), (1,), (33,), [storage])
