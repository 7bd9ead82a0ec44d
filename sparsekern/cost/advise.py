"""What sparsity would bring to each layer of a model, before anything is pruned or timed: :func:`advise`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import nn

from ..eligible import convertible
from ..prune.blocksizes import Blocksize, check_blocksize
from ..prune.blocksizes import blocksizes as pruned_blocksizes
from ..weights import weight_matrix
from .layers import LayerCall, recorded_calls, unmodelled
from .table import Table, current


@dataclass(frozen=True)
class LayerAdvice:
    """What one layer is predicted to take in a training step, called by itself: milliseconds on one thread.

    Attributes:
        name: as in ``model.named_modules()``.
        shape: of the weight as a matrix.
        dense_ms: torch's dense layer; None where nothing can be predicted.
        blocksizes: {blocksize asked for: the one that pruning would give this layer}.
        sparse_ms: {blocksize asked for: {sparsity: the sparse kernels}}.
        break_even: {blocksize asked for: the sparsity from which on the kernels are faster than the dense layer; 0
            where they always are, None where they never are}.
        calls: of this layer in one training step.
        reason: why nothing can be predicted, or None.
    """

    name: str
    shape: tuple[int, int]
    dense_ms: float | None = None
    blocksizes: Mapping[Blocksize, Blocksize] = field(default_factory=dict)
    sparse_ms: Mapping[Blocksize, Mapping[float, float]] = field(default_factory=dict)
    break_even: Mapping[Blocksize, float | None] = field(default_factory=dict)
    calls: tuple[LayerCall, ...] = ()
    reason: str | None = None


def advise(
    model: nn.Module,
    example: Any,
    *,
    blocksizes: Sequence[Blocksize] = ((1, 1), (4, 1), (8, 8), (16, 16)),
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    table: Table | None = None,
) -> list[LayerAdvice]:
    """Predict what each Linear and Conv2d of ``model`` takes in a training step, dense and sparse.

    Args:
        model: a dense model. It runs once on the example, in evaluation mode, and is left as it was.
        example: a batch of the size that matters: what the model is called with, or a tuple of it.
        blocksizes: to be compared, each adjusted to every layer as pruning does it.
        sparsities: fractions removed, in [0, 1).
        table: coefficients of the cost model; by default those of this machine (``sparsekern calibrate``), or else
            those that come with the package.

    Returns:
        A row for each layer that can be sparse, in the model's order.

    Raises:
        TypeError: ``model`` is no module, ``blocksizes`` no sequence of pairs of integers, ``sparsities`` none
            of numbers.
        ValueError: a blocksize below 1, a sparsity outside [0, 1), none of either; an example that the model cannot be
            called with.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    blocksizes = _listed("blocksizes", blocksizes, "pairs such as [(8, 8)]", lambda pair: not isinstance(pair, int))
    for i, blocksize in enumerate(blocksizes):
        check_blocksize(f"blocksizes[{i}]", blocksize)
    sparsities = _listed("sparsities", sparsities, "numbers such as [0.9]", lambda number: isinstance(number, Real))
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsities must be fractions removed, in [0, 1), got {sparsity}")
    own = {asked: pruned_blocksizes(model, asked) for asked in blocksizes}
    calls = recorded_calls(model, example)
    table = table or current()
    rows = []
    for name, layer in convertible(model)[0].items():
        rows_columns = weight_matrix(layer.weight).shape
        shape = (rows_columns[0], rows_columns[1])
        reason = unmodelled(layer) or (None if layer in calls else "the model did not call it")
        if reason:
            rows.append(LayerAdvice(name, shape, reason=reason))
        else:
            by_asked = {asked: own[asked][name] for asked in blocksizes}
            rows.append(_predicted(name, shape, calls[layer], by_asked, sparsities, table))
    return rows


def _listed(name: str, given: Any, of: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    """``given`` as a tuple, if it is a sequence of what ``fits``, at least one."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a sequence of {of}, got {given!r}")
    found = tuple(given)
    if not all(map(fits, found)):
        raise TypeError(f"{name} must be a sequence of {of}, got {given!r}")
    if not found:
        raise ValueError(f"{name} must hold at least one of {of}, got none")
    return found


def _predicted(
    name: str,
    shape: tuple[int, int],
    calls: Sequence[LayerCall],
    blocksizes: Mapping[Blocksize, Blocksize],
    sparsities: Sequence[float],
    table: Table,
) -> LayerAdvice:
    dense = 1e3 * sum(table.predict(call.work.dense(call.products)) for call in calls)
    times, even = {}, {}
    for asked, blocksize in blocksizes.items():

        def sparse(sparsity: float, blocksize: Blocksize = blocksize) -> float:
            terms = (call.work.sparse(blocksize, 1 - sparsity, call.products) for call in calls)
            return 1e3 * sum(table.predict(of_call) for of_call in terms)

        times[asked] = {sparsity: sparse(sparsity) for sparsity in sparsities}
        even[asked] = _break_even(sparse, dense)
    return LayerAdvice(name, shape, dense, dict(blocksizes), times, even, tuple(calls))


def _break_even(sparse: Callable[[float], float], dense: float) -> float | None:
    """The least sparsity at which ``sparse`` takes no longer than ``dense``: by bisection, as its time only falls."""
    low, high = 0.0, 1.0
    if sparse(low) <= dense:
        return low
    if sparse(high) > dense:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if sparse(middle) > dense else (low, middle)
    return high
