"""``python -m bench.overhead``: what a call costs besides arithmetic, on layers too small for arithmetic to matter.

Microseconds per call of op, function and layer against dense torch, all weights kept, interleaved, on one thread; and
page faults, where outputs are 1 MiB: over malloc's first threshold for memory of its own. And training steps of a small
network, beside what is left of one with next to no arithmetic.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import BlockPattern, functional
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.timing import interleaved, speedup

Call = Callable[[], object]
no_grad = torch.no_grad()


def calls(dense: nn.Linear | nn.Conv2d, x: Tensor) -> dict[str, tuple[Call, Call]]:
    """{what: (dense, sparse)}"""
    rows, columns = dense.weight.shape[0], dense.weight[0].numel()
    p = BlockPattern.from_mask(torch.ones(rows // 4, columns // 4, dtype=torch.bool), (4, 4))
    if isinstance(dense, nn.Conv2d):
        conv: tuple[Any, ...] = (dense.kernel_size, dense.stride, dense.padding, dense.dilation, dense.groups)
        kernel, *more = conv
        layer: SparseLinear | SparseConv2d = SparseConv2d.from_dense(dense, p)
        plans, op = functional.prepare(p, (*kernel, dense.groups)), torch.ops.sparsekern.bsr_conv2d.default
        rest: tuple[Any, ...] = (*plans[:3], rows, *conv, False)
        theirs, ours = (
            lambda w, b: F.conv2d(x, w, b, *more),
            lambda v, b: functional.bsr_conv2d(x, v, p, b, *more, kernel_size=kernel),
        )
    else:
        layer = SparseLinear.from_dense(dense, p)
        op, rest = torch.ops.sparsekern.bsr_linear.default, (*functional.prepare(p)[:3], rows)
        theirs, ours = partial(F.linear, x), lambda v, b: functional.bsr_linear(x, v, p, b)
    assert dense.bias is not None
    w, v, b, grad = dense.weight.data, layer.values.data, dense.bias.data, torch.randn_like(dense(x))
    xg = x.clone().requires_grad_()
    return {
        "op": (no_grad(lambda: theirs(w, b)), no_grad(lambda: op(x, v, b, *rest))),
        "function, no grad": (no_grad(lambda: theirs(w, b)), no_grad(lambda: ours(v, b))),
        "layer, no grad": (no_grad(lambda: dense(x)), no_grad(lambda: layer(x))),
        "function": (lambda: theirs(dense.weight, dense.bias), lambda: ours(layer.values, layer.bias)),
        "layer": (lambda: dense(x), lambda: layer(x)),
        "first layer, forward + backward": (lambda: dense(x).backward(grad), lambda: layer(x).backward(grad)),
        "layer, forward + backward": (lambda: dense(xg).backward(grad), lambda: layer(xg).backward(grad)),
    }


def steps(sparsity: float = 0.9) -> dict[str, Call]:
    """Training steps of LeNet-300-100, dense and pruned, and of the same layers with 8 inputs and 8 or 10 outputs."""
    images, labels = torch.randn(100, 784), torch.randint(10, (100,))
    tiny = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
    nets: dict[str, tuple[nn.Module, Tensor]] = {
        "dense": (sk.models.build("lenet-300-100"), images),
        "next to no arithmetic": (tiny, images[:, :8].clone()),
    }
    for blocksize in ((1, 1), (8, 8)):
        model = sk.models.build("lenet-300-100")
        sk.sparsify_(model, sk.prune.snip(model, (images, labels), F.cross_entropy, sparsity, blocksize))
        nets[f"{sparsity:.0%} sparse, {blocksize[0]}x{blocksize[1]}"] = model, images

    def step(model: nn.Module, x: Tensor) -> Call:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # the weights stay what they are

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

        return run

    return {name: step(*net) for name, net in nets.items()}


def faults(call: Call, repeats: int = 100) -> float:
    """Pages that the system had to hand out, per call."""
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / repeats


def main() -> None:
    torch.set_num_threads(1)
    table = Table("layer", "call", "dense us", "sparse us", "dense / sparse", "page faults", title="per call, 1 thread")
    layers: dict[str, tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]]
    layers = {"linear": (nn.Linear(8, 8), (8, 8)), "conv2d": (nn.Conv2d(4, 4, 3, padding=1), (1, 4, 4, 4))}
    layers["1 MiB"] = (nn.Linear(8, 512), (512, 8))
    for name, (module, shape) in layers.items():
        for what, (dense, sparse) in calls(module, torch.randn(shape)).items():
            t = interleaved({"dense": dense, "sparse": sparse}, limit_seconds=3)
            times = [f"{timing.median * 1e6:.1f}" for timing in t.values()]
            ratio, pages = speedup(t["dense"], t["sparse"])["p50"], f"{faults(dense):.0f}, {faults(sparse):.0f}"
            table.add_row(name, what, *times, f"{ratio:.2f}", pages)
    Console().print(table)
    table = Table("training step", "us", title="LeNet-300-100, batch 100, 1 thread")
    for name, timing in interleaved(steps(), limit_seconds=10).items():
        table.add_row(name, f"{timing.median * 1e6:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
