"""The data sets of the thesis's small networks, whole and in memory: :func:`load` and :class:`Batches`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .idx import read_idx
from .sources import CHECKSUMS, locate
from .synthetic import make_synthetic

NAMES = (*CHECKSUMS, "synthetic")

__all__ = ["NAMES", "Batches", "Dataset", "load"]


@dataclass(frozen=True)
class Dataset:
    """Ten-class images, standardised with the one mean and standard deviation of all training pixels.

    ``train_images`` and ``test_images`` are float32 [N, 1, 28, 28]; the labels int64 [N], 0 to 9.
    ``mean`` and ``std`` are those of the training pixels on the scale 0 to 1. ``source`` says where the files are from.
    """

    name: str
    source: str
    mean: float
    std: float
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set whole.

    Args:
        name: "fashion-mnist", "mnist", or "synthetic" (a small seeded stand-in that needs no files).
        root: folder that holds the four idx files (raw or .gz), directly or in a folder of the data set's name.
            Default: the environment variable SPARSEKERN_DATA. Where neither is given, the places and downloads of
            :func:`sparsekern.data.sources.locate` are tried in order. A folder that is given is the only one looked at.

    Raises:
        ValueError: an unknown name, or a file whose checksum is wrong.
        FileNotFoundError: nowhere to be found; the message names every way that was tried and why it failed.
    """
    if name == "synthetic":
        return _standardise(name, "generated", *make_synthetic())
    if name not in CHECKSUMS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    files, source = locate(name, Path(root) if root is not None else None)
    train_images, train_labels, test_images, test_labels = (read_idx(path, sha256) for path, sha256 in files)
    return _standardise(name, source, train_images, train_labels, test_images, test_labels)


class Batches:
    """Shuffled batches of a data set that lies in memory; iterating it once is one epoch.

    Args:
        images: [N, ...]; labels: [N].
        batch_size: examples per batch; the last one of an epoch is smaller where N is no multiple of it.
        generator: CPU generator that draws a new order for every epoch.

    Yields:
        (images [B, ...], labels [B]), copies.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) != len(labels):
            raise ValueError(f"images and labels must be equally many, got {len(images)} and {len(labels)}")
        self.images, self.labels = images, labels
        self.batch_size, self.generator = batch_size, generator

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        # index_select, not images[index]: a third of the time for a batch of 100 images.
        for index in order.split(self.batch_size):
            yield self.images.index_select(0, index), self.labels.index_select(0, index)


def _standardise(
    name: str, source: str, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Dataset:
    """uint8 images [N, 28, 28] and labels [N] to the standardised data set."""
    counts = torch.bincount(train_images.flatten(), minlength=256).double()
    levels = torch.arange(256).double() / 255
    mean = float((counts * levels).sum() / counts.sum())
    std = float(((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt())

    def scale(images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(mean).div_(std).unsqueeze(1)

    return Dataset(
        name, source, mean, std, scale(train_images), train_labels.long(), scale(test_images), test_labels.long()
    )
