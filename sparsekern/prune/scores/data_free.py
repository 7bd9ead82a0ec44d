"""Scores that need no data: SynFlow, magnitude, random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...eligible import evaluating
from .gradients import Scores, scored_parameters, undisturbed
from .progressive import Choose, in_rounds


def magnitude(model: nn.Module) -> Scores:
    """|w|."""
    return {name: weight.to("cpu").double().abs() for name, weight in scored_parameters(model).items()}


def random(model: nn.Module, generator: torch.Generator | None = None) -> Scores:
    """Uniform in [0, 1).

    Args:
        model: any model with layers that can be sparse.
        generator: CPU generator; a fresh one with seed 0 by default.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return {
        name: torch.rand(weight.shape, dtype=torch.float64, generator=generator)
        for name, weight in scored_parameters(model).items()
    }


def synflow(
    model: nn.Module, image_shape: Sequence[int], sparsity: float, *, rounds: int = 100, choose: Choose | None = None
) -> Scores:
    """SynFlow: the share of each weight in the sum, over all paths, of the product of absolute weights along the path.

    The model runs in evaluation mode and float64 with the absolute values of its parameters and buffers on an input of
    ones, in ``rounds`` steps that leave (1 - sparsity)**(r / rounds) of the weights; what is pruned scores 0.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
    2020.

    Args:
        model: any model with one floating-point input.
        image_shape: of one example, such as (1, 28, 28).
        sparsity: the fraction of the weights to be removed in the end, in [0, 1).
        rounds: steps, at least 1.
        choose: as in :func:`iterative_snip`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an argument out of range; no layer that can be sparse; an output that depends on no weight, or that
            is not finite.
    """
    weights = scored_parameters(model)
    first = next(iter(weights.values()))
    ones = torch.ones(1, *image_shape, dtype=torch.float64, device=first.device)
    absolute = {name: t.detach().abs().double() for name, t in _floating(model).items()}

    def score(masks: dict[str, Tensor]) -> Scores:
        leaves = {name: (absolute[name] * masks[name].to(first.device)).requires_grad_() for name in weights}
        with evaluating(model), undisturbed(model) as call:
            flow = call(absolute | leaves, ones).sum()
            if not flow.requires_grad or not bool(flow.isfinite()):
                raise ValueError("model must map ones to a finite output that depends on its weights")
            gradients = torch.autograd.grad(flow, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf, device="cpu") if g is None else (leaf.detach() * g).abs().cpu()
            for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
        }

    return in_rounds(score, weights, sparsity, rounds, choose)


def _floating(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}
