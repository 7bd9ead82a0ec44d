"""The six ops against their plain-torch reference: exactness, rounding, memory, registration."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from samples import GEOMETRIES, OPS, Geometry, Problem, linear_problems, make_problem, problems, small_problems
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import ops, reference

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_op = pytest.mark.parametrize("op", OPS)


def run(op: str, problem: Problem) -> Tensor:
    return kernel(op)(*problem.args(op))


def kernel(op: str) -> Callable[..., Tensor]:
    return first_result(op, getattr(torch.ops.sparsekern, op).default)


def truth(op: str, problem: Problem) -> Tensor:
    return referee(op)(*problem.args(op))


def referee(op: str) -> Callable[..., Tensor]:
    return first_result(op, getattr(reference, op))


def first_result(op: str, call: Callable[..., Any]) -> Callable[..., Tensor]:
    """wgrad also gives the bias' gradient, which has a test of its own."""
    return (lambda *args: call(*args)[0]) if op.endswith("wgrad") else call


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    tensors = {name: getattr(problem, name) for name in ("x", "values", "bias", "grad")}
    return dataclasses.replace(problem, **{name: t if t is None else t.to(dtype) for name, t in tensors.items()})


def differing(op: str, cases: Iterable[Problem]) -> list[str]:
    """Names of the problems where kernel and reference are not bit-equal."""
    return [p.name for p in cases if op in p.ops and not torch.equal(run(op, p), truth(op, p))]


def test_the_kernels_are_there() -> None:
    """Without them everything below would compare the reference with itself."""
    assert ops.CPU_KERNELS_MISSING is None


# ---- exactness --------------------------------------------------------------------------------------------------


@both_dtypes
@every_op
def test_kernels_equal_the_reference_on_integers(op: str, dtype: torch.dtype) -> None:
    assert differing(op, problems(dtype)) == []


@pytest.mark.slow
@both_dtypes
@every_op
def test_kernels_equal_the_reference_on_integers_everywhere(op: str, dtype: torch.dtype) -> None:
    assert differing(op, problems(dtype, full=True)) == []


@both_dtypes
def test_wgrad_gives_the_gradient_of_the_bias(dtype: torch.dtype) -> None:
    for p in problems(dtype):
        op, dims = p.ops[2], (0, 2, 3) if p.geometry else tuple(range(p.grad.dim() - 1))
        for implementation in (getattr(torch.ops.sparsekern, op).default, getattr(reference, op)):
            _, with_bias = implementation(*p.args(op)[:-1], True)
            assert torch.equal(with_bias, p.grad.sum(dims) if dims else p.grad), p.name
            assert implementation(*p.args(op)[:-1], False)[1].shape == (0,)


@every_op
def test_the_reference_is_dense_torch(op: str) -> None:
    """The truth itself, against a weight written entry by entry from the definition, and torch's own gradients."""
    for p in small_problems():
        if op not in p.ops:
            continue
        weight = definition(p).requires_grad_()
        x = p.x.detach().clone().requires_grad_()
        if p.geometry:
            y = torch.nn.functional.conv2d(x, weight, p.bias, *p.geometry.conv[1:])
        else:
            y = torch.nn.functional.linear(x, weight, p.bias)
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), p.grad)
        expected = {"d": grad_x, "w": entries(p, grad_weight)}.get(op.split("_")[-1][0], y)
        if not op.endswith("grad"):
            expected = y
        assert torch.equal(truth(op, p), expected), p.name


def places(p: Problem) -> list[tuple[int, tuple[int, ...]]]:
    """(index among the flat values, index in torch's weight) of every stored weight, from the definitions alone."""
    crow, col = p.pattern.crow_indices.tolist(), p.pattern.col_indices.tolist()
    (bh, bw), (rows, cols) = p.pattern.blocksize, p.pattern.shape
    found = []
    for block_row in range(len(crow) - 1):
        for block in range(crow[block_row], crow[block_row + 1]):
            for i in range(bh):
                for j in range(bw):
                    row, column = block_row * bh + i, col[block] * bw + j
                    if row >= rows or column >= cols:
                        continue
                    if p.geometry:
                        tap, channel = divmod(column, p.geometry.weight_shape[1])
                        place = (row, channel, *divmod(tap, p.geometry.kernel_size[1]))
                    else:
                        place = (row, column)
                    found.append(((block * bh + i) * bw + j, place))
    return found


def definition(p: Problem) -> Tensor:
    weight = torch.zeros(p.geometry.weight_shape if p.geometry else p.pattern.shape, dtype=p.x.dtype)
    flat = p.values.flatten()
    for index, place in places(p):
        weight[place] = flat[index]
    return weight


def entries(p: Problem, weight: Tensor) -> Tensor:
    values = torch.zeros(p.pattern.values_shape, dtype=weight.dtype)
    for index, place in places(p):
        values.view(-1)[index] = weight[place]
    return values


# ---- memory -----------------------------------------------------------------------------------------------------


