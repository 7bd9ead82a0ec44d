"""Promises of the project as a whole: one version, a light import, a package that works unbuilt, small files."""

import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern
from sparsekern import info, ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(sparsekern.__file__).parent
SOURCE = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds packages in ``cwd`` first, with warnings as errors."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", "-c", code, str(cwd)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def lines(folder: str) -> dict[str, int]:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCE]
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}


def test_one_version() -> None:
    assert importlib.metadata.version("sparsekern") == sparsekern.__version__
    assert f"## [{sparsekern.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_import_is_light() -> None:
    """Importing starts no CUDA, no compiler, and nothing that only the command line needs."""
    code = (
        "import sys, torch; before = set(sys.modules); import sparsekern; import json;"
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr
    added, cuda_started = json.loads(done.stdout)
    # Where Triton is installed, torch.utils.flop_counter brings it; the kernels written in it stay out.
    heavy = {
        "sparsekern.triton.kernels",
        "sparsekern.triton.linear",
        "matplotlib",
        "rich",
        "scipy",
        "torch._inductor",
        "torch.utils.cpp_extension",
        "sparsekern.cli",
    }
    assert heavy.isdisjoint(added)
    assert not cuda_started


def test_works_with_nothing_built(tmp_path: Path) -> None:
    """A copy of the Python files alone computes with plain torch, and says once how to build the kernels."""
    shutil.copytree(PACKAGE, tmp_path / "sparsekern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # The import hook of an editable install would find the checkout's compiled libraries.
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, sparsekern as sk
from sparsekern import info
assert sk.__file__.startswith(sys.argv[1])
linear = torch.nn.Linear(12, 8)
layer = sk.SparseLinear.from_dense(linear, sk.BlockPattern.from_mask(torch.ones(2, 3, dtype=torch.bool), (4, 4)))
x = torch.randn(5, 12)
layer(x).sum().backward()
assert torch.allclose(layer(x), linear(x), atol=1e-5) and layer.values.grad is not None
facts = info.collect()
assert facts["cpu"]["features"] is None and facts["cpu"]["isa"] is None
assert all("pip install" in backend for backend in facts["ops"].values())
print("worked")
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "worked\n"
    assert done.stderr.count("pip install") == 1


def test_info_says_what_runs_here() -> None:
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["sparsekern"] == sparsekern.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["ops"]) == set(ops.SCHEMAS)
    assert facts["cpu"]["model"]
    assert 1 <= facts["cpu"]["cores"] <= (os.cpu_count() or 1)


def test_kernels_are_built() -> None:
    """The tests mean little on the reference alone: in a checkout the compiled libraries must be there and complete."""
    facts = info.collect()
    assert set(facts["ops"].values()) == {"cpu"}
    assert facts["cpu"]["isa"]


def test_native_module_agrees_with_the_system() -> None:
    native = pytest.importorskip("sparsekern._native", reason="built without Python's headers")
    assert native.version == sparsekern.__version__
    features = native.cpu_features()
    assert set(features) == {"sse2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "neon"}
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line.split(":")[1].split() for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    if flags:
        assert {name for name, there in features.items() if there} == set(features) & set(flags[0])


def test_files_stay_small() -> None:
    product = lines("sparsekern") | lines("csrc") | lines("bench") | lines("examples")
    everything = product | lines("tests")
    assert {path: count for path, count in everything.items() if count > 500} == {}
    assert {path: count for path, count in lines("examples").items() if count > 80} == {}
    assert statistics.median(product.values()) < 150
