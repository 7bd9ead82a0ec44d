"""Orthogonal initialisation of dense layers, before they are pruned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsekern.eligible import convertible


@torch.no_grad()
def orthogonal_(model: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
    """Fill the weight of every nn.Linear and nn.Conv2d that can be sparse with an orthogonal matrix, its bias with 0.

    A conv weight [C_out, C_in/groups, kh, kw] counts as the matrix [C_out, C_in/groups*kh*kw], each group by itself.
    Rows are orthonormal where there are at least as many columns, else columns are; times ``gain``.

    Source: Saxe, McClelland & Ganguli, 2014, as SPP (ICLR 2020) initialises before pruning.

    Args:
        model: a dense model; layers that cannot be sparse are left alone.
        gain: factor on the weights.
        generator: for the draws, on the device of the weights; torch's default one if None.

    Raises:
        ValueError: the model has no such layer.
    """
    for layer in _layers(model, gain).values():
        for part in layer.weight.chunk(_groups(layer)):
            part.copy_(_orthogonal(part.flatten(1), generator).view(part.shape) * gain)
        _no_bias(layer)


@torch.no_grad()
def delta_orthogonal_(model: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
    """As :func:`orthogonal_`, but a conv weight is zero beside its middle tap, (kh // 2, kw // 2), which is orthogonal.

    A convolution of stride 1 that keeps its size then changes no norm where C_out >= C_in; where C_out < C_in the rows
    of the middle tap are orthonormal. Pruning by score keeps of such a layer the middle taps alone.

    Source: Xiao et al., "Dynamical isometry and a mean field theory of CNNs", ICML 2018, section 3.

    Args, raises: as :func:`orthogonal_`.
    """
    for layer in _layers(model, gain).values():
        for part in layer.weight.chunk(_groups(layer)):
            taps = part
            if isinstance(layer, nn.Conv2d):
                part.zero_()
                taps = part[:, :, part.shape[2] // 2, part.shape[3] // 2]
            taps.copy_(_orthogonal(taps, generator) * gain)
        _no_bias(layer)


@torch.no_grad()
def block_orthogonal_(model: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
    """As :func:`orthogonal_`, but convolutions become random orthogonal ones ("block convolution"), spread over taps.

    Circular convolution (stride 1) with the weight changes no norm where C_out >= C_in; where C_out < C_in its
    transpose changes none. With zero padding this holds but for the border.

    Source: Xiao et al., ICML 2018, algorithm 1 and appendix; after Kautsky and Turcajova, 1994.

    Args: as :func:`orthogonal_`.

    Raises:
        ValueError: the model has no layer that can be sparse, or a kernel that is not square. Nothing has changed then.
    """
    layers = _layers(model, gain)
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] != layer.kernel_size[1]:
            kh, kw = layer.kernel_size
            raise ValueError(f"layer {name!r} must have a square kernel, got {kh}x{kw}")
    for layer in layers.values():
        for part in layer.weight.chunk(_groups(layer)):
            draw = _orthogonal_kernel if isinstance(layer, nn.Conv2d) else _orthogonal
            part.copy_(draw(part, generator) * gain)
        _no_bias(layer)


def _orthogonal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """An orthogonal matrix of the shape and device of ``like``, in at least float32: torch has no QR in less."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return nn.init.orthogonal_(torch.empty_like(like, dtype=dtype), generator=generator)


def _orthogonal_kernel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """An orthogonal convolution of the shape [C_out, C_in, k, k] and device of ``like``, in at least float32."""
    outputs, inputs, k, _ = like.shape
    size = max(outputs, inputs)
    frame = _orthogonal(like.new_empty(outputs, inputs), generator)
    identity = torch.eye(size, dtype=frame.dtype, device=like.device)
    # [k, k, size, size], a matrix per tap: a product of k - 1 orthogonal 2x2 kernels along each axis.
    kernel = identity[None, None]
    for _ in range(k - 1):
        p, q = (_projection(identity, generator) for _ in range(2))
        p_rest, q_rest = identity - p, identity - q
        kernel = _convolved(kernel, ((p @ q, p @ q_rest), (p_rest @ q, p_rest @ q_rest)))
    taps = kernel @ frame if outputs >= inputs else frame @ kernel
    return taps.permute(2, 3, 0, 1)


def _projection(identity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Onto a random subspace of half the dimensions."""
    basis = _orthogonal(identity, generator)[: len(identity) // 2]
    return basis.T @ basis


def _convolved(kernel: Tensor, small: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """[k, k, n, n] by 2x2 matrices, a full convolution over taps with matrix products: [k + 1, k + 1, n, n]."""
    k, n = len(kernel), kernel.shape[-1]
    found = kernel.new_zeros(k + 1, k + 1, n, n)
    for a in range(2):
        for b in range(2):
            found[a : a + k, b : b + k] += kernel @ small[a][b]
    return found


def _layers(model: nn.Module, gain: float) -> dict[str, nn.Linear | nn.Conv2d]:
    if not math.isfinite(gain):
        raise ValueError(f"gain must be finite, got {gain}")
    layers, _ = convertible(model)
    if not layers:
        raise ValueError(
            "model has no nn.Linear or nn.Conv2d that can be sparse; sparse layers are filled before they are"
        )
    return layers


def _groups(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _no_bias(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.bias is not None:
        layer.bias.zero_()
