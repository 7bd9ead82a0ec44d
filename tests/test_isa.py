"""The instruction set of the kernels: each one gives the right numbers, and a wrong name is refused by name."""

import os
import subprocess
import sys
from pathlib import Path

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


def python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *sys.path])
    env = {**os.environ, "SPARSEKERN_CPU_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=tests, capture_output=True, text=True, timeout=300)


def test_the_baseline_is_exact_too() -> None:
    result = python(CHECK, "baseline")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["baseline"]


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
    result = python(code, "avx1024")
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()
    assert len([m for m in messages if "SPARSEKERN_CPU_ISA must be baseline" in m and "got avx1024" in m]) == 3


def test_the_default_is_the_best_this_processor_has() -> None:
    result = python("import sparsekern, torch; print(torch.ops.sparsekern.cpu_isa())", "")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    best = "avx2" if " avx2 " in flags and " fma " in flags else "baseline"
    assert result.stdout.split() == [best], result.stderr
