"""Drop-in sparse layers: :class:`SparseLinear` and :class:`SparseConv2d`, with torch's constructor arguments.

``values`` is an ordinary Parameter [nnz_blocks, bh, bw]; kernels read the indices from ``layer.pattern`` alone. The
buffers ``crow_indices`` and ``col_indices`` are a record of the pattern for ``state_dict``: nothing computes with them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from . import cost, dense, functional, triton
from .backend import BACKENDS, OF_CONVOLUTIONS, Backend, Runs, triton_missing
from .eligible import why_not
from .optimizer import forbid
from .pattern import BlockPattern
from .weights import weight_from_matrix, weight_matrix

Padding = int | tuple[int, int] | Literal["same", "valid"]

log = logging.getLogger("sparsekern")

INDEX_BUFFERS = ("crow_indices", "col_indices")


class SparseLayer(nn.Module):
    """What :class:`SparseLinear` and :class:`SparseConv2d` share; not for use by itself.

    Attributes:
        values: Parameter [nnz_blocks, bh, bw], contiguous, in the order of ``pattern.col_indices``. Entries of edge
            blocks that overhang the weight are 0 at first, get gradient 0 and are never read.
        bias: Parameter [outputs] or None.
        runs: "cpu", "triton", "dense" or "reference": ``backend`` itself, or what "auto" has chosen.
        why: on a GPU, why "auto" has not chosen the sparse kernels, None where it has, and on the CPU; of
            ``backend="triton"``, why this machine cannot run it, None where it can.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    runs: Runs
    why: str | None
    crow_indices: Tensor
    col_indices: Tensor

    # DistributedDataParallel overwrites buffers in place at every step and reads this list from the module it wraps:
    # here for a layer wrapped by itself, see ddp_ignore_ for models.
    _ddp_params_and_buffers_to_ignore = INDEX_BUFFERS

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        groups: int,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        pattern: BlockPattern,
        backend: Backend,
    ) -> None:
        super().__init__()
        matrix_shape = (weight_shape[0], math.prod(weight_shape[1:]))
        if not isinstance(pattern, BlockPattern):
            raise TypeError(f"pattern must be a BlockPattern, got {type(pattern).__name__}")
        if pattern.shape != matrix_shape:
            raise ValueError(f"pattern must have shape {matrix_shape} for a weight {weight_shape}, got {pattern.shape}")
        # What the plans of a convolution depend on besides the pattern; a linear layer has none.
        self._kernel = (weight_shape[2], weight_shape[3], groups) if len(weight_shape) == 4 else None
        self._check_backend(backend, pattern)
        self._backend = backend
        self.values = nn.Parameter(torch.empty(pattern.values_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(matrix_shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        for name in INDEX_BUFFERS:
            self.register_buffer(name, torch.empty(0, dtype=torch.int32))
        self._set_pattern(pattern)
        self.reset_parameters()

    @property
    def pattern(self) -> BlockPattern:
        """Which blocks exist, on the device of ``values``. Immutable; to change it, build another layer or load one."""
        return self._pattern

    @property
    def backend(self) -> Backend:
        """What is to compute: "cpu", "triton", "dense" or "reference" as in :func:`sparsekern.functional.bsr_linear`.


        Or "auto", which stands for what :func:`sparsekern.cost.choose` expects to be fastest for the layer's pattern,
        dtype and device, and is chosen anew whenever one of them changes.
        """
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._check_backend(backend, self._pattern)
        self._backend = backend
        self._choose()

    def _check_backend(self, backend: Backend, pattern: BlockPattern) -> None:
        known = OF_CONVOLUTIONS if self._kernel else BACKENDS
        if backend not in known:
            raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")
        # A dtype can change by .to(), blocks cannot.
        if backend == "triton" and (refused := triton.supports(pattern.blocksize, torch.float32)):
            raise ValueError(f"backend 'triton' has no kernel for this layer: {refused}")

    def reset_parameters(self) -> None:
        """Draw ``values`` and ``bias`` anew, as a masked dense layer would: uniform in ±1/sqrt(fan_in).

        This is torch's own init (``kaiming_uniform_(a=sqrt(5))``). fan_in is that of the dense weight, so the kept
        weights have the distribution they have after masking a fresh dense layer; the numbers drawn are others.
        """
        fan_in = self.pattern.shape[1]
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.values, -bound, bound)
        if self.values.device.type != "meta" and _overhangs(self.pattern):
            with torch.no_grad():
                self.values.masked_fill_(~self.pattern.edge_mask(), 0)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """``values`` and ``bias``, without nn.Module's slow attribute look-up where they are Parameters as usual."""
        parameters = self._parameters
        try:
            return cast("Tensor", parameters["values"]), parameters["bias"]
        except KeyError:  # pruned, or a replica of nn.DataParallel
            return self.values, self.bias

    def _set_pattern(self, pattern: BlockPattern) -> None:
        """Take ``pattern`` to the device of the values, plan its kernels, and write the record of it in the buffers."""
        device = self.values.device
        if device.type != "meta":
            pattern = pattern.to(device)
        self._pattern = pattern
        self._choose()
        for name in INDEX_BUFFERS:
            setattr(self, name, getattr(pattern, name).to(device))

    def _choice(self) -> cost.Choice:
        """What "auto" would choose, and why."""
        pattern, values = self._pattern, self.values
        return cost.choose(
            values.device.type, values.dtype, pattern.blocksize, pattern.shape, pattern.density, self._kernel
        )

    def _choose(self) -> None:
        self.why = None
        if self._backend == "auto":
            self.runs, self.why = self._choice()[:2]
        else:
            self.runs = self._backend
            self.why = triton_missing() if self.runs == "triton" else None
        # On the CPU, importing the package has said it.
        if self.why and self._backend == "auto" and self.values.device.type != "cpu":
            _say_once(self.runs, self.why)
        if self.values.device.type != "meta":
            self._prepared()

    def _prepared(self) -> tuple[Tensor, ...]:
        """The tensors that what runs reads beside the values; made, and kept on the pattern, where they are missing."""
        if self.runs == "dense":
            return (dense.positions(self._pattern, self._kernel),)
        if self.runs == "triton":
            # Where there are no kernels for the layer as it is now, its call says so; .to() must not.
            refused = triton.supports(self._pattern.blocksize, self.values.dtype)
            return () if refused else functional.prepare_triton(self._pattern)
        return functional.prepare(self._pattern, self._kernel)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)
        # fn has moved, and may have cast or (to_empty) left unwritten, the buffers: the pattern says what they hold.
        self._set_pattern(self._pattern)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_pattern(self._pattern)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            pattern = self._loaded_pattern(state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        if pattern != self._pattern:
            # Other weights, so another Parameter: what optimizers and graphs keep belongs to the old one, and an
            # optimizer that goes on with it raises.
            values = state_dict[prefix + "values"].detach()
            try:
                values = values.to(self.values, copy=True)  # before anything has changed, as it can fail
            except RuntimeError as error:
                error_msgs.append(f"{prefix}values cannot be copied: {error}")
                return
            old = self.values
            self.values = nn.Parameter(values.contiguous(), requires_grad=old.requires_grad)
            forbid([(f"{prefix}values", old)])
            self._set_pattern(pattern)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._set_pattern(self._pattern)

    def _loaded_pattern(self, state_dict: dict[str, Any], prefix: str) -> BlockPattern:
        """The pattern this layer has once it has loaded ``state_dict``: all of it is checked, nothing changed."""
        tensors = self._parameters | self._buffers
        own = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{prefix}{name} must be a tensor, got {type(tensor).__name__}")
        merged = own | given
        crow, col = (merged[name].to(self._pattern.device) for name in INDEX_BUFFERS)
        try:
            pattern = BlockPattern(crow, col, self._pattern.shape, self._pattern.blocksize)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{prefix}crow_indices, {prefix}col_indices, for blocks of {self._pattern.blocksize} as here: {error}"
            ) from error
        if pattern != self._pattern and not given.keys() >= {"values", *INDEX_BUFFERS}:
            raise ValueError(f"{prefix}values, crow_indices and col_indices must come together to change the pattern")
        check_values(merged["values"], pattern, f"{prefix}values")
        if "bias" in own and tuple(merged["bias"].shape) != pattern.shape[:1]:
            raise ValueError(f"{prefix}bias must have shape {pattern.shape[:1]}, got {tuple(merged['bias'].shape)}")
        return pattern

    def _take_weights(self, module: nn.Linear | nn.Conv2d) -> None:
        """Copy the kept weights, the bias and the flags of the dense ``module``."""
        with torch.no_grad():
            self.values.copy_(self.pattern.gather(weight_matrix(module.weight)))
            if self.bias is not None and module.bias is not None:
                self.bias.copy_(module.bias)
        _copy_flags(module, self, "weight", "values")

    def _give_weights(self, module: nn.Linear | nn.Conv2d) -> None:
        """Inverse of ``_take_weights``: ``module`` (on the meta device) gets real parameters."""
        with torch.no_grad():
            matrix = self.pattern.scatter(self.values)
            module.weight = nn.Parameter(weight_from_matrix(matrix, module.weight.shape))
            if self.bias is not None:
                module.bias = nn.Parameter(self.bias.clone())
        _copy_flags(self, module, "values", "weight")

    def _sparse_repr(self) -> str:
        text = f"blocksize={self.pattern.blocksize}, density={self.pattern.density:.4g}, backend={self.backend!r}"
        if not self.why:
            return text
        return f"{text} ({f'runs {self.runs}' if self._backend == 'auto' else 'cannot run here'}: {self.why})"


class SparseLinear(SparseLayer):
    """``nn.Linear`` whose weight [out_features, in_features] is block sparse: y = x Wᵀ + b.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        pattern: which blocks of the weight exist; shape (out_features, in_features).
        backend: as in :func:`sparsekern.functional.bsr_linear`.

    Raises:
        TypeError, ValueError: ``pattern`` is none, or of another shape; an unknown backend.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: BlockPattern,
        backend: Backend = "auto",
    ) -> None:
        super().__init__((out_features, in_features), 1, bias, device, dtype, pattern, backend)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        values, bias = self._weights()
        return functional.bsr_linear(input, values, self._pattern, bias, backend=self.runs)

    @classmethod
    def from_dense(cls, module: nn.Linear, pattern: BlockPattern, *, backend: Backend = "auto") -> SparseLinear:
        """A sparse copy of ``module``: its weights at the stored blocks, bias, dtype, device, flags; hooks stay behind.

        Raises:
            TypeError, ValueError: ``module`` is not exactly an ``nn.Linear`` in plain use (subclasses, parametrised or
                pruned layers and the like), or ``pattern`` does not fit it.
        """
        _check_dense(module, nn.Linear)
        weight, bias = module.weight, module.bias is not None
        layer: SparseLinear = nn.utils.skip_init(
            cls, module.in_features, module.out_features, bias,
            device=weight.device, dtype=weight.dtype, pattern=pattern, backend=backend,
        )  # fmt: skip
        layer._take_weights(module)
        return layer

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weights, 0 where no block is stored; dtype, device and flags are kept."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        self._give_weights(dense)
        return dense

    def extra_repr(self) -> str:
        plain = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{plain}, {self._sparse_repr()}"


class SparseConv2d(SparseLayer):
    """``nn.Conv2d`` whose weight is block sparse, as a matrix (C_out, kh*kw*C_in/groups), tap-major.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in ``nn.Conv2d``; ``padding_mode`` must be "zeros".
        pattern: which blocks of the weight exist; shape as above (see :func:`sparsekern.weights.weight_matrix`).
        backend: as in :func:`sparsekern.functional.bsr_conv2d`.

    As with ``nn.Conv2d``, the output is channels_last where the input is, or where the layer was made so
    (``model.to(memory_format=torch.channels_last)``, before it was sparse or after).

    Raises:
        TypeError, ValueError: as :class:`SparseLinear`, as ``nn.Conv2d``, or another padding mode.
    """

    _channels_last = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: BlockPattern,
        backend: Backend = "auto",
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        # nn.Conv2d knows its arguments best: it checks and normalises them, and allocates nothing on this device.
        like = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, device="meta"
        )  # fmt: skip
        super().__init__(tuple(like.weight.shape), groups, bias, device, dtype, pattern, backend)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.padding_mode = padding_mode
        # torch types them as tuples of any length.
        self.kernel_size = cast("tuple[int, int]", like.kernel_size)
        self.stride, self.dilation = cast("tuple[int, int]", like.stride), cast("tuple[int, int]", like.dilation)
        self.padding = cast("Padding", like.padding)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C_in, H, W] or [C_in, H, W] -> [N, C_out, H', W'] or [C_out, H', W']."""
        values, bias = self._weights()
        return functional.bsr_conv2d(
            input, values, self._pattern, bias, self.stride, self.padding, self.dilation, self.groups,
            kernel_size=self.kernel_size, channels_last=self._channels_last, backend=self.runs,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseConv2d:
        # model.to(memory_format=...) converts what has four dimensions, which the values do not: ask with what has.
        like = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        small = self.values.detach().new_empty([min(size, 2) for size in like])
        probe = fn(small.to(memory_format=self._memory_format()))
        super()._apply(fn, recurse)
        self._channels_last = functional.is_channels_last(probe)
        return self

    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @classmethod
    def from_dense(cls, module: nn.Conv2d, pattern: BlockPattern, *, backend: Backend = "auto") -> SparseConv2d:
        """As :meth:`SparseLinear.from_dense`, for an ``nn.Conv2d``."""
        _check_dense(module, nn.Conv2d)
        weight = module.weight
        layer: SparseConv2d = nn.utils.skip_init(
            cls, module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, module.bias is not None,
            device=weight.device, dtype=weight.dtype, pattern=pattern, backend=backend,
        )  # fmt: skip
        layer._take_weights(module)
        layer._channels_last = functional.is_channels_last(weight)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with the same weights, 0 where no block is stored; dtype, device and flags are kept."""
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, device="meta",
        )  # fmt: skip
        self._give_weights(dense)
        dense.weight.data = dense.weight.data.to(memory_format=self._memory_format())
        return dense

    def extra_repr(self) -> str:
        plain = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )
        return f"{plain}, {self._sparse_repr()}"


def ddp_ignore_(model: nn.Module) -> None:
    """Keep the index buffers of the model's sparse layers out of DistributedDataParallel's broadcasts, in place.

    Call it on the very module that is to be wrapped, where layers were built by hand or ``sparsify_`` (which does this
    for the model it is given) saw only a part of it. Names that are listed already stay.
    """
    listed = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    sparse = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, SparseLayer)]
    names = [f"{name}.{buffer}".lstrip(".") for name in sparse for buffer in INDEX_BUFFERS]
    # Read by DistributedDataParallel.__init__ (torch 2.10 to 2.13); the names are those of model.named_buffers().
    vars(model)["_ddp_params_and_buffers_to_ignore"] = listed + [name for name in names if name not in listed]


def check_values(values: Tensor, pattern: BlockPattern, name: str) -> None:
    """Raise ValueError unless ``values``, from outside, go with ``pattern``: their shape, and 0 beyond the edge."""
    shape = pattern.values_shape
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} (nnz_blocks, bh, bw), got {tuple(values.shape)}")
    if values.device.type == "meta" or not _overhangs(pattern):
        return
    if bool((values[~pattern.to(values.device).edge_mask()] != 0).any()):
        raise ValueError(f"{name} is not 0 where blocks overhang the edge of the weight, {pattern.shape}")


@functools.cache
def _say_once(runs: str, why: str) -> None:
    log.warning('backend="auto": sparse layers run as %s: %s (said once)', runs, why)


def _overhangs(pattern: BlockPattern) -> bool:
    return any(size % block for size, block in zip(pattern.shape, pattern.blocksize, strict=True))


def _check_dense(module: nn.Module, expected: type[nn.Module]) -> None:
    if not isinstance(module, expected):
        raise TypeError(f"module must be a torch.nn.{expected.__name__}, got {type(module).__name__}")
    reason = why_not(module)
    if reason is not None:
        raise ValueError(f"module cannot be made sparse: {reason}")


def _copy_flags(source: nn.Module, target: nn.Module, source_weight: str, target_weight: str) -> None:
    target.train(source.training)
    getattr(target, target_weight).requires_grad_(getattr(source, source_weight).requires_grad)
    if isinstance(source.bias, nn.Parameter) and isinstance(target.bias, nn.Parameter):
        target.bias.requires_grad_(source.bias.requires_grad)
