"""The weights that experiments start from, by the names of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .. import isometry, models

# Variance of a weight by its layer's (fan_in, fan_out). Source: SPP (ICLR 2020), section 5: VS-L, VS-G, VS-H.
_VARIANCES: dict[str, Callable[[int, int], float]] = {
    "lecun-normal": lambda fan_in, fan_out: 1 / fan_in,
    "glorot": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "he": lambda fan_in, fan_out: 2 / fan_in,
}
_ORTHOGONAL = {
    "orthogonal": isometry.orthogonal_,
    "delta-orthogonal": isometry.delta_orthogonal_,
    "block-orthogonal": isometry.block_orthogonal_,
}
NAMES = ("lecun", *_VARIANCES, *_ORTHOGONAL, "normal:VARIANCE", "truncated:VARIANCE")


@torch.no_grad()
def fill_(model: nn.Module, name: str, generator: torch.Generator | None = None) -> None:
    """Fresh weights in place, biases 0.

    Args:
        name: "lecun", truncated normal of variance 1 / fan_in, as ``models.build`` draws; "lecun-normal", "glorot",
            "he": normal; "orthogonal", "delta-orthogonal", "block-orthogonal": of :mod:`sparsekern.isometry`;
            "normal:V", "truncated:V" of variance V (before it is cut off).

    Raises:
        ValueError: another name.
    """
    kind, _, number = name.partition(":")
    if name == "lecun":
        models.init_(model, generator)
        return
    if name in _ORTHOGONAL:
        _ORTHOGONAL[name](model, generator=generator)
        return
    fixed = kind in ("normal", "truncated") and number.replace(".", "", 1).isdecimal()
    if not fixed and name not in _VARIANCES:
        raise ValueError(f"init must be one of {', '.join(NAMES)}, got {name!r}")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            fan_out = module.weight.numel() // (module.weight.shape[1] if module.weight.dim() > 1 else 1)
            std = math.sqrt(float(number) if fixed else _VARIANCES[name](fan_in, fan_out))
            if kind == "truncated":
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            else:
                module.weight.normal_(std=std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
