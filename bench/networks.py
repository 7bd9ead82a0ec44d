"""Whole networks: one training step (forward, backward, optimizer), dense against pruned by SNIP.

The sparse layers have ``backend="auto"``, as ``sparsify_`` makes them: what users get. Some may thus run dense, where
the cost model expects that to be faster; rows of single layers (``cases.py``) are always of the sparse kernels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import BlockPattern, models
from sparsekern.timing import interleaved
from sparsekern.train.loop import MOMENTUM, WEIGHT_DECAY
from sparsekern.train.measure import kept_weights, macs_per_layer
from sparsekern.weights import weight_matrix

from .cases import FORMATS
from .compare import Job, Version, Way, Ways, compare, times, use_threads
from .peers import COMPILE
from .table import TOLERANCE, Results

# Right are logits and gradients as near to dense torch's, on the same masked weights, as two of its own layouts are to
# each other, times this; and logits within TOLERANCE, gradients within a share: rounding flips a ReLU or a maximum here
# and there, and with it one sample's part of a gradient.
ROUNDING = 10.0
FLIPS = 0.02
SMALL = 1e-3  # a gradient this much smaller than the largest one counts as that; some are zero but for rounding


@dataclass(frozen=True)
class Network:
    """A network of :mod:`sparsekern.models` with random weights, on random images.

    ``compiled``: whether ``torch.compile`` is tried on the sparse networks as it is on the dense one; the large ones
    would take a minute each, so they have one thread and only their dense rival is compiled.
    """

    name: str
    model: str
    batch: int
    compiled: bool = True
    threads: tuple[int, ...] = (1, 2)
    blocksizes: tuple[tuple[int, int], ...] = ((1, 1), (8, 8))
    sparsities: tuple[float, ...] = (0.9, 0.95)

    @property
    def images(self) -> tuple[int, ...]:
        return (self.batch, *models.image_shape(self.model))


NETWORKS = {
    network.name: network
    for network in (
        Network("net-lenet-300-100", "lenet-300-100", 100),
        Network("net-lenet-5-caffe", "lenet-5-caffe", 100),
        Network("net-simple-cnn", "simple-cnn", 100),
        Network("net-vgg-d", "vgg-d", 32, compiled=False, threads=(1,)),
        Network("net-resnet-18", "resnet-18", 32, compiled=False, threads=(1,)),
    )
}


@dataclass(frozen=True)
class _Net:
    """``call`` is the module or what ``torch.compile`` made of it."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor

    def step(self) -> Callable[[], None]:
        parameters = list(self.module.parameters())
        # All the work of a step, and the weights stay what they are, however often this is called.
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)

        def run() -> None:
            F.cross_entropy(self.call(self.images), self.labels).backward()
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None

        return run

    def results(self, patterns: Mapping[str, BlockPattern]) -> list[Tensor]:
        """Logits and all gradients; of dense layers named in ``patterns``, the gradients of the blocks."""
        logits = self.call(self.images)
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        found = [logits.detach()]
        gradients = torch.autograd.grad(F.cross_entropy(logits, self.labels), parameters)
        for name, gradient in zip(names, gradients, strict=True):
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and layer in patterns:
                gradient = patterns[layer].gather(weight_matrix(gradient))
            found.append(gradient)
        return found


def measure_network(results: Results, network: Network, threads: Sequence[int]) -> Iterator[str]:
    """All blocksizes and sparsities are one group; yields what comes next, once per number of threads."""
    for n in threads:
        yield f"{network.name}, {n} thread(s)"
        torch.compiler.reset()  # what was compiled is for one number of threads, and torch keeps eight of a kind
        with use_threads(n):
            if n == threads[0]:
                dense, versions = _candidates(results, network)
            compare(results, Job(network.name, network.batch, "step", n), dense, versions)


