"""bsr_linear and bsr_conv2d as functions: gradients of any order, torch's other features, errors in words."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import GEOMETRIES, Geometry, Problem, lay_out, make_problem, problems, small_problems
from torch import Tensor

from sparsekern import autograd, functional
from sparsekern.functional import bsr_conv2d, bsr_linear, prepare
from sparsekern.pattern import BlockPattern
from sparsekern.weights import weight_from_matrix

BACKENDS = ("cpu", "dense", "reference")
SMALL = list(small_problems())
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def forward_and_gradients(p: Problem, backend: Any, x: Tensor | None = None) -> list[Tensor]:
    x = (p.x if x is None else x).detach().requires_grad_()
    inputs = [t.detach().requires_grad_() for t in (p.values, p.bias) if t is not None]
    y = p.call(x, inputs[0], inputs[1] if len(inputs) > 1 else None, backend)
    return [y.detach(), *torch.autograd.grad(y, [x, *inputs], p.grad)]


# ---- values and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backends_agree_exactly_on_integers(dtype: torch.dtype) -> None:
    for p in problems(dtype):
        kernels = forward_and_gradients(p, "cpu")
        for backend in ("dense", "reference"):
            for a, b in zip(kernels, forward_and_gradients(p, backend), strict=True):
                assert torch.equal(a, b), p.name
                assert not a.isnan().any(), p.name


@every_backend
def test_overhang_never_shows_and_gets_zero_gradient(backend: str) -> None:
    p = make_problem("edge", (7, 9), (3, 5), "full", (4,), integers=False)
    beyond = ~p.pattern.edge_mask()
    assert p.values[beyond].isnan().all()
    y, grad_x, grad_values, _ = forward_and_gradients(p, backend)
    assert y.isfinite().all()
    assert grad_x.isfinite().all()
    assert (grad_values[beyond] == 0).all()
    assert (grad_values[~beyond] != 0).all()


def differentiable(p: Problem) -> tuple[Any, tuple[Tensor, ...]]:
    inputs = [p.x, p.values.nan_to_num(0), *([] if p.bias is None else [p.bias])]
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
    layout = "expanded" if "expanded" in p.name else "contiguous"

    def function(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        if layout == "expanded":  # read one sample through stride 0
            x = x[:1].expand(x.shape)
        return p.call(x, values, bias, "cpu")

    return function, leaves


@pytest.mark.parametrize("p", SMALL, ids=lambda p: p.name)
def test_gradcheck(p: Problem) -> None:
    function, leaves = differentiable(p)
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("p", SMALL, ids=lambda p: p.name)
def test_gradgradcheck(p: Problem) -> None:
    function, leaves = differentiable(p)
    assert torch.autograd.gradgradcheck(function, leaves, nondet_tol=0.0, gen_non_contig_grad_outputs=True)


@pytest.mark.slow
def test_gradients_everywhere() -> None:
    for p in problems():
        if p.x.numel() <= 400 and p.pattern.nnz <= 400:
            function, leaves = differentiable(p)
            assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True), p.name
            assert torch.autograd.gradgradcheck(function, leaves, nondet_tol=0.0, fast_mode=True), p.name


def test_third_derivatives() -> None:
    """The products are closed under differentiation, to any order."""
    p = SMALL[3]
    x, values = p.x.detach().clone().requires_grad_(), p.values.nan_to_num(0).requires_grad_()

    def third(backend: Any) -> Tensor:
        y = p.call(x, values, None, backend).pow(4).sum()
        for _ in range(2):
            y = torch.autograd.grad(y, x, create_graph=True)[0].pow(2).sum()
        return torch.autograd.grad(y, values)[0]

    torch.testing.assert_close(third("cpu"), third("reference"))
    torch.testing.assert_close(third("cpu"), third("dense"))


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("p", [SMALL[3], SMALL[9]], ids=["linear", "conv2d"])
def test_only_the_gradients_asked_for(p: Problem, need: tuple[bool, bool, bool]) -> None:
    inputs = [
        t.detach().requires_grad_(n)
        for t, n in zip((p.x, p.values, torch.ones(len(p.bias)).double()), need, strict=True)
    ]
    p.call(*inputs, "cpu").sum().backward()
    assert [t.grad is not None for t in inputs] == list(need)


def test_no_graph_without_grad_mode() -> None:
    p = SMALL[3]
    x = p.x.detach().requires_grad_()
    with torch.no_grad():
        assert not p.call(x, p.values, p.bias, "cpu").requires_grad
    with torch.inference_mode():
        assert p.call(x, p.values, p.bias, "cpu").is_inference()


# ---- convolutions as torch has them -----------------------------------------------------------------------------


def dense_weight(p: Problem) -> Tensor:
    assert p.geometry
    return weight_from_matrix(p.pattern.scatter(p.values), p.geometry.weight_shape)


@every_backend
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)], ids=str)
@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (2, 1), ((4, 2), (1, 3)), ((1, 4), 2)], ids=str)
def test_padding_as_in_torch(kernel_size: Any, dilation: Any, padding: Any, backend: Any) -> None:
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    p = make_problem(
        "pad", Geometry(4, 6, kernel, (9, 8)).shape, (4, 4), "third", (2,), geometry=Geometry(4, 6, kernel, (9, 8))
    )
    x = p.x.detach().requires_grad_()
    actual = bsr_conv2d(
        x, p.values, p.pattern, p.bias, 1, padding, dilation, kernel_size=kernel_size, backend=backend
    )  # fmt: skip
    with torch.random.fork_rng():
        expected = dense_same(x, dense_weight(p), p.bias, padding, dilation)
    assert torch.equal(actual, expected)
    for a, b in zip(torch.autograd.grad(actual.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        assert torch.equal(a, b)


def dense_same(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, dilation: Any) -> Tensor:
    if padding != "same":
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    # torch pads an even kernel itself, and warns about it; so pad here, by its documented rule.
    spread = (dilation, dilation) if isinstance(dilation, int) else dilation
    total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
    sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    return F.conv2d(F.pad(x, sides), weight, bias, dilation=dilation)


@every_backend
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed", "sliced"])
def test_outputs_follow_the_memory_format_of_x(layout: str, backend: Any) -> None:
    p = make_problem("format", GEOMETRIES["3x3"].shape, (2, 3), "third", (2,), geometry=GEOMETRIES["3x3"])
    for grad_layout in ("nchw", "channels_last", "scalar"):
        x = lay_out(p.x, layout).detach().requires_grad_()
        y = p.call(x, p.values, None, backend)
        expected = F.conv2d(p.x, dense_weight(p), None, padding=1)
        assert torch.equal(y, expected)
        grad = lay_out(p.grad, grad_layout)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(grad_x, torch.nn.grad.conv2d_input(p.x.shape, dense_weight(p), grad, padding=1))
        if layout != "transposed":
            wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            assert y.is_contiguous(memory_format=wanted)
            assert grad_x.is_contiguous(memory_format=wanted)


@every_backend
def test_no_batch_dimension(backend: Any) -> None:
    p = make_problem("single", GEOMETRIES["groups"].shape, (4, 2), "third", (1,), geometry=GEOMETRIES["groups"])
    kernel_size, *conv = p.geometry.conv
    y = bsr_conv2d(p.x[0], p.values, p.pattern, p.bias, *conv, kernel_size=kernel_size, backend=backend)
    assert torch.equal(y, p.call(p.x, p.values, p.bias, backend)[0])
    assert p.pattern.scatter(p.values).any()
    z = bsr_linear(torch.ones(p.pattern.shape[1], dtype=p.x.dtype), p.values, p.pattern, backend=backend)
    assert z.shape == p.pattern.shape[:1]


@every_backend
@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("blocksize", [(1, 1), (2, 3)], ids=str)
def test_layers_without_inputs_or_outputs(shape: tuple[int, int], blocksize: tuple[int, int], backend: Any) -> None:
    p = make_problem("empty", shape, blocksize, "full", (3,))
    y, grad_x, grad_values, grad_bias = forward_and_gradients(p, backend)
    assert torch.equal(y, p.bias.expand(3, -1))
    assert torch.equal(grad_x, torch.zeros_like(p.x))
    assert torch.equal(grad_bias, p.grad.sum(0))
    assert grad_values.shape == p.pattern.values_shape


@every_backend
@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_images_without_pixels_are_refused(size: tuple[int, int], backend: Any) -> None:
    """As torch does; with padding there would be an output."""
    pattern = BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), (2, 2))
    x, values = torch.ones(2, 4, *size), torch.ones(pattern.values_shape)
    with pytest.raises(ValueError, match="x must"):
        bsr_conv2d(x, values, pattern, padding=1, kernel_size=1, backend=backend)


def test_what_is_channels_last_is_as_torch_has_it() -> None:
    sizes = [(n, c, h, w) for n in (0, 1, 2) for c in (0, 1, 3) for h in (1, 4) for w in (1, 5)]
    for size in sizes:
        x = torch.empty(size)
        layouts = [lay_out(x, name) for name in ("nchw", "channels_last", "transposed", "sliced", "expanded", "scalar")]
        for y in (*layouts, x.permute(0, 1, 3, 2), torch.empty(size[0], size[2], size[3], size[1]).permute(0, 3, 1, 2)):
            expected = torch._prims_common.suggest_memory_format(y) == torch.channels_last
            assert functional.is_channels_last(y) == expected, (size, y.stride())


def test_a_convolutions_geometry_is_checked_again_unless_it_is_the_same_object() -> None:
    stride: Any = [1, 1]
    y = bsr_conv2d(IMAGES, CONV_VALUES, CONV, stride=stride, kernel_size=(2, 2))
    assert y.shape[2:] == (4, 4)
    stride[:] = [2, 2]
    assert bsr_conv2d(IMAGES, CONV_VALUES, CONV, stride=stride, kernel_size=(2, 2)).shape[2:] == (2, 2)
    for good, bad in ((1, True), ((1, 1), (1.0, 1)), (1, 1.0)):
        for _ in range(2):
            bsr_conv2d(IMAGES, CONV_VALUES, CONV, stride=good, kernel_size=2)
            with pytest.raises(ValueError, match="stride must be"):
                bsr_conv2d(IMAGES, CONV_VALUES, CONV, stride=bad, kernel_size=2)
    with pytest.raises(ValueError, match="groups must be"):
        bsr_conv2d(IMAGES, CONV_VALUES, CONV, stride=1, groups=True, kernel_size=2)


# ---- lower precision --------------------------------------------------------------------------------------------


def convolution_or_linear(kind: str, dtype: torch.dtype) -> Problem:
    geometry = GEOMETRIES["3x3"] if kind == "conv2d" else None
    shape = geometry.shape if geometry else (40, 30)
    return make_problem(kind, shape, (4, 4), "third", (5,), geometry=geometry, dtype=dtype, integers=False)


kinds = pytest.mark.parametrize("kind", ["linear", "conv2d"])
sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@every_backend
@sixteen_bits
@kinds
def test_16_bit_tensors_compute_in_float32(kind: str, dtype: torch.dtype, backend: Any) -> None:
    p = convolution_or_linear(kind, dtype)
    wide = dataclasses.replace(
        p, x=p.x.float(), values=p.values.float(), bias=p.bias.float(), grad=p.grad.float()
    )  # fmt: skip
    exact = forward_and_gradients(wide, "reference")
    for actual, expected in zip(forward_and_gradients(p, backend), exact, strict=True):
        assert actual.dtype == dtype
        # one rounding at the end; the sums in front of it differ in the last bits of float32
        torch.testing.assert_close(actual.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@every_backend
@sixteen_bits
@kinds
def test_autocast(kind: str, dtype: torch.dtype, backend: Any) -> None:
    p = convolution_or_linear(kind, torch.float32)
    x, values, bias = (t.detach().requires_grad_() for t in (p.x, p.values, p.bias))
    with torch.autocast("cpu", dtype):
        y = p.call(x, values, bias, backend)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, (x, values, bias), p.grad.to(dtype))
    assert {g.dtype for g in gradients} == {torch.float32}
    narrow = dataclasses.replace(
        p, x=p.x.to(dtype), values=p.values.to(dtype), bias=p.bias.to(dtype), grad=p.grad.to(dtype)
    )  # fmt: skip
    expected = forward_and_gradients(narrow, backend)
    for actual, e in zip((y.detach(), *gradients), expected, strict=True):
        torch.testing.assert_close(actual.float(), e.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_autocast_leaves_float64_alone() -> None:
    p = convolution_or_linear("linear", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert p.call(p.x, p.values, p.bias, "cpu").dtype == torch.float64


# ---- autograd Functions without torch's wrapper ------------------------------------------------------------------


@kinds
def test_calls_are_the_same_without_the_shortcut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a torch that does not say whether functorch is active: Function.apply itself is called then."""
    p = convolution_or_linear(kind, torch.float32)
    expected = forward_and_gradients(p, "cpu")
    for name, function in (("linear", autograd.Linear), ("conv2d", autograd.Conv2d)):
        plain = autograd.direct_apply(function, None)
        assert plain == function.apply != autograd.direct_apply(function, torch.is_grad_enabled)
        monkeypatch.setattr(functional, f"apply_{name}", plain)
    monkeypatch.setattr(functional, "functorch_is_active", None)
    for a, b in zip(forward_and_gradients(p, "cpu"), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: p.call(x, p.values, p.bias, "cpu").sum())(p.x)


