"""Singular values of the network's Jacobian: how it stretches a small change of its input, direction by direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        ValueError: the output has another batch size, or does not depend on ``x``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        # Copies: batch norm in train mode updates its buffers in place.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = torch.func.functional_call(model, buffers, (x,))
        if output.dim() == 0 or len(output) != len(x):
            raise ValueError(f"model must map a batch of {len(x)} to as many outputs, got shape {tuple(output.shape)}")
        if not output.requires_grad:
            raise ValueError("model must depend on x, but its output has no gradient")
        # Examples are independent, so the gradient of a sum over the batch holds a row of each example's Jacobian.
        sums = output.flatten(1).sum(0)
        rows = [torch.autograd.grad(total, x, retain_graph=True)[0].flatten(1) for total in sums]
    return torch.linalg.svdvals(torch.stack(rows, dim=1))
