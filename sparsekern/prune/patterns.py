"""What pruning methods return: a dictionary of patterns that knows what was asked for and which biases go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..pattern import BlockPattern

if TYPE_CHECKING:
    from .by_time import InTime


class Patterns(dict[str, BlockPattern]):
    """{module name: BlockPattern}, and what the pruning method has to say about it.

    Attributes:
        requested: the sparsity asked for, or None where none was.
        drop_bias: names of the layers that are to be built without their bias.
        in_time: what was predicted and measured, where a speed-up was asked for; else None.
    """

    def __init__(
        self,
        patterns: Mapping[str, BlockPattern],
        requested: float | None = None,
        drop_bias: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(patterns)
        self.requested = requested
        self.drop_bias = drop_bias
        self.in_time: InTime | None = None

    @property
    def achieved(self) -> float:
        """The sparsity of all layers together: weights removed / weights, without biases."""
        total = sum(math.prod(pattern.shape) for pattern in self.values())
        return 1 - sum(pattern.nnz for pattern in self.values()) / total if total else 0.0

    def summary(self) -> str:
        """Achieved and requested sparsity, then a line per layer, for people to read."""
        asked = "" if self.requested is None else f", requested {self.requested:.4%}"
        lines = [f"sparsity {self.achieved:.4%}{asked}"]
        for name, pattern in self.items():
            blocks = f"{pattern.nnz_blocks} blocks of {pattern.blocksize}"
            bias = ", bias dropped" if name in self.drop_bias else ""
            lines.append(f"{name}: density {pattern.density:.4%}, {blocks}{bias}")
        return "\n".join(lines)
