"""Training sparse is training masked: the same run by torch.nn.utils.prune, with none of our code, agrees."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune as torch_prune

from sparsekern import data, models, prune, sparsify_
from sparsekern.nn import SparseLayer
from sparsekern.weights import weight_from_matrix

BATCH = 10


def networks(name: str, blocksize: tuple[int, int], dtype: torch.dtype) -> tuple[nn.Module, nn.Module, data.Dataset]:
    """The same pruned network twice: dense with masks by torch, and sparse."""
    dataset = data.load("synthetic")
    masked = models.build(name, generator=torch.Generator().manual_seed(1)).to(dtype)
    batch = dataset.train_images[:100].to(dtype), dataset.train_labels[:100]
    patterns = prune.snip(masked, batch, cross_entropy, 0.9, blocksize)
    sparse = copy.deepcopy(masked)
    sparsify_(sparse, patterns)
    for module in sparse.modules():
        if isinstance(module, SparseLayer):
            module.backend = "cpu"
    for layer_name, pattern in patterns.items():
        layer = masked.get_submodule(layer_name)
        mask = weight_from_matrix(pattern.to_element_mask(), layer.weight.shape)
        torch_prune.custom_from_mask(layer, "weight", mask.to(dtype))
    return masked, sparse, dataset


def trained(model: nn.Module, dataset: data.Dataset, steps: int, dtype: torch.dtype, lr: float) -> Tensor:
    """The losses of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(steps):
        at = slice(BATCH * step, BATCH * (step + 1))
        loss = cross_entropy(model(dataset.train_images[at].to(dtype)), dataset.train_labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("blocksize", [(1, 1), (8, 8)])
@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5-caffe", "simple-cnn"])
def test_float64_agrees_for_200_steps(name: str, blocksize: tuple[int, int]) -> None:
    masked, sparse, dataset = networks(name, blocksize, torch.float64)
    expected, found = (trained(model, dataset, 200, torch.float64, 0.01) for model in (masked, sparse))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    compare(masked, sparse, 1e-9)


@pytest.mark.parametrize("blocksize", [(1, 1), (8, 8)])
@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5-caffe", "simple-cnn"])
def test_float32_agrees_for_50_steps(name: str, blocksize: tuple[int, int]) -> None:
    """At a rate at which rounding is not yet blown up: at five times this one, max pooling that decides otherwise
    between two nearly equal pixels sets LeNet-5's losses 4e-3 apart."""
    masked, sparse, dataset = networks(name, blocksize, torch.float32)
    expected, found = (trained(model, dataset, 50, torch.float32, 0.002) for model in (masked, sparse))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    compare(masked, sparse, 1e-4)


def compare(masked: nn.Module, sparse: nn.Module, atol: float) -> None:
    """Weights, with zeros where nothing is stored, and biases."""
    for name, layer in sparse.named_modules():
        if isinstance(layer, SparseLayer):
            other = masked.get_submodule(name)
            dense = layer.to_dense()
            # other.weight is that of the last forward pass.
            weight = other.weight_orig * other.weight_mask
            torch.testing.assert_close(dense.weight, weight, rtol=0, atol=atol)
            torch.testing.assert_close(dense.bias, other.bias, rtol=0, atol=atol)
