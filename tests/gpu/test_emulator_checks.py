"""Every checker, with a small kernel that must be refused; each has a correct twin nearby in the other tests."""

import re

import numpy as np
import pytest
from emulator import EmulatorError, Kernel, launch
from ptx_text import fill_shared, kernel, run

A = "mov.u32 %r2, smem; mad.lo.u32 %r3, %r0, 4, %r2;\n"  # %r3: a word of each thread
COPY = "mad.wide.u32 %d5, %r0, 4, %d0; cp.async.ca.shared.global [%r3], [%d5], 4; cp.async.commit_group;\n"
INIT = A + "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;\n"
WAIT = "{ .reg .pred done; l: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], 0; @!done bra l; }\n"
# A wgmma on zeros: A at 0, B at 2048, both 32-byte rows without leading dimension.
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r20, %r21, %r22, %r23}, %d20, %d21, 1, 1, 1, 0, 0;\n"
TILES = (
    fill_shared("%d0", 4096, 128)
    + "\nmov.u64 %d20, 0xC000001000010000; mov.u64 %d21, 0xC000001000010080;\n"
    + "".join(f"mov.b32 %r{20 + i}, 0;\n" for i in range(4))
)
COMMIT, JOIN = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
FENCE = "wgmma.fence.sync.aligned;\n"
# A word that thread 0 set to 0 in two ways, for atomics of two warps.
ZEROED = A + "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [%r2], 0; bar.sync 0;\n"
COUNTER = ZEROED + "red.shared.add.u32 [%r2], 1;\n"
SECOND = "setp.gt.u32 %p2, %r0, 31; @%p2 "  # what warp 1 does

