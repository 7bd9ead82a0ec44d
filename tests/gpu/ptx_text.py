"""Little PTX kernels for the emulator's tests."""

from collections.abc import Sequence

import numpy as np
from emulator import Counters, launch

REGISTERS = ".reg .pred %p<16>; .reg .b16 %h<64>; .reg .b32 %r<320>; .reg .b64 %d<64>;"


def kernel(body: str, pointers: int = 0, shared: int = 0, numbers: int = 0, maps: int = 0) -> str:
    """An entry whose pointer parameters are in %d0, %d1, ..., numbers in %r300..., tid in %r0, tid%32 in %r1, shared
    memory at `smem` and tensor maps at `map0`, ..."""
    parameters = [f".param .u64 p{i}" for i in range(pointers)]
    parameters += [f".param .u32 n{i}" for i in range(numbers)]
    parameters += [f".param .align 64 .b8 map{i}[128]" for i in range(maps)]
    loads = "".join(f"ld.param.u64 %d{i}, [p{i}];\n" for i in range(pointers))
    loads += "".join(f"ld.param.u32 %r{300 + i}, [n{i}];\n" for i in range(numbers))
    buffer = f".shared .align 1024 .b8 smem[{shared}];\n" if shared else ""
    return (
        ".version 8.7\n.target sm_90a\n.address_size 64\n"
        f".visible .entry test({', '.join(parameters)})\n{{\n{REGISTERS}\n{buffer}"
        f"{loads}mov.u32 %r0, %tid.x;\nand.b32 %r1, %r0, 31;\n{body}\nret;\n}}\n"
    )


KINDS = {1: "h", 2: "h", 4: "r", 8: "d"}


def evaluate(body: str, inputs: Sequence[np.ndarray], outputs: Sequence[type]) -> list[np.ndarray]:
    """Run `body` in one thread per element: inputs in %{h,r,d}10, 11, ..., results expected in %{h,r,d}30, 31, ..."""
    count = len(inputs[0])
    threads = -(-count // 32) * 32
    arrays = [np.concatenate([x, np.repeat(x[-1:], threads - count)]) for x in inputs]
    arrays += [np.zeros(threads, dtype) for dtype in outputs]
    before, after = "", ""
    for number, array in enumerate(arrays):
        size = array.itemsize
        place = f"mad.wide.u32 %d50, %r0, {size}, %d{number};\n"
        if number < len(inputs):
            before += f"{place}ld.global.b{8 * size} %{KINDS[size]}{10 + number}, [%d50];\n"
        else:
            after += f"{place}st.global.b{8 * size} [%d50], %{KINDS[size]}{30 + number - len(inputs)};\n"
    launch(kernel(f"{before}{body}\n{after}", pointers=len(arrays)), (1,), (threads,), arrays)
    return [x[:count] for x in arrays[len(inputs) :]]


def run(body: str, args: Sequence[object] = (), block: int = 32, shared: int = 0, grid: int = 1) -> Counters:
    """Launch a kernel whose arguments are arrays (pointers), then integers, then tensor maps."""
    pointers = sum(isinstance(x, np.ndarray) for x in args)
    numbers = sum(isinstance(x, int) for x in args)
    text = kernel(body, pointers, shared, numbers, len(args) - pointers - numbers)
    return launch(text, (grid,), (block,), args)


def fill_shared(pointer: str, size: int, block: int) -> str:
    """Copy `size` bytes from a pointer to `smem`, 16 bytes a thread and step, then make them visible to all proxies."""
    lines = [f"mov.u32 %r280, smem;\nmad.lo.u32 %r280, %r0, 16, %r280;\nmad.wide.u32 %d40, %r0, 16, {pointer};"]
    for start in range(0, size, 16 * block):
        lines.append(f"ld.global.v4.b32 {{%r281, %r282, %r283, %r284}}, [%d40+{start}];")
        lines.append(f"st.shared.v4.b32 [%r280+{start}], {{%r281, %r282, %r283, %r284}};")
    return "\n".join([*lines, "fence.proxy.async.shared::cta;", "bar.sync 0;"])
