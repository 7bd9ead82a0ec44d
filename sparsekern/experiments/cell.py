"""One training run of a study: :class:`Cell` says what, :func:`run` does it."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, isometry, models, prune
from ..convert import sparsify_
from ..nn import SparseConv2d
from ..prune.by_time import Of
from ..train.loop import Recipe, Schedule, Trainer
from ..train.measure import macs_per_layer
from . import equal_time, initial

# Labels of the pruning batch, as losses.
LOSSES: dict[str, prune.scores.LossFn] = {
    "true": F.cross_entropy,
    "predicted": prune.losses.predicted,
    "uniform": prune.losses.uniform,
}
FIT = 10_000  # training examples that the fit is measured on
CLASS_SAMPLES = 10  # of each class, for GraSP, as its authors take


@dataclass(frozen=True)
class Cell:
    """A network, how it is pruned and how it is trained; fields that are left alone do not show in its key.

    Attributes:
        model, width, activation, dataset: as in ``models.build`` and ``data.load``.
        method: "dense", or the name of a function of :mod:`sparsekern.prune`; "grasp-absolute" is one of them.
        sparsity, blocksize, allocation, placement, balance, granularity: as in :func:`sparsekern.prune.from_scores`.
        speedup, of: in place of a sparsity, as in :func:`sparsekern.prune.in_time`; a "dense" network is as much
            narrower.
        by: "time" ranks by score over time for a speed-up; "sparsity" prunes as usual, as far as the speed-up takes.
        labels: "true", "predicted" or "uniform", of the pruning batch.
        prune_on: another data set to prune on.
        images: of the pruning batch.
        init: name in ``initial.NAMES``, of the weights that are scored and, unless ``fresh``, trained.
        fresh: train from new weights of "lecun" instead, as the first paper does.
        isometry: restore approximate isometry before training.
        rescaled: scale kept weights by fan-in instead.
        epochs, batch_size, lr, schedule: of the training; see ``train.loop.Recipe``.
        shuffled: train on labels in random order, which can only be learnt by heart.
        seed: of weights, batches and draws.
    """

    model: str
    width: float = 1.0
    activation: str | None = None
    dataset: str = "fashion-mnist"
    method: str = "snip"
    sparsity: float | None = None
    blocksize: tuple[int, int] | None = (1, 1)
    allocation: str = "global"
    placement: prune.Placement = "auto"
    balance: prune.Balance = "auto"
    granularity: str = "block"
    speedup: float | None = None
    of: Of = "inference"
    by: str = "time"
    labels: str = "true"
    prune_on: str | None = None
    images: int = 1000
    init: str = "lecun"
    fresh: bool = False
    isometry: bool = False
    rescaled: bool = False
    epochs: int = 8
    batch_size: int = 100
    lr: float = 0.1
    schedule: Schedule = "one-cycle"
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.labels not in LOSSES:
            raise ValueError(f"labels must be one of {', '.join(LOSSES)}, got {self.labels!r}")
        if self.isometry and self.rescaled:
            raise ValueError("isometry and rescaled cannot both be asked for")

    @property
    def key(self) -> str:
        """JSON of the fields that differ from their defaults: the same cell, the same key."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return json.dumps(given, sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Cell:
        """The cell of that key."""
        given = json.loads(key)
        if given.get("blocksize"):
            given["blocksize"] = tuple(given["blocksize"])
        return cls(**given)

    def but(self, **changes: Any) -> Cell:
        """A copy with other values in some fields."""
        return replace(self, **changes)