REFUSED = {
    # name: (body, message, threads)
    "global load past the end": (
        "mad.wide.u32 %d5, %r0, 4, %d0; ld.global.b32 %r2, [%d5+16384];",
        "global load out of bounds",
        32,
    ),
    "global store before the start": ("st.global.b32 [%d0+-4], %r0;", "global store out of bounds", 32),
    "last bytes out of bounds": (
        "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0+16380];",
        "misaligned 16-byte|out of bounds",
        32,
    ),
    "misaligned global": ("ld.global.b64 %d5, [%d0+4];", "misaligned 8-byte global load", 32),
    "null pointer": ("mov.u64 %d5, 0; ld.global.b32 %r2, [%d5];", "out of bounds", 32),
    "cp.async out of bounds": (
        A + "cp.async.ca.shared.global [%r3], [%d0+16384], 4;",
        "global cp.async out of bounds",
        32,
    ),
    "atomic out of bounds": ("red.global.add.u32 [%d0+16384], 1;", "global atomic out of bounds", 32),
    "shared out of bounds": (A + "st.shared.b32 [%r3+4096], %r0;", "shared store out of bounds at 0x1000", 32),
    "atomic, then a load by the last warp": (COUNTER + SECOND + "ld.shared.b32 %r5, [%r2];", "race: load reads", 64),
    "atomic, then a store by the last warp": (
        COUNTER + SECOND + "st.shared.b32 [%r2], 5;",
        "race: store overwrites what another warp wrote",
        64,
    ),
    "loads, then an atomic of one warp": (
        ZEROED + "ld.shared.b32 %r5, [%r2]; bar.warp.sync -1;\n" + SECOND + "red.shared.add.u32 [%r2], 1;",
        "race: atomic overwrites what another warp reads",
        64,
    ),
    "atomic after a store without a barrier": (
        A + "setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r2], 0;\n" + SECOND + "red.shared.add.u32 [%r2], 1;",
        "race: atomic overwrites what another warp wrote",
        64,
    ),
    "the same value by two warps, then another": (
        A + "st.shared.b32 [%r2], 5;\n" + SECOND + "st.shared.b32 [%r2], 6;",
        "race: store overwrites what another warp wrote",
        64,
    ),
    "the same value by two warps, then read": (
        A + "st.shared.b32 [%r2], 5;\n" + SECOND + "ld.shared.b32 %r5, [%r2];",
        "race: load reads",
        64,
    ),
    "misaligned shared": (A + "st.shared.b64 [%r2+4], %d0;", "misaligned 8-byte shared store", 32),
    "misaligned ldmatrix": (
        A + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3];",
        "misaligned 16-byte shared ldmatrix",
        32,
    ),
    "uninitialised shared": (A + "ld.shared.b32 %r5, [%r3];", "uninitialised shared memory", 32),
    "half initialised": (
        A + "mov.b16 %h1, 1; st.shared.b16 [%r3], %h1; ld.shared.b32 %r5, [%r3];",
        "uninitialised shared memory",
        32,
    ),
    "register never written": ("add.u32 %r5, %r6, 1;", "%r6 is never written", 32),
    "register not written on this path": (
        "setp.lt.u32 %p1, %r0, 7; @%p1 bra skip; mov.u32 %r5, 1;\nskip: add.u32 %r6, %r5, 1;",
        r"%r5 was never written(.|\n)*thread 0",
        32,
    ),
    "predicate not written": (
        "setp.lt.u32 %p1, %r0, 7; @%p1 bra skip; setp.eq.u32 %p2, 1, 1;\nskip: @%p2 mov.u32 %r5, 1;",
        "predicate was never",
        32,
    ),
    "copy not waited for": (A + COPY + "ld.shared.b32 %r5, [%r3];", "before an asynchronous copy", 32),
    "copy waited for, no barrier": (
        A + COPY + "cp.async.wait_group 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];",
        "race: load reads",
        64,
    ),
    "store over a pending copy": (
        A + COPY + "st.shared.b32 [%r3], %r0;",
        "unfinished asynchronous copy will write",
        32,
    ),
    "two copies to one place": (A + COPY.replace("[%r3]", "[%r2]"), "two threads write", 32),
    "copy over unread data": (
        A + "st.shared.b32 [%r3], %r0; bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];" + COPY,
        "race: cp.async overwrites what another warp reads",
        64,
    ),
    "read after write": (
        A + "st.shared.b32 [%r3], %r0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];",
        "race: load reads",
        64,
    ),
    "write after write": (
        A + "st.shared.b32 [%r3], %r0; xor.b32 %r4, %r3, 128; st.shared.b32 [%r4], %r0;",
        "race: store overwrites what another warp wrote",
        64,
    ),
    "write after read": (
        A + "st.shared.b32 [%r3], %r0; bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];"
        "st.shared.b32 [%r3], %r0;",
        "race: store overwrites what another warp reads",
        64,
    ),
    "two warps at once": (A + "st.shared.b32 [%r2], %r0;", "different values to one place", 64),
    "barrier of too few": (
        A + "st.shared.b32 [%r3], %r0; setp.lt.u32 %p1, %r0, 64; @%p1 bar.sync 1, 64;"
        "xor.b32 %r4, %r3, 256; ld.shared.b32 %r5, [%r4];",
        "race: load reads",
        128,
    ),
    "divergent barrier": ("setp.lt.u32 %p1, %r0, 5; @%p1 bar.sync 0;", "divergent barrier", 64),
    "barrier in one warp": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0; bar.sync 1;",
        r"deadlock: barrier \d has 32 of 64",
        64,
    ),
    "exit before a barrier": ("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", "exited and never reach", 64),
    "barrier counts differ": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 96;",
        "different thread counts",
        96,
    ),
    "named barrier without partner": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;",
        "deadlock: barrier 1 has 32 of 64",
        96,
    ),
    "divergent shfl": ("setp.lt.u32 %p1, %r0, 5; @%p1 shfl.sync.idx.b32 %r3, %r0, 0, 31, -1;", "divergent shfl", 32),
    "partial mask": ("shfl.sync.idx.b32 %r3, %r0, 0, 31, 15;", "partial member mask", 32),
    "divergent ldmatrix": (
        A + "st.shared.b32 [%r3], 0; setp.lt.u32 %p1, %r0, 5;"
        "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2];",
        "divergent ldmatrix",
        32,
    ),
    "mbarrier never initialised": (A + "mbarrier.arrive.shared::cta.b64 _, [%r2];", "before mbarrier.init", 32),
    "mbarrier init not ordered": (INIT.replace("bar.sync 0;", "") + WAIT, "race: mbarrier used", 64),
    "mbarrier over-arrival": (INIT + "mbarrier.arrive.shared::cta.b64 _, [%r2];", "more arrivals than it expects", 32),
    "mbarrier wait for nothing": (INIT + WAIT, "deadlock: an mbarrier waits for 1 arrivals", 32),
    "mbarrier expects bytes": (
        INIT + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;\n" + WAIT,
        "deadlock: an mbarrier waits for 0 arrivals and 64 bytes",
        32,
    ),
    "mbarrier read as data": (INIT + "ld.shared.b32 %r5, [%r2];", "an mbarrier object as data", 32),
    "mbarrier overwritten": (INIT + "@%p1 st.shared.b32 [%r2], 0;", "overwrites an mbarrier object", 32),
    "wgmma result read early": (
        TILES + FENCE + PRODUCT + COMMIT + "add.u32 %r5, %r20, 1;" + JOIN,
        "reads %r20, a register of an unfinished",
        128,
    ),
    "wgmma result written early": (
        TILES + FENCE + PRODUCT + COMMIT + "mov.b32 %r20, 0;" + JOIN,
        "writes %r20, a register of an unfinished",
        128,
    ),
    "wgmma not committed": (
        TILES + FENCE + PRODUCT + JOIN + "add.u32 %r5, %r20, 1;",
        "register of an unfinished wgmma",
        128,
    ),
    "wgmma without a fence": (TILES + PRODUCT + COMMIT + JOIN, "written since the last wgmma.fence", 128),
    "wgmma never waited for": (TILES + FENCE + PRODUCT + COMMIT, "a wgmma that nobody waited for", 128),
    "wgmma operand overwritten": (
        TILES
        + FENCE
        + PRODUCT
        + COMMIT
        + "bar.sync 0; mov.u32 %r2, smem; mad.lo.u32 %r3, %r0, 4, %r2; st.shared.b32 [%r3], 0;"
        + JOIN,
        "overwrites what an unfinished asynchronous operation reads",
        128,
    ),
    "wgmma operand overwritten by another warp": (
        TILES
        + FENCE
        + PRODUCT
        + COMMIT
        + JOIN
        + "mov.u32 %r2, smem; mad.lo.u32 %r3, %r0, 4, %r2; st.shared.b32 [%r3], 0;",
        "race: store overwrites what another warp reads",
        128,
    ),
    "wgmma without a proxy fence": (
        TILES.replace("fence.proxy.async.shared::cta;", "") + FENCE + PRODUCT + COMMIT + JOIN,
        "without a fence.proxy.async",
        128,
    ),
    "wgmma before the barrier": (
        TILES.replace("bar.sync 0;", "") + FENCE + PRODUCT + COMMIT + JOIN,
        "race: wgmma reads",
        128,
    ),
    "wgmma past shared memory": (
        TILES.replace("010080;", "0100FF;") + FENCE + PRODUCT + COMMIT + JOIN,
        "reaches beyond",
        128,
    ),
    "divergent wgmma": (
        TILES + FENCE + "setp.lt.u32 %p1, %r0, 64; @%p1 " + PRODUCT,
        "part of a warp group is missing",
        128,
    ),
    "spinning for ever": ("loop: bra loop;", "hangs", 32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message, threads = REFUSED[name]
    monkeypatch.setattr("emulator.machine.STEPS", 10_000)
    with pytest.raises(EmulatorError, match=message):
        run(body, [np.zeros(4096, np.uint32)], block=threads, shared=4096)


def test_atomics_of_several_warps_are_accepted() -> None:
    found = np.zeros(64, np.uint32)
    body = COUNTER + "bar.sync 0; ld.shared.b32 %r5, [%r2]; mad.wide.u32 %d5, %r0, 4, %d0; st.global.b32 [%d5], %r5;"
    run(body, [found], block=64, shared=16)
    assert (found == 64).all()


@pytest.mark.parametrize("distance", [256, 512, 768, 1024, 65536, -512])
def test_an_argument_is_not_reached_from_its_neighbour(distance: int) -> None:
    storage = np.zeros(4096, np.uint32)
    for arrays in ([storage[:64], storage[128:192]], [storage[128:192], storage[:64]]):
        with pytest.raises(EmulatorError, match="global store out of bounds"):
            run(f"mad.wide.u32 %d5, %r0, 4, %d0; st.global.b32 [%d5+{distance}], %r0;", arrays)
        assert not storage.any()


def test_shared_memory_ends_where_it_was_declared() -> None:
    with pytest.raises(EmulatorError, match="shared store out of bounds at 0x8 of 0x8"):
        run("mov.u32 %r2, smem; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [%r2+8], 7;", shared=8)


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,), (0,)])
def test_grids_that_cannot_be_launched(grid: tuple[int, ...]) -> None:
    with pytest.raises(EmulatorError, match="can be launched"):
        launch(kernel("mov.u32 %r2, %r0;"), grid, (32,), [])


