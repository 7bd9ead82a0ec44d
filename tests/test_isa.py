"""The instruction set of the kernels: each one gives the right numbers, and a wrong name is refused by name.

What this processor cannot run, runs as ``native/driver.cpp``: NEON in an emulator, and the source of AVX-512 with its
vectors lowered to AVX2, and as it is in a slower emulator.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bochs
import native_driver
import pytest
import torch

CHECK = """
import torch
from samples import problems
from sparsekern import reference

torch.use_deterministic_algorithms(True)
for dtype in (torch.float32, torch.float64):
    for p in problems(dtype):
        for op in p.ops:
            args = p.args(op)
            results = getattr(torch.ops.sparsekern, op)(*args), getattr(reference, op)(*args)
            pairs = zip(*results) if op.endswith("wgrad") else [results]
            assert all(torch.equal(a, b) for a, b in pairs), (op, p.name)
print(torch.ops.sparsekern.cpu_isa())
"""
X86 = platform.machine() == "x86_64"
NAMES, SUPPORTED, AUTOMATIC = torch.ops.sparsekern.cpu_isas()


def python(words: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *sys.path])
    env = {**os.environ, "SPARSEKERN_CPU_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], env=env, cwd=tests, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa", NAMES)
def test_every_set_is_exact(isa: str) -> None:
    if not SUPPORTED[NAMES.index(isa)]:
        pytest.skip(f"this processor has no {isa}")
    result = python(["-c", CHECK], isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


def test_an_unknown_instruction_set_is_refused() -> None:
    code = """
import torch
from samples import linear_problems
problem = next(linear_problems(torch.float32))
for op in problem.ops:
    try:
        getattr(torch.ops.sparsekern, op)(*problem.args(op))
    except RuntimeError as error:
        print(error)
"""
    result = python(["-c", code], "avx1024")
    assert result.returncode == 0, result.stderr
    wanted = f"SPARSEKERN_CPU_ISA must be {' or '.join(NAMES)} (or empty: the best this CPU has), got avx1024"
    assert result.stdout.splitlines() == [wanted] * 3


def test_the_command_line_refuses_it_in_one_line() -> None:
    result = python(["-m", "sparsekern", "info"], "avx1024")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"sparsekern: SPARSEKERN_CPU_ISA must be .*, got avx1024\n", result.stderr)


def test_a_set_that_this_processor_lacks_is_refused() -> None:
    lacking = [name for name, supported in zip(NAMES, SUPPORTED, strict=True) if not supported]
    if not lacking:
        pytest.skip("it has all that are compiled in")
    for isa in lacking:
        result = python(["-m", "sparsekern", "info"], isa)
        assert result.stderr == f"sparsekern: SPARSEKERN_CPU_ISA is {isa}, which this CPU does not have\n"


def test_the_default_is_the_best_that_the_test_suite_has_run_on() -> None:
    if X86:
        assert (NAMES, AUTOMATIC) == (["avx512", "avx2", "baseline"], [0, 1, 1])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    best = "avx2" if " avx2 " in flags and " fma " in flags else "baseline"
    result = python(["-m", "sparsekern", "info"], "")
    assert f"cpu isa: {best if X86 else None}\n" in result.stdout, result.stderr
    assert ("cpu isa_chosen: automatically\n" in result.stdout) == X86


def test_info_says_which_set_was_asked_for() -> None:
    result = python(["-m", "sparsekern", "info"], NAMES[-1])
    assert f"cpu isa: {NAMES[-1]}\ncpu isa_chosen: by SPARSEKERN_CPU_ISA\n" in result.stdout, result.stderr
    assert all(f"'{name}': '" in result.stdout for name in NAMES)


@pytest.mark.slow
def test_vectors_of_64_bytes_are_exact_and_stay_in_bounds(tmp_path: Path) -> None:
    """The source of AVX-512, each of its vectors made of two of AVX2: masks, transposes and tails of 16 lanes."""
    if not X86 or "avx2" not in (name for name, there in zip(NAMES, SUPPORTED, strict=True) if there):
        pytest.skip("this processor has no AVX2")
    kernels = {
        "kernels_avx512.cpp": [
            "-mavx2",
            "-mfma",
        ]
    }
    table = ["-DSK_ISA=avx512", "-DKERNELS=sk::avx512::table"]
    sanitized = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    driver = native_driver.build("g++", tmp_path, kernels, *table, *sanitized)
    assert native_driver.check([driver], tmp_path) == "avx512"


@pytest.mark.slow
def test_neon_is_exact_in_an_emulator(tmp_path: Path) -> None:
    tools = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        pytest.skip(f"{' and '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    driver = native_driver.build(tools[0], tmp_path, {"dispatch.cpp": [], "kernels_neon.cpp": []}, "-static")
    assert native_driver.check([tools[1], driver], tmp_path, SPARSEKERN_CPU_ISA="neon") == "neon"
    # Not by itself: the test suite has not run on it.
    env = {name: value for name, value in os.environ.items() if name != "SPARSEKERN_CPU_ISA"}
    unasked = subprocess.run([tools[1], driver, "none"], env=env, capture_output=True, text=True, timeout=60)
    assert unasked.returncode == 1
    assert unasked.stderr == "none is chosen automatically on this CPU: set SPARSEKERN_CPU_ISA=neon\n"


@pytest.mark.slow
def test_avx512_is_exact_in_an_emulator(tmp_path: Path) -> None:
    if lacking := bochs.missing():
        pytest.skip(lacking)
    linux = bochs.kernel(tmp_path)
    if not linux:
        pytest.skip("no Linux to boot could be downloaded (Debian: linux-image-cloud-amd64)")
    kernels = {f"kernels_{isa}.cpp": native_driver.flags(isa)[1] for isa in ("baseline", "avx2", "avx512")}
    driver = native_driver.build("g++", tmp_path, {"dispatch.cpp": [], **kernels}, "-static")
    crc = native_driver.write(tmp_path / "problems")
    problems = [tmp_path / "problems"]
    asked = bochs.run(linux, driver, problems, {"SPARSEKERN_CPU_ISA": "avx512"}, tmp_path, timeout=3000)
    assert asked == f"avx512 {crc}"