def run(cell: Cell) -> dict[str, Any]:
    """Prune, train, test. Returns plain values for JSON.

    Keys: accuracy (of the last epoch), fit (accuracy on 10,000 of the training examples), curve (test accuracy after
    each epoch), loss (training, last epoch), diverged, seconds of training; and, for sparse networks, sparsity,
    densities {layer: density}, macs_kept, effective_sparsity, collapsed [layers], and isometry (orthogonality score
    before, after, and seconds) or in_time where asked for; for a speed-up what was measured of it, and width or
    sparsity.
    """
    dataset = load(cell.dataset)
    model, result = prepared(cell)
    if cell.shuffled:
        order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(cell.seed))
        dataset = replace(dataset, train_labels=dataset.train_labels[order])
    recipe = Recipe(cell.epochs, cell.batch_size, cell.lr, cell.seed, cell.schedule)
    trainer = Trainer(model, dataset, recipe, best_format(model))
    curve: list[float] = []
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float, accuracy: float) -> None:
        curve.append(accuracy)
        losses.append(loss)

    try:
        trainer.fit(on_epoch=on_epoch)
        diverged = False
    except FloatingPointError:
        diverged = True
    return result | {
        "accuracy": curve[-1] if curve and not diverged else 1 / (int(dataset.test_labels.max()) + 1),
        "fit": _fit(model, dataset),
        "curve": curve,
        "loss": losses[-1] if losses else None,
        "diverged": diverged,
        "seconds": trainer.seconds,
    }


