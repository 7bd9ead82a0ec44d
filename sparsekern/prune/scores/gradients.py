"""Running a model for the sake of its gradients, and leaving no trace: what all scores share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...eligible import convertible

LossFn = Callable[[Any, Any], Tensor]
Batches = Iterable[Any]
Scores = dict[str, Tensor]


def prunable(model: nn.Module) -> tuple[dict[str, nn.Linear | nn.Conv2d], dict[str, str]]:
    """The layers of ``model`` that can be sparse, at least one, and why others cannot; see :func:`convertible`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers, skipped = convertible(model)
    if not layers:
        why = "".join(f"; {name!r}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"model has no nn.Linear or nn.Conv2d that can be sparse{why}")
    return layers, skipped


def scored_parameters(model: nn.Module, biases: bool = False) -> dict[str, Tensor]:
    """{parameter name: detached weight} of each layer that can be sparse, and of its bias where ``biases``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no layer that can be sparse.
    """
    layers, _ = prunable(model)
    found = {parameter_name(name, "weight"): layer.weight.detach() for name, layer in layers.items()}
    if biases:
        found |= {
            parameter_name(name, "bias"): layer.bias.detach()
            for name, layer in layers.items()
            if layer.bias is not None
        }
    return found


def parameter_name(layer: str, kind: str) -> str:
    """The name of a layer's weight or bias as in ``model.named_parameters()``."""
    return f"{layer}.{kind}".removeprefix(".")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Callable[[Mapping[str, Tensor], Any], Any]]:
    """``call(tensors, input)`` runs the model with those tensors in place of its own of the same names.

    Whatever a call does to buffers, gradients and random states is undone, also when it raises.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("scores need gradients: call this outside torch.inference_mode()")
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def call(tensors: Mapping[str, Tensor], inputs: Any) -> Any:
        return torch.func.functional_call(model, {**buffers, **tensors}, (inputs,))

    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield call


def summed_gradients(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: LossFn,
    *,
    absolute: bool = False,
) -> Scores:
    """∂L/∂t of each of ``tensors``, which stand in for parameters of the model, summed over the batches.

    One layer's gradient exists at a time beside the sums, which are float32 or wider.

    Args:
        absolute: sum absolute values.

    Raises:
        TypeError, ValueError: a batch or loss that is none; no batch.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    # Detached copies share the storage but have their own requires_grad, so frozen weights are scored as well.
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    sums = {name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in leaves.items()}

    def add(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        sums[name] += leaf.grad.abs() if absolute else leaf.grad
        leaf.grad = None

    handles = [leaf.register_post_accumulate_grad_hook(partial(add, name)) for name, leaf in leaves.items()]
    try:
        with undisturbed(model) as call:
            for inputs, target in pairs(batches):
                loss = checked(loss_fn(call(leaves, inputs), target))
                loss.backward(inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
    return sums


def pairs(batches: Batches) -> Iterator[tuple[Any, Any]]:
    """The (input, target) pairs of ``batches``, which may be one such pair; at least one."""
    if isinstance(batches, tuple | list) and len(batches) == 2 and isinstance(batches[0], Tensor):
        batches = [batches]
    none = True
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise TypeError(f"batches must hold (input, target) pairs, got {type(batch).__name__}{size}")
        none = False
        yield batch[0], batch[1]
    if none:
        raise ValueError("batches must hold at least one (input, target) pair, got none")


def checked(loss: Any) -> Tensor:
    """``loss``, if it is a scalar with a gradient."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on the model's weights, got one without gradient")
    return loss
