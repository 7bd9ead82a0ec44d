"""The Triton kernels of the linear products against float64, on emulated GPUs (or a real one)."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import needs_triton  # noqa: F401 -- first: skips where there is no Triton
import pytest
import torch
import triton_driver
from emulator import Pointer
from linear_cases import MACHINES, PRODUCTS, REAL, Case, check, emulated, make_problem, on, run
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk
from sparsekern.pattern import BlockPattern
from sparsekern.triton import linear
from sparsekern.triton.plan import Product, launch, make_plan
from sparsekern.triton.tuning import Kind, choose_config

AXES = {
    "blocksize": ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (16, 64), (32, 128)),
    "shape": ((128, 256), (200, 264), (97, 131), (16, 16), (5, 300), (300, 6)),
    "work": (
        ("forward", "none"),
        ("forward", "bias"),
        ("forward", "relu"),
        ("forward", "gelu"),
        ("forward", "residual"),
        ("forward", "all"),
        ("dgrad", "none"),
        ("dgrad", "none"),
        ("wgrad", "none"),
        ("wgrad", "bias"),
    ),
    "kind": ("float16", "bfloat16", "tf32", "float32"),
    "machine": MACHINES,
    "density": ("none", "tenth", "third", "full", "one", "holes"),
    "tokens": (1, 20, 33, 64, 150),
    "layout": ("contiguous", "transposed", "expanded", "sliced"),
    "group": (None, 1, 0),
    "integers": (True, False),
}
CASES = [(row.pop("machine"), Case(*row.pop("work"), **row, seed=i)) for i, row in enumerate(pairwise(AXES))]


@pytest.mark.parametrize("machine, case", CASES, ids=str)
def test_product(machine: int | str, case: Case) -> None:
    problem = make_problem(case)
    with on(machine):
        check(problem, run(problem))


SPECIAL = {
    # A row of 128 blocks among rows of one: cut in two, added up by a second kernel, epilogue and all.
    "long row": Case("forward", blocksize=(16, 16), shape=(70, 2048), tokens=40, epilogue="all"),
    "long row of dgrad": Case("dgrad", blocksize=(16, 16), shape=(2048, 70), tokens=40),
    # Few tokens, few and long rows: cut into 4 parts.
    "decode": Case("forward", blocksize=(16, 32), shape=(40, 512), density="full", tokens=3, epilogue="all"),
    "decode in groups": Case("dgrad", blocksize=(64, 16), shape=(600, 50), density="third", tokens=32, group=2),
    "decode without blocks": Case("forward", blocksize=(16, 16), shape=(40, 512), density="none", tokens=3),
    # Two chunks of tokens; more tiles of tokens than run abreast, the last of them ragged.
    "many tokens": Case("wgrad", blocksize=(16, 32), shape=(40, 70), tokens=600),
    "more tokens": Case("forward", blocksize=(64, 32), shape=(64, 32), density="full", tokens=600, kind="float32"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_plans_and_chunks(name: str) -> None:
    case = SPECIAL[name]
    pattern = None
    if "long row" in name:
        along = 0 if case.product == "forward" else 1
        mask = torch.zeros(5, 128, dtype=torch.bool)
        mask[:, 3] = mask[1] = True
        pattern = BlockPattern.from_mask(mask if along == 0 else mask.T, case.blocksize, case.shape)
    problem = make_problem(case, pattern)
    with on(MACHINES[0]) as driver:
        check(problem, run(problem))
    if not REAL:
        names = [name for name, _ in driver.launches]
        adding = {"wgrad": "add_chunks"}.get(case.product, "add_parts")
        cut = name not in ("more tokens", "decode without blocks")
        assert (adding in names) == cut, names


@pytest.mark.parametrize("tokens, shape", [(0, (40, 50)), (3, (0, 40)), (3, (40, 0))])
def test_nothing_to_compute(tokens: int, shape: tuple[int, int]) -> None:
    for product in PRODUCTS:
        problem = make_problem(Case(product, shape=shape, tokens=tokens))
        with on(MACHINES[0]):
            check(problem, run(problem))


@pytest.mark.parametrize("product", PRODUCTS)
def test_leading_dimensions_and_repetition(product: Product) -> None:
    problem = make_problem(Case(product, tokens=60, integers=False))
    with on(MACHINES[0]):
        once, again = run(problem), run(problem)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        shaped = problem.__class__(
            **{**vars(problem), "x": problem.x.view(4, 15, -1), "grad": problem.grad.view(4, 15, -1)}
        )
        for a, b in zip(run(shaped), once, strict=True):
            assert torch.equal(a, b if product == "wgrad" else b.view(4, 15, -1))


@pytest.mark.skipif(REAL, reason="moves pointers, which only the emulator has made")
@pytest.mark.parametrize("product", PRODUCTS)
def test_values_beyond_31_bits(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a layer with 2**31 values more in front, which the pointer pretends to."""
    problem = make_problem(Case(product, blocksize=(16, 16), shape=(48, 64), density="full", tokens=40, group=2))
    with on(MACHINES[0]):
        expected = run(problem)
    far, plan = 2**31 // 256, problem.plan.clone()
    if product == "wgrad":
        plan[:, 1] += far
    else:
        features = problem.pattern.shape[product == "dgrad"]
        todo = launch(plan.shape, features, (16, 16), problem.pattern.nnz_blocks, False)
        entries = plan.flatten()[todo.entries_at :]
        places = entries[: entries.numel() // 3 * 3].view(-1, 3)[:, 1:]
        places[places >= 0] += far
    pointer = triton_driver.pointer

    def moved(tensor: torch.Tensor) -> Pointer:
        found, values = pointer(tensor), problem.values
        step = far * 256 * values.element_size() if tensor.shape == values.shape else 0
        return Pointer(found.storage, found.offset - step)

    monkeypatch.setattr(triton_driver, "pointer", moved)
    with on(MACHINES[0]):
        for a, b in zip(run(dataclasses.replace(problem, plan=plan)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("product", PRODUCTS)
def test_launches_neither_wait_nor_depend_on_data(product: Product) -> None:
    """What CUDA graphs need: nothing is read back, and layers of one shape launch the same."""

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func.name())
            return func(*args, **(kwargs or {}))

    grids = []
    for turn in range(2):
        mask = torch.eye(4, dtype=torch.bool).roll(turn, 0)
        case = Case(product, blocksize=(16, 16), shape=(64, 64), tokens=40, seed=turn)
        problem = make_problem(case, BlockPattern.from_mask(mask, (16, 16)))
        with on(MACHINES[0]) as driver, Calls() as calls:
            run(problem)
        views = {"aten::view", "aten::_unsafe_view"}
        assert calls.names <= {"aten::empty.memory_format", "aten::new_empty", "aten::clone", *views}  # clone: run's
        grids.append([(name, counters.ctas) for name, counters in driver.launches])
    assert grids[0] == grids[1]


@pytest.mark.skipif(not REAL, reason="no GPU to capture")
def test_a_step_is_captured_and_replayed() -> None:
    torch.manual_seed(0)
    mask = torch.rand(4, 4) < 0.5
    layer = sk.SparseLinear(128, 128, pattern=BlockPattern.from_mask(mask, (32, 32)), device="cuda", backend="triton")
    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    for _ in range(2):
        x = torch.randn(64, 128, device="cuda", requires_grad=True)
        results = []
        for call in (graphed, layer):
            y = call(x)
            results.append([y.clone(), *torch.autograd.grad(y.sum(), (x, layer.values, layer.bias))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_plans_hold_every_block_once() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = BlockPattern.from_mask(torch.rand(13, 21, generator=generator) < 0.4, (16, 32), (200, 650))
    steps: dict[Product, tuple[int, int]] = {"forward": (13, 2), "dgrad": (21, 4)}
    for product, (per_tile, per_step) in steps.items():
        for group in (1, 2, 8):
            plan = make_plan(pattern, product, group=group)
            features, blocksize = (200, (16, 32)) if product == "forward" else (650, (32, 16))
            for decode in (False, True):
                todo = launch(plan.shape, features, blocksize, pattern.nnz_blocks, decode)
                assert todo.rows == -(-per_tile // group)
                flat = plan.flatten()
                units = flat[todo.units_at :][: 4 * todo.units].view(-1, 4).tolist()
                entries = flat[todo.entries_at :]
                entries = entries[: entries.numel() // (1 + group) * (1 + group)].view(-1, 1 + group)
                found = set()
                for row, first, last, _ in units:
                    assert first % per_step == last % per_step == 0
                    for col, *places in entries[first:last].tolist():
                        found |= {(row * group + g, col, place) for g, place in enumerate(places) if place >= 0}
                lengths = [last - first for _, first, last, _ in units]
                assert lengths == sorted(lengths, reverse=True)
                rows, cols = pattern.block_rows().tolist(), pattern.col_indices.tolist()
                blocks = zip(rows, cols, strict=True) if product == "forward" else zip(cols, rows, strict=True)
                assert found == {(r, c, place) for place, (r, c) in enumerate(blocks)}


def test_configurations_follow_from_arguments_and_fit() -> None:
    sizes: dict[Kind, int] = {"float16": 2, "tf32": 4, "float32": 4}
    for kind, size in sizes.items():
        for arch, shared, spare in ((80, 163, 1), (86, 99, 1), (90, 227, 0), ("gfx942", 64, 1)):
            for tokens in (1, 32, 4096):
                for blocksize, group in (((16, 16), 1), ((128, 128), 1), ((16, 64), 8)):
                    config = choose_config("forward", blocksize, tokens, kind, arch, group)
                    tile_n = blocksize[0] * group
                    stage = (config.tile_t + tile_n) * config.tile_k * size
                    buffers = config.stages - spare
                    assert buffers >= 2 and buffers * stage <= 1024 * shared
                    assert config.tile_t < 2 * max(tokens, 16)
                    assert config.tile_k * size == 128


@pytest.mark.skipif(REAL, reason="the tensors of these launches are never made")
def test_grids_can_be_launched_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third dimension of a grid end at 65,535, the first at 2**31 - 1."""
    grids: dict[str, tuple[int, ...]] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **keywords: grids.update({self.name: grid})

    names = ("gather", "add_parts", "sampled", "sum_tokens", "add_chunks")
    monkeypatch.setattr(linear, "kernels", SimpleNamespace(**{name: Recorder(name) for name in names}))
    mask = torch.zeros(5, 128, dtype=torch.bool)
    mask[:, 3] = mask[1] = True  # one row long enough to be cut
    pattern = BlockPattern.from_mask(mask, (16, 16), (70, 2048))
    x, grad = torch.zeros(1, 2048).half().expand(2**21, 2048), torch.zeros(1, 70).half().expand(2**21, 70)
    values = torch.zeros(pattern.values_shape).half()
    indices = pattern.crow_indices, pattern.col_indices
    with emulated(80):
        linear.linear(x, values, None, *indices, make_plan(pattern, "forward"), 70, False)
        linear.linear_wgrad(grad, x, *indices, make_plan(pattern, "wgrad"), (16, 16), True, False)
    assert set(grids) == set(names)
    for name, grid in grids.items():
        assert max(grid[1:], default=1) <= 65_535 and grid[0] < 2**31, (name, grid)
