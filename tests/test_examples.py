"""Every script in examples/ runs as it stands, without warnings; where it takes arguments, on a small job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = {"train_lenet.py": ["synthetic", "1"]}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(script), *ARGUMENTS.get(script.name, [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
