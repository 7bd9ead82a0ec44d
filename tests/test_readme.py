"""Every code block of README.md runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def _lines() -> list[str]:
    return [line.split("#")[0].strip() for language, code in BLOCKS if language == "bash" for line in code.splitlines()]


def test_only_known_languages() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in _lines() if line.startswith("sparsekern ")])
def test_command(line: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/first/result.json").exists()


@pytest.mark.parametrize("line", [line for line in _lines() if line.startswith("make ")])
def test_make_target_exists(line: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # Running them here would set up a second environment and call this test again.
    done = subprocess.run([*line.split(), "--dry-run"], cwd=README.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_bash_line_is_covered() -> None:
    assert all(line.startswith(("sparsekern ", "make ")) for line in _lines() if line)