@torch.inference_mode()
def _fit(model: nn.Module, dataset: data.Dataset) -> float:
    model.eval()
    pairs = zip(dataset.train_images[:FIT].split(1000), dataset.train_labels[:FIT].split(1000), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return right / len(dataset.train_labels[:FIT])


def prepared(cell: Cell) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a cell before training, sparse unless its method is "dense", and what was done to get it.

    Raises:
        ValueError: what the cell asks for cannot be had.
    """
    dataset = load(cell.dataset)
    generator = torch.Generator().manual_seed(cell.seed)
    model = built(cell, generator)
    initial.fill_(model, cell.init, generator)
    result: dict[str, Any] = {}
    dense = None
    if cell.speedup is not None:
        dense = copy.deepcopy(in_best_format(model))
        cell, model = _in_time(cell, model)
        result = {"width": cell.width, "asked_sparsity": cell.sparsity}
    if cell.method != "dense":
        patterns = prune_(model, cell)
        if cell.fresh:
            initial.fill_(model, "lecun", generator)
        connections = prune.connectivity(model, patterns, dataset.train_images.shape[1:])
        full = sum(macs_per_layer(model, dataset.test_images[:1]).values())
        if cell.isometry:
            start = time.perf_counter()
            report = isometry.approximate_isometry_(model, patterns)
            result["isometry"] = [report.before, report.after, time.perf_counter() - start]
        if cell.rescaled:
            isometry.fan_in_rescale_(model, patterns)
        sparsify_(model, patterns)
        result |= {
            "sparsity": patterns.achieved,
            "densities": {name: pattern.density for name, pattern in patterns.items()},
            "macs_kept": sum(macs_per_layer(model, dataset.test_images[:1]).values()) / full,
            "effective_sparsity": connections.effective_sparsity,
            "collapsed": connections.collapsed,
        }
        if patterns.in_time:
            result["in_time"] = asdict(patterns.in_time)
    if dense is not None:
        result["speedup"] = equal_time.measured(dense, model, _step(cell), cell.of)
    return model, result


def _in_time(cell: Cell, model: nn.Module) -> tuple[Cell, nn.Module]:
    """The cell with the width or the sparsity at which its network has the speed-up, and the dense network of it."""
    if cell.by not in ("time", "sparsity"):
        raise ValueError(f"by must be 'time' or 'sparsity', got {cell.by!r}")
    assert cell.speedup is not None
    batch, speedup = _step(cell), cell.speedup

    def narrow(width: float) -> nn.Module:
        generator = torch.Generator().manual_seed(cell.seed)
        other = built(cell.but(width=width), generator)
        initial.fill_(other, cell.init, generator)
        return in_best_format(other)

    def sparse(density: float) -> nn.Module:
        other = copy.deepcopy(model)
        sparsify_(other, prune_(other, cell.but(speedup=None, sparsity=1 - density)))
        return other

    if cell.method == "dense":
        width = cell.width * equal_time.scale(model, lambda w: narrow(w * cell.width), speedup, batch, cell.of)
        return cell.but(width=width), narrow(width)
    if cell.by == "sparsity":
        density = equal_time.scale(model, sparse, speedup, batch, cell.of)
        return cell.but(speedup=None, sparsity=1 - density), model
    return cell, model


def _step(cell: Cell) -> tuple[Tensor, Tensor]:
    """A batch of the training's size, as it is timed."""
    dataset = load(cell.dataset)
    return dataset.train_images[: cell.batch_size], dataset.train_labels[: cell.batch_size]


def built(cell: Cell, generator: torch.Generator) -> nn.Module:
    """The dense network of a cell, for the images of its data set."""
    channels, height, width = load(cell.dataset).train_images.shape[1:]
    shape = channels, height, width
    return models.build(cell.model, cell.width, generator, activation=cell.activation, image_shape=shape)


def prune_(model: nn.Module, cell: Cell) -> prune.Patterns:
    """The patterns of a cell for this (dense) model, which is not changed."""
    generator = torch.Generator().manual_seed(cell.seed)
    dataset = load(cell.prune_on or cell.dataset)
    order = torch.randperm(len(dataset.train_labels), generator=generator)[: cell.images]
    batch = dataset.train_images[order], dataset.train_labels[order]
    loss = LOSSES[cell.labels]
    rules: dict[str, Any] = {
        "placement": cell.placement,
        "balance": cell.balance,
        "granularity": cell.granularity,
        "generator": generator,
    }
    if cell.speedup is None:
        rules |= {"sparsity": cell.sparsity, "allocation": cell.allocation}
    else:
        rules |= {"speedup": cell.speedup, "of": cell.of, "example": _step(cell)}
    blocksize = cell.blocksize
    match cell.method:
        case "snip":
            return prune.snip(model, batch, loss, blocksize=blocksize, **rules)
        case "grasp" | "grasp-absolute":
            few = _balanced(dataset, generator)
            absolute = cell.method == "grasp-absolute"
            return prune.grasp(model, few, loss, blocksize=blocksize, absolute=absolute, **rules)
        case "iterative_snip" | "force":
            return getattr(prune, cell.method)(model, batch, loss, blocksize=blocksize, **rules)
        case "synflow":
            return prune.synflow(model, batch[0].shape[1:], blocksize=blocksize, **rules)
        case "magnitude":
            return prune.magnitude(model, blocksize=blocksize, **rules)
        case "random":
            rules["allocation"] = "uniform" if cell.allocation == "global" else cell.allocation
            rules["placement"] = "random" if cell.placement == "auto" else cell.placement
            return prune.random(model, blocksize=blocksize, **rules)
        case "snip-shuffled":
            return prune.shuffle(prune.snip(model, batch, loss, blocksize=blocksize, **rules), generator)
        case unknown:
            raise ValueError(f"method must be one of those in sparsekern.prune, or 'dense', got {unknown!r}")


def _balanced(dataset: data.Dataset, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """10 examples of each class, in two halves."""
    labels = dataset.train_labels
    order = torch.randperm(len(labels), generator=generator)
    per_class = [order[labels[order] == c][:CLASS_SAMPLES] for c in range(int(labels.max()) + 1)]
    halves = torch.stack(per_class, 1).chunk(2)
    return [(dataset.train_images[i.flatten()], labels[i.flatten()]) for i in halves]


def best_format(model: nn.Module) -> torch.memory_format:
    """channels_last for networks with convolutions: torch's pooling is then far faster, dense and sparse."""
    convolutional = any(isinstance(module, nn.Conv2d | SparseConv2d) for module in model.modules())
    return torch.channels_last if convolutional else torch.contiguous_format


def in_best_format(model: nn.Module) -> nn.Module:
    """The model, its weights moved to :func:`best_format`."""
    return model.to(memory_format=best_format(model))  # type: ignore[call-overload]  # not in torch's stubs


@lru_cache(maxsize=2)
def load(name: str) -> data.Dataset:
    """A data set, kept."""
    return data.load(name)
