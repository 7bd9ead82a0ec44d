"""Dense to sparse and back, in place: :func:`sparsify_` and :func:`densify_`, and the :class:`Report` they return."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import cost
from .cost.table import current
from .eligible import convertible
from .nn import SparseConv2d, SparseLayer, SparseLinear, ddp_ignore_
from .optimizer import Swap, check_state, forbid, swap_parameters
from .pattern import BlockPattern
from .weights import weight_from_matrix, weight_matrix

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """One converted layer. ``shape`` is that of the weight as a matrix, ``kept`` and ``weights`` count true weights."""

    name: str
    kind: str  # "linear" or "conv2d"
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    nnz_blocks: int
    kept: int
    weights: int
    bias: bool
    backend: str  # what runs: "cpu", "triton", "dense" or "reference"
    dead_outputs: int  # rows without a weight
    # Where "auto" has weighed the kernels against dense: the speed-up that it expects of a training step against
    # torch's dense layer, at the nominal batch of sparsekern.cost.choose.
    speedup: float | None = None
    why: str | None = None  # on a GPU, why "auto" has not chosen the sparse kernels

    @property
    def density(self) -> float:
        """Kept weights / weights."""
        return self.kept / self.weights if self.weights else 1.0


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        converted: one row per converted layer, in the model's order.
        left_out: {module name: reason} for every linear or convolution that was not converted.
    """

    converted: tuple[LayerReport, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the converted layers that was removed, in [0, 1]."""
        weights = sum(row.weights for row in self.converted)
        return 1 - sum(row.kept for row in self.converted) / weights if weights else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types, for JSON."""
        rows = [asdict(row) | {"density": row.density} for row in self.converted]
        return {"sparsity": self.sparsity, "converted": rows, "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "block", "kept", "density", "backend", "speed-up")
        rows = [
            (
                row.name, row.kind, "x".join(map(str, row.shape)), "x".join(map(str, row.blocksize)),
                f"{row.kept:,} of {row.weights:,}", f"{row.density:.2%}", row.backend,
                "-" if row.speedup is None else f"{row.speedup:.2f}x",
            )
            for row in self.converted
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in (header, *rows)]
        lines = ["  ".join(row).rstrip() for row in padded]
        lines.append(f"{len(rows)} converted, sparsity {self.sparsity:.2%}")
        lines += [
            f"{row.name}: {row.dead_outputs} of {row.shape[0]} outputs have no weight left, they are constant"
            for row in self.converted
            if row.dead_outputs
        ]
        for why in dict.fromkeys(row.why for row in self.converted if row.why):
            rows_so = [row for row in self.converted if row.why == why]
            lines.append(f"{', '.join(row.name for row in rows_so)}: {rows_so[0].backend}, not sparse kernels: {why}")
        if any(row.speedup is not None for row in self.converted):
            lines.append(
                f"speed-up: of a training step against torch's dense layer, with {cost.NOMINAL}, predicted by "
                f"{current().source()}"
            )
        if any(row.speedup is not None and row.speedup < 0.995 for row in self.converted):
            lines.append(
                'below 1x: backend="auto" runs the faster of the sparse kernels ("cpu") and of torch\'s product with a '
                'dense weight that the values are first written into ("dense"); a dense layer, which need not write '
                "them, is expected to be faster than both: where only time counts, leave it out of patterns"
            )
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def sparsify_(model: nn.Module, patterns: Mapping[str, BlockPattern], optimizer: Optimizer | None = None) -> Report:
    """Replace the layers named in ``patterns`` by sparse ones that keep their weights at the stored blocks, in place.

    Biases, dtype, device, training mode, ``requires_grad`` and hooks of a layer are kept (its bias is the same
    Parameter as before); gradients of its weight are not. A name in ``patterns.drop_bias``, where there is such a set,
    gives a layer without bias. The index buffers are kept out of DistributedDataParallel's broadcasts
    (:func:`sparsekern.nn.ddp_ignore_`), and TransformerEncoder layers that hold a sparse layer no longer take their
    fused evaluation path, which reads dense weights.

    Args:
        model: any module; its own root cannot be replaced.
        patterns: {name as in ``model.named_modules()``: BlockPattern}. Names of layers that cannot be sparse are left
            out, with the reason in the report.
        optimizer: where given, it goes on with the new parameters: same place, group and options, and each state tensor
            of the weight's shape (momentum, moments) gathered at the kept places. Use it with optimizers that treat
            weights one by one (SGD, Adam, ...). Where not, or for any other optimizer, a step while it still holds a
            replaced parameter raises RuntimeError.

    Returns:
        The report; every linear or convolution of the model is in it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, a layer that is sparse already, a pattern of another shape than its layer, or
            optimizer state that cannot follow. Nothing has changed then.
    """
    layers, left_out = _checked(model, patterns)
    drop_bias: frozenset[str] = getattr(patterns, "drop_bias", frozenset())
    sparse: dict[str, SparseLayer] = {}
    swaps = []
    for name, dense in layers.items():
        pattern = patterns[name].to(dense.weight.device)
        layer = _sparse_copy(dense, pattern)
        layer._parameters["bias"] = None if name in drop_bias else dense._parameters["bias"]
        sparse[name] = layer
        swaps.append(Swap(name, dense.weight, layer.values, partial(_gather, pattern), "weight", "values"))
        if layer.bias is None and dense.bias is not None and not _used_elsewhere(model, dense.bias, drop_bias):
            swaps.append(Swap(name, dense.bias, None, lambda state: state, "bias", ""))
    _replace(model, sparse, swaps, optimizer)
    return Report(tuple(_row(name, layer) for name, layer in sparse.items()), left_out)


def densify_(model: nn.Module, optimizer: Optimizer | None = None, *, names: Iterable[str] | None = None) -> Report:
    """Inverse of :func:`sparsify_`, in place: dense layers under the same names, 0 where no block was stored.

    Args:
        model: any module; its own root cannot be replaced.
        optimizer: as in :func:`sparsify_`; its state is 0 where no block was stored.
        names: which sparse layers (default: all).

    Returns:
        The report of the layers that were sparse.

    Raises:
        TypeError, ValueError: a name that is no sparse layer, the root itself, or optimizer state that cannot follow.
    """
    modules = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in modules if isinstance(module, SparseLayer)}
    wanted = list(found) if names is None else list(names)
    for name in wanted:
        if name not in found:
            raise ValueError(f"names holds {name!r}, which is no sparse layer of the model")
    if "" in wanted:
        raise ValueError("model is itself a sparse layer, which cannot be replaced in place: use model.to_dense()")
    dense: dict[SparseLayer, nn.Linear | nn.Conv2d] = {}  # by layer: one may stand under several names
    swaps = []
    for name in wanted:
        layer = found[name]
        if layer in dense:
            continue
        new = dense[layer] = cast("SparseLinear | SparseConv2d", layer).to_dense()
        new.bias = layer.bias
        convert = partial(_scatter, layer.pattern, new.weight.shape)
        swaps.append(Swap(name, layer.values, new.weight, convert, "values", "weight"))
    _replace(model, {name: dense[found[name]] for name in wanted}, swaps, optimizer)
    return Report(tuple(_row(name, found[name]) for name in wanted))


def _checked(
    model: nn.Module, patterns: Mapping[str, BlockPattern]
) -> tuple[dict[str, nn.Linear | nn.Conv2d], dict[str, str]]:
    """The layers to convert and the reasons for the rest, in the model's order; raises before anything has changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(patterns, Mapping):
        raise TypeError(f"patterns must be a mapping from module names to BlockPatterns, got {type(patterns).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    layers, reasons = convertible(model)
    for name, pattern in patterns.items():
        if not isinstance(pattern, BlockPattern):
            raise TypeError(
                f"patterns[{name!r}] must be a BlockPattern, got {type(pattern).__name__}; "
                "BlockPattern.from_dense(mask, blocksize) makes one of a mask of the weight"
            )
        if name not in modules:
            raise ValueError(f"patterns names {name!r}, which is no module of the model")
        if name == "":
            raise ValueError("patterns names the model itself, which cannot be replaced in place: use from_dense")
        if isinstance(modules[name], SparseLayer):
            raise ValueError(f"patterns names {name!r}, which is sparse already: densify_ it first")
        if name not in layers:
            reasons.setdefault(name, f"it is a {type(modules[name]).__name__}; only nn.Linear and nn.Conv2d convert")
        else:
            rows, *rest = layers[name].weight.shape
            shape = (rows, math.prod(rest))
            if pattern.shape != shape:
                raise ValueError(f"patterns[{name!r}] must have shape {shape} as its layer does, got {pattern.shape}")
    for name, module in modules.items():
        if name in layers and name not in patterns:
            reasons[name] = "not in patterns"
        elif isinstance(module, SparseLayer):
            reasons[name] = "it is sparse already"
    return (
        {name: layer for name, layer in layers.items() if name in patterns},
        {name: reasons[name] for name in modules if name in reasons},
    )


def _sparse_copy(dense: nn.Linear | nn.Conv2d, pattern: BlockPattern) -> SparseLayer:
    if isinstance(dense, nn.Linear):
        return SparseLinear.from_dense(dense, pattern)
    return SparseConv2d.from_dense(dense, pattern)


def _replace(model: nn.Module, layers: Mapping[str, nn.Module], swaps: list[Swap], optimizer: Optimizer | None) -> None:
    """The one place where the model changes; only the check of the optimizer, which comes first, can fail."""
    if optimizer is not None:
        check_state(optimizer, swaps)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if swaps and not any(id(swap.old) in held for swap in swaps):
            raise ValueError("optimizer holds no parameter of the layers to convert: is it another model's?")
        swap_parameters(optimizer, swaps)
    for name, layer in layers.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        old = parent._modules[child]
        for hooks in _HOOKS:
            # The dictionaries themselves, so that handles the user holds still remove their hooks.
            setattr(layer, hooks, getattr(old, hooks))
        parent._modules[child] = layer
    forbid((f"{swap.layer}.{swap.old_name}".lstrip("."), swap.old) for swap in swaps)
    ddp_ignore_(model)
    _sync_transformers(model)


def _sync_transformers(model: nn.Module) -> None:
    """Keep transformer encoders that hold sparse layers from their fused evaluation paths; the others have theirs.

    In evaluation without gradients, ``nn.TransformerEncoderLayer`` hands ``linear1.weight`` and ``linear2.weight`` to
    one fused op unless ``activation_relu_or_gelu`` is 0, and ``nn.TransformerEncoder`` feeds nested tensors to its
    layers if ``use_nested_tensor``. Both attributes are read for nothing else (torch 2.10 to 2.13).
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _park(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder):
            _park(module, "use_nested_tensor", False)


def _park(module: nn.Module, attribute: str, off: int | bool) -> None:
    parked = f"_sparsekern_{attribute}"
    sparse = any(isinstance(child, SparseLayer) for child in module.modules())
    if sparse and not hasattr(module, parked):
        setattr(module, parked, getattr(module, attribute))
        setattr(module, attribute, off)
    elif not sparse and hasattr(module, parked):
        setattr(module, attribute, getattr(module, parked))
        delattr(module, parked)


def _used_elsewhere(model: nn.Module, bias: Tensor, drop_bias: frozenset[str]) -> bool:
    """Whether a layer that keeps its bias has this very one."""
    return any(
        parameter is bias and name.removesuffix(".bias") not in drop_bias
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )


def _gather(pattern: BlockPattern, tensor: Tensor) -> Tensor:
    return pattern.gather(weight_matrix(tensor))


def _scatter(pattern: BlockPattern, weight_shape: torch.Size, tensor: Tensor) -> Tensor:
    return weight_from_matrix(pattern.scatter(tensor), weight_shape)


def _row(name: str, layer: SparseLayer) -> LayerReport:
    pattern = layer.pattern
    choice = layer._choice() if layer.backend == "auto" else None
    return LayerReport(
        name=name,
        kind="linear" if isinstance(layer, SparseLinear) else "conv2d",
        shape=pattern.shape,
        blocksize=pattern.blocksize,
        nnz_blocks=pattern.nnz_blocks,
        kept=pattern.nnz,
        weights=pattern.shape[0] * pattern.shape[1],
        bias=layer.bias is not None,
        backend=layer.runs,
        dead_outputs=pattern.dead_rows().numel(),
        speedup=choice.dense_layer / choice.seconds if choice and choice.dense_layer and choice.seconds else None,
        why=layer.why,
    )
