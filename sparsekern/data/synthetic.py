"""A seeded stand-in for MNIST that needs no files: learnable, but its figures say nothing about real data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

N_TRAIN, N_TEST, N_CLASSES = 6000, 1000, 10


def make_synthetic(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images [N, 28, 28] and labels [N], train then test: ten smooth shapes, shifted, dimmed and noisy."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(N_CLASSES, 1, 5, 5, generator=generator)
    shapes = F.interpolate(coarse, size=(28, 28), mode="bicubic", align_corners=True).clamp(0, 1).squeeze(1)

    n = N_TRAIN + N_TEST
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    shift = torch.randint(-3, 4, (n, 2, 1), generator=generator)
    row, col = ((torch.arange(28) + shift[:, axis]) % 28 for axis in (0, 1))
    images = shapes[labels[:, None, None], row[:, :, None], col[:, None, :]]
    images = images * (0.5 + 0.5 * torch.rand(n, 1, 1, generator=generator))
    images = images + 0.25 * torch.randn(n, 28, 28, generator=generator)
    pixels = images.clamp(0, 1).mul(255).byte()
    return pixels[:N_TRAIN], labels[:N_TRAIN], pixels[N_TRAIN:], labels[N_TRAIN:]
