"""``backend="triton"`` and what "auto" means on a GPU, where neither Triton nor a GPU is needed.

What the kernels compute is tested in tests/gpu. Here plain torch stands in for them behind the ops, so that everything
around the kernels can be tested on any machine: schemas, fakes, gradients, torch.compile, errors.
"""

import dataclasses
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import Problem, make_problem, small_problems
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import backend, cost, functional, ops, reference, triton
from sparsekern import nn as sparse_nn
from sparsekern.functional import bsr_conv2d, bsr_linear
from sparsekern.pattern import BlockPattern
from sparsekern.triton import model

HALF, FLOAT, DOUBLE = torch.float16, torch.float32, torch.float64
PATTERN = BlockPattern.from_mask(torch.ones(2, 3, dtype=torch.bool), (16, 16))
X, VALUES = torch.ones(5, 48), torch.ones(6, 16, 16)
SMALL = [p for p in small_problems() if not p.geometry]


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where Triton can run."""
    monkeypatch.setattr(triton, "missing", lambda: None)


class StandIn:
    """The module of the kernels, in plain torch; ``tf32`` notes what each call allowed."""

    def __init__(self) -> None:
        self.tf32: list[tuple[str, bool]] = []
        for name in ("linear", "linear_dgrad", "linear_wgrad"):
            setattr(self, name, self.noting(name, getattr(reference, f"bsr_{name}")))

    def noting(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.tf32.append((name, args[-1]))
            return compute(*args[:-1])

        return call


@pytest.fixture
def stand_in(ready: None, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    kernels = StandIn()
    monkeypatch.setattr(ops, "triton_kernels", lambda: kernels)
    monkeypatch.setattr(ops, "triton_device", lambda: "cpu")
    monkeypatch.setattr(triton, "supports", lambda blocksize, dtype: None)
    monkeypatch.setattr(functional, "make_triton_plan", lambda pattern, product: torch.zeros(3, dtype=torch.int32))
    return kernels


# ---- what "auto" means --------------------------------------------------------------------------------------------


def test_a_gpu_runs_triton_where_it_can(ready: None) -> None:
    for blocksize in ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (16, 64), (32, 128)):
        for dtype in (HALF, torch.bfloat16, FLOAT):
            assert cost.choose("cuda", dtype, blocksize, (512, 512), 0.3) == ("triton", None, None, None)
            assert backend.resolve("auto", "cuda", dtype, blocksize) == "triton"


@pytest.mark.parametrize(
    "dtype, blocksize, kernel, why",
    [
        (HALF, (1, 1), None, "1x1"),
        (HALF, (4, 4), None, "4x4"),
        (HALF, (8, 8), None, "8x8"),
        (HALF, (16, 8), None, "16x8"),
        (HALF, (48, 48), None, "48x48"),
        (DOUBLE, (64, 64), None, "float64"),
        (HALF, (64, 64), (3, 3, 1), "convolutions"),
    ],
)
def test_a_gpu_runs_dense_elsewhere_and_says_why(
    ready: None, dtype: Any, blocksize: Any, kernel: Any, why: str
) -> None:
    choice = cost.choose("cuda", dtype, blocksize, (576, 576), 0.3, kernel)
    assert (choice.backend, choice.seconds) == ("dense", None)
    assert choice.why is not None and why in choice.why
    assert backend.resolve("auto", "cuda", dtype, blocksize, kernel is not None) == "dense"


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
def test_what_is_too_dense_for_its_blocks_runs_dense(
    gpu: model.Gpu, ready: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "gpu", lambda: gpu)
    breaks_even = {}
    for side in triton.SIDES:
        chosen = [
            cost.choose("cuda", torch.bfloat16, (side, side), (4096, 4096), percent / 100) for percent in range(1, 100)
        ]
        runs = [choice.backend for choice in chosen]
        breaks_even[side] = runs.count("triton")
        assert runs == ["triton"] * breaks_even[side] + ["dense"] * (99 - breaks_even[side])
        assert all((choice.why is None) == (choice.backend == "triton") for choice in chosen)
        assert runs[9] == "triton"
    assert sorted(breaks_even.values()) == list(breaks_even.values()), breaks_even
    assert breaks_even[16] < 60 and breaks_even[128] > 80
    for dtype in (FLOAT, HALF):  # autocast computes in 16 bits what has values of 32
        assert cost.choose("cuda", dtype, (16, 16), (4096, 4096), 0.5).backend == "dense"
    why = cost.choose("cuda", HALF, (16, 16), (4096, 4096), 0.9).why
    assert why == f"blocks of 16x16 at this density are slower than dense, by a model of {gpu.name} (not measured)"


def test_without_a_known_gpu_density_does_not_matter(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "gpu", lambda: None)
    assert cost.choose("cuda", HALF, (16, 16), (4096, 4096), 1.0) == ("triton", None, None, None)


@pytest.mark.parametrize(
    "available, hip, capability, found",
    [
        (False, None, (8, 0), None),
        (True, "6.2", (9, 4), None),
        (True, None, (8, 6), model.A100),
        (True, None, (9, 0), model.H100),
        (True, None, (10, 0), model.H100),
    ],
)
def test_which_gpu_is_modelled(
    monkeypatch: pytest.MonkeyPatch, available: bool, hip: str | None, capability: Any, found: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert triton.gpu.__wrapped__() is found


def test_without_triton_a_gpu_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing", lambda: "it is on holiday")
    assert cost.choose("cuda", HALF, (64, 64), (512, 512), 0.3)[:2] == ("dense", "it is on holiday")
    assert cost.choose("mps", HALF, (64, 64), (512, 512), 0.3).backend == "reference"
    assert cost.choose("meta", HALF, (64, 64), (512, 512), 0.3)[:2] == ("reference", None)


def test_the_cpu_does_not_care(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (None, "it is on holiday"):
        monkeypatch.setattr(triton, "missing", lambda missing=missing: missing)
        assert cost.choose("cpu", HALF, (64, 64), (512, 512), 0.3) == ("cpu", None, None, None)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers choose as if their values were on a GPU."""
    choose = cost.choose
    monkeypatch.setattr(cost, "choose", lambda device, *args: choose("cuda", *args))


