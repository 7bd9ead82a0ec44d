"""Builds the compiled libraries with CMake; everything else about the package is in pyproject.toml.

SPARSEKERN_NO_EXT=1 installs the pure Python package, which computes with plain torch.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries of CMakeLists.txt, in place of compiling extensions one by one."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            # A fixed directory, so that `make build` (ninja) goes on from here after an edit.
            output, build = ROOT / "sparsekern", ROOT / "build" / "cmake"
        else:
            output, build = Path(self.build_lib).resolve() / "sparsekern", Path(self.build_temp).resolve()
        # pip does not put the environment's own scripts (cmake, ninja) on PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSPARSEKERN_OUTPUT_DIR={output}"]
        try:
            for command in (configure, ["cmake", "--build", build]):
                subprocess.run([str(part) for part in command], check=True, env={**os.environ, "PATH": path})
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            raise CompileError(
                f"sparsekern: building the compiled libraries failed ({error}). They need a C++17 compiler, CMake, "
                "Ninja and torch >= 2.10; the compiler's own message is above. "
                "SPARSEKERN_NO_EXT=1 installs the pure Python package instead, which computes with plain torch."
            ) from error

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "sparsekern").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # editable installs: the libraries are written beside the sources, nothing is linked


without_extension = os.environ.get("SPARSEKERN_NO_EXT") == "1"
setup(
    # The name only marks the package as compiled for one platform; CMakeLists.txt says what is built.
    ext_modules=[] if without_extension else [Extension("sparsekern._native", [])],
    cmdclass={"build_ext": CMakeBuild},
)