@kinds
def test_functorch_is_refused(kind: str) -> None:
    p = convolution_or_linear(kind, torch.float32)
    prepare(p.pattern, p.geometry.kernel if p.geometry else None)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: p.call(x, p.values, p.bias, "cpu").sum())(p.x)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(lambda x: p.call(x, p.values, p.bias, "cpu"))(p.x[None])


@kinds
def test_a_tensor_left_over_from_functorch_is_an_ordinary_one(kind: str) -> None:
    p = convolution_or_linear(kind, torch.float32)
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(p.x)
    for a, b in zip(forward_and_gradients(p, "cpu", left[0]), forward_and_gradients(p, "cpu"), strict=True):
        assert torch.equal(a, b)


# ---- torch.compile ----------------------------------------------------------------------------------------------


# torch 2.13's own tracing instantiates autograd Functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@kinds
def test_compiles_whole_with_a_dynamic_batch(kind: str) -> None:
    p = convolution_or_linear(kind, torch.float32)
    prepare(p.pattern, p.geometry.kernel if p.geometry else None)
    graphs = 0

    def step(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return p.call(x, values, bias, "cpu").sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    for batch in (5, 3, 8, 13):
        x = torch.randn(batch, *p.x.shape[1:], requires_grad=True)
        if kind == "conv2d" and batch == 8:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        inputs = (x, p.values.detach().requires_grad_(), p.bias.detach().requires_grad_())
        y, expected = compiled(*inputs), step(*inputs)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
            assert torch.equal(a, b)
        if batch == 5:
            graphs = counters["unique_graphs"]
    # channels_last is another graph; another batch is not
    assert counters["unique_graphs"] == graphs + (kind == "conv2d")


# ---- errors -----------------------------------------------------------------------------------------------------

PATTERN = BlockPattern.from_mask(torch.ones(2, 3, dtype=torch.bool), (2, 2))  # 4 x 6
X, VALUES, BIAS = torch.ones(5, 6), torch.ones(6, 2, 2), torch.ones(4)
LINEAR_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x list": ({"x": [1.0]}, TypeError, "x must be a tensor"),
    "x 0-D": ({"x": torch.ones(())}, ValueError, r"x must have shape \[\*, 6\]"),
    "x width": ({"x": torch.ones(5, 7)}, ValueError, r"x must have shape \[\*, 6\].*got \(5, 7\)"),
    "x int": ({"x": X.int()}, TypeError, "x"),
    "all int": ({"x": X.int(), "values": VALUES.int(), "bias": None}, TypeError, "x must be of a floating-point dtype"),
    "x complex": ({"x": X.cfloat(), "values": VALUES.cfloat(), "bias": None}, TypeError, "x must be"),
    "x float8": (
        {"x": X.to(torch.float8_e5m2), "values": VALUES.to(torch.float8_e5m2), "bias": None}, TypeError, "x must be",
    ),
    "x device": ({"x": X.to("meta")}, ValueError, "x must be on cpu, where the pattern is, got meta"),
    "x sparse": ({"x": X.to_sparse()}, TypeError, "x must be"),
    "values list": ({"values": [1.0]}, TypeError, "values must be a tensor"),
    "values shape": ({"values": torch.ones(6, 4)}, ValueError, r"values must have shape \(6, 2, 2\).*got \(6, 4\)"),
    "values number": ({"values": torch.ones(5, 2, 2)}, ValueError, r"values must have shape \(6, 2, 2\)"),
    "values dtype": ({"values": VALUES.double()}, TypeError, "values must have the dtype of x, .*got torch.float64"),
    "values device": ({"values": VALUES.to("meta")}, ValueError, "values must be on cpu"),
    "pattern": ({"pattern": None}, TypeError, "pattern must be a BlockPattern"),
    "bias list": ({"bias": [1.0]}, TypeError, "bias must be a tensor"),
    "bias shape": ({"bias": torch.ones(6)}, ValueError, r"bias must have shape \(4,\).*got \(6,\)"),
    "bias dtype": ({"bias": BIAS.double()}, TypeError, "bias must have the dtype of x, .*got torch.float64"),
    "bias device": ({"bias": BIAS.to("meta")}, ValueError, r"bias must have shape \(4,\) on cpu, got \(4,\) on meta"),
    "backend": (
        {"backend": "cuda"}, ValueError, 'be "auto", "cpu", "triton", "dense" or "reference", got .cuda.',
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, error, message", LINEAR_ERRORS.values(), ids=LINEAR_ERRORS)
def test_errors_of_bsr_linear(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"x": X, "values": VALUES, "pattern": PATTERN, "bias": BIAS, **change}
    with pytest.raises(error, match=message):
        bsr_linear(**args)


IMAGES = torch.ones(2, 3, 5, 5)
CONV = BlockPattern.from_mask(torch.ones(2, 6, dtype=torch.bool), (2, 2))  # 4 x (2 * 2 * 3)
CONV_VALUES = torch.ones(12, 2, 2)
CONV_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x list": ({"x": [1.0]}, TypeError, "x must be a tensor"),
    "x 2-D": ({"x": torch.ones(3, 5)}, ValueError, r"x must have shape \[n, 3, h, w\] or \[3, h, w\], got \(3, 5\)"),
    "x channels": ({"x": torch.ones(2, 4, 5, 5)}, ValueError, r"x must have shape \[n, 3, h, w\]"),
    "x 3-D channels": ({"x": torch.ones(4, 5, 5)}, ValueError, r"x must have shape \[n, 3, h, w\]"),
    "x small": ({"x": torch.ones(2, 3, 1, 5)}, ValueError, r"x is too small: a kernel of \(2, 2\)"),
    "x dilated": ({"dilation": 5}, ValueError, r"x is too small.*dilation \(5, 5\)"),
    "x dtype": ({"x": IMAGES.double()}, TypeError, "values must have the dtype of x, torch.float64"),
    "x device": ({"x": IMAGES.to("meta")}, ValueError, "x must be on cpu"),
    "values": ({"values": CONV_VALUES[1:]}, ValueError, r"values must have shape \(12, 2, 2\)"),
    "bias": ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(4,\)"),
    "pattern": ({"pattern": None}, TypeError, "pattern must be a BlockPattern"),
    "kernel_size does not fit": ({"kernel_size": 3}, ValueError, r"12 columns are no multiple of kernel_size 3 \* 3"),
    "kernel_size 0": ({"kernel_size": 0}, ValueError, "kernel_size must be an int or two ints of at least 1 .*got 0"),
    "kernel_size 3 sides": ({"kernel_size": (2, 2, 1)}, ValueError, r"kernel_size must be .*got \(2, 2, 1\)"),
    "kernel_size float": ({"kernel_size": 2.0}, (TypeError, ValueError), "kernel_size must be .*got 2.0"),
    "kernel_size text": ({"kernel_size": "22"}, (TypeError, ValueError), "kernel_size must be .*got '22'"),
    "kernel_size bool": ({"kernel_size": True}, (TypeError, ValueError), "kernel_size must be .*got True"),
    "stride": ({"stride": 0}, ValueError, "stride must be an int or two ints of at least 1 .*got 0"),
    "stride float": ({"stride": 1.5}, (TypeError, ValueError), "stride must be .*got 1.5"),
    "padding negative": ({"padding": (0, -1)}, ValueError, r"padding must be .* at least 0 .*got \(0, -1\)"),
    "padding None": ({"padding": None}, (TypeError, ValueError), "padding must be .*got None"),
    "padding word": ({"padding": "full"}, ValueError, 'padding must be "same", "valid",.* got .full.'),
    "padding same": ({"padding": "same", "stride": 2}, ValueError, r'padding="same" needs stride 1, got \(2, 2\)'),
    "dilation": ({"dilation": (1, 0)}, ValueError, r"dilation must be .*got \(1, 0\)"),
    "groups 0": ({"groups": 0}, ValueError, "groups must be .*4 output channels, got 0"),
    "groups 3": ({"groups": 3}, ValueError, "groups must be .*4 output channels, got 3"),
    "groups float": ({"groups": 2.0}, (TypeError, ValueError), "groups must be .*got 2.0"),
    "groups text": ({"groups": "2"}, (TypeError, ValueError), "groups must be .*got .?2"),
    "backend": ({"backend": "triton"}, ValueError, "backend must be"),
}  # fmt: skip


@pytest.mark.parametrize("change, error, message", CONV_ERRORS.values(), ids=CONV_ERRORS)
def test_errors_of_bsr_conv2d(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"x": IMAGES, "values": CONV_VALUES, "pattern": CONV, "kernel_size": 2, **change}
    with pytest.raises(error, match=message):
        bsr_conv2d(**args)


def test_autocast_does_not_hide_a_wrong_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be of a floating-point dtype"):
        bsr_linear(X.int(), VALUES, PATTERN, BIAS)


def test_the_cpu_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekern.ops.CPU_KERNELS_MISSING", "it is not built")
    with pytest.raises(RuntimeError, match='backend="cpu" needs the compiled kernels: it is not built'):
        bsr_linear(X, VALUES, PATTERN, BIAS, backend="cpu")
    assert math.isclose(float(bsr_linear(X, VALUES, PATTERN, BIAS, backend="auto")[0, 0]), 7.0)
