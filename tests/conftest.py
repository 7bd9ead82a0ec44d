"""What holds for every test: uninitialised memory is NaN, random numbers repeat, global torch state is put back."""

import os
from collections.abc import Iterator

import pytest
import torch

# No test depends on what this machine was once measured to be.
os.environ["SPARSEKERN_CALIBRATION"] = "/nowhere/calibration.json"


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    """Memory that nobody wrote shows up as NaN (integers: the largest), so a kernel that skips an output fails.

    torch fills what `torch.empty`, also called from C++, hands out while deterministic algorithms are on.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
