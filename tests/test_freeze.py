"""Frozen networks against the models they were made of: exactly on small integers, and within rounding."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from samples import BLOCKSIZES, GEOMETRIES
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.frozen import FrozenModel
from sparsekern.weights import weight_matrix

Layer = nn.Linear | nn.Conv2d


def sparse(model: nn.Module, blocksize: tuple[int, int] = (1, 1), density: float = 0.4) -> nn.Module:
    """``model`` in evaluation mode, all its layers sparse at random, the second block row empty."""
    patterns = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Layer):
            shape = tuple(weight_matrix(layer.weight).shape)
            grid = [-(-size // block) for size, block in zip(shape, blocksize, strict=True)]
            mask = torch.rand(grid) < density
            mask[1:2] = False
            patterns[name] = sk.BlockPattern.from_mask(mask, blocksize, shape)
    if isinstance(model, Layer):
        kind = sk.SparseLinear if isinstance(model, nn.Linear) else sk.SparseConv2d
        return kind.from_dense(model, patterns[""]).eval()
    sk.sparsify_(model, patterns)
    return model.eval()


@torch.no_grad()
def integers(model: nn.Module) -> nn.Module:
    """``model`` with small integers everywhere, and batch norms that keep them integers."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.copy_(torch.randint(-2, 3, module.running_mean.shape))
            module.running_var.fill_(1)
            module.eps = 0.0
    return model


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).float()


@torch.no_grad()
def check(model: nn.Module, x: Tensor) -> FrozenModel:
    """Freezes ``model`` with an example of another batch size; the results on integers must be exact."""
    fast = sk.freeze(model, x[:1].repeat(2, *[1] * (x.dim() - 1)))
    expected = copy.deepcopy(model).double()(x.double())
    assert torch.equal(fast(x).double(), expected)
    return fast


