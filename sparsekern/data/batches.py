"""Batches of images in memory, random changes to them, and images held out: what training takes from a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Shuffled batches of a data set that lies in memory; iterating it once is one epoch.

    Args:
        images: [N, ...]; labels: [N].
        batch_size: examples per batch; the last one of an epoch is smaller where N is no multiple of it.
        generator: CPU generator that draws a new order for every epoch, and what ``augment`` draws.
        augment: ``augment(images [B, ...], generator)`` gives the images that are yielded in place of those; for
            example :func:`flip_and_shift`. Labels stay.

    Yields:
        (images [B, ...], labels [B]), copies.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        generator: torch.Generator,
        augment: Augment | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) != len(labels):
            raise ValueError(f"images and labels must be equally many, got {len(images)} and {len(labels)}")
        self.images, self.labels = images, labels
        self.batch_size, self.generator, self.augment = batch_size, generator, augment

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        # index_select, not images[index]: a third of the time for a batch of 100 images.
        for index in order.split(self.batch_size):
            images = self.images.index_select(0, index)
            if self.augment is not None:
                images = self.augment(images, self.generator)
            yield images, self.labels.index_select(0, index)


def flip_and_shift(images: Tensor, generator: torch.Generator, shift: int = 4, flip: bool = True) -> Tensor:
    """Each image by itself: mirrored left to right with probability 1/2, then moved by up to ``shift`` pixels.

    The distances down and to the right are drawn uniformly from -shift to shift, and zeros, the mean colour of
    standardised images, move in. Source: SNIP (Lee et al., 2019), with 4 pixels; SPP (Lee et al., 2020) takes 8 for
    Tiny-ImageNet.

    Args:
        images: [B, C, H, W], any dtype, on the CPU; left as they are.
        generator: CPU generator; draws the same number of times for every batch of a size.
        shift: pixels, from 0 to less than the height and the width.
        flip: whether images are mirrored.

    Returns:
        New images of the same shape and dtype.

    Raises:
        ValueError: images of another rank, or a shift that moves whole images out or is negative.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be [B, C, H, W], got shape {tuple(images.shape)}")
    height, width = images.shape[2:]
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift must be from 0 to less than the images' {height}x{width} pixels, got {shift}")
    n = len(images)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(3), images)
    # A shift is a window into the padded image: further up in it moves the image down.
    windows = F.pad(images, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, rows, columns, H, W]
    top, left = torch.randint(2 * shift + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, top, left]
