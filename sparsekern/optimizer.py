"""What a change of layers means for an optimizer: parameters swapped, state gathered, forgotten optimizers stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary


class Swap(NamedTuple):
    """One Parameter that leaves a model and what takes its place."""

    layer: str
    old: Tensor
    new: Tensor | None  # None: a bias that is dropped
    convert: Callable[[Tensor], Tensor]  # takes a tensor shaped like old to one shaped like new
    old_name: str  # "weight", "values" or "bias", the last part of its name
    new_name: str


def check_state(optimizer: Optimizer, swaps: Iterable[Swap]) -> None:
    """Raise unless the state of every swapped parameter can follow it: scalars, or tensors of the parameter's shape.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: some state is neither (factored moments, histories of directions), named with its layer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    for swap in swaps:
        for key, entry in optimizer.state.get(swap.old, {}).items():
            scalar = entry is None or isinstance(entry, (bool, int, float))
            if isinstance(entry, Tensor):
                scalar = entry.dim() == 0
                if entry.shape == swap.old.shape:
                    continue
            if not scalar:
                what = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
                raise ValueError(
                    f"optimizer state {key!r} of {swap.layer!r} ({what}) is neither a scalar nor shaped as its "
                    f"{swap.old_name} {tuple(swap.old.shape)}: it cannot follow the layer; make a new optimizer"
                )


def swap_parameters(optimizer: Optimizer, swaps: Iterable[Swap]) -> None:
    """Put the new parameters where the old ones stood, with their state; groups, options and orders stay."""
    by_old = {id(swap.old): swap for swap in swaps}
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        kept = [
            (parameter, name) if swap is None else (swap.new, _renamed(name, swap))
            for parameter, name in zip(group["params"], names, strict=True)
            if (swap := by_old.get(id(parameter))) is None or swap.new is not None
        ]
        # In place: some optimizers (LBFGS) keep the list itself.
        group["params"][:] = [parameter for parameter, _ in kept]
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in kept]
    entries = list(optimizer.state.items())
    optimizer.state.clear()
    for parameter, state in entries:
        swap = by_old.get(id(parameter))
        if swap is None:
            optimizer.state[parameter] = state
        elif swap.new is not None:
            optimizer.state[swap.new] = {key: _follow(entry, swap) for key, entry in state.items()}


def forbid(replaced: Iterable[tuple[str, Tensor]]) -> None:
    """From now on a step of any optimizer that still holds one of these (name, Parameter) raises RuntimeError.

    Without it the step would change a tensor that no layer reads: training would go on and do nothing.
    """
    _install_guard()
    for name, parameter in replaced:
        _replaced[parameter] = name


def allow(parameters: Iterable[Tensor]) -> None:
    """Undo :func:`forbid` for parameters that are in use again."""
    for parameter in parameters:
        _replaced.pop(parameter, None)


# Held weakly: an entry goes with its Parameter.
_replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()


@cache
def _install_guard() -> None:
    register_optimizer_step_pre_hook(_guard)


def _guard(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _replaced:
        return
    held = [_replaced[p] for group in optimizer.param_groups for p in group["params"] if p in _replaced]
    if held:
        raise RuntimeError(
            f"this optimizer still holds parameters that a conversion replaced ({', '.join(held)}): its step would "
            "change nothing. Give it to sparsify_ or densify_ as optimizer=, or make it after the conversion"
        )


def _follow(entry: Any, swap: Swap) -> Any:
    if not isinstance(entry, Tensor) or entry.shape != swap.old.shape:
        return entry
    with torch.no_grad():
        return swap.convert(entry)


def _renamed(name: str, swap: Swap) -> str:
    return name.removesuffix(swap.old_name) + swap.new_name if name.endswith(swap.old_name) else name
