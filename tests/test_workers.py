"""Layers beside and inside the processes of a DataLoader: nothing hangs, and the numbers stay the same."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsekern import BlockPattern, SparseLinear

BATCH, FEATURES = 8, 256


def layer(seed: int) -> SparseLinear:
    """Large enough for several tasks: with two threads its kernels start torch's pool."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(FEATURES // 4, FEATURES // 4, generator=generator) < 0.5
    torch.manual_seed(seed)
    return SparseLinear(FEATURES, FEATURES, pattern=BlockPattern.from_mask(mask, (4, 4)))


class ThroughALayer(Dataset[Tensor]):
    """Samples that a sparse layer makes, forward and backward, in the process that loads them."""

    def __init__(self) -> None:
        self.layer = layer(0)

    def __len__(self) -> int:
        return 4 * BATCH

    def __getitem__(self, index: int) -> Tensor:
        x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(index)).requires_grad_()
        self.layer(x).pow(2).sum().backward()
        assert x.grad is not None
        return x.grad[0]


def trained(workers: int, context: str | None) -> list[Tensor]:
    """The parameters after an epoch."""
    model = nn.Sequential(layer(1), nn.ReLU(), layer(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = DataLoader(
        ThroughALayer(), BATCH, num_workers=workers, multiprocessing_context=context, timeout=60 if workers else 0
    )
    for x in loader:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


# Python 3.12 and later warn of every fork of a process with threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_training_beside_workers(context: str, threads: int) -> None:
    torch.set_num_threads(1)
    expected = trained(0, None)
    assert all(tensor.isfinite().all() for tensor in expected)
    torch.set_num_threads(2)
    layer(0)(torch.randn(512, FEATURES)).sum().backward()  # now the pool runs, and a forked child does not have it
    torch.set_num_threads(threads)
    for a, b in zip(trained(1, context), expected, strict=True):
        assert torch.equal(a, b)
