"""Pruning to a speed-up instead of a sparsity: scores compete per predicted microsecond of this machine.

A global ranking by score says nothing of time: a weight of a convolution is used at every pixel. Here every weight is
ranked by its score over the time that the cost model (``sparsekern.cost``) predicts for it, the predicted budget is
corrected by measurements, and both are reported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor, nn

from ..convert import sparsify_
from ..cost import table as cost_table
from ..cost.layers import LayerCall, recorded_calls, sparse_layer, timed_calls, unmodelled
from ..eligible import convertible
from ..frozen import freeze
from ..timing import interleaved
from ..timing import speedup as ratio
from .arguments import checked_scores, chosen_layers
from .blocksizes import Blocksize, blocksizes
from .patterns import Patterns
from .scores.gradients import Scores
from .selection import Selection, from_scores

Of = Literal["inference", "eval", "step"]
CANDIDATES: tuple[Blocksize, ...] = ((1, 1), (4, 1), (8, 8), (16, 16))
# A smaller block is taken where it costs at most this much more per weight: it prunes more finely.
WORTH = 1.25
TOLERANCE, TRIES, ROUNDS = 0.03, 12, 15


class LayerTime(NamedTuple):
    """One layer, called by itself: milliseconds, predicted and measured, of all its calls in what is timed."""

    name: str
    blocksize: Blocksize
    density: float
    dense_predicted: float
    dense_measured: float
    sparse_predicted: float
    sparse_measured: float


@dataclass(frozen=True)
class InTime:
    """What was asked for, expected and found.

    Attributes:
        of: what was timed.
        asked: the speed-up asked for.
        measured: the one found, dense over sparse, median of interleaved samples; ``spread`` holds its p20 and p80.
        predicted: what the layers' predicted times lead to, all else taking what it takes in the dense network.
        dense_ms, sparse_ms: milliseconds of the whole.
        layers: those that were pruned; all others stay dense.
    """

    of: Of
    asked: float
    measured: float
    spread: tuple[float, float]
    predicted: float
    dense_ms: float
    sparse_ms: float
    layers: tuple[LayerTime, ...]

    def __str__(self) -> str:
        low, high = self.spread
        lines = [
            f"{self.of}: {self.measured:.2f}x measured ({low:.2f} to {high:.2f}), {self.asked:g}x asked, "
            f"{self.predicted:.2f}x predicted; {self.dense_ms:.3f} ms dense, {self.sparse_ms:.3f} ms sparse"
        ]
        lines += [
            f"{t.name}: density {t.density:.2%} in blocks of {t.blocksize}; dense {t.dense_predicted:.3f} ms "
            f"predicted, {t.dense_measured:.3f} measured; sparse {t.sparse_predicted:.3f}, {t.sparse_measured:.3f}"
            for t in self.layers
        ]
        return "\n".join(lines)


class _Layer(NamedTuple):
    """The time of a layer by its number of kept weights: ``base + slope * kept``, or ``dense`` for all of them."""

    size: int
    blocksize: Blocksize
    base: float
    slope: float
    dense: float


def in_time(
    model: nn.Module,
    scores: Scores,
    asked: float,
    blocksize: Blocksize | Mapping[str, Blocksize] | None,
    example: Any,
    *,
    of: Of = "inference",
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    **selection: Unpack[Selection],
) -> Patterns:
    """Patterns with which the network runs ``asked`` times as fast as dense, by the clock of this machine.

    Args:
        model: dense, float32 on the CPU. It is copied, not changed.
        scores: as in :func:`from_scores`; negative ones count as 0.
        asked: the speed-up, above 1.
        blocksize: as in :func:`from_scores`; None chooses among 1x1, 4x1, 8x8 and 16x16 for each layer.
        example: (input, target), a batch of the size that matters.
        of: "inference": the network as :func:`sparsekern.freeze` deploys it, against the dense module without
            gradients; "eval": the sparse module instead of the frozen one; "step": a training step with SGD (momentum
            0.9). Dense convolutions are timed in the model's memory format and in channels_last; the faster counts.
        loss_fn: for "step".
        **selection: placement, balance, granularity, block_score, min_blocks, exclude and generator of
            :func:`from_scores`.

    Returns:
        Patterns of the layers that are pruned, with the report in ``in_time``; what is best left dense is not in it.

    Raises:
        ValueError: an argument out of range; a speed-up that this network cannot reach.
    """
    if not (math.isfinite(asked) and asked > 1):
        raise ValueError(f"speedup must be above 1, got {asked}")
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {get_args(Of)}, got {of!r}")
    for name in ("allocation", "min_density", "max_density"):
        if name in selection:
            raise ValueError(f"{name} cannot be given with speedup, which decides how much each layer keeps")
    if selection.get("placement") == "global":
        raise ValueError("placement 'global' cannot be given with speedup: blocks are placed layer by layer")
    if of == "step" and loss_fn is None:
        raise ValueError("loss_fn must be given for of='step'")
    inputs, target = example
    layers = chosen_layers(model, selection.get("exclude", ()))
    weights, _ = checked_scores(layers, scores)
    if selection.get("block_score") == "gate":
        weights = {name: score.abs() for name, score in weights.items()}
    for name, layer in layers.items():
        if reason := unmodelled(layer):
            raise ValueError(f"layer {name!r} cannot be pruned by time: {reason}; exclude it")
    recorded = recorded_calls(model, inputs)
    calls = {name: recorded[layer] for name, layer in layers.items() if layer in recorded}
    table = cost_table.current()
    products = ("forward",) if of != "step" else None
    costs = {
        name: _cost(table, layers[name], calls[name], products, choices)
        for name, choices in _choices(model, blocksize, calls).items()
    }
    if not costs:
        raise ValueError("model must call a layer that can be sparse on the example")
    ranked = {name: (weights[name].flatten().clamp_min(0) / cost.slope).sort().values for name, cost in costs.items()}
    dense_run = dense_runner(model, inputs, target, of, loss_fn)
    dense_total = sum(cost.dense for cost in costs.values())
    floor = {name: _floor(layers[name], cost, selection.get("min_blocks", 1)) for name, cost in costs.items()}
    least = _spent(floor, costs)
    budget, best, tried = max(least, dense_total / asked), None, []
    for _ in range(TRIES):
        kept = _within(budget, costs, ranked, floor)
        if all(kept[name] == cost.size for name, cost in costs.items()):
            tried.append((budget, 1.0))
            budget = _next(tried, asked, least, dense_total)
            continue
        patterns = _patterns(model, scores, costs, kept, selection)
        sparse_run = runner(_sparse(model, patterns), inputs, target, of, loss_fn)
        times = interleaved({"dense": dense_run, "sparse": sparse_run}, rounds=ROUNDS)
        found = ratio(times["dense"], times["sparse"])
        tried.append((budget, found["p50"]))
        if best is None or abs(math.log(found["p50"] / asked)) < abs(math.log(best[1]["p50"] / asked)):
            best = (patterns, found, times["dense"].median, times["sparse"].median, kept)
        if abs(found["p50"] / asked - 1) <= TOLERANCE or (found["p50"] < asked and budget <= 1.001 * least):
            break
        budget = _next(tried, asked, least, dense_total)
    if best is None:
        raise ValueError(f"speedup {asked:g} of {of} is what the cost model expects of the dense network: ask for more")
    patterns, found, dense_s, sparse_s, kept = best
    if abs(found["p50"] / asked - 1) > 0.1:
        reached = max(value for _, value in tried)
        raise ValueError(
            f"speedup {asked:g} of {of} cannot be had from these layers: nearest {found['p50']:.2f}x, most "
            f"{reached:.2f}x in {len(tried)} tries"
            + (
                "; what the layers leave (pooling, activations, loss, calls) limits it, of='inference' least"
                if reached < asked
                else "; other programs on this machine may disturb its clock"
            )
        )
    other = dense_s - dense_total
    predicted = dense_s / max(other + _spent(kept, costs), 1e-9)
    layer_times = [
        _measured(name, layers[name], calls[name], costs[name], pattern.density, products)
        for name, pattern in patterns.items()
    ]
    patterns.in_time = InTime(
        of, asked, found["p50"], (found["p20"], found["p80"]), predicted, 1e3 * dense_s, 1e3 * sparse_s,
        tuple(layer_times),
    )  # fmt: skip
    return patterns


def _next(tried: list[tuple[float, float]], asked: float, least: float, most: float) -> float:
    """The budget to try: between the nearest that were too fast and too slow, along the line of time over budget.

    Before there are both, in proportion to what the last try took. Where noise has closed the gap, around the last one.
    """
    budget, found = tried[-1]
    fast = max((entry for entry in tried if entry[1] > asked), default=(least, math.inf))
    slow = min((entry for entry in tried if entry[1] <= asked), default=(most, 1.0))
    if slow[0] <= 1.1 * fast[0]:
        return min(max(budget * found / asked, least), most)
    if math.isinf(fast[1]) or slow[1] == 1.0:
        wanted = budget * found / asked
    else:
        share = (1 / asked - 1 / fast[1]) / (1 / slow[1] - 1 / fast[1])
        wanted = fast[0] + share * (slow[0] - fast[0])
    margin = 0.1 * (slow[0] - fast[0])
    inside = least if math.isinf(fast[1]) else fast[0] + margin
    return min(max(wanted, budget / 4, inside), budget * 4, slow[0] - margin)


def _floor(layer: nn.Linear | nn.Conv2d, cost: _Layer, min_blocks: int) -> int:
    """The fewest weights that a layer keeps: a block for every block row, or what the caller asks for."""
    block = math.prod(cost.blocksize)
    rows = -(-layer.weight.shape[0] // cost.blocksize[0])
    return min(cost.size, max(rows, min_blocks) * block)


def _choices(
    model: nn.Module, blocksize: Blocksize | Mapping[str, Blocksize] | None, calls: Mapping[str, object]
) -> dict[str, tuple[Blocksize, ...]]:
    asked = CANDIDATES if blocksize is None else (blocksize,)
    by_asked = [blocksizes(model, one) for one in asked]
    return {name: tuple(dict.fromkeys(pairs[name] for pairs in by_asked)) for name in calls}


def _cost(
    table: cost_table.Table,
    layer: nn.Linear | nn.Conv2d,
    calls: list[LayerCall],
    products: tuple[str, ...] | None,
    choices: tuple[Blocksize, ...],
) -> _Layer:
    size = layer.weight.numel()

    def sparse(pair: Blocksize, density: float) -> float:
        return sum(table.predict(call.work.sparse(pair, density, products or call.products)) for call in calls)

    dense = sum(table.predict(call.work.dense(products or call.products)) for call in calls)
    lines = {pair: (sparse(pair, 0.0), (sparse(pair, 1.0) - sparse(pair, 0.0)) / size) for pair in choices}
    fastest = min(slope for _, slope in lines.values())
    pair = next(pair for pair in choices if lines[pair][1] <= WORTH * fastest)
    return _Layer(size, pair, *lines[pair], dense)


def _spent(kept: Mapping[str, int], costs: Mapping[str, _Layer]) -> float:
    return sum(
        cost.dense if kept[name] == cost.size else cost.base + cost.slope * kept[name] for name, cost in costs.items()
    )


def _within(
    budget: float, costs: Mapping[str, _Layer], ranked: Mapping[str, Tensor], floor: Mapping[str, int]
) -> dict[str, int]:
    """{layer: weights kept} by one threshold of score over time, as low as the budget (seconds) allows.

    Of weights at the threshold every layer keeps the same share; a layer that would take as long as a dense one keeps
    everything.
    """

    def limited(counts: Mapping[str, int]) -> dict[str, int]:
        limited = {}
        for name, cost in costs.items():
            count = max(counts[name], floor[name])
            limited[name] = cost.size if cost.base + cost.slope * count >= cost.dense else count
        return limited

    def above(threshold: float) -> dict[str, int]:
        return {
            name: cost.size - int(torch.searchsorted(ranked[name], threshold, right=True))
            for name, cost in costs.items()
        }

    values = torch.cat([values[values > 0] for values in ranked.values()])
    if not values.numel():
        raise ValueError("scores must not all be zero")
    low, high = float(values.min().log()) - 1, float(values.max().log())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(limited(above(math.exp(middle))), costs) > budget else (low, middle)
    fewer, more = above(math.exp(high)), above(math.exp(low))
    if _spent(limited(more), costs) <= budget:  # room for weights without a score, too
        fewer, more = more, {name: cost.size for name, cost in costs.items()}
    # Equal scores stand or fall together only as far as the budget goes.
    none, all_ = 0.0, 1.0
    for _ in range(40):
        share = (none + all_) / 2
        between = {name: fewer[name] + int(share * (more[name] - fewer[name])) for name in costs}
        none, all_ = (share, all_) if _spent(limited(between), costs) <= budget else (none, share)
    return limited({name: fewer[name] + int(none * (more[name] - fewer[name])) for name in costs})


def _patterns(
    model: nn.Module,
    scores: Scores,
    costs: Mapping[str, _Layer],
    kept: Mapping[str, int],
    selection: Selection,
) -> Patterns:
    pruned = [name for name, cost in costs.items() if kept[name] < cost.size]
    others = [name for name in convertible(model)[0] if name not in pruned]
    rules: Selection = {**selection, "exclude": others}
    if isinstance(generator := rules.get("generator"), torch.Generator):
        rules["generator"] = generator.clone_state()  # every try draws the same
    densities = {name: kept[name] / costs[name].size for name in pruned}
    pairs = {name: costs[name].blocksize for name in pruned}
    rules["allocation"] = densities
    return from_scores(model, scores, None, pairs, **rules)


def _sparse(model: nn.Module, patterns: Patterns) -> nn.Module:
    sparse = copy.deepcopy(model)
    sparsify_(sparse, patterns)
    return sparse


def dense_runner(
    model: nn.Module, inputs: Any, target: Any, of: Of, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[], object]:
    """What the dense model runs as, by torch, in the faster memory format: for pooled convolutions half the time."""
    of = "eval" if of == "inference" else of
    as_given = runner(copy.deepcopy(model), inputs, target, of, loss_fn)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return as_given
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    runs = {"as given": as_given, "channels_last": runner(other, inputs, target, of, loss_fn)}
    times = interleaved(runs, rounds=5)
    return runs[min(times, key=lambda name: times[name].median)]


def runner(
    model: nn.Module, inputs: Any, target: Any, of: Of, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[], object]:
    """What is timed: one forward pass, or one training step, of this model, which a step changes."""
    if of == "step":
        assert loss_fn is not None
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, fused=True)

        def step() -> None:
            loss_fn(model(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
    model.eval()
    network: Callable[[Any], Any] = freeze(model, inputs) if of == "inference" else model

    def forward() -> None:
        with torch.inference_mode():
            network(inputs)

    return forward


def _measured(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    calls: list[LayerCall],
    cost: _Layer,
    density: float,
    products: tuple[str, ...] | None,
) -> LayerTime:
    generator = torch.Generator().manual_seed(0)
    sparse = sparse_layer(layer, cost.blocksize, density, generator)
    dense_ms = sparse_ms = 0.0
    for call in calls:
        x = torch.randn(call.input, generator=generator)
        taken = products or call.products
        timed = {kind: timed_calls(one, x)[taken] for kind, one in (("dense", layer), ("sparse", sparse))}
        times = interleaved(timed, rounds=5, sample_seconds=0.004, limit_seconds=2.0)
        dense_ms, sparse_ms = dense_ms + 1e3 * times["dense"].median, sparse_ms + 1e3 * times["sparse"].median
    predicted = 1e3 * (cost.base + cost.slope * density * cost.size)
    return LayerTime(name, cost.blocksize, density, 1e3 * cost.dense, dense_ms, predicted, sparse_ms)
