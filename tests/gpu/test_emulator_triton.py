"""Triton kernels on the emulator: the same calls as on a GPU, on CPU tensors."""

from collections.abc import Callable

import pytest
import torch
import triton_driver
from triton_driver import emulated

if reason := triton_driver.missing():
    pytest.skip(reason, allow_module_level=True)

import emulator_kernels as kernels
from emulator import EmulatorError
from triton.tools.tensor_descriptor import TensorDescriptor

ARCHITECTURES = [80, 90]


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.full((m, n), float("nan"), dtype=dtype)


def check(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """TF32 (fp32 inputs) and 16-bit results: relative to the size of the sums."""
    want = a.double() @ b.double()
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-3}[c.dtype]
    torch.testing.assert_close(c.double(), want, rtol=bound, atol=bound * a.shape[1] ** 0.5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m, n, k", [(128, 64, 128), (100, 72, 96)])
def test_matmul(arch: int, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b, c = operands(m, n, k, dtype)
    with emulated(arch) as driver:
        kernels.matmul[(-(-m // 64), -(-n // 64))](a, b, c, m, n, k, 64, 64, 32, num_warps=4, num_stages=3)
    check(c, a, b)
    ((name, counters),) = driver.launches
    tiles = -(-m // 64) * -(-n // 64) * k  # 64x64 sums, each of k products
    assert name == "matmul" and counters.mma_flops == 2 * 64 * 64 * tiles
    assert all(shape.startswith("m64" if arch == 90 else "m16") for shape in counters.mma)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("m, n, k", [(128, 64, 192), (100, 72, 136)])
def test_matmul_with_tensor_descriptors(stages: int, m: int, n: int, k: int) -> None:
    a, b, c = operands(m, n, k, torch.float16)
    descriptors = [TensorDescriptor.from_tensor(x, [64, 64]) for x in (a, b, c)]
    with emulated(90):
        kernels.matmul_tma[(-(-m // 64), -(-n // 64))](*descriptors, k, 64, 64, 64, num_warps=4, num_stages=stages)
    check(c, a, b)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reductions_and_atomics(arch: int) -> None:
    x, y, total = torch.randn(200), torch.full((200,), float("nan")), torch.zeros(1)
    with emulated(arch) as driver:
        kernels.softmax_atomic[(1,)](x, y, total, 200, 256)
    torch.testing.assert_close(y, x.softmax(0))
    torch.testing.assert_close(total[0], (x - x.max()).exp().sum())
    assert driver.launches[0][1].atomics == 1


def test_views_stay_within_their_storage() -> None:
    """A transposed view works; a grid that is one too large is refused before anything is written back."""
    storage = torch.zeros(4 * 256)
    x, y = torch.randn(1000), storage[24:]
    with emulated(80):
        kernels.scale.fn[(4,)](x, y, 3.0, 1000, 256)
        torch.testing.assert_close(y, x * 3)
        with pytest.raises(EmulatorError, match="global load out of bounds"):
            kernels.scale.fn[(8,)](x, y, 3.0, 2000, 256)
    assert not storage[:24].any()


def test_autotuning_is_deterministic() -> None:
    """The wide configuration needs fewer warp instructions by the model, and that decides."""
    x, y = torch.randn(512), torch.empty(512)
    chosen = []
    for _ in range(2):
        kernels.scale.cache.clear()
        with emulated(80) as driver:
            kernels.scale[lambda meta: (512 // meta["B"],)](x, y, 2.0, 512)
        torch.testing.assert_close(y, 2 * x)
        chosen.append(kernels.scale.best_config.kwargs["B"])
        assert len(driver.launches) == 1  # trial launches are not listed
    assert chosen[0] == chosen[1]


def test_a_kernel_can_run_again_in_a_new_context() -> None:
    x = torch.randn(64)
    for _ in range(2):
        y = torch.zeros(64)
        with emulated(80) as driver:
            kernels.scale.fn[(1,)](x, y, 2.0, 64, 64)
        assert [name for name, _ in driver.launches] == ["scale"]
        torch.testing.assert_close(y, 2 * x)


@pytest.mark.parametrize(
    "version, supported", [("3.8.1", False), ("3.9.0", True), ("3.9.7+git1", True), ("3.10.0", False)]
)
def test_other_versions_are_refused_with_a_reason(
    version: str, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    reason = triton_driver.missing()
    if supported:
        assert reason is None
        return
    assert reason is not None and version in reason and "3.9" in reason
    with pytest.raises(RuntimeError, match=r"up to, not including, 3\.10"), emulated(80):
        pass


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match=r"one of \[80, 90\] expected, got 100"), emulated(100):
        pass


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real: Callable[..., object] = builtins.__import__

    def no_triton(name: str, *args: object, **kwargs: object) -> object:
        if name == "triton":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_triton)
    assert triton_driver.missing() == "Triton is not installed"
