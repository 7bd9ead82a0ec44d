"""Singular values of the network's Jacobian: how it stretches a small change of its input, direction by direction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.nn import SparseConv2d, SparseLinear

LARGEST = 2**24  # elements of an example's Jacobian of one layer


class Statistics(NamedTuple):
    """Of singular values: mean, standard deviation, least, largest, and largest / least (infinite where least is 0)."""

    mean: float
    std: float
    min: float
    max: float
    condition: float


def singular_value_statistics(values: Tensor) -> Statistics:
    """Statistics over all ``values`` (any shape, at least one), in float64."""
    if not values.numel():
        raise ValueError("values must not be empty")
    values = values.detach().double()
    least, largest = float(values.min()), float(values.max())
    spread = float(values.std()) if values.numel() > 1 else 0.0
    return Statistics(float(values.mean()), spread, least, largest, largest / least if least > 0 else math.inf)


def jacobian_singular_values(model: nn.Module, x: Tensor) -> Tensor:
    """Singular values of the input-to-output Jacobian of every example. Changes nothing.

    Examples must not influence one another: ``model.eval()`` first, if there is batch norm. One backward pass runs per
    output, for the whole batch at once.

    Source: SPP (ICLR 2020), section 4; isometry is all of them near 1.

    Args:
        model: the model to measure, in the mode it is in.
        x: floating point, [batch, ...], of d_in elements an example.

    Returns:
        [batch, min(d_in, d_out)], descending, where the model maps ``x`` to [batch, ...] of d_out elements an example.

    Raises:
        ValueError: ``x`` is not floating point, the output has another batch size, or does not depend on ``x``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = _leaf(x)
        rows = _jacobian(_run(model, x), x)
    if rows is None:
        raise ValueError("model must depend on x, but its output has no gradient")
    return torch.linalg.svdvals(rows)


def layer_jacobian_singular_values(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Singular values of each layer's Jacobian, for every example: from its input to the next layer's. Changes nothing.

    Layers are nn.Linear, nn.Conv2d, SparseLinear and SparseConv2d; what lies between one and the next (activation,
    norm, pooling) belongs to the former, what follows the last to the last. Examples must not influence one another, as
    in :func:`jacobian_singular_values`.

    Source: SPP (ICLR 2020), section 4, D^l W^l: isometry of every layer is what isometry of the network is built of.

    Returns:
        {name: [batch, min(d_in, d_out)]}, descending, in the order in which layers run.

    Raises:
        ValueError: a layer runs twice, does not lead to the next, has its input changed in place, or a Jacobian of over
            2**24 elements; the model runs none; as :func:`jacobian_singular_values`.
    """
    kinds = (nn.Linear, nn.Conv2d, SparseLinear, SparseConv2d)
    inputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def capture(name: str, arguments: tuple[Any, ...]) -> None:
        if name in inputs:
            raise ValueError(f"layer {name!r} runs twice: it has no Jacobian of its own")
        if not arguments:
            raise ValueError(f"layer {name!r} must get its input as a positional argument")
        inputs[name], versions[name] = arguments[0], arguments[0]._version

    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: capture(name, arguments))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            output = _run(model, _leaf(x))
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        raise ValueError("model runs no nn.Linear, nn.Conv2d, SparseLinear or SparseConv2d")
    for name, start in inputs.items():
        if start._version != versions[name]:
            raise ValueError(f"the input of layer {name!r} must not be changed in place after the layer has read it")
    found = {}
    for (name, start), end in zip(inputs.items(), [*list(inputs.values())[1:], output], strict=True):
        size = start[0].numel() * end[0].numel()
        if size > LARGEST:
            raise ValueError(f"layer {name!r} has a Jacobian of {size:,} elements an example, over {LARGEST:,}")
        with torch.inference_mode(False):
            rows = None if end is start else _jacobian(end, start)  # the same where two layers stand side by side
        if rows is None:
            raise ValueError(f"layer {name!r} must lead to the layer that runs next, as in a chain")
        found[name] = torch.linalg.svdvals(rows)
    return found


def _leaf(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    return x.detach().clone().requires_grad_()


def _run(model: nn.Module, x: Tensor) -> Tensor:
    # Copies: batch norm in train mode updates its buffers in place.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output: Tensor = torch.func.functional_call(model, buffers, (x.clone(),))  # a leaf could not be changed in place
    if output.dim() == 0 or len(output) != len(x):
        raise ValueError(f"model must map a batch of {len(x)} to as many outputs, got shape {tuple(output.shape)}")
    return output


def _jacobian(output: Tensor, x: Tensor) -> Tensor | None:
    """[batch, d_out, d_in]; None where no path leads from x to the output.

    Examples are independent, so the gradient of a sum over the batch holds a row of each.
    """
    if not (output.requires_grad and x.requires_grad):
        return None
    rows = []
    for total in output.reshape(len(output), -1).sum(0):
        (row,) = torch.autograd.grad(total, x, retain_graph=True, allow_unused=True)
        if row is None:
            return None
        rows.append(row.flatten(1))
    # There is no SVD in half precision.
    return torch.stack(rows, dim=1).to(torch.promote_types(x.dtype, torch.float32))
