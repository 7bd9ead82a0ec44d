"""Which layers of a model can become sparse, and why the others cannot; and how to call one on an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .pattern import BlockPattern
from .weights import weight_matrix

# Layers with a weight that a reader of the report would look for. Embeddings and norms nobody expects there.
_WEIGHTED = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def convertible(model: nn.Module) -> tuple[dict[str, nn.Linear | nn.Conv2d], dict[str, str]]:
    """The layers of ``model`` that can become sparse, and the reason for each linear or convolution that cannot.

    Only exact ``nn.Linear`` and ``nn.Conv2d`` in plain use can: what a subclass, a parametrisation or a module that
    reads its child's weight does with a weight is not known here.

    Returns:
        ({name: layer}, {name: reason}), names as in ``model.named_modules()``, in its order. A layer that stands under
        several names is in the second under each of them.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    reasons: dict[str, str] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules:
        names.setdefault(module, []).append(name)
    tied = _tied_weights(model)
    outputs_of_attention = {
        module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }  # fmt: skip
    for name, module in modules:
        if not isinstance(module, _WEIGHTED):
            continue
        others = [other for other in names[module] if other != name]
        if module in outputs_of_attention:
            reasons[name] = "MultiheadAttention reads the weight of its out_proj instead of calling it"
        elif others:
            reasons[name] = f"one module under several names, also {', '.join(others)}"
        elif (reason := why_not(module)) is not None:
            reasons[name] = reason
        elif isinstance(module.weight, Tensor) and _place(module.weight) in tied:
            with_names = [other for other in tied[_place(module.weight)] if other != f"{name}.weight".lstrip(".")]
            reasons[name] = f"its weight is tied to {', '.join(with_names)}"
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            layers[name] = module
    return layers, reasons


def why_not(module: nn.Module) -> str | None:
    """Why ``module``, seen by itself, cannot become sparse; None if it can."""
    if parametrize.is_parametrized(module):
        return "it is parametrised (torch.nn.utils.parametrize)"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: run a batch through the model first"
    if type(module) not in (nn.Linear, nn.Conv2d):
        kind = type(module).__name__
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            return f"it is a {kind}, a subclass; only exact nn.Linear and nn.Conv2d convert"
        return f"it is a {kind}; only nn.Linear and nn.Conv2d convert"
    if reason := _hook_reason(module):
        return reason
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is not a plain Parameter but {type(getattr(module, 'weight', None)).__name__}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    held = (*module._parameters, *module._buffers, *module._modules)
    extra = [name for name in held if name not in ("weight", "bias")]
    if extra:
        return f"it holds more than weight and bias: {', '.join(extra)}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode is {module.padding_mode!r}; only 'zeros' is supported"
    return None


def _hook_reason(module: nn.Module) -> str | None:
    """Reasons that show as names or hooks on a layer of the right type."""
    parameters, buffers = module._parameters, module._buffers
    if any(f"{name}_mask" in buffers and f"{name}_orig" in parameters for name in ("weight", "bias")):
        return "it is pruned (torch.nn.utils.prune): prune.remove it first"
    if "weight_g" in parameters:
        return "it is weight-normed (torch.nn.utils.weight_norm)"
    if "weight_orig" in parameters:
        return "it is spectral-normed (torch.nn.utils.spectral_norm)"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    hooks = (
        module._state_dict_hooks, module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks,
    )  # fmt: skip
    if any(hooks):
        return "it has state_dict hooks, which may expect a weight"
    return None


def call_with_example(model: nn.Module, *example: Any) -> Any:
    """``model(*example)``; what it raises becomes a ValueError that names the argument ``example``."""
    try:
        return model(*example)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kinds = [
            f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in example
        ]  # fmt: skip
        raise ValueError(
            f"example must be what the model can be called with, got {', '.join(kinds)}; the model says: {error}"
        ) from error


def fitting_layers(model: nn.Module, patterns: Mapping[str, BlockPattern]) -> dict[str, nn.Linear | nn.Conv2d]:
    """{name: dense layer} of every pattern.

    Raises:
        TypeError: a pattern that is no BlockPattern.
        ValueError: a name that is no layer that can be sparse, or a pattern of another shape than its layer's matrix.
    """
    layers, reasons = convertible(model)
    for name, pattern in patterns.items():
        if not isinstance(pattern, BlockPattern):
            raise TypeError(f"patterns must hold BlockPattern, got {type(pattern).__name__} for {name!r}")
        if name not in layers:
            raise ValueError(f"patterns names {name!r}: {reasons.get(name, 'no dense layer of the model')}")
        shape = tuple(weight_matrix(layers[name].weight).shape)
        if pattern.shape != shape:
            raise ValueError(f"the pattern of layer {name!r} must have shape {shape}, got {pattern.shape}")
    return {name: layers[name] for name in patterns}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, where running changes nothing; every module is put back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Equal for tensors that begin at the same element: one Parameter under two names, or two that share memory."""
    if nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" or tensor.numel() == 0:
        return torch.device("meta"), id(tensor)
    return tensor.device, tensor.data_ptr()


def _tied_weights(model: nn.Module) -> dict[tuple[torch.device, int], list[str]]:
    named = list(_named_tensors(model))
    counts = Counter(_place(tensor) for _, tensor in named)
    tied: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in named:
        if counts[_place(tensor)] > 1:
            tied.setdefault(_place(tensor), []).append(name)
    return tied
