"""GraSP: keep the gradient flowing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .gradients import Batches, LossFn, Scores, checked, pairs, scored_parameters, summed_gradients, undisturbed


def grasp(
    model: nn.Module, batches: Batches, loss_fn: LossFn, *, absolute: bool = False, temperature: float = 200.0
) -> Scores:
    """w·(H g): how much the squared norm of the gradient shrinks when a connection is removed, to first order, halved.

    Negative scores are connections whose removal lets the gradient grow. The batches run twice, the second time with a
    graph of their gradient.

    Source: Wang, Zhang & Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020;
    ``absolute`` as in Frankle et al., "Pruning neural networks at initialization: why are we missing the mark?", ICLR
    2021.

    Args:
        model, loss_fn: as in :func:`snip`. All operations of the model need second derivatives.
        batches: (input, target) pairs that can be iterated twice; the authors take 10 examples of each class.
        absolute: |w·(H g)| instead.
        temperature: outputs are divided by it, as in the authors' code.

    Raises:
        TypeError, ValueError: as :func:`snip`; ``temperature`` is not positive; ``batches`` can be iterated only once;
            weights of float16, in which second derivatives at this temperature vanish.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if isinstance(batches, Iterator):
        raise TypeError(f"batches must be a collection that can be iterated twice, got {type(batches).__name__}")

    def cooled(output: torch.Tensor, target: object) -> torch.Tensor:
        return loss_fn(output / temperature, target)

    weights = scored_parameters(model)
    for name, weight in weights.items():
        if weight.dtype == torch.float16:
            raise ValueError(f"{name!r} must not be float16, in which second derivatives vanish: score in float32")
    gradients = summed_gradients(model, weights, batches, cooled)
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    products = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    # Fused attention has no second derivatives.
    with undisturbed(model) as call, sdpa_kernel(SDPBackend.MATH):
        for inputs, target in pairs(batches):
            loss = checked(cooled(call(leaves, inputs), target))
            of_batch = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
            along = sum(
                (g * gradients[name].to(g.dtype)).sum()
                for name, g in zip(leaves, of_batch, strict=True)
                if g is not None and g.requires_grad
            )
            if isinstance(along, torch.Tensor):
                hessian_products = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
                for name, product in zip(leaves, hessian_products, strict=True):
                    if product is not None:
                        products[name] += product
    scores = {name: weight.to("cpu").double() * products[name].to("cpu").double() for name, weight in weights.items()}
    return {name: score.abs() for name, score in scores.items()} if absolute else scores
