"""What a network costs: multiply-adds, bytes, and seconds, the latter always measured beside the others'."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import torch
from torch import Tensor, nn

from ..eligible import evaluating
from ..nn import SparseConv2d, SparseLayer
from ..timing import Timing, equal_time_scale, interleaved
from .loop import Trainer

THROUGHPUT_BATCH = 1000
# Of interleaved samples of one training step, p80 / p20; and of a speed-up, what its ceiling allows.
QUIET_SPREAD, CEILING_TOLERANCE = 1.5, 1.1
SPLIT_SECONDS, SPLIT_MIN_STEPS, SPLIT_MAX_STEPS = 1.5, 20, 300


def macs_per_layer(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Multiply-adds of every linear and convolutional layer for one image [1, ...]: outputs x kept weights of each."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            convolution = isinstance(module, nn.Conv2d | SparseConv2d)
            positions = output.numel() // output.shape[1 if convolution else -1]
            counts[name] = counts.get(name, 0) + positions * kept_weights(module)

        return hook

    kinds = (nn.Linear, nn.Conv2d, SparseLayer)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    handles = [module.register_forward_hook(count(name)) for name, module in layers]
    try:
        with torch.inference_mode(), evaluating(model):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def kept_weights(layer: nn.Module) -> int:
    """Weights of a layer that exist, without bias and without the overhang of edge blocks."""
    if isinstance(layer, SparseLayer):
        return layer.pattern.nnz
    return int(layer.get_parameter("weight").numel())


def parameters(model: nn.Module) -> int:
    """Weights and biases that exist."""
    overhang = sum(m.values.numel() - m.pattern.nnz for m in model.modules() if isinstance(m, SparseLayer))
    return sum(p.numel() for p in model.parameters()) - overhang


def bytes_held(trainer: Trainer) -> dict[str, int]:
    """Bytes of the tensors a training run holds on to, by purpose: weights, gradients and optimizer state, and what
    sparse layers hold beside them ("indices": the record for the state_dict and the plans of the kernels)."""
    trainer = fork(trainer)
    trainer.step()
    trainer.loss(*trainer.batch()).backward()
    weights: list[Tensor] = list(trainer.model.parameters())
    layers = [m for m in trainer.model.modules() if isinstance(m, SparseLayer)]
    plans = [tensor for layer in layers for tensor in layer._prepared()]
    state = (t for entries in trainer.optimizer.state.values() for t in entries.values() if isinstance(t, Tensor))
    groups: dict[str, list[Tensor]] = {
        "weights": weights,
        "indices": [*trainer.model.buffers(), *plans],
        "gradients": [p.grad for p in weights if p.grad is not None],
        "optimizer": list(state),
    }
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in groups.items()}


def fork(trainer: Trainer) -> Trainer:
    """A fresh trainer of a copy of the network, so that measuring never changes what was trained."""
    model = copy.deepcopy(trainer.model).train()
    return Trainer(model, trainer.dataset, trainer.recipe, trainer.memory_format)


def time_steps(trainers: Mapping[str, Trainer], rounds: int) -> dict[str, Timing]:
    """Seconds of a whole training step (data, forward, backward, optimizer) of each network, interleaved."""
    return interleaved({name: fork(trainer).step for name, trainer in trainers.items()}, rounds=rounds)


def time_inference(trainers: Mapping[str, Trainer], batch_size: int, rounds: int) -> dict[str, Timing]:
    """Seconds of a forward pass without gradients on ``batch_size`` test images, interleaved."""

    def forward(trainer: Trainer) -> Callable[[], object]:
        model = fork(trainer).model.eval()
        images = trainer.dataset.test_images[:batch_size].clone()
        return lambda: model(images)

    with torch.inference_mode():
        return interleaved({name: forward(trainer) for name, trainer in trainers.items()}, rounds=rounds)


def split_step(trainer: Trainer) -> dict[str, float]:
    """Median seconds of the parts of a training step: {"data", "forward", "backward", "optimizer"}."""
    trainer = fork(trainer)
    for _ in range(5):
        trainer.step()
    parts: dict[str, list[float]] = {"data": [], "forward": [], "backward": [], "optimizer": []}
    clock = time.perf_counter
    begin = clock()
    for done in range(SPLIT_MAX_STEPS):
        if done >= SPLIT_MIN_STEPS and clock() - begin > SPLIT_SECONDS:
            break
        start = clock()
        images, labels = trainer.batch()
        loaded = clock()
        loss = trainer.loss(images, labels)
        computed = clock()
        loss.backward()
        derived = clock()
        trainer.update()
        updated = clock()
        spans = (loaded - start, computed - loaded, derived - computed, updated - derived)
        for samples, span in zip(parts.values(), spans, strict=True):
            samples.append(span)
    return {name: median(samples) for name, samples in parts.items()}


def faster_format(trainer: Trainer, rounds: int) -> torch.memory_format:
    """The memory format in which a training step is faster; contiguous for networks without convolutions.

    Dense convolutions can take half the time in channels_last: a comparison has to give each network its better one.
    """
    if not any(isinstance(module, nn.Conv2d | SparseConv2d) for module in trainer.model.modules()):
        return torch.contiguous_format
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    copies = {
        name: Trainer(copy.deepcopy(trainer.model), trainer.dataset, trainer.recipe, memory_format)
        for name, memory_format in formats.items()
    }
    timings = time_steps(copies, rounds)
    return formats[min(timings, key=lambda name: timings[name].median)]


def trustworthy(steps: Mapping[str, Timing], speedups: Iterable[float], ceiling: float) -> bool:
    """Whether the machine was quiet enough: samples of a step agree, and no speed-up is beyond what can be.

    Args:
        steps: timings of the training step; those of "dense" and "sparse" count.
        speedups: of the sparse network.
        ceiling: the speed-up its multiply-adds allow.
    """
    quantiles = [steps[name].quantiles() for name in ("dense", "sparse") if name in steps]
    quiet = all(q["p80"] <= QUIET_SPREAD * q["p20"] for q in quantiles)
    return quiet and all(value <= CEILING_TOLERANCE * ceiling for value in speedups)


def equal_time_width(
    reference: Trainer, narrower: Callable[[float], Trainer], rounds: int, limit_seconds: float = 5.0
) -> float:
    """The width factor, at most 1, at which ``narrower(width)`` needs the training step time of ``reference``.

    On a quiet machine the ten timings of the search take half of ``limit_seconds``; none is begun after it.
    """

    def slower(width: float) -> bool:
        timings = time_steps({"reference": reference, "narrower": narrower(width)}, rounds)
        return timings["narrower"].median > timings["reference"].median

    return equal_time_scale(slower, limit_seconds=limit_seconds)
