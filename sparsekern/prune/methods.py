"""From a dense model to the patterns of its layers, in one call: a score each, and the rules that all share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from ..pattern import BlockPattern
from . import scores
from .allocation import best, densities, exact_counts, top_k
from .arguments import chosen_layers
from .blocksizes import Blocksize
from .by_time import Of, in_time
from .patterns import Patterns
from .placement import cpu_generator, drawn_order, first
from .scores import Batches, LossFn
from .scores.gradients import pairs, parameter_name
from .scores.progressive import Choose
from .scores.snip import Accumulate
from .selection import Selection, from_scores

Biases = Literal["keep", "score"]
BlocksizeArgument = Blocksize | Mapping[str, Blocksize] | None


class Rules(Selection, total=False):
    """Keyword arguments of all methods: those of :func:`from_scores`, and to prune to a speed-up instead.

    ``speedup``, ``of`` ("inference", "eval" or "step") and, for scores without data, ``example``, an (input, target)
    batch of the size that matters: see :func:`in_time`. Takes the place of a sparsity; then ``blocksize=None`` chooses
    one for each layer.
    """

    speedup: float | None
    of: Of
    example: tuple[Any, Any]


def _select(
    model: nn.Module,
    found: scores.Scores,
    sparsity: float | None,
    blocksize: BlocksizeArgument,
    rules: Rules,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
) -> Patterns:
    """:func:`from_scores`, or :func:`in_time` where a speed-up is asked for."""
    asked, of, example = rules.get("speedup"), rules.get("of"), rules.get("example")
    selection: Any = {key: value for key, value in rules.items() if key in Selection.__annotations__}
    if asked is None:
        for name in ("of", "example"):
            if name in rules:
                raise ValueError(f"{name} goes with speedup, which is not given")
        if blocksize is None:
            raise ValueError("blocksize=None goes with speedup; give a pair such as (8, 8)")
        return from_scores(model, found, sparsity, blocksize, **selection)
    if example is None and batches is not None:
        example = next(pairs(batches))
    if example is None:
        raise ValueError("example must be given with speedup: an (input, target) batch of the size that matters")
    return in_time(model, found, asked, blocksize, example, of=of or "inference", loss_fn=loss_fn, **selection)


def _known(rules: Rules) -> None:
    """Before any score is computed."""
    for name in rules:
        if name not in Rules.__annotations__:
            raise TypeError(
                f"got an unexpected keyword argument {name!r}; pruning takes {', '.join(Rules.__annotations__)}"
            )


def _default(sparsity: float | None, rules: Rules) -> float | None:
    """The sparsity that is meant where none is given."""
    _known(rules)
    if rules.get("speedup") is not None:
        if sparsity is not None:
            raise ValueError(f"sparsity and speedup cannot both be given, got {sparsity} and {rules['speedup']}")
        return None
    return (
        None
        if isinstance(rules.get("allocation"), Mapping) and sparsity is None
        else 0.9
        if sparsity is None
        else sparsity
    )


def _of_rounds(sparsity: float, rules: Rules) -> float | None:
    """The sparsity to prune to, where rounds end at ``sparsity``."""
    return sparsity if rules.get("speedup") is None else None


def _rounds(model: nn.Module, rules: Rules) -> Choose:
    """What each round keeps: excluded layers whole, of the others the best, by the allocation that is asked for.

    Rounds that kept other numbers than the selection after them would leave it weights of score 0 to choose from.
    """
    _known(rules)
    allocation = rules.get("allocation", "global")
    if isinstance(allocation, Mapping):
        raise ValueError("allocation must be a rule, not densities, for scores that are taken in rounds")
    layers = chosen_layers(model, rules.get("exclude", ()))
    shapes = {parameter_name(name, "weight"): tuple(layer.weight.shape) for name, layer in layers.items()}

    def choose(found: scores.Scores, density: float) -> dict[str, Tensor]:
        masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in found.items()}
        ranked = {name: found[name] for name in shapes}
        kept = max(1, round(density * sum(score.numel() for score in ranked.values())))
        if allocation == "global":
            return masks | top_k(ranked, kept)
        share = densities(shapes, allocation, density)
        sizes = {name: share[name] * score.numel() for name, score in ranked.items()}
        most = {name: score.numel() for name, score in ranked.items()}
        counts = exact_counts(sizes, kept, dict.fromkeys(ranked, 0), most)
        return masks | {name: best(score, counts[name]) for name, score in ranked.items()}

    return choose


def snip(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float | None = None,
    blocksize: BlocksizeArgument = (8, 8),
    *,
    biases: Biases = "keep",
    accumulate: Accumulate = "signed",
    **rules: Unpack[Rules],
) -> Patterns:
    """Prune before training by connection sensitivity |w·∂L/∂w|: which blocks of each layer to keep. Changes nothing.

    With larger blocks a ranking of all blocks together starves small layers. By default each layer therefore gets the
    density that it has when single weights are ranked together, and its blocks are placed within the layer.

    Source: Lee, Ajanthan & Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019;
    :mod:`sparsekern.prune` shows the authors' own mode.

    Args:
        model, batches, loss_fn, accumulate: as in :func:`scores.snip <sparsekern.prune.scores.snip>`.
        sparsity: as in :func:`from_scores`; 0.9 where neither it, nor ``speedup``, nor densities are given.
        blocksize: as in :func:`from_scores`.
        biases: "keep" all; or "score" them like weights, as the authors do (zero biases score 0 and fall): a layer
            whose bias falls is named in ``drop_bias`` of the result.
        **rules: allocation, placement, balance, granularity, block_score, min_blocks, min_density, max_density, exclude
            and generator, as in :func:`from_scores`; or ``speedup`` (and ``of``, ``example``) in place of a sparsity,
            as in :func:`in_time`. The example is the first batch unless given.

    Returns:
        {module name: BlockPattern, on the CPU}, as :func:`from_scores`.

    Raises:
        ValueError, TypeError: as :func:`scores.snip <sparsekern.prune.scores.snip>` and :func:`from_scores`.
    """
    if biases not in get_args(Biases):
        raise ValueError(f"biases must be one of {get_args(Biases)}, got {biases!r}")
    wanted = _default(sparsity, rules)
    if rules.get("speedup") is not None:
        batches = list(pairs(batches))  # scores need all of them, and the first is what is timed
    found = scores.snip(
        model,
        batches,
        loss_fn,
        accumulate=accumulate,
        signed=rules.get("block_score") == "gate",
        biases=biases == "score",
    )
    return _select(model, found, wanted, blocksize, rules, batches, loss_fn)


def random(
    model: nn.Module,
    sparsity: float | None = None,
    blocksize: BlocksizeArgument = (8, 8),
    **rules: Unpack[Rules],
) -> Patterns:
    """Blocks at random, by default the same density in every layer; needs no data.

    Arguments, counts and errors as in :func:`from_scores`, with the defaults ``allocation="uniform"`` and
    ``placement="random"``.
    """
    wanted = _default(sparsity, rules)
    generator = rules["generator"] = cpu_generator(rules.get("generator"))
    rules.setdefault("placement", "random")
    if wanted is not None:
        rules.setdefault("allocation", "uniform")
    return _select(model, scores.random(model, generator), wanted, blocksize, rules)


def magnitude(
    model: nn.Module,
    sparsity: float | None = None,
    blocksize: BlocksizeArgument = (8, 8),
    **rules: Unpack[Rules],
) -> Patterns:
    """Prune by |w|. Arguments, counts and errors as in :func:`from_scores`."""
    return _select(model, scores.magnitude(model), _default(sparsity, rules), blocksize, rules)


def grasp(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float | None = None,
    blocksize: BlocksizeArgument = (8, 8),
    *,
    absolute: bool = False,
    **rules: Unpack[Rules],
) -> Patterns:
    """Prune by GraSP. Arguments and errors as in :func:`scores.grasp <sparsekern.prune.scores.grasp>` and
    :func:`from_scores`."""
    wanted = _default(sparsity, rules)
    found = scores.grasp(model, batches, loss_fn, absolute=absolute)
    return _select(model, found, wanted, blocksize, rules, batches, loss_fn)


def synflow(
    model: nn.Module,
    image_shape: Sequence[int],
    sparsity: float = 0.9,
    blocksize: BlocksizeArgument = (8, 8),
    *,
    rounds: int = 100,
    **rules: Unpack[Rules],
) -> Patterns:
    """Prune by SynFlow, without data. Arguments and errors as in
    :func:`scores.synflow <sparsekern.prune.scores.synflow>` and :func:`from_scores`."""
    found = scores.synflow(model, image_shape, sparsity, rounds=rounds, choose=_rounds(model, rules))
    return _select(model, found, _of_rounds(sparsity, rules), blocksize, rules)


def iterative_snip(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float = 0.9,
    blocksize: BlocksizeArgument = (8, 8),
    *,
    rounds: int = 60,
    **rules: Unpack[Rules],
) -> Patterns:
    """Prune by SNIP in rounds; with ``speedup``, ``sparsity`` is where the rounds end. Arguments and errors as in
    :func:`scores.iterative_snip <sparsekern.prune.scores.iterative_snip>` and :func:`from_scores`."""
    choose = _rounds(model, rules)
    found = scores.iterative_snip(model, batches, loss_fn, sparsity, rounds=rounds, choose=choose)
    return _select(model, found, _of_rounds(sparsity, rules), blocksize, rules, batches, loss_fn)


def force(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float = 0.9,
    blocksize: BlocksizeArgument = (8, 8),
    *,
    rounds: int = 60,
    **rules: Unpack[Rules],
) -> Patterns:
    """Prune by FORCE; with ``speedup``, ``sparsity`` is where the rounds end. Arguments and errors as in
    :func:`scores.force <sparsekern.prune.scores.force>` and :func:`from_scores`."""
    choose = _rounds(model, rules)
    found = scores.force(model, batches, loss_fn, sparsity, rounds=rounds, choose=choose)
    return _select(model, found, _of_rounds(sparsity, rules), blocksize, rules, batches, loss_fn)


def shuffle(patterns: Mapping[str, BlockPattern], generator: torch.Generator | None = None) -> Patterns:
    """The random twin of ``patterns``: in every layer as many blocks of the same size, at random places.

    Where all block rows of a layer hold the same number (±1), they do so in the twin, and so do block columns then.
    Where blocks overhang the edge, the number of weights can differ by what edge blocks lack.

    Source: Frankle et al., "Pruning neural networks at initialization: why are we missing the mark?", ICLR 2021.

    Args:
        patterns: {module name: BlockPattern}.
        generator: CPU generator for the draws; a fresh one with seed 0 by default.
    """
    generator = cpu_generator(generator)
    twins = {}
    for name, pattern in patterns.items():
        if _even(pattern.blocks_per_row()):
            columns = torch.bincount(pattern.col_indices, minlength=pattern.grid[1])
            balance: Literal["rows", "both"] = "both" if _even(columns) else "rows"
            order = drawn_order(torch.ones(pattern.grid, dtype=torch.float64), generator, balance, pattern.nnz_blocks)
        else:
            order = torch.randperm(math.prod(pattern.grid), generator=generator)
        mask = first(order, pattern.nnz_blocks, pattern.grid)
        twins[name] = BlockPattern.from_mask(mask, pattern.blocksize, pattern.shape).to(pattern.device)
    return Patterns(twins, getattr(patterns, "requested", None), getattr(patterns, "drop_bias", frozenset()))


def _even(counts: torch.Tensor) -> bool:
    return bool(counts.numel()) and int(counts.max() - counts.min()) <= 1