def test_the_correct_wgmma_is_accepted() -> None:
    run(TILES + FENCE + PRODUCT + COMMIT + JOIN, [np.zeros(4096, np.uint32)], block=128, shared=4096)


def test_errors_say_where() -> None:
    text = kernel(
        "setp.eq.u32 %p1, %r0, 9; mov.u32 %r2, %ctaid.y; setp.eq.u32 %p2, %r2, 3;\n"
        "and.pred %p1, %p1, %p2;\n@%p1 st.global.b32 [%d0+64], %r0;",
        1,
    )
    with pytest.raises(EmulatorError) as error:
        launch(text, (2, 5), (64,), [np.zeros(16, np.uint32)])
    line = text.split("\n").index("@%p1 st.global.b32 [%d0+64], %r0;") + 1
    assert f"PTX line {line}: @%p1 st.global.b32" in str(error.value) and "CTA (0, 3, 0), thread 9" in str(error.value)


NOT_MODELLED = [
    "tcgen05.fence::before_thread_sync;",
    "barrier.cluster.arrive;",
    "mapa.shared::cluster.u32 %r2, %r0, 1;",
    "add.rz.f32 %r2, %r0, %r0;",
    "add.f32x2 %d2, %d0, %d0;",
    "cvt.rn.satfinite.e4m3x2.f32 %h1, %r0, %r0;",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r2,%r3,%r4,%r5}, {%r0,%r0,%r0,%r0}, {%r0,%r0}, {0,0,0,0};",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r2,%r3}, {%r0,%r0,%r0,%r0}, {%r0,%r0}, {%r0,%r0};",
    "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r20,%r21,%r22,%r23}, %d0, %d0, 1, 1, 1;",
    "ld.u32 %r2, [%d0];",
    "ld.local.u32 %r2, [%d0];",
    "st.shared::cluster.b32 [%r0], %r0;",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%d0], 64, [%r0];",
    "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r0];",
    "mbarrier.arrive.shared::cta.b64 %d2, [%r0];",
    "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;",
    "atom.global.add.noftz.f16x4 %r2, [%d0], %r0;",
    "mov.u32 %r2, %clock;",
    "activemask.b32 %r2;",
    "vadd.u32.u32.u32 %r2, %r0, %r0;",
    "call.uni foo;",
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r2, %r3}, [%r0];",
    "red.async.relaxed.cluster.global.add.u32 [%d0], %r0;",
]


@pytest.mark.parametrize("text", NOT_MODELLED)
def test_what_is_not_modelled_raises(text: str) -> None:
    """Even where it would never be executed."""
    with pytest.raises(EmulatorError, match=re.escape(text.split(";")[0][:20])):
        launch(kernel(f"bra end;\n{text}\nend:", 1), (1,), (32,), [np.zeros(16, np.uint32)])


def test_entries_are_chosen_by_name() -> None:
    two = kernel("", 1) + kernel("", 1).replace("test(", "other(").split("\n", 3)[3]
    assert Kernel(two, "oth").name == "other"
    with pytest.raises(EmulatorError, match="2 entries"):
        Kernel(two)


def test_read_only_arrays_stay() -> None:
    array = np.zeros(32, np.uint32)
    array.flags.writeable = False
    with pytest.raises(EmulatorError, match="read-only"):
        run("st.global.b32 [%d0], %r0;", [array])
