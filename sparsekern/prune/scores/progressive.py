"""Scores that are taken again and again while the network gets sparser: iterative SNIP and FORCE."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..allocation import top_k
from .gradients import Batches, LossFn, Scores, scored_parameters, summed_gradients

Choose = Callable[[Scores, float], dict[str, Tensor]]


def iterative_snip(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float,
    *,
    rounds: int = 60,
    choose: Choose | None = None,
) -> Scores:
    """SNIP in ``rounds`` steps: what one step prunes scores 0 ever after.

    After step r the fraction (1 - sparsity)**(r / rounds) of all weights is left, ranked together one by one; the
    scores returned are those before the last step.

    Source: de Jorge et al., "Progressive skeletonization: trimming more fat from a network at initialization", ICLR
    2021, section 4.

    Args:
        model, loss_fn: as in :func:`snip`.
        batches: as in :func:`snip`, but collections that can be iterated ``rounds`` times; all of them are used in
            every step.
        sparsity: the fraction of the weights to be removed in the end, in [0, 1).
        rounds: steps, at least 1; 1 is SNIP.
        choose: ``choose(scores, density)`` says what a step keeps, as {parameter name: bool mask}; by default the best
            of all together.

    Raises:
        TypeError, ValueError: as :func:`snip`; ``sparsity`` or ``rounds`` out of range; batches that can be iterated
            only once.
    """
    return _progressively(model, batches, loss_fn, sparsity, rounds, choose, revive=False)


def force(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float,
    *,
    rounds: int = 60,
    choose: Choose | None = None,
) -> Scores:
    """FORCE: the sensitivity that connections would have in the pruned network, so that pruned ones can come back.

    Arguments, source and errors as :func:`iterative_snip`; gradients are those of the network that is left, multiplied
    by the weights of the whole one.
    """
    return _progressively(model, batches, loss_fn, sparsity, rounds, choose, revive=True)


def _progressively(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float,
    rounds: int,
    choose: Choose | None,
    *,
    revive: bool,
) -> Scores:
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be a collection that can be iterated {rounds} times, got {type(batches).__name__}"
        )
    weights = scored_parameters(model)
    whole = {name: weight.to("cpu").double() for name, weight in weights.items()}

    def score(masks: dict[str, Tensor]) -> Scores:
        left = {name: weight * masks[name].to(weight) for name, weight in weights.items()}
        gradients = summed_gradients(model, left, batches, loss_fn)
        factors = whole if revive else {name: weight * masks[name] for name, weight in whole.items()}
        return {name: (factor * gradients[name].to("cpu").double()).abs() for name, factor in factors.items()}

    return in_rounds(score, weights, sparsity, rounds, choose)


def in_rounds(
    score: Callable[[dict[str, Tensor]], Scores],
    weights: dict[str, Tensor],
    sparsity: float,
    rounds: int,
    choose: Choose | None = None,
) -> Scores:
    """The scores before the last of ``rounds`` steps; ``score`` takes bool masks of what is left."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be the fraction to remove, in [0, 1), got {sparsity}")
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds must be an integer of at least 1, got {rounds!r}")
    total = sum(weight.numel() for weight in weights.values())

    def together(scores: Scores, density: float) -> dict[str, Tensor]:
        return top_k(scores, max(1, round(total * density)))

    scores = score({name: weight.new_ones(weight.shape, device="cpu").bool() for name, weight in weights.items()})
    for step in range(1, rounds):
        scores = score((choose or together)(scores, (1 - sparsity) ** (step / rounds)))
    return scores
