"""Imported first by tests that need Triton's compiler: skips them, with the reason, where there is none that they know.

The tests reach into Triton (its driver protocol, what it keeps of a compiled kernel), so they name the versions that
they were written for; the kernels themselves ask for ``sparsekern.triton.OLDEST`` or later.
"""

import importlib.metadata
import os

import pytest

OLDEST, BELOW = (3, 6), (3, 10)


def why_not() -> str | None:
    """Why these tests cannot run here, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install 'sparsekern[test]', on Linux x86-64)"
    number = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= number < BELOW:
        low, high = (".".join(map(str, bound)) for bound in (OLDEST, BELOW))
        return f"Triton {version} is installed, these tests know {low} and later, below {high}"
    return None


# Whether a multiply and an add may become one: the default changes with Triton 3.10, which warns.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
reason = why_not()
if reason:
    pytest.skip(reason, allow_module_level=True)
