"""What is timed on a GPU: linear layers, blocks, densities."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsekern.pattern import BlockPattern
from sparsekern.triton.plan import Product

PRODUCTS: tuple[Product, ...] = ("forward", "dgrad", "wgrad")
BLOCKS = ((128, 128), (64, 64), (32, 32), (16, 16))
DENSITIES = (0.5, 0.25, 0.1, 0.05)


class Case(NamedTuple):
    """A linear layer and the tokens that it sees."""

    tokens: int
    outputs: int
    inputs: int

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.inputs}x{self.outputs}"

    def pattern(self, blocksize: tuple[int, int], density: float, device: str = "cpu") -> BlockPattern:
        """Blocks at random, the same on every machine."""
        generator = torch.Generator().manual_seed(0)
        grid = (-(-self.outputs // blocksize[0]), -(-self.inputs // blocksize[1]))
        mask = torch.rand(grid, generator=generator) < density
        return BlockPattern.from_mask(mask, blocksize, (self.outputs, self.inputs)).to(device)


CASES = (
    Case(8192, 4096, 4096),
    Case(8192, 16384, 16384),
    *(Case(tokens, size, size) for size in (4096, 16384) for tokens in (16, 64, 256)),
)
QUICK = CASES[:1] + CASES[2:3]