def test_layers_and_report_say_what_runs_and_why(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(2, 4, 3), nn.Linear(32, 64))
    ones = {"0": ((16, 16), (32, 64)), "1": ((4, 2), (4, 18)), "2": ((8, 8), (64, 32))}
    patterns = {
        name: BlockPattern.from_dense(torch.ones(shape), blocksize) for name, (blocksize, shape) in ones.items()
    }
    report = sk.sparsify_(model, patterns)
    assert [layer.runs for layer in model] == ["triton", "dense", "dense"]
    assert [row.backend for row in report.converted] == ["triton", "dense", "dense"]
    assert model[0].why is None and "convolutions" in model[1].why and "8x8" in model[2].why
    assert "runs" not in repr(model[0]) and "runs dense: blocks of 8x8" in repr(model[2])
    assert f"2: dense, not sparse kernels: {model[2].why}" in str(report)
    assert report.as_dict()["converted"][2]["why"] == model[2].why
    assert {"triton"} == model[0].pattern._plans.keys()  # planned when it got its pattern, and nothing else
    model[0].double()
    assert (model[0].runs, model[0].why is None) == ("dense", False)
    model[0].half()
    assert (model[0].runs, model[0].why) == ("triton", None)


def test_a_layer_that_ends_up_dense_on_a_gpu_is_said_once(
    ready: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sparse_nn._say_once.cache_clear()
    monkeypatch.setattr(sparse_nn.SparseLayer, "_choice", lambda self: cost.Choice("dense", "blocks of 8x8"))
    with caplog.at_level(logging.WARNING, "sparsekern"), torch.device("meta"):
        layers = [sk.SparseLinear(48, 32, pattern=PATTERN) for _ in range(3)]
    assert [layer.runs for layer in layers] == ["dense"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        'backend="auto": sparse layers run as dense: blocks of 8x8 (said once)'
    ]
    sparse_nn._say_once.cache_clear()


# ---- an explicit choice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, built, gpu, version, reason",
    [
        (None, "cuda", (8, 0), "", "not installed"),
        ("found", None, None, "", "built without GPUs"),
        ("found", "cuda", None, "", "no GPU"),
        ("found", "cuda", (9, 0), "3.5.1", "3.5.1 is older than 3.6"),
        ("found", "cuda", (7, 5), "3.9.0", "sm_75; the kernels need Ampere"),
        ("found", "cuda", (8, 0), "3.9.0", None),
        ("found", "hip", "gfx90a:sramecc+", "3.9.0", "gfx90a; the kernels are for CDNA3"),
        ("found", "hip", "gfx942:sramecc+", "3.6.0+rocm7", None),
    ],
)
def test_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    spec: str | None,
    built: str | None,
    gpu: tuple[int, int] | str | None,
    version: str,
    reason: str | None,
) -> None:
    """Triton is asked itself: distributions for AMD have other names."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.version, "cuda", "13" if built == "cuda" else None)
    monkeypatch.setattr(torch.version, "hip", "7" if built == "hip" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(gcnArchName=gpu))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    found = triton.missing.__wrapped__()
    assert found is None if reason is None else reason in (found or "")


def test_without_triton_an_explicit_choice_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing", lambda: "it is on holiday")
    ops.triton_kernels.cache_clear()
    layer = sk.SparseLinear(48, 32, pattern=PATTERN, backend="triton")
    assert (layer.runs, layer.why) == ("triton", "it is on holiday")
    assert "cannot run here: it is on holiday" in str(layer)
    for call in (lambda: bsr_linear(X, VALUES, PATTERN, backend="triton"), lambda: layer(X)):
        with pytest.raises(RuntimeError, match='backend="triton" cannot run here: it is on holiday'):
            call()
    plans = functional.prepare_triton(PATTERN)
    with pytest.raises(RuntimeError, match="it is on holiday"):  # the op itself, as a compiled graph calls it
        torch.ops.sparsekern.bsr_linear_triton(X, VALUES, None, *plans[:3], 32, False)


def test_an_explicit_choice_needs_a_gpu(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "triton_device", lambda: "cuda")
    with pytest.raises(ValueError, match='backend="triton" needs tensors on a GPU, got x on cpu'):
        bsr_linear(X, VALUES, PATTERN, backend="triton")


def test_an_explicit_choice_is_refused_where_there_is_no_kernel(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "triton_device", lambda: "cpu")
    eight = BlockPattern.from_mask(torch.ones(2, 3, dtype=torch.bool), (8, 8))
    with pytest.raises(ValueError, match='backend="triton" has no kernel for these tensors: blocks of 8x8'):
        bsr_linear(torch.ones(5, 24), torch.ones(6, 8, 8), eight, backend="triton")
    with pytest.raises(ValueError, match=r"no kernel for these tensors: .*float64"):
        bsr_linear(X.double(), VALUES.double(), PATTERN, backend="triton")
    layer = sk.SparseLinear(24, 16, pattern=eight)
    for call in (
        lambda: sk.SparseLinear(24, 16, pattern=eight, backend="triton"),
        lambda: setattr(layer, "backend", "triton"),
    ):
        with pytest.raises(ValueError, match="'triton' has no kernel for this layer: blocks of 8x8"):
            call()
    assert layer.backend == "auto"
    with pytest.raises(ValueError, match=r'"cpu", "dense" or "reference" for a convolution, got .triton.'):
        bsr_conv2d(torch.ones(1, 12, 4, 4), VALUES, PATTERN, kernel_size=2, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, dense, reference, got 'triton'"):
        sk.SparseConv2d(12, 32, 2, pattern=PATTERN, backend="triton")


# ---- around the kernels ---------------------------------------------------------------------------------------------


def arguments(p: Problem) -> tuple[Tensor, ...]:
    return tuple(
        t.detach().contiguous().requires_grad_() for t in (p.x, p.values.nan_to_num(0), p.bias) if t is not None
    )


def call(p: Problem, name: functional.Backend) -> Callable[..., Tensor]:
    return lambda x, values, bias=None: p.call(x, values, bias, name)


@pytest.mark.parametrize("p", SMALL, ids=lambda p: p.name)
def test_gradients_of_any_order(p: Problem, stand_in: StandIn) -> None:
    inputs = arguments(p)
    assert torch.autograd.gradcheck(call(p, "triton"), inputs, nondet_tol=0.0, fast_mode=True)
    assert torch.autograd.gradgradcheck(call(p, "triton"), inputs, nondet_tol=0.0, fast_mode=True)
    assert {name for name, _ in stand_in.tf32} == {"linear", "linear_dgrad", "linear_wgrad"}


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("p", SMALL, ids=lambda p: p.name)
def test_opcheck(p: Problem, stand_in: StandIn) -> None:
    p = dataclasses.replace(p, values=p.values.nan_to_num(0))
    for name, op in ops.TRITON.items():
        for grad in (False, True):
            tensors = [
                a.detach().requires_grad_(grad) if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in p.args(op)
            ]
            torch.library.opcheck(getattr(torch.ops.sparsekern, name).default, (*tensors, True))


def test_flops_are_those_of_stored_blocks(stand_in: StandIn) -> None:
    p = make_problem("flops", (8, 12), (4, 4), "holes", (5,))
    for name, op in ops.TRITON.items():
        with FlopCounterMode(display=False) as counter:
            getattr(torch.ops.sparsekern, name)(*p.args(op), False)
        assert counter.get_total_flops() == 2 * 5 * p.pattern.nnz_blocks * 16


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_16_bits_stay_16_bits(dtype: torch.dtype, stand_in: StandIn) -> None:
    """The kernels take them as they are, and autocast makes them."""
    seen = []
    compute = stand_in.linear  # type: ignore[attr-defined]
    stand_in.linear = lambda x, *rest: (seen.append(x.dtype), compute(x, *rest))[1]  # type: ignore[attr-defined]
    assert bsr_linear(X.to(dtype), VALUES.to(dtype), PATTERN, backend="triton").dtype == dtype
    with torch.autocast("cpu", dtype):
        values = VALUES.clone().requires_grad_()
        y = bsr_linear(X, values, PATTERN, backend="triton")
    y.float().sum().backward()
    assert y.dtype == dtype and seen == [dtype, dtype]
    assert values.grad is not None and values.grad.dtype == FLOAT


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch's setting, put back afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_follows_torch(stand_in: StandIn, tf32: Any) -> None:
    for precision, allowed in (("tf32", True), ("ieee", False)):
        tf32.fp32_precision = precision
        stand_in.tf32.clear()
        x = X.clone().requires_grad_()
        y = bsr_linear(x, VALUES.clone().requires_grad_(), PATTERN, backend="triton")
        y.sum().backward()
        assert stand_in.tf32 == [(name, allowed) for name in ("linear", "linear_dgrad", "linear_wgrad")]


# torch 2.13's own tracing instantiates autograd Functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_with_a_dynamic_batch(stand_in: StandIn, tf32: Any) -> None:
    layer = sk.SparseLinear(48, 32, pattern=PATTERN, backend="triton")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x).sin(), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, precision in ((5, "ieee"), (3, "ieee"), (8, "tf32")):
        tf32.fp32_precision = precision
        x = torch.randn(batch, 48, requires_grad=True)
        stand_in.tf32.clear()
        y, expected = compiled(x), layer(x).sin()
        assert torch.equal(y, expected)
        actual = torch.autograd.grad(y.sum(), (x, layer.values, layer.bias))
        for a, b in zip(actual, torch.autograd.grad(expected.sum(), (x, layer.values, layer.bias)), strict=True):
            assert torch.equal(a, b)
        assert {allowed for _, allowed in stand_in.tf32} == {precision == "tf32"}


def test_plans_are_made_once_and_travel_with_the_pattern() -> None:
    pattern = BlockPattern.from_mask(torch.ones(2, 3, dtype=torch.bool), (16, 16))
    plans = functional.prepare_triton(pattern)
    assert functional.prepare_triton(pattern) is plans
    assert {plan.dtype for plan in plans} == {torch.int32}
    assert functional.prepare(pattern) is not plans
