"""Whole pruned networks for inference, packed and fused: :func:`freeze`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .program import pack
from .trace import trace

__all__ = ["FrozenModel", "freeze"]

if not ops.CPU_KERNELS_MISSING:

    @torch.library.register_fake("sparsekern::frozen")
    def _fake(input: Tensor, program: Tensor, constants: Tensor, shape: list[int]) -> Tensor:
        return input.new_empty((input.shape[0], *shape))


class FrozenModel:
    """A model packed by :func:`freeze`: call it as the model, with any batch size. It has no parameters, no gradients.

    It can be pickled and copied; what was pickled under another instruction set or version says so when called.
    """

    def __init__(
        self, program: Tensor, constants: Tensor, input_shape: tuple[int, ...], output_shape: tuple[int, ...],
        multiply_adds: int, tail: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self._program, self._constants = program, constants
        self._tail = tail
        self.input_shape, self.output_shape = input_shape, output_shape
        self.multiply_adds = multiply_adds

    def __call__(self, x: Tensor) -> Tensor:
        """[N, *input_shape] -> [N, *output_shape].

        Raises:
            TypeError, ValueError: ``x`` is of another shape, dtype or device, or requires grad while gradients are on.
        """
        constants = self._constants
        if not (
            isinstance(x, Tensor) and x.dtype is constants.dtype and x.is_cpu
            and x.layout is torch.strided and x.shape[1:] == self.input_shape
        ):  # fmt: skip
            raise self._refusal(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x requires grad, but a frozen model has no gradients: use the model itself, or torch.no_grad()"
            )
        y: Tensor = torch.ops.sparsekern.frozen(x, self._program, constants, self.output_shape)
        return y if self._tail is None else self._tail(y)

    def _refusal(self, x: Any) -> Exception:
        if not isinstance(x, Tensor):
            return TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            return TypeError(f"x must be a dense (strided) tensor, got {x.layout}")
        if x.dtype != self._constants.dtype:
            return TypeError(f"x must be {self._constants.dtype}, which the model was frozen for, got {x.dtype}")
        if not x.is_cpu:
            return ValueError(f"x must be on the CPU, got {x.device}")
        return ValueError(f"x must have shape {self._shape()}, got {tuple(x.shape)}")

    def _shape(self) -> str:
        return f"[N, {', '.join(map(str, self.input_shape))}]"

    def __repr__(self) -> str:
        return (
            f"FrozenModel({self._shape()} -> [N, {', '.join(map(str, self.output_shape))}], "
            f"{self._constants.dtype}, {self.multiply_adds:,} multiply-adds per sample)"
        )


@torch.no_grad()
def freeze(model: nn.Module, example: Tensor) -> FrozenModel:
    """Pack ``model`` for inference on the CPU: one call for the whole network, activations in the kernels' own layout.

    Weights are packed once, biases, batch norm, ReLU, residuals and pools are fused, and a tile of the batch goes
    through all layers while it is in the cache. The result does not follow later updates of ``model``. It is made for
    batches of 8 samples (AVX2, float32) and more: samples fill the lanes of vectors, and fewer leave lanes idle.

    Args:
        model: in evaluation mode (``model.eval()``) where it holds batch norms or dropout. A chain (or sum of chains)
            of sparse and dense linear and convolution layers, batch norm, ReLU, max and average pools, flatten,
            dropout; a softmax or log_softmax may come last.
        example: an input on the CPU, float32 or float64 as the parameters are. It sets all sizes but the batch's.

    Returns:
        A callable with the results of ``model``, up to rounding; contiguous ones, whatever the model's memory format.

    Raises:
        TypeError, ValueError: an unfitting argument, or a part of the model that is not supported; it is named.
        RuntimeError: no kernels are built.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor) or example.layout != torch.strided:
        raise TypeError(f"example must be a dense (strided) tensor, got {type(example).__name__}")
    if example.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"example must be float32 or float64, got {example.dtype}")
    for name, tensor in (("example", example), *model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype != example.dtype:
            raise TypeError(f"example must have the dtype of {name}, {tensor.dtype}, got {example.dtype}")
    if example.dim() < 2 or example.numel() == 0:
        raise ValueError(f"example must have shape [N, ...] and hold at least one sample, got {tuple(example.shape)}")
    if ops.CPU_KERNELS_MISSING:
        raise RuntimeError(f"freeze needs the compiled kernels: {ops.CPU_KERNELS_MISSING}")
    network, shape, tail = trace(model, example)
    program, constants = pack(network, example.dtype, torch.ops.sparsekern.cpu_vector_bytes())
    return FrozenModel(program, constants, tuple(example.shape[1:]), tuple(shape[1:]), network.multiply_adds, tail)
