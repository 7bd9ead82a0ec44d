"""``python -m bench.frozen [--quick]``: whole pruned networks, dense and sparse in eager torch, and frozen, in turn.

One thread. Patterns are random; the classifier has blocks of 1x1, and a block of a convolution stays within one tap.
``of peak`` counts stored multiply-adds against the most that the core does in registers, measured in the same turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import nn

import sparsekern as sk
from sparsekern import info
from sparsekern.timing import interleaved, speedup
from sparsekern.weights import weight_matrix

from .run import machine

Size = tuple[int, int]
PEAK_SECONDS = 0.005


def vgg() -> nn.Sequential:
    """Eight convolutions 3x3 with batch norm on 32x32, four max pools, two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 0, 256, 256, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp 1024-1024-1024": (lambda: nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)), (256, 1024)),
    "lenet-300-100": (lambda: sk.models.build("lenet-300-100"), (100, 784)),
    "lenet-5-caffe": (lambda: sk.models.build("lenet-5-caffe"), (100, 784)),
    "vgg on 32x32": (vgg, (32, 3, 32, 32)),
}


def prune(model: nn.Module, sparsity: float, blocksize: Size) -> nn.Module:
    patterns = {}
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        weight = layer.weight
        rows, columns = weight_matrix(weight).shape
        bh, bw = blocksize if min(rows, weight.shape[1]) >= 4 and rows > 10 else (1, 1)
        bw = bw if weight.dim() == 2 or weight.shape[1] % bw == 0 else 1
        grid = (-(-rows // bh), -(-columns // bw))
        mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        mask[torch.randperm(len(mask))[: max(1, round((1 - sparsity) * len(mask)))]] = True
        patterns[name] = sk.BlockPattern.from_mask(mask.view(grid), (bh, bw), (rows, columns))
    sk.sparsify_(model, patterns)
    return model.eval()


def row(name: str, sparsity: float, blocksize: Size) -> str:
    build, shape = NETWORKS[name]
    x, dense, model = torch.randn(shape), build().eval(), prune(build(), sparsity, blocksize)
    fast = sk.freeze(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3 * float(model(x).abs().max()))
    calls = {"dense": partial(dense, x), "sparse": partial(model, x), "frozen": partial(fast, x)}
    native = info.native_module()
    peaks: list[float] = []  # GFLOP/s, each of its own turn
    peak: dict[str, Callable[[], object]] = {"peak": lambda: peaks.append(native.fma_peak(PEAK_SECONDS)[0])}
    times = interleaved(calls | (peak if native else {}), limit_seconds=6)
    gain, over = (speedup(times[kind], times["frozen"])["p50"] for kind in ("dense", "sparse"))
    allowed = sk.freeze(dense, x).multiply_adds / fast.multiply_adds
    micros = "".join(f"{times[kind].median * 1e6:10.0f}" for kind in calls)
    rate = fast.multiply_adds * shape[0] / times["frozen"].median
    of_peak = f"{2e-9 * rate / median(peaks):8.0%}" if peaks else "       -"
    line = f"{name:20}{shape[0]:5}{sparsity:7.2f}{blocksize[0]:5}x{blocksize[1]:<3}{micros}"
    return f"{line}{gain:9.1f}x{over:8.2f}x{allowed:8.1f}x{gain / allowed:8.0%}{of_peak}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.frozen", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="90 %% sparsity and blocks of 1x1 and 8x8 only")
    quick = parser.parse_args().quick
    sparsities = (0.9,) if quick else (0.9, 0.95, 0.98)
    blocks = ((1, 1), (8, 8)) if quick else ((1, 1), (4, 1), (8, 8), (16, 16))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    machine()
    print(f"{'network':20}batch sparse blocks  dense us sparse us frozen us vs dense vs sparse allowed of that of peak")
    with torch.no_grad():
        for name, sparsity, blocksize in product(NETWORKS, sparsities, blocks):
            print(row(name, sparsity, blocksize), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
