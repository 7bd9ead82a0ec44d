"""SNIP: connection sensitivity."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from .gradients import Batches, LossFn, Scores, scored_parameters, summed_gradients

Accumulate = Literal["signed", "absolute"]


def snip(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    *,
    accumulate: Accumulate = "signed",
    signed: bool = False,
    biases: bool = False,
) -> Scores:
    """|w·∂L/∂w|, the effect on the loss of removing a connection, to first order.

    The paper divides by the sum over all connections, which changes no order and is left out.

    Source: Lee, Ajanthan & Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019,
    equations 4 to 6.

    Args:
        model: any model. It runs in the mode it is in: ``model.eval()`` before makes batch norm an identity at
            initialisation, as in the authors' code.
        batches: (input, target) pairs, or one such pair, on the model's device. Large ones can be cut into smaller
            ones where ``loss_fn`` adds up (``reduction="sum"``).
        loss_fn: ``loss_fn(model(input), target)`` is a scalar tensor.
        accumulate: sum gradients over batches with their signs, as the authors' code does, or their absolute values.
        signed: return w·∂L/∂w, for ``block_score="gate"``.
        biases: score biases as well.

    Raises:
        ValueError: no layer that can be sparse, no batch, a loss that is no scalar or does not depend on the weights,
            an unknown ``accumulate``, or "absolute" with ``signed``.
        TypeError: a model, batch or loss of the wrong type.
    """
    if accumulate not in get_args(Accumulate):
        raise ValueError(f"accumulate must be one of {get_args(Accumulate)}, got {accumulate!r}")
    if signed and accumulate == "absolute":
        raise ValueError("signed must be False where accumulate is 'absolute': the signs are gone")
    weights = scored_parameters(model, biases)
    sums = summed_gradients(model, weights, batches, loss_fn, absolute=accumulate == "absolute")
    scores = {name: weight.to("cpu").double() * sums[name].to("cpu").double() for name, weight in weights.items()}
    return scores if signed else {name: score.abs() for name, score in scores.items()}