def mlp(*sizes: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """All the ways in which two results are added: into a product before, after, with a shortcut, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.short = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1, stride=2)
        self.third, self.fourth = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = self.norm(self.second(x))
        y += x
        x = torch.relu(y)
        x = (self.third(x) + self.short(x)).relu()
        x = x + x
        x = F.max_pool2d(x, 2)
        flat = torch.flatten(x, 1)
        return flat + self.fourth(flat)


class Branches(nn.Module):
    """Results with several readers, which nothing may be fused into, and reshapes as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(100, 7)
        self.norm, self.d = nn.BatchNorm1d(100), nn.Linear(100, 7)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.relu(a)) + a
        flat = b.view(b.size(0), -1)
        return self.c(flat.relu()) + self.d(self.norm(flat))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(37, 53), (37,)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 5, 4)),
    "mlp": (lambda: mlp(37, 53, 70, 10), (37,)),
    "mlp norm": (lambda: mlp(20, 33, 9, norm=True), (20,)),
    "wide": (lambda: mlp(5, 700, 300, 3), (5,)),
    "long sums": (lambda: mlp(1300, 9, 1300, 2), (1300,)),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(9, 5)), (9,)),
    "nothing": (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Identity()), (2, 3, 3)),
    "norms alone": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1),
                                          nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(16)),
                    (3, 4, 5)),
    "conv pool linear": (lambda: nn.Sequential(nn.Conv2d(2, 7, 3, bias=False), nn.MaxPool2d(2), nn.ReLU(),
                                               nn.Conv2d(7, 9, (3, 2), padding=(1, 2)), nn.BatchNorm2d(9), nn.ReLU(),
                                               nn.Flatten(), nn.Linear(9 * 24, 6)), (2, 11, 9)),
    "pools": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 4, 2), nn.MaxPool2d((2, 3), 2, ceil_mode=True),
                                    nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 1, dilation=2)), (2, 13, 15)),
    "adaptive": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.AdaptiveAvgPool2d((2, 1)), nn.AdaptiveAvgPool2d(1),
                                       nn.Flatten(), nn.Linear(4, 3)), (2, 4, 4)),
    "same": (lambda: nn.Sequential(nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)),
                                   nn.Conv2d(3, 3, 3, padding="same")), (2, 6, 5)),
    "offsets beyond 16 bits": (lambda: mlp(22000, 5, 2), (22000,)),
    "residual": (Residual, (3, 8, 8)),
    "branches": (Branches, (2, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_model(name: str, blocksize: tuple[int, int]) -> None:
    build, shape = NETWORKS[name]
    check(integers(sparse(build(), blocksize)), small_integers(13, *shape))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_models_freeze_too(name: str) -> None:
    build, shape = NETWORKS[name]
    check(integers(build().eval()), small_integers(9, *shape))


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
def test_every_blocksize(blocksize: tuple[int, int]) -> None:
    check(integers(sparse(mlp(45, 61, 34), blocksize)), small_integers(27, 45))


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_window(name: str, blocksize: tuple[int, int]) -> None:
    g = GEOMETRIES[name]
    kernel, stride, padding, dilation, groups = g.conv
    build = nn.Conv2d(g.c_in, g.c_out, kernel, stride, padding, dilation, groups)
    check(integers(sparse(build, blocksize)), small_integers(10, g.c_in, *g.size))


@pytest.mark.parametrize("name", ["mlp", "conv pool linear", "residual"])
def test_the_batch_does_not_matter(name: str) -> None:
    """Not its size, nor how many threads share it, nor what ran before: the bits of a sample are the same."""
    build, shape = NETWORKS[name]
    fast = sk.freeze(sparse(build()), torch.randn(1, *shape))
    x = torch.randn(50, *shape)
    whole = fast(x)
    for n in range(51):
        assert torch.equal(fast(x[:n]), whole[:n])
        assert torch.equal(fast(x[50 - n :]), whole[50 - n :])
    many = torch.randn(500, *shape)
    torch.set_num_threads(1)
    single = fast(many)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        fast(torch.full_like(many, float("nan")))  # leaves NaN in the scratch
        assert torch.equal(fast(many), single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sk.models.NAMES)
def test_rounds_as_dense_torch_does(name: str, dtype: torch.dtype) -> None:
    model = sparse(sk.models.build(name), (4, 1), 0.3).to(dtype)
    x = torch.randn(30, 784, dtype=dtype)
    dense = copy.deepcopy(model)
    sk.densify_(dense)
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(x.double()) if dtype == torch.float32 else dense(x)
        error = (sk.freeze(model, x)(x) - exact).norm()
        images = sk.freeze(model, x.view(-1, 1, 28, 28))(x.view(-1, 1, 28, 28))
        assert torch.equal(images, sk.freeze(model, x)(x))
        allowed = 2 * (dense(x) - exact).norm() if dtype == torch.float32 else 1e-14
    assert error <= allowed + 1e-16


def test_what_is_not_finite_shows_as_in_the_model() -> None:
    model = integers(
        sparse(nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2, 1)))
    )
    x = small_integers(8, 2, 10, 10)
    x[0, 0, 3, 3], x[1, 1, 5, 5], x[2, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        assert torch.equal(sk.freeze(model, x)(x).isnan(), model(x).isnan())
        torch.testing.assert_close(sk.freeze(model, x)(x), model(x), rtol=0, atol=0, equal_nan=True)


def test_layouts_of_the_input() -> None:
    model = integers(sparse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())))
    x = small_integers(12, 3, 6, 7)
    fast = sk.freeze(model, x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(fast(other), fast(x))
    assert torch.equal(fast(x[:1].expand(9, -1, -1, -1)), fast(x[:1].repeat(9, 1, 1, 1)))


def test_softmax_comes_last() -> None:
    for last in (nn.LogSoftmax(dim=1), nn.Softmax(dim=-1)):
        model = nn.Sequential(mlp(9, 12, 5), last).eval()
        x = torch.randn(11, 9)
        torch.testing.assert_close(sk.freeze(model, x)(x), model(x).detach())


def test_does_not_follow_the_model() -> None:
    model = sparse(mlp(12, 20, 4, norm=True))
    x = torch.randn(10, 12)
    fast = sk.freeze(model, x)
    before = fast(x)
    assert not before.requires_grad
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(fast(x), before)


def test_copies_and_pickles() -> None:
    model, x = sparse(NETWORKS["conv pool linear"][0]()), torch.randn(5, 2, 11, 9)
    fast = sk.freeze(nn.Sequential(model, nn.LogSoftmax(dim=1)), x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x))
    assert "[N, 2, 11, 9] -> [N, 6]" in repr(fast) and f"{fast.multiply_adds:,}" in repr(fast)


def test_counts_stored_multiply_adds() -> None:
    model = sparse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30, 4)))
    stored = [layer.pattern.nnz for layer in model if isinstance(layer, sk.nn.SparseLayer)]
    assert sk.freeze(model, torch.randn(2, 3, 5, 6)).multiply_adds == stored[0] * 30 + stored[1]


def test_the_op_is_a_good_citizen() -> None:
    fast, x = sk.freeze(sparse(mlp(12, 20, 4)), torch.randn(3, 12)), torch.randn(10, 12)
    args = (x, fast._program, fast._constants, list(fast.output_shape))
    torch.library.opcheck(torch.ops.sparsekern.frozen, args)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), fast(x))


