"""How much the loss depends on each connection: SNIP's connection sensitivity, and its mean over blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.pattern import tile
from sparsekern.weights import weight_matrix

LossFn = Callable[[Any, Any], Tensor]
Batches = Iterable[Any]


def connection_sensitivity(
    model: nn.Module,
    layers: dict[str, nn.Linear | nn.Conv2d],
    batches: Batches,
    loss_fn: LossFn,
    *,
    biases: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """|w·∂L/∂w| of every weight (and bias) of ``layers``, divided by the sum over all of them.

    Gradients are summed with their signs over the batches; the absolute value comes last. The model runs in the mode it
    is in: ``model.eval()`` before makes batch norm an identity at initialisation, as in the authors' code. Gradients,
    buffers, modes, ``requires_grad`` and random states are as before afterwards, whatever happens in between.

    Source: Lee, Ajanthan & Torr, "SNIP", ICLR 2019, equations 4 to 6.

    Args:
        model: the model to run.
        layers: {module name: nn.Linear or nn.Conv2d of ``model``} to score.
        batches: (input, target) pairs, or one such pair, on the model's device.
        loss_fn: ``loss_fn(model(input), target)`` is a scalar tensor.
        biases: score biases too.

    Returns:
        ({module name: [rows, columns]}, {module name: [rows]}), scores of the weights in their matrix view and of the
        biases (empty unless ``biases``), float64 on the CPU.

    Raises:
        ValueError: no batch, a loss that is no scalar or does not depend on the weights, a score that is not finite
            (the layer is named), or scores that are all zero.
        TypeError: a batch that is no (input, target) pair, a loss that is no tensor.
    """
    # Detached copies share the storage but have their own requires_grad, so frozen weights are scored as well.
    tensors = {(name, "weight"): layer.weight for name, layer in layers.items()}
    if biases:
        tensors |= {(name, "bias"): layer.bias for name, layer in layers.items() if layer.bias is not None}
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    swapped = {".".join(filter(None, key)): leaf for key, leaf in leaves.items()}
    swapped |= {name: buffer.clone() for name, buffer in model.named_buffers()}

    sums = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves.values()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        count = 0
        for inputs, target in _pairs(batches):
            loss = loss_fn(torch.func.functional_call(model, swapped, (inputs,)), target)
            _check_loss(loss)
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient
            count += 1
    if not count:
        raise ValueError("batches must hold at least one (input, target) pair, got none")

    scores = {
        key: (leaf.detach().to("cpu", torch.float64) * total.to("cpu", torch.float64)).abs()
        for (key, leaf), total in zip(leaves.items(), sums, strict=True)
    }
    for (name, kind), score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(f"{kind} of layer {name!r} has scores that are not finite: check loss, data and weights")
    total_score = sum(float(score.sum()) for score in scores.values())
    if not 0 < total_score < float("inf"):
        raise ValueError(f"scores must have a positive, finite sum to be compared, got {total_score}")
    weights = {name: weight_matrix(scores[name, "weight"] / total_score) for name in layers}
    return weights, {name: scores[name, "bias"] / total_score for name in layers if (name, "bias") in scores}


def block_means(matrix: Tensor, blocksize: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean of ``matrix`` [rows, columns] over each block, and each block's number of entries; an overhang is no entry.

    Returns:
        (means, sizes), both [block_rows, block_cols]; sizes is int64.
    """
    sizes = tile(torch.ones(matrix.shape, dtype=torch.int64), blocksize).sum((2, 3))
    return tile(matrix, blocksize).sum((2, 3)) / sizes, sizes


def _pairs(batches: Batches) -> Iterator[tuple[Any, Any]]:
    if isinstance(batches, tuple | list) and len(batches) == 2 and isinstance(batches[0], Tensor):
        batches = [batches]
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise TypeError(f"batches must hold (input, target) pairs, got {type(batch).__name__}{size}")
        yield batch[0], batch[1]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on the model's weights, got one without gradient")
