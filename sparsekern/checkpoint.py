"""A model with sparse layers as one safetensors file: :func:`save` and :func:`load_`.

The file holds the model's ``state_dict``, and in its metadata what the tensors do not say:

    format_version    "1"
    layers            JSON {module name: {"type", "shape", "blocksize", "kernel_size", "groups", "bias"}}; ``shape`` is
                      that of the weight as a matrix, ``kernel_size`` and ``groups`` are null for a linear layer
    aliases           JSON {key: key that holds the same tensor}, for tied weights
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .convert import densify_, sparsify_
from .eligible import convertible
from .nn import INDEX_BUFFERS, SparseConv2d, SparseLayer, SparseLinear, check_values
from .optimizer import allow
from .pattern import BlockPattern

FORMAT_VERSION = "1"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's parameters, buffers and patterns to ``path``. An older file there is replaced whole or not.

    Raises:
        TypeError: the ``state_dict`` holds something other than dense tensors (extra state), named by its key.
        OSError: ``path`` cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tensors, aliases = _without_aliases(model.state_dict())
    layers = {name: _spec(layer)._asdict() for name, layer in _sparse_layers(model).items()}
    metadata = {"format_version": FORMAT_VERSION, "layers": json.dumps(layers), "aliases": json.dumps(aliases)}
    target = Path(path)
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, draft, metadata)
        draft.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        os.replace(draft, target)
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def load_(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give ``model`` the patterns, parameters and buffers of a file that :func:`save` wrote, in place.

    Values are cast to the model's dtypes and moved to its devices. Layers that are sparse already, with the pattern of
    the file, keep their Parameters; others are converted, and an optimizer that holds theirs must be made anew (its
    step raises, see :func:`sparsekern.sparsify_`).

    Args:
        model: built as the saved one was, dense, or with sparse layers of any pattern. Layers that are dense in the
            file become dense, and layers that have no bias there lose theirs.
        path: the file.

    Raises:
        ValueError: the file is damaged, of another format, or does not fit the model; the model is as it was.
        OSError: ``path`` cannot be read.
    """
    try:
        state, specs = _read(path)
        patterns = {name: _pattern(name, spec, state) for name, spec in specs.items()}
        stays, drop_bias = _check_layers(model, specs, patterns)
        _check_state(state, _expected(model, specs, patterns))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    modules = {module: dict(module._modules) for module in model.modules()}
    try:
        densify_(model, names=[name for name in _sparse_layers(model) if name not in stays])
        wanted = _Patterns({name: pattern for name, pattern in patterns.items() if name not in stays})
        wanted.drop_bias = drop_bias
        sparsify_(model, wanted)
        model.load_state_dict(state)
    except BaseException:
        # Out of memory, say: what is checked above does not fail. The layers come back, and their optimizers may go on;
        # only what load_state_dict had already copied into the others stays.
        for module, children in modules.items():
            module._modules.update(children)
        allow(model.parameters())
        raise


class _Spec(NamedTuple):
    """What the metadata says of a layer; ``kernel_size`` and ``groups`` are None for a linear layer."""

    type: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    kernel_size: tuple[int, int] | None
    groups: int | None
    bias: bool

    def words(self) -> str:
        """For messages; the blocksize may differ and is not said."""
        kernel = f", kernel_size {self.kernel_size}, groups {self.groups}" if self.kernel_size else ""
        return f"{self.type} {self.shape}{kernel}, {'with' if self.bias else 'without'} bias"


class _Patterns(dict[str, BlockPattern]):
    drop_bias: frozenset[str]


def _sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SparseLayer)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _spec(layer: nn.Module) -> _Spec:
    """Of a sparse layer, or of one that can become sparse (block 1x1 then)."""
    blocksize = layer.pattern.blocksize if isinstance(layer, SparseLayer) else (1, 1)
    bias = layer.bias is not None
    if isinstance(layer, (SparseLinear, nn.Linear)):
        return _Spec("linear", (layer.out_features, layer.in_features), blocksize, None, None, bias)
    if not isinstance(layer, (SparseConv2d, nn.Conv2d)):
        raise TypeError(f"{type(layer).__name__} is no layer of this format")
    kernel, groups = (layer.kernel_size[0], layer.kernel_size[1]), layer.groups
    shape = (layer.out_channels, math.prod(kernel) * layer.in_channels // groups)
    return _Spec("conv2d", shape, blocksize, kernel, groups, bias)


def _without_aliases(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``state``, each once, and {key: key that holds the same tensor} for the rest."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"the state_dict must hold dense tensors only, but {key!r} is a {type(tensor).__name__}")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[key] = first[place]
            continue
        first[place] = key
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        # The format has no views into one memory: such a tensor is written as a copy.
        tensors[key] = tensor.detach().contiguous() if whole else tensor.detach().clone().contiguous()
    return tensors, aliases


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, _Spec]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"not a readable safetensors file: {error}") from error
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION!r}, got {version!r}")
    specs = {name: _parse_spec(name, entry) for name, entry in _json_object(metadata, "layers").items()}
    for key, source in _json_object(metadata, "aliases").items():
        if key in state or not isinstance(source, str) or source not in state:
            raise ValueError(f"aliases: {key!r} cannot stand for {source!r}")
        state[key] = state[source]
    return state, specs


def _json_object(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata {name!r} is missing or no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"metadata {name!r} must be a JSON object, got {type(found).__name__}")
    return found


