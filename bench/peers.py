"""The same products by other libraries, where they are installed: :func:`peer_calls`. One that is missing is named.

Products of matrices are given their activations feature-major and contiguous, and prepared weights (Wᵀ for dgrad),
outside the timing: that is in their favour, a layer would have to transpose. SparseProp is a layer and takes what
sparsekern takes. onnxruntime computes the dense layer: it is a second dense baseline, not a sparse one.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern import BlockPattern
from sparsekern.weights import weight_from_matrix

from .cases import Case, Tensors, step

TORCH, SCIPY, MKL, SPARSEPROP, ONNX = "torch", "scipy", "sparse_dot_mkl", "SparseProp", "onnxruntime"
MODULES = {SCIPY: "scipy.sparse", MKL: "sparse_dot_mkl", SPARSEPROP: "sparseprop.modules", ONNX: "onnxruntime"}
COMPILE = "torch.compile"  # stands among the peers where it does not work
PACKAGES = {SCIPY: "scipy", MKL: "sparse_dot_mkl", SPARSEPROP: "sparseprop", ONNX: "onnxruntime"}


@dataclass(frozen=True)
class Peer:
    """A product by another library: what it is called, its calls by layout, and what they must return."""

    name: str
    calls: dict[str, Callable[[], Tensors]]
    truth: Tensors


def versions() -> dict[str, str]:
    """Of every peer, or why it is missing."""
    found = {TORCH: str(torch.__version__)}
    for name in MODULES:
        loaded = _load(name)
        found[name] = loaded if isinstance(loaded, str) else importlib.metadata.version(PACKAGES[name])
    return found


def peer_calls(
    case: Case, product: str, pattern: BlockPattern, layer: nn.Module, x: Tensor, grad: Tensor, truth: Tensors
) -> list[Peer]:
    """All peers that can do this product of the sparse ``layer`` of ``case``; ``truth`` is the product itself."""
    if case.is_conv:
        return _convolutions(case, product, pattern, layer, x, grad, truth)
    peers = _matrix_products(product, pattern, layer, x, grad, truth)
    if pattern.blocksize == (1, 1):
        peers += _torch_autograd(product, pattern, layer, x, grad, truth)
        if isinstance(module := _load(SPARSEPROP), str):
            return peers
        weight, bias = _dense_weight(case, pattern, layer), _bias(layer)
        theirs = module.SparseLinear(weight, nn.Parameter(bias))
        order = _order(lambda numbered: module.SparseLinear(numbered), case, pattern)
        peers += _layer_peer(product, {"row-major": theirs}, order, x, grad, truth)
    return peers


def dense_peer(case: Case, dense: nn.Module, x: Tensor) -> Peer | None:
    """onnxruntime on the dense layer, forward, one thread, activations row-major or NCHW."""
    runtime = _load(ONNX)
    if isinstance(runtime, str) or isinstance(onnx := _module("onnx"), str):
        return None
    weight, bias = (parameter.detach().contiguous().numpy() for parameter in dense.parameters())
    if case.is_conv:
        node = onnx.helper.make_node(
            "Conv", ["x", "w", "b"], ["y"], strides=[case.stride] * 2, pads=[case.padding] * 4, group=case.groups
        )
    else:
        node = onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], case.name, [value("x", kind, case.input)], [value("y", kind, case.output)],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    with torch.no_grad():
        truth = copy.deepcopy(dense).double()(x.double())
    layout = case.layouts[0]
    return Peer(f"{ONNX}, dense", {layout: lambda: (torch.from_numpy(session.run(None, feed)[0]),)}, (truth,))


def _matrix_products(
    product: str, pattern: BlockPattern, layer: nn.Module, x: Tensor, grad: Tensor, truth: Tensors
) -> list[Peer]:
    """forward (W X + b) and dgrad (Wᵀ G) by CSR, or BSR where the library has it; results are transposed views."""
    if product == "forward":
        values, wide, bias = _values(layer), x.t().contiguous(), _bias(layer)[:, None]
    elif product == "dgrad":
        turned, index = pattern.transposed()
        values, wide, bias = _values(layer)[index].transpose(1, 2).contiguous(), grad.t().contiguous(), None
        pattern = turned
    else:
        return []
    if any(size % block for size, block in zip(pattern.shape, pattern.blocksize, strict=True)):
        return []  # none of them has blocks that overhang
    kind = "CSR" if pattern.blocksize == (1, 1) else "BSR"
    square = pattern.blocksize[0] == pattern.blocksize[1]
    calls: dict[str, Callable[[], Tensors]] = {}
    if square:  # torch's BSR, and MKL's, have no others
        weight = _torch_sparse(pattern, values)
        if bias is None:
            calls[TORCH] = lambda: ((weight @ wide).t(),)
        else:
            calls[TORCH] = lambda: ((weight @ wide + bias).t(),)
    if not isinstance(_load(SCIPY), str):
        matrix: Any = pattern.to_scipy(values)
        matrix = matrix.tocsr() if kind == "CSR" else matrix
        x_np, b_np = wide.numpy(), np.float32(0) if bias is None else bias.numpy()
        calls[SCIPY] = lambda: (torch.from_numpy((matrix @ x_np + b_np).T),)
        mkl = _load(MKL)
        if square and not isinstance(mkl, str):
            mkl.mkl_set_num_threads(1)
            calls[MKL] = lambda: (torch.from_numpy((mkl.dot_product_mkl(matrix, x_np) + b_np).T),)
    return [Peer(f"{name} {kind}", {"feature-major": call}, truth) for name, call in calls.items()]


def _torch_autograd(
    product: str, pattern: BlockPattern, layer: nn.Module, x: Tensor, grad: Tensor, truth: Tensors
) -> list[Peer]:
    """wgrad by ``sampled_addmm``, and the whole layer through ``torch.sparse.mm``."""
    weight, bias = _torch_sparse(pattern, _values(layer)), _bias(layer)
    if product == "wgrad":
        zeros = _torch_sparse(pattern, torch.zeros_like(_values(layer)))
        grad_wide = grad.t().contiguous()

        def sampled() -> Tensors:
            return (torch.sparse.sampled_addmm(zeros, grad_wide, x, beta=0).values(),)

        return [Peer(f"{TORCH} CSR", {"feature-major": sampled}, (truth[0].flatten(),))]
    if product == "layer":
        leaf, b = x.detach().requires_grad_(), bias.clone().requires_grad_()
        weight.requires_grad_()

        def autograd() -> Tensors:
            y = torch.sparse.mm(weight, leaf.t()).t() + b
            grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (leaf, weight, b), grad)
            return (y, grad_x, grad_weight.values(), grad_bias)

        y, grad_x, grad_values, grad_bias = truth
        return [Peer(f"{TORCH} CSR", {"row-major": autograd}, (y, grad_x, grad_values.flatten(), grad_bias))]
    return []


def _convolutions(
    case: Case, product: str, pattern: BlockPattern, layer: nn.Module, x: Tensor, grad: Tensor, truth: Tensors
) -> list[Peer]:
    module = _load(SPARSEPROP)
    one_kernel = case.kernel[0] == case.kernel[1] and case.stride in (1, 2) and case.groups == 1
    if isinstance(module, str) or pattern.blocksize != (1, 1) or not one_kernel:
        return []
    weight, bias = _dense_weight(case, pattern, layer), _bias(layer)

    def build(dense: Tensor, over_width: bool = False) -> nn.Module:
        theirs: nn.Module = module.SparseConv2d(
            dense, nn.Parameter(bias.clone()), case.padding, case.stride, over_width
        )
        return theirs

    order = _order(build, case, pattern)
    layers = {"nchw, over the width": build(weight, True)}
    if case.batch % 8 == 0:  # wrong for others
        layers["nchw, over the batch"] = build(weight)
    return _layer_peer(product, layers, order, x.contiguous(), grad.contiguous(), truth)


def _forward(layer: nn.Module, x: Tensor) -> Tensors:
    return (layer(x),)


def _layer_peer(
    product: str, layers: dict[str, nn.Module], order: Tensor, x: Tensor, grad: Tensor, truth: Tensors
) -> list[Peer]:
    """A module with values and bias as its parameters; ``order`` says which of our values each of its values is."""
    calls: dict[str, Callable[[], Tensors]] = {}
    for layout, layer in layers.items():
        if product == "forward":
            calls[layout] = partial(_forward, layer, x)
        elif product == "layer":
            calls[layout] = step(layer, layer, x, grad)
    if product == "layer":
        y, grad_x, grad_values, grad_bias = truth
        truth = (y, grad_x, grad_values.flatten()[order], grad_bias)
    return [Peer(SPARSEPROP, calls, truth)] if calls else []


def _order(build: Callable[[Tensor], nn.Module], case: Case, pattern: BlockPattern) -> Tensor:
    """Which of our values each of SparseProp's is: read off a layer whose weights are 1, 2, 3, ..."""
    numbers = torch.arange(1, pattern.nnz_blocks + 1, dtype=torch.float32).view(-1, 1, 1)  # exact up to 2 ** 24
    numbered = weight_from_matrix(pattern.scatter(numbers), case.weight).contiguous()
    return build(numbered).get_parameter("W_val").detach().long() - 1


def _torch_sparse(pattern: BlockPattern, values: Tensor) -> Tensor:
    crow, col = pattern.crow_indices, pattern.col_indices
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta", UserWarning)
        if pattern.blocksize == (1, 1):
            return torch.sparse_csr_tensor(crow, col, values.flatten(), pattern.shape, check_invariants=True)
        return torch.sparse_bsr_tensor(crow, col, values, pattern.shape, check_invariants=True)


def _values(layer: nn.Module) -> Tensor:
    return layer.get_parameter("values").detach()


def _bias(layer: nn.Module) -> Tensor:
    return layer.get_parameter("bias").detach()


def _dense_weight(case: Case, pattern: BlockPattern, layer: nn.Module) -> Tensor:
    return weight_from_matrix(pattern.scatter(_values(layer)), case.weight).contiguous()


def _load(name: str) -> Any:
    """The module of a peer, or why it is missing, as text."""
    return _module(MODULES[name])


@cache
def _module(name: str) -> Any:
    if name == MODULES[MKL]:
        # One thread; and pip puts MKL where this package does not look.
        os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")
        for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*")):
            os.environ.setdefault("MKL_RT", str(path))
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        return f"missing: {error}".splitlines()[0]
