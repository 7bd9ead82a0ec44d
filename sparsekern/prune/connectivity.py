"""Which weights lie on a path from input to output, and moving those that do not: effective sparsity.

Source: Vysogorets & Kempe, "Connectivity matters: neural network pruning through the lens of effective sparsity", JMLR
2023; the flow along all paths at once is that of SynFlow (Tanaka et al., 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..eligible import convertible, evaluating, fitting_layers
from ..pattern import BlockPattern, tile
from ..weights import weight_from_matrix, weight_matrix
from .arguments import checked_scores
from .patterns import Patterns
from .placement import cpu_generator, drawn_order
from .scores.gradients import Scores, parameter_name, undisturbed

# Modules that pass a signal on or, as far as paths go, leave it as it is.
_PASSING = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Softplus, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.LogSoftmax, nn.Dropout,
    nn.Dropout2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.Softmin, nn.LogSigmoid, nn.Identity,
)  # fmt: skip
# What an absent block weighs while looking for a place: paths that need fewer of them are better by this factor.
LEAK = 1e-6


@dataclass(frozen=True)
class LayerConnectivity:
    """One layer: weights, those kept, those of them on a path, and the outputs and inputs that no path passes.

    A layer has collapsed when no path passes it at all.
    """

    weights: int
    kept: int
    effective: int
    dead_outputs: tuple[int, ...]
    dead_inputs: tuple[int, ...]

    @property
    def collapsed(self) -> bool:
        return self.effective == 0


class Connectivity(dict[str, LayerConnectivity]):
    """{module name: LayerConnectivity} of the layers in the patterns."""

    @property
    def effective_sparsity(self) -> float:
        """Fraction of the weights of all layers that is removed or on no path from input to output."""
        return 1 - sum(layer.effective for layer in self.values()) / sum(layer.weights for layer in self.values())

    @property
    def collapsed(self) -> list[str]:
        """Names of the layers that no path passes."""
        return [name for name, layer in self.items() if layer.collapsed]

    def __str__(self) -> str:
        lines = [f"effective sparsity {self.effective_sparsity:.4%}"]
        for name, layer in self.items():
            lost = f", {layer.kept - layer.effective} of them on no path" if layer.effective < layer.kept else ""
            dead = f"; dead: {len(layer.dead_outputs)} outputs, {len(layer.dead_inputs)} inputs"
            lines.append(
                f"{name}: {layer.kept} of {layer.weights} weights kept{lost}{dead}{', COLLAPSED' * layer.collapsed}"
            )
        return "\n".join(lines)


def connectivity(model: nn.Module, patterns: Mapping[str, BlockPattern], image_shape: Sequence[int]) -> Connectivity:
    """Which of the kept weights lie on a path from an input to an output. Changes nothing.

    The model runs once, in evaluation mode and float64, on ones, with 1 for every kept weight and every other parameter
    and no biases; modules of activation, normalisation and dropout pass their input on, max pooling takes means.
    Networks that do other than that (attention, differences, products of activations, normalisation by functions) are
    not covered.

    Args:
        model: dense.
        patterns: {module name: BlockPattern} of its layers; layers that are not named are whole.
        image_shape: of one example, such as (1, 28, 28).

    Raises:
        ValueError: there are no patterns, or they name what is no layer, or do not fit it.
    """
    masks = _masks(model, patterns)
    flow = _flow(model, masks, image_shape)
    found = Connectivity()
    for name, pattern in patterns.items():
        on_path = (flow[name] > 0) & (masks[name] > 0)
        found[name] = LayerConnectivity(
            on_path.numel(),
            pattern.nnz,
            int(on_path.sum()),
            tuple((~on_path.any(1)).nonzero().flatten().tolist()),
            tuple((~on_path.any(0)).nonzero().flatten().tolist()),
        )
    return found


def reconnect(
    model: nn.Module,
    patterns: Mapping[str, BlockPattern],
    image_shape: Sequence[int],
    scores: Scores | None = None,
    generator: torch.Generator | None = None,
) -> Patterns:
    """Move blocks that are on no path to where they are. Changes nothing; as many blocks in every layer as before.

    Layer by layer, in the order of ``patterns``, blocks of which no weight is on a path go to places where one needs
    the fewest further blocks, drawn there in proportion to their scores with even rows; up to three times over. A layer
    without any block gets none: give it one with ``min_blocks``.

    Args:
        model, patterns, image_shape: as in :func:`connectivity`.
        scores: {parameter name: scores}, not negative; all alike by default.
        generator: CPU generator; a fresh one with seed 0 by default.

    Raises:
        ValueError: as :func:`connectivity`; scores that are missing, of another shape, negative or not finite.
    """
    generator = cpu_generator(generator)
    masks = _masks(model, patterns)
    likelies: dict[str, Tensor] = {}
    if scores is not None:
        likelies, _ = checked_scores(fitting_layers(model, patterns), scores)
        for name, likely in likelies.items():
            if bool((likely < 0).any()):
                raise ValueError(f"scores[{parameter_name(name, 'weight')!r}] must not be negative")
    result = dict(patterns)
    for _ in range(3):
        moved = 0
        for name, pattern in patterns.items():
            kept = result[name].to_mask().cpu()
            on_path = tile((_flow(model, masks, image_shape)[name] > 0) & (masks[name] > 0), pattern.blocksize)
            idle = kept & ~on_path.flatten(2).any(-1)
            if not bool(idle.any()):
                continue
            leaking = {other: mask + LEAK * (mask == 0) for other, mask in masks.items()}
            reach = tile(_flow(model, leaking, image_shape)[name], pattern.blocksize).flatten(2).amax(-1)
            # How many blocks a path is short of: whole powers of the leak.
            reach = (reach.clamp_min(1e-300).log() / -torch.tensor(LEAK, dtype=torch.float64).log()).round()
            likely = torch.ones(pattern.grid, dtype=torch.float64)
            if scores is not None:
                likely = tile(weight_matrix(likelies[name]), pattern.blocksize).flatten(2).mean(-1)
            order = drawn_order(likely, generator)
            order = order[reach.flatten()[order].argsort(descending=True, stable=True)]
            stays = kept & ~idle
            places = order[~stays.flatten()[order]][: int(idle.sum())]
            mask = stays.flatten()
            mask[places] = True
            moved += int((mask.view_as(kept) & ~kept).sum())
            result[name] = BlockPattern.from_mask(mask.view_as(kept), pattern.blocksize, pattern.shape)
            masks[name] = result[name].to_element_mask().double()
        if not moved:
            break
    devices = {name: pattern.device for name, pattern in patterns.items()}
    result = {name: pattern.to(devices[name]) for name, pattern in result.items()}
    return Patterns(result, getattr(patterns, "requested", None), getattr(patterns, "drop_bias", frozenset()))


def _masks(model: nn.Module, patterns: Mapping[str, BlockPattern]) -> dict[str, Tensor]:
    """1 for every kept weight, 0 elsewhere, as float64 matrices, for all layers of the model."""
    if not patterns:
        raise ValueError("patterns must hold the pattern of a layer")
    fitting_layers(model, patterns)
    masks = {}
    for name, layer in convertible(model)[0].items():
        whole = torch.ones(weight_matrix(layer.weight).shape)
        masks[name] = (patterns[name].to_element_mask().cpu() if name in patterns else whole).double()
    return masks


def _flow(model: nn.Module, masks: Mapping[str, Tensor], image_shape: Sequence[int]) -> dict[str, Tensor]:
    """For every weight, kept or not: positive where its input is reached and its output reaches the network's."""
    layers, _ = convertible(model)
    device = next(iter(layers.values())).weight.device
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            # Ones, whatever a parameter is: weights of both signs would let paths cancel.
            tensors[name] = torch.full_like(tensor, 0 if name.endswith("bias") else 1, dtype=torch.float64)
    leaves = {}
    for name, layer in layers.items():
        # Means over what is kept, so that no sum overflows.
        mask = masks[name] / masks[name].sum(1, keepdim=True).clamp_min(1)
        leaves[name] = weight_from_matrix(mask, layer.weight.shape).to(device).requires_grad_()
        tensors[parameter_name(name, "weight")] = leaves[name]

    def passing(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return inputs[0]

    def mean(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(module, nn.AdaptiveMaxPool2d):
            return F.adaptive_avg_pool2d(inputs[0], module.output_size)
        return F.avg_pool2d(inputs[0], module.kernel_size, module.stride, module.padding, module.ceil_mode)

    handles = [m.register_forward_hook(passing) for m in model.modules() if isinstance(m, _PASSING)]
    handles += [
        m.register_forward_hook(mean) for m in model.modules() if isinstance(m, nn.MaxPool2d | nn.AdaptiveMaxPool2d)
    ]
    ones = torch.ones(1, *image_shape, dtype=torch.float64, device=device)
    try:
        with evaluating(model), undisturbed(model) as call:
            out = call(tensors, ones).sum()
            gradients = torch.autograd.grad(out, list(leaves.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: torch.zeros_like(masks[name]) if g is None else weight_matrix(g).cpu()
        for name, g in zip(leaves, gradients, strict=True)
    }