# ---- refusals -------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, example: Tensor, *words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as caught:
        sk.freeze(model, example)
    for word in words:
        assert word in str(caught.value)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class InPlace(nn.Module):
    """A ReLU, or a sum, in place on what is read again."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=relu)

    def forward(self, x: Tensor) -> Tensor:
        a = same = self.a(x)
        b = self.b(self.relu(a))
        if not self.relu.inplace:
            a += b
        return same + b


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x if y is None else x + y


def test_unsupported_modules_are_named() -> None:
    images, features = torch.randn(2, 4, 6, 6), torch.randn(2, 4)
    supported = "AdaptiveAvgPool2d"
    refused(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU()), images, "'1' (GELU)", supported)
    refused(nn.Sequential(nn.Linear(6, 6)), images, "'0' (Linear)", "(2, 4, 6, 6)")
    refused(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), images, "'0' (Conv2d)", "circular")
    refused(nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), images, "'0' (AvgPool2d)", "ceil_mode")
    refused(nn.Sequential(nn.AvgPool2d(2, 1, 1, count_include_pad=False)), images, "'0' (AvgPool2d)", "padding")
    refused(nn.Sequential(nn.MaxPool2d(2, return_indices=True)), images, "tensor")
    refused(nn.Sequential(nn.AdaptiveAvgPool2d(4)), images, "'0' (AdaptiveAvgPool2d)", "(4, 4)", "(6, 6)")
    refused(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(2)), images, "'1' (Flatten)", "flatten")
    refused(nn.Sequential(nn.BatchNorm1d(4)), features, "'0' (BatchNorm1d)", "eval()")
    refused(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval(), features, "'0' (BatchNorm1d)")
    refused(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), features, "'1' (Dropout)", "eval()")
    refused(nn.Sequential(nn.LogSoftmax(dim=1), nn.Linear(4, 4)), features, "'1' (Linear)", "after")
    refused(Product(), features, "mul")
    refused(InPlace(relu=True), features, "in place")
    refused(InPlace(relu=False), features, "traced")
    refused(Decides(), features, "control flow")
    refused(Two(), features, "takes 2")
    refused(nn.LSTM(4, 3), features, "one tensor")
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    refused(hooked, features, "'0' (Linear)", "hooks")


def test_arguments_of_freeze_are_checked() -> None:
    model = mlp(4, 3)
    refused(None, torch.randn(2, 4), "model", "NoneType", error=TypeError)  # type: ignore[arg-type]
    refused(model, [1.0], "example", "list", error=TypeError)  # type: ignore[arg-type]
    refused(model, torch.randn(2, 4).to_sparse(), "strided", error=TypeError)
    refused(model, torch.randn(2, 4).half(), "float16", error=TypeError)
    refused(model, torch.randn(2, 4).double(), "0.weight", "float64", error=TypeError)
    refused(model, torch.randn(2, 4, device="meta"), "example", "meta")
    refused(model, torch.randn(0, 4), "one sample")
    refused(model, torch.randn(4), "[N, ...]")
    refused(model, torch.randn(2, 5), "example must be what the model can be called with, got (2, 5) of torch.float32")
    refused(model, torch.randn(2, 4).double(), "example must have the dtype of 0.weight", error=TypeError)


def test_a_model_that_trains_is_refused_unchanged() -> None:
    norm = nn.BatchNorm1d(4)
    refused(nn.Sequential(norm), torch.randn(8, 4), "model must be in evaluation mode: call model.eval() first")
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


def test_inputs_are_checked() -> None:
    fast = sk.freeze(mlp(4, 3), torch.randn(2, 4))
    for x, error, words in (
        ([1.0], TypeError, "list"),
        (torch.randn(2, 5), ValueError, "[N, 4], got (2, 5)"),
        (torch.randn(4), ValueError, "[N, 4], got (4,)"),
        (torch.randn(2, 4).double(), TypeError, "float32"),
        (torch.randn(2, 4, device="meta"), ValueError, "meta"),
        (torch.randn(2, 4).to_sparse(), TypeError, "strided"),
        (torch.randn(2, 4, requires_grad=True), ValueError, "no gradients"),
    ):
        with pytest.raises(error) as caught:
            fast(x)
        assert words in str(caught.value)
    with torch.no_grad():
        assert fast(torch.randn(2, 4, requires_grad=True)).shape == (2, 3)
    assert fast(torch.randn(0, 4)).shape == (0, 3)


def test_the_op_refuses_what_is_not_for_it() -> None:
    fast, x = sk.freeze(mlp(4, 3), torch.randn(2, 4)), torch.randn(2, 4)
    lanes, magic = fast._program.clone(), fast._program.clone()
    lanes[1] *= 2
    magic[0] += 1
    for program, constants, words in (
        (lanes, fast._constants, "freeze the model again"),
        (magic, fast._constants, "freeze the model again"),
        (fast._program[:3], fast._constants, "no frozen network"),
        (fast._program, fast._constants.double(), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.sparsekern.frozen(x, program, constants, [3])
    with pytest.raises(RuntimeError, match="per sample"):
        torch.ops.sparsekern.frozen(torch.randn(2, 5), fast._program, fast._constants, [3])


def test_the_baseline_is_exact_too() -> None:
    code = """
import test_freeze as t
for name in ("mlp norm", "wide", "conv pool linear", "pools", "residual"):
    for blocksize in ((1, 1), (4, 1)):
        build, shape = t.NETWORKS[name]
        t.check(t.integers(t.sparse(build(), blocksize)), t.small_integers(13, *shape))
print(t.torch.ops.sparsekern.cpu_vector_bytes())
"""
    tests = Path(__file__).parent
    env = {**os.environ, "SPARSEKERN_CPU_ISA": "baseline", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tests, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["16"]