def _parse_spec(name: str, entry: Any) -> _Spec:
    if not isinstance(entry, dict) or entry.keys() != set(_Spec._fields):
        raise ValueError(f"layers: {name!r} must be an object with the keys {', '.join(_Spec._fields)}")
    kind, kernel, groups, bias = (entry[key] for key in ("type", "kernel_size", "groups", "bias"))
    plain = (kernel, groups) == (None, None) if kind == "linear" else kind == "conv2d" and type(groups) is int
    if not plain or type(bias) is not bool:
        raise ValueError(f"layers: {name!r} is neither a linear nor a conv2d layer: {entry}")
    kernel_size = None if kernel is None else _sizes(name, kernel)
    return _Spec(kind, _sizes(name, entry["shape"]), _sizes(name, entry["blocksize"]), kernel_size, groups, bias)


def _sizes(name: str, pair: Any) -> tuple[int, int]:
    if not isinstance(pair, list) or [type(size) for size in pair] != [int, int]:
        raise ValueError(f"layers: {name!r} must have two integers for a size, got {pair!r}")
    return pair[0], pair[1]


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _pattern(name: str, spec: _Spec, state: Mapping[str, Tensor]) -> BlockPattern:
    keys = [_key(name, part) for part in (*INDEX_BUFFERS, "values")]
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"the file lacks {', '.join(missing)}")
    try:
        pattern = BlockPattern(state[keys[0]], state[keys[1]], spec.shape, spec.blocksize)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the pattern of {name!r}: {error}") from error
    padded = math.prod(-(-size // block) * block for size, block in zip(pattern.shape, pattern.blocksize, strict=True))
    if padded > 16 * math.prod(spec.shape) + 2**20:
        # Dense copies are padded to whole blocks: a few bytes of file would ask for any amount of memory.
        raise ValueError(f"the blocksize {spec.blocksize} of {name!r} is far beyond its shape, {spec.shape}")
    check_values(state[keys[2]], pattern, keys[2])
    return pattern


def _check_layers(
    model: nn.Module, specs: Mapping[str, _Spec], patterns: Mapping[str, BlockPattern]
) -> tuple[set[str], frozenset[str]]:
    """Names of the layers that stay the objects they are, and of those that lose their bias."""
    sparse, (eligible, reasons) = _sparse_layers(model), convertible(model)
    stays, drop_bias = set(), set()
    for name, spec in specs.items():
        layer = sparse.get(name) or eligible.get(name)
        if layer is None:
            raise ValueError(f"{name!r} cannot be sparse in this model: {reasons.get(name, 'it is no such layer')}")
        here = _spec(layer)
        if here._replace(blocksize=spec.blocksize, bias=here.bias and spec.bias) != spec:
            raise ValueError(f"{name!r} must be {here.words()}, as in the model, got {spec.words()}")
        if isinstance(layer, SparseLayer) and layer.pattern == patterns[name] and here.bias == spec.bias:
            stays.add(name)
        elif here.bias and not spec.bias:
            drop_bias.add(name)
    if "" in (sparse.keys() | specs.keys()) - stays:
        raise ValueError("the model is itself a layer that would have to be replaced, which cannot be done in place")
    uses = Counter(sparse.values())
    shared = [name for name, layer in sparse.items() if uses[layer] > 1 and name not in stays]
    if shared:
        raise ValueError(f"one sparse layer stands under several names and has another pattern: {', '.join(shared)}")
    return stays, frozenset(drop_bias)


def _expected(model: nn.Module, specs: Mapping[str, _Spec], patterns: Mapping[str, BlockPattern]) -> dict[str, Tensor]:
    """The model's state once it has the layers of the file; for the layers that may change, tensors without data."""
    sparse = _sparse_layers(model)
    changing = sparse.keys() | specs.keys()
    state = model.state_dict()
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta:
            raise ValueError(f"{key} of the model must be a tensor with data, got {_kind(tensor)}")
    expected = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in changing}
    for name in changing:
        spec = specs.get(name) or _spec(sparse[name])
        shapes: dict[str, tuple[int, ...]] = {"bias": spec.shape[:1]} if spec.bias else {}
        if name in specs:
            shapes["values"] = patterns[name].values_shape
            expected |= {_key(name, part): getattr(patterns[name], part) for part in INDEX_BUFFERS}
        elif spec.kernel_size is None:
            shapes["weight"] = spec.shape
        else:
            shapes["weight"] = (spec.shape[0], spec.shape[1] // math.prod(spec.kernel_size), *spec.kernel_size)
        expected |= {_key(name, part): torch.empty(shape, device="meta") for part, shape in shapes.items()}
    return expected


def _kind(entry: object) -> str:
    if isinstance(entry, Tensor) and not is_lazy(entry):
        return "one on the meta device"
    return type(entry).__name__


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for what, keys in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if keys:
            raise ValueError(f"the file {what} {', '.join(sorted(keys))}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise ValueError(f"{key} must have shape {tuple(tensor.shape)}, got {tuple(state[key].shape)}")
        if not _casts(state[key].dtype, tensor.dtype):
            raise ValueError(f"{key} must be {tensor.dtype} or of a kind that casts to it, got {state[key].dtype}")


def _casts(source: torch.dtype, target: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=source).to(target)
    except RuntimeError:
        return False  # torch.can_cast also says yes to packed 4-bit types, which nothing can copy
    return torch.can_cast(source, target)
