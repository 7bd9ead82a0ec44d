"""Orthogonal initialisation of dense layers, before they are pruned."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.eligible import convertible


@torch.no_grad()
def orthogonal_(model: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
    """Fill the weight of every nn.Linear and nn.Conv2d that can be sparse with an orthogonal matrix, its bias with 0.

    A conv weight [C_out, C_in/groups, kh, kw] counts as the matrix [C_out, C_in/groups*kh*kw], each group by itself.
    Rows are orthonormal where there are at least as many columns, else columns are; times ``gain``.

    Source: Saxe, McClelland & Ganguli, 2014, as SPP (ICLR 2020) initialises before pruning.

    Args:
        model: a dense model; layers that cannot be sparse are left alone.
        gain: factor on the weights.
        generator: for the draws, on the device of the weights; torch's default one if None.

    Raises:
        ValueError: the model has no such layer.
    """
    layers, _ = convertible(model)
    if not layers:
        raise ValueError("model has no nn.Linear or nn.Conv2d that can be sparse")
    for layer in layers.values():
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        for part in layer.weight.chunk(groups):
            nn.init.orthogonal_(part, gain, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
