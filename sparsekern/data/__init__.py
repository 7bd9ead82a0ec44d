"""The thesis's data sets of ten classes, whole and in memory: :func:`load` and :class:`Batches`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import cifar
from .batches import Batches, flip_and_shift
from .sources import CHECKSUMS, locate, read_checked
from .synthetic import make_synthetic

NAMES = (*CHECKSUMS, "synthetic")
COLOUR_NAMES = (cifar.NAME,)

__all__ = ["COLOUR_NAMES", "NAMES", "Batches", "Dataset", "flip_and_shift", "hold_out", "invert", "load"]


@dataclass(frozen=True)
class Dataset:
    """Ten-class images, standardised with the mean and standard deviation of all training pixels of each channel.

    ``train_images`` and ``test_images`` are float32, [N, 1, 28, 28] for the grey sets (:data:`NAMES`) and
    [N, 3, 32, 32] for those in colour (:data:`COLOUR_NAMES`); the labels int64 [N], 0 to 9. ``mean`` and ``std`` are
    those of the training pixels on the scale 0 to 1, one per channel. ``source`` says where the files are from.
    """

    name: str
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set whole.

    Args:
        name: "fashion-mnist", "mnist", "synthetic" (a small seeded stand-in that needs no files), or "cifar-10" (its
            binary version; the Python version, being pickled, is not read).
        root: folder that holds the four idx files (raw or .gz) or CIFAR-10's archive or six files, directly or in a
            folder of the data set's name. Default: the environment variable SPARSEKERN_DATA. Where neither is given,
            the places and downloads of :func:`sparsekern.data.sources.locate` are tried in order. A folder that is
            given is the only one looked at.

    Raises:
        ValueError: an unknown name, or a file whose checksum or content is wrong.
        FileNotFoundError: nowhere to be found; the message names every way that was tried and why it failed.
    """
    if name not in NAMES + COLOUR_NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES + COLOUR_NAMES)}, got {name!r}")
    if name == "synthetic":
        train_images, train_labels, test_images, test_labels = make_synthetic()
        source = "generated"
    else:
        files, source = locate(name, Path(root) if root is not None else None)
        if name == cifar.NAME:
            return _standardise(name, source, *cifar.read(files))
        train_images, train_labels, test_images, test_labels = (read_checked(name, path) for path in files)
    return _standardise(name, source, train_images.unsqueeze(1), train_labels, test_images.unsqueeze(1), test_labels)


def hold_out(dataset: Dataset, generator: torch.Generator, fraction: float = 0.1) -> tuple[Dataset, Tensor, Tensor]:
    """Take examples out of the training set for validation, at random, as SNIP and SPP do with a tenth.

    Args:
        dataset: left as it is.
        generator: CPU generator that draws which.
        fraction: of the training examples (rounded), in (0, 1).

    Returns:
        (data set with the training examples that are left, validation images, validation labels). ``mean`` and ``std``
        stay those of all training pixels.

    Raises:
        ValueError: a fraction that takes none or all.
    """
    n = len(dataset.train_labels)
    taken = round(n * fraction) if math.isfinite(fraction) else 0
    if not 0 < taken < n:
        raise ValueError(f"fraction must take some of the {n} training examples, and not all, got {fraction}")
    order = torch.randperm(n, generator=generator)
    held, kept = order[:taken].sort().values, order[taken:].sort().values
    images, labels = dataset.train_images, dataset.train_labels
    rest = replace(dataset, train_images=images[kept], train_labels=labels[kept])
    return rest, images[held], labels[held]


def invert(dataset: Dataset) -> Dataset:
    """Every pixel p on the scale 0 to 1 as 1 - p, standardised with its own mean and deviation (SNIP, appendix)."""
    mean = tuple(1 - m for m in dataset.mean)
    return replace(dataset, mean=mean, train_images=-dataset.train_images, test_images=-dataset.test_images)


def _standardise(
    name: str, source: str, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Dataset:
    """uint8 images [N, C, H, W] and labels [N] to the standardised data set."""
    levels = torch.arange(256).double() / 255
    mean, std = [], []
    for channel in train_images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean.append(float((counts * levels).sum() / counts.sum()))
        std.append(float(((counts * (levels - mean[-1]) ** 2).sum() / counts.sum()).sqrt()))
    if not min(std) > 0:
        raise ValueError(f"{name}: the training images must not be all alike in a channel, but deviate by {std}")

    def scale(images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))

    train, test = scale(train_images), scale(test_images)
    return Dataset(name, source, tuple(mean), tuple(std), train, train_labels.long(), test, test_labels.long())
