"""The same bits whatever the number of threads, and in every run: forward, dgrad and wgrad, large enough to be cut."""

import pytest
import torch
from samples import Geometry, Problem, make_problem
from torch import Tensor

LARGE = {
    # Few tiles of pixels (rows are shared out), many tiles, and a wgrad of several ranges.
    "linear few tiles": ((600, 500), (100,), None),
    "linear many tiles": ((300, 784), (1000,), None),
    "linear many ranges": ((48, 40), (6000,), None),
    "linear wide": ((2000, 1500), (20,), None),
    "conv nchw": ((), (6,), Geometry(24, 40, (3, 3), (20, 20), padding=(1, 1))),
    "conv few pixels": ((), (1,), Geometry(64, 160, (3, 3), (5, 5), padding=(1, 1))),
    "conv strided groups": ((), (9,), Geometry(16, 36, (3, 2), (25, 24), stride=(2, 1), padding=(2, 1), groups=2)),
}


def large(name: str, blocksize: tuple[int, int], layout: str, dtype: torch.dtype) -> Problem:
    shape, batch, geometry = LARGE[name]
    density = "full" if name == "linear many ranges" else "third"
    return make_problem(
        name, geometry.shape if geometry else shape, blocksize, density, batch, layout,
        geometry=geometry, dtype=dtype, integers=False,
    )  # fmt: skip


def results(p: Problem) -> list[Tensor]:
    forward, dgrad, wgrad = (getattr(torch.ops.sparsekern, op)(*p.args(op)) for op in p.ops)
    return [forward, dgrad, *wgrad]


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("blocksize", [(1, 1), (8, 8), (5, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_threads_do_not_matter(name: str, blocksize: tuple[int, int], dtype: torch.dtype) -> None:
    for layout in ("nchw", "channels_last") if "conv" in name else ("contiguous",):
        p = large(name, blocksize, layout, dtype)
        torch.set_num_threads(1)
        single = results(p)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all_equal(results(p), single), (threads, layout)


@pytest.mark.parametrize("name", LARGE)
def test_runs_do_not_matter(name: str) -> None:
    torch.set_num_threads(2)
    p = large(name, (1, 1) if "wide" in name else (4, 4), "contiguous", torch.float32)
    first = results(p)
    for _ in range(20):
        assert all_equal(results(p), first)


def test_the_rest_of_the_batch_does_not_matter() -> None:
    """An output is one sum in the order of the plan, so a sample's bits do not depend on where it stands."""
    p = make_problem("batch", (70, 90), (4, 4), "third", (50,), dtype=torch.float32, integers=False)
    x, *rest = p.args("bsr_linear")
    whole = torch.ops.sparsekern.bsr_linear(x, *rest)
    for low, high in ((0, 1), (7, 30), (49, 50)):
        assert torch.equal(torch.ops.sparsekern.bsr_linear(x[low:high], *rest), whole[low:high])
