"""``python -m bench.memory``: the most memory that a training step takes, dense and pruned by SNIP.

Every figure is of a process of its own, which builds the network, prunes it, and trains it on random images. "held" are
the tensors that stay between steps (weights, gradients, momentum, indices and plans); "peak" is the most that the
process had resident in any step, over what it had before the network was built; "beside" is their difference:
activations, temporary tensors, scratch of the kernels. glibc is told to give freed memory back at once, so that what is
resident is what is in use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk
from sparsekern.nn import SparseLayer
from sparsekern.train.loop import MOMENTUM

MIB = 2**20
STEPS = 4
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


# name: (batch, shape of an input); "mlp-4096" is what weights alone rule.
NETWORKS: dict[str, tuple[int, tuple[int, ...]]] = {
    "lenet-300-100": (100, (784,)),
    "lenet-5-caffe": (100, sk.models.image_shape("lenet-5-caffe")),
    "vgg-d": (32, sk.models.image_shape("vgg-d")),
    "resnet-18": (32, sk.models.image_shape("resnet-18")),
    "mlp-4096": (128, (4096,)),
}
Case = tuple[float, tuple[int, int]] | None  # sparsity and blocksize
CASES: tuple[Case, ...] = (None, (0.9, (1, 1)), (0.9, (8, 8)), (0.95, (8, 8)), (0.9, (16, 16)))


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory: now, or the most since :func:`forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def build(name: str) -> nn.Module:
    return wide() if name == "mlp-4096" else sk.models.build(name)


def measure(name: str, case: Case) -> dict[str, int]:
    """{"held", "peak"}: bytes, in a process that has done nothing else."""
    torch.set_num_threads(1)
    train("lenet-5-caffe", (0.5, (1, 1)), batch=2)  # what a process loads for its first step belongs to no network
    forget_peak()
    start = resident()
    held = train(name, case, NETWORKS[name][0])
    return {"held": held, "peak": resident(peak=True) - start}


def train(name: str, case: Case, batch: int) -> int:
    """Some steps on random images; bytes of all tensors that stay between them."""
    images, labels = torch.randn(batch, *NETWORKS[name][1]), torch.randint(10, (batch,))
    model = build(name)
    if case:
        sk.sparsify_(model, sk.prune.snip(model, (images, labels), F.cross_entropy, *case))
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    for layer in layers:
        layer.backend = "cpu"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=MOMENTUM, fused=True)
    forget_peak()
    for _ in range(STEPS):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    held = [*model.parameters(), *model.buffers()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    held += [plan for layer in layers for plan in layer._prepared()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in held}.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what the process of one figure is called with
    arguments = parser.parse_args()
    if arguments.measure:
        name, which = arguments.measure
        print(json.dumps(measure(name, CASES[int(which)])))
        return 0
    print(f"{'network':16}{'batch':>6}  {'weights':14}{'held MiB':>9}{'peak MiB':>9}{'beside':>9}{'peak of dense':>15}")
    for name in arguments.only:
        dense = 0
        for which, case in enumerate(CASES):
            command = [sys.executable, "-m", "bench.memory", "--measure", name, str(which)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | AT_ONCE)
            held, peak = (json.loads(done.stdout)[key] for key in ("held", "peak"))
            dense = dense or peak
            what = f"{case[0]:.0%} {case[1][0]}x{case[1][1]}" if case else "dense"
            sizes = "".join(f"{n / MIB:9.1f}" for n in (held, peak, peak - held))
            print(f"{name:16}{NETWORKS[name][0]:6}  {what:14}{sizes}{peak / dense:15.0%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