@every_op
def test_no_uninitialised_number_shows(op: str) -> None:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1000).isnan().all(), "the poison does not work"
    for p in problems(torch.float32):
        if op in p.ops:
            assert not run(op, p).isnan().any(), p.name


@pytest.mark.parametrize("geometry", [None, GEOMETRIES["odd-groups"]], ids=["linear", "conv2d"])
def test_wgrad_writes_zero_beyond_the_edge(geometry: Geometry | None) -> None:
    shape = geometry.shape if geometry else (21, 18)
    p = make_problem("edge", shape, (4, 5), "full", (3,), geometry=geometry, integers=False)
    beyond = ~p.pattern.edge_mask()
    grad = run(p.ops[2], p)
    assert beyond.any()
    assert (grad[beyond] == 0).all()
    assert (grad[~beyond] != 0).all()


@every_op
def test_inputs_stay_as_they_are(op: str) -> None:
    for p in small_problems():
        if op in p.ops:
            args = p.args(op)
            before = [a.clone() if isinstance(a, Tensor) else a for a in args]
            run(op, p)
            for a, b in zip(args, before, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b


# ---- a NaN or Inf stays where it belongs ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_op
def test_bad_numbers_reach_only_what_depends_on_them(op: str, bad: float) -> None:
    """Whatever is bad in an argument changes no bit of a result that does not read it.

    A zero of the padding counts as read: it is multiplied by the weight, as in dense torch's own im2col kernels.
    """
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for p in problems(torch.float32):
        args = list(dataclasses.replace(p, bias=None).args(op)) if op in p.ops else []
        if not args or min(args[0].numel(), args[1].numel()) == 0:
            continue
        for i in (0, 1):
            args[i] = torch.randint(1, 5, args[i].shape, generator=generator).float()
        clean = kernel(op)(*args)
        for which in (0, 1):
            is_values = which == 1 and not op.endswith("wgrad")
            places = p.pattern.edge_mask().flatten().nonzero() if is_values else torch.arange(args[which].numel())
            at = int(places[torch.randint(len(places), (1,), generator=generator)])
            changed = list(args)
            changed[which] = args[which].clone()
            changed[which].view(-1)[at] = bad
            actual = kernel(op)(*changed)
            depends = dependents(op, args, which, at)
            assert not actual[depends].isfinite().any(), p.name
            if p.geometry and is_values:  # every pixel of the channels that do depend
                depends = depends.any(3, True).any(2, True).any(0, True).expand_as(actual)
                if not depends.any():  # a tap that sees nothing but padding
                    continue
            elif op == "bsr_conv2d_wgrad" and which == 0:  # every weight of that output channel
                rows = p.pattern.block_rows()[:, None, None] * p.pattern.blocksize[0]
                rows = rows + torch.arange(p.pattern.blocksize[0])[None, :, None]
                channel = at // args[0][0, 0].numel() % args[0].shape[1]
                depends = (rows == channel).expand_as(actual)
            assert torch.equal(actual[~depends], clean[~depends]), p.name
            checked += 1
    assert checked > 40


def dependents(op: str, args: list[object], which: int, at: int) -> Tensor:
    """Which results read number ``at`` of argument ``which``: bilinear, so put 1 there, 0 elsewhere, 1 in the other."""
    probe = list(args)
    probe[which], probe[1 - which] = torch.zeros_like(args[which]), torch.ones_like(args[1 - which])
    probe[which].view(-1)[at] = 1
    return referee(op)(*probe) != 0


# ---- rounding ---------------------------------------------------------------------------------------------------


def rounding_excess(op: str, p: Problem) -> float:
    """Max error of float32 against float64, over what is allowed: at most 1."""
    exact = truth(op, cast(p, torch.float64))
    if exact.numel() == 0:
        return 0.0
    dense = (truth(op, p).double() - exact).abs().max()
    actual = (run(op, p).double() - exact).abs().max()
    factor = 3 if op.endswith("grad") else 2
    allowed = factor * dense + torch.finfo(torch.float32).eps * exact.abs().max()
    return float(actual / allowed) if actual else 0.0


@every_op
def test_rounding_error_is_like_that_of_dense_torch(op: str) -> None:
    cases = problems(torch.float32, integers=False)
    # A batch of one sample repeated is not enough numbers to compare maxima.
    cases = [p for p in cases if op in p.ops and not p.name.endswith(("expanded", "scalar"))]
    excess = {p.name: rounding_excess(op, p) for p in cases}
    assert {name: e for name, e in excess.items() if e > 1} == {}


@pytest.mark.parametrize("blocksize", [(1, 1), (8, 8), (1, 4), (5, 2)])
@pytest.mark.parametrize("outputs, inputs, batch", [(40, 2048, 16), (24, 4096, 7), (2048, 24, 9), (16, 24, 4096)])
def test_rounding_error_of_long_sums(blocksize: tuple[int, int], outputs: int, inputs: int, batch: int) -> None:
    p = make_problem(
        "long", (outputs, inputs), blocksize, "full", (batch,), dtype=torch.float32, integers=False
    )  # fmt: skip
    for op in p.ops:
        assert rounding_excess(op, p) <= 1, op


@pytest.mark.parametrize("blocksize", [(1, 1), (8, 8)])
def test_rounding_error_of_long_sums_of_a_convolution(blocksize: tuple[int, int]) -> None:
    geometry = Geometry(128, 16, (3, 3), (20, 20), padding=(1, 1))
    p = make_problem(
        "long", geometry.shape, blocksize, "full", (4,), geometry=geometry, dtype=torch.float32, integers=False
    )  # fmt: skip
    for op in p.ops:
        assert rounding_excess(op, p) <= 1, op


# ---- registration -----------------------------------------------------------------------------------------------


# The ops are private and carry no autograd rule (functional.py does); torch says so when asked for their gradient.
no_autograd = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")


@no_autograd
@pytest.mark.parametrize("problem", list(small_problems(torch.float32)), ids=lambda p: p.name)
def test_opcheck(problem: Problem) -> None:
    for op in problem.ops:
        check_registration(op, problem, requires_grad=False)
        check_registration(op, problem, requires_grad=True)


@pytest.mark.slow
@no_autograd
@every_op
def test_opcheck_everywhere(op: str) -> None:
    for p in problems(torch.float32):
        if op in p.ops:
            check_registration(op, p, requires_grad=False)
            check_registration(op, p, requires_grad=True)


def check_registration(op: str, problem: Problem, requires_grad: bool) -> None:
    # No NaN: opcheck compares the arguments before and after.
    problem = dataclasses.replace(problem, values=problem.values.nan_to_num(0))
    args = tuple(
        a.detach().requires_grad_() if requires_grad and isinstance(a, Tensor) and a.is_floating_point() else a
        for a in problem.args(op)
    )
    torch.library.opcheck(getattr(torch.ops.sparsekern, op).default, args)


@every_op
def test_flop_counter(op: str) -> None:
    """Two per stored weight and sample (pixel of the output), for each of the three products."""
    geometry = Geometry(2, 4, (3, 3), (8, 5), stride=(2, 1))  # output 3 x 3, 72 weights
    linear = make_problem("flops", (8, 12), (4, 4), "holes", (5,))
    conv = make_problem("flops", geometry.shape, (2, 2), "full", (2,), geometry=geometry)
    assert linear.pattern.nnz_blocks > 0
    with FlopCounterMode(display=False) as counter:
        run(op, linear if op in linear.ops else conv)
    expected = 2 * 5 * linear.pattern.nnz_blocks * 16 if op in linear.ops else 2 * (2 * 3 * 3) * 72
    assert counter.get_total_flops() == expected


# ---- the last guard before raw pointers -------------------------------------------------------------------------


def test_kernels_refuse_what_does_not_belong_together() -> None:
    p = next(iter(linear_problems()))
    other = make_problem("other", (p.pattern.shape[0] + 1, p.pattern.shape[1]), (1, 1), "third", (2,))
    x, values, bias, crow, col, plan, outputs = p.args("bsr_linear")
    wrong = {
        "does not belong": (x, values, bias, crow, col, other.args("bsr_linear")[5], outputs),
        "not a plan": (x, values, bias, crow, col, plan[:-1], outputs),
        "no plan": (x, values, bias, crow, col, plan.long(), outputs),
        "shorter values": (x, values[1:], bias, crow, col, plan, outputs),
        "dtype": (x, values.float(), bias, crow, col, plan, outputs),
        "16 bits": (x.bfloat16(), values.bfloat16(), None, crow, col, plan, outputs),
        "more inputs": (torch.cat([x, x], -1), values, bias, crow, col, plan, outputs),
        "bias": (x, values, torch.ones(outputs + 1, dtype=x.dtype), crow, col, plan, outputs),
    }
    for args in wrong.values():
        with pytest.raises(RuntimeError, match=r"plan|dtype|float32|bias"):
            kernel("bsr_linear")(*args)


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (0, 9)], ids=str)
def test_kernels_refuse_images_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    """With strides, rounding towards zero would find one pixel in a size below zero."""
    geometry = Geometry(2, 4, (3, 3), (9, 9), stride=(4, 4))
    p = make_problem("small", geometry.shape, (2, 2), "full", (2,), geometry=geometry)
    with pytest.raises(RuntimeError, match="input is too small"):
        run("bsr_conv2d", dataclasses.replace(p, x=p.x.new_ones(2, 2, *size)))


def test_wgrad_kernels_refuse_different_batches() -> None:
    p = make_problem("batch", (6, 8), (2, 2), "full", (4,))
    grad, *rest = p.args("bsr_linear_wgrad")
    with pytest.raises(RuntimeError, match="batch size"):
        kernel("bsr_linear_wgrad")(grad[1:], *rest)
    c = make_problem("conv", GEOMETRIES["3x3"].shape, (2, 2), "full", (4,), geometry=GEOMETRIES["3x3"])
    grad, *rest = c.args("bsr_conv2d_wgrad")
    with pytest.raises(RuntimeError, match="fit together"):
        kernel("bsr_conv2d_wgrad")(grad[:, :, 1:], *rest)
