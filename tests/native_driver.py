"""The samples as files for ``native/driver.cpp``, which runs kernels without torch: build, write, run, compare."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from samples import Problem, problems
from torch import Tensor

from sparsekern import functional, reference

ROOT = Path(__file__).resolve().parent.parent
FORWARD, CONV_DGRAD, WGRAD = range(3)


def flags(isa: str) -> tuple[list[str], list[str]]:
    """What CMakeLists.txt compiles all files with, and the kernels of that set besides."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    common = re.search(r"target_compile_options\(flags INTERFACE (-O3.*)\)", cmake)
    of_set = re.search(rf"add_kernels\({isa}\b(.*)\)", cmake)
    assert common and of_set
    return ["-std=c++17", "-DNDEBUG", *common[1].split()], of_set[1].split()


def build(compiler: str, folder: Path, sources: dict[str, list[str]], *more: str) -> Path:
    """The driver with these files of ``csrc/cpu`` and their flags; ``more`` are flags for all of it."""
    every = [compiler, *flags("baseline")[0], f"-I{ROOT / 'csrc'}", *more]
    objects = [folder / f"{source}.o" for source in sources]
    for (source, own), target in zip(sources.items(), objects, strict=True):
        subprocess.run([*every, *own, "-c", ROOT / "csrc" / "cpu" / source, "-o", target], check=True, timeout=600)
    driver = ROOT / "tests" / "native" / "driver.cpp"
    subprocess.run([*every, driver, *objects, "-o", folder / "driver"], check=True, timeout=600)
    return folder / "driver"


def cases() -> Iterator[tuple[Problem, str]]:
    return ((p, op) for dtype in (torch.float32, torch.float64) for p in problems(dtype) for op in p.ops)


def write(file: Path) -> str:
    """All samples as the driver reads them; returns the CRC-32 it is to print for the results."""
    crc = 0
    records = []
    for p, op in cases():
        records += [array.tobytes() for array in record(p, op)]
        for expected in of_reference(p, op):
            crc = zlib.crc32((memory_order(expected) + 0).tobytes(), crc)  # of -0 and 0, 0
    file.write_bytes(np.int64(len(list(cases()))).tobytes() + b"".join(records))
    return f"{crc:08x}"


def check(command: list[str | Path], folder: Path, **variables: str) -> str:
    """Run the driver over all samples and compare bit for bit; returns the name of the set it used."""
    crc = write(folder / "problems")
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEKERN_CPU_ISA"} | variables
    words = [*command, folder / "problems", folder / "results"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    with (folder / "results").open("rb") as results:
        for p, op in cases():
            for expected in map(memory_order, of_reference(p, op)):
                got = np.fromfile(results, expected.dtype, expected.size).reshape(expected.shape)
                assert np.array_equal(got, expected), (op, p.name, p.x.dtype)
        assert not results.read()
    name, printed = done.stdout.split()
    assert printed == crc
    return name


def of_reference(p: Problem, op: str) -> tuple[Tensor, ...]:
    """The results, every linear one as [samples, features]."""
    results = getattr(reference, op)(*p.args(op))
    return results if op.endswith("wgrad") else (flat(results, p),)


def flat(t: Tensor, p: Problem) -> Tensor:
    return t if p.geometry else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def is_last(t: Tensor) -> bool:
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def memory_order(t: Tensor) -> np.ndarray:
    """Its numbers as they lie in memory once it is contiguous, or channels last where it is so already."""
    return (t.permute(0, 2, 3, 1) if is_last(t) else t).contiguous().numpy()


def images(t: Tensor, last: bool) -> list[int]:
    """A linear layer's samples are images of one pixel."""
    return [*t.shape, int(last)] if t.dim() == 4 else [*t.shape, 1, 1, 1]


def record(p: Problem, op: str) -> Iterator[np.ndarray]:
    """One problem as the driver reads it; see there. What a view says is what ops_cpu.cpp would put in it."""
    plans = functional.prepare(p.pattern, p.geometry.kernel if p.geometry else None)
    x, grad, results = flat(p.x, p), flat(p.grad, p), of_reference(p, op)
    bias = p.bias
    if op.endswith("dgrad"):
        kind, plan, values, bias, read, y = (
            CONV_DGRAD if p.geometry else FORWARD,
            plans.dgrad,
            p.values,
            None,
            grad,
            results[0],
        )
        view = images(grad, is_last(grad)) + images(y, p.channels_last)
    elif op.endswith("wgrad"):
        kind, plan, values, read, y = WGRAD, plans.wgrad, grad, x, torch.cat([t.reshape(-1) for t in results])
        view = images(x, is_last(x)) + images(grad, is_last(grad))
    else:
        kind, plan, values, read, y = FORWARD, plans.forward, p.values, x, results[0]
        view = images(x, is_last(x)) + images(y, p.channels_last)
    window = [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    if p.geometry:
        window = [*itertools.chain(*p.geometry.conv[:4]), *p.geometry.output_size]
    numbers = memory_order(values)
    offset = bias.numpy() if bias is not None and kind == FORWARD else np.empty(0, numbers.dtype)
    lengths = [plan.numel(), numbers.size, -1 if bias is None else offset.size, read.numel(), y.numel()]
    yield np.array([kind, numbers.itemsize, *view, *window, *lengths], np.int64)
    yield from (plan.numpy(), numbers, offset, memory_order(read))