def _candidates(results: Results, network: Network) -> tuple[Ways, list[Version]]:
    generator = torch.Generator().manual_seed(0)
    model = models.build(network.model, generator=generator)
    images = torch.randn(network.images, generator=generator)
    labels = torch.randint(10, (network.batch,), generator=generator)
    nets = _ways(model, images, labels, True)
    dense = {way: nets[way].step() for way in _right(results, f"{network.name}/step/dense", nets, model, {})}
    macs, versions = _macs(model, images), []
    for blocksize in network.blocksizes:
        for sparsity in network.sparsities:
            patterns = sk.prune.snip(model, (images, labels), F.cross_entropy, sparsity, blocksize)
            sparse = copy.deepcopy(model)
            sk.sparsify_(sparse, patterns)
            nets = _ways(sparse, images, labels, network.compiled)
            label = f"{network.name}/step/{times(blocksize)}/sparsekern/{sparsity}"
            steps = {way: nets[way].step() for way in _right(results, label, nets, sparse, patterns)}
            kept, total = (sum(map(kept_weights, _layers(net, patterns))) for net in (sparse, model))
            macs_kept = _macs(sparse, images)
            flops = 3 * 2 * macs_kept * network.batch  # three products of every layer
            versions.append(
                Version(
                    "sparsekern", times(blocksize), sparsity, kept / total, macs / macs_kept, flops, None, None, steps
                )
            )
    return dense, versions


def _ways(model: nn.Module, images: Tensor, labels: Tensor, compiled: bool) -> dict[Way, _Net]:
    """Copies of ``model``, because a step changes them: in every layout, and compiled in the faster one."""
    convolutions = any(isinstance(module, nn.Conv2d | sk.SparseConv2d) for module in model.modules())
    layouts = tuple(FORMATS) if convolutions else ("row-major",)

    def net(layout: str) -> _Net:
        form = FORMATS.get(layout, torch.contiguous_format)
        module = copy.deepcopy(model).train().to(memory_format=form)  # type: ignore[call-overload]  # not in torch's stubs
        return _Net(module, module, images.contiguous(memory_format=form), labels)

    found: dict[Way, _Net] = {(layout, "eager"): net(layout) for layout in layouts}
    if compiled:
        quick = interleaved({layout: found[layout, "eager"].step() for layout in layouts}, rounds=3, limit_seconds=0)
        layout = min(layouts, key=lambda layout: quick[layout].median)
        plain = net(layout)
        found[layout, "compiled"] = _Net(plain.module, torch.compile(plain.module, dynamic=False), plain.images, labels)
    return found


def _right(
    results: Results, label: str, nets: Mapping[Way, _Net], sparse: nn.Module, patterns: Mapping[str, BlockPattern]
) -> list[Way]:
    """The ways whose logits and gradients are those of the dense network with the same weights, masked."""
    masked = copy.deepcopy(sparse)
    sk.densify_(masked)
    first = next(iter(nets.values()))
    true, *others = (
        net.results(patterns) for net in _ways(masked, first.images.contiguous(), first.labels, False).values()
    )
    noise = max((_errors(other, true) for other in others), default=(0.0, 0.0))
    limits = [max(floor, ROUNDING * error) for floor, error in zip((TOLERANCE, FLIPS), noise, strict=True)]
    right = []
    for way, net in nets.items():
        try:
            errors = _errors(net.results(patterns), true)
        except RuntimeError as failure:
            if way[1] != "compiled":
                raise
            results.peers[COMPILE] = f"missing: {str(failure).splitlines()[0]}"  # no C++ compiler, for one
            continue
        if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            right.append(way)
        else:
            found = "error of logits {:.2g}, of gradients {:.2g}".format(*errors)
            results.refused.append(f"{label}/{'/'.join(way)}: {found}")
    return right


def _errors(got: list[Tensor], true: list[Tensor]) -> tuple[float, float]:
    """The relative errors of logits and of the worst gradient, in the Euclidean norm; infinite if not finite."""
    floor = SMALL * max(float(t.norm()) for t in true[1:])
    errors = [float((g - t).norm()) / max(float(t.norm()), floor) for g, t in zip(got, true, strict=True)]
    return (errors[0], max(errors[1:])) if all(map(math.isfinite, errors)) else (math.inf, math.inf)


def _layers(model: nn.Module, names: Mapping[str, object]) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names]


def _macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of all layers for one image."""
    model.eval()  # batch normalisation refuses a single image in training
    try:
        return sum(macs_per_layer(model, images[:1]).values())
    finally:
        model.train()
