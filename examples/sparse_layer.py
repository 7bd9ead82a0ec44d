"""Sparse layers as drop-in replacements in any torch model: convert, train a step, save, load, convert back.

Run it with::

    python examples/sparse_layer.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))


def magnitude_pattern(weight: torch.Tensor, blocksize: tuple[int, int], density: float) -> sk.BlockPattern:
    """The blocks of a weight matrix with the largest sums of magnitudes."""
    (rows, columns), (bh, bw) = weight.shape, blocksize
    strength = weight.detach().abs().view(rows // bh, bh, columns // bw, bw).sum((1, 3))
    threshold = strength.flatten().quantile(1 - density)
    return sk.BlockPattern.from_mask(strength > threshold, blocksize)


def main() -> None:
    torch.manual_seed(0)

    # A whole model: name the layers that become sparse and which of their blocks exist.
    model = mlp()
    print(sk.sparsify_(model, {"0": magnitude_pattern(model[0].weight, (8, 8), 0.1)}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, labels = torch.randn(128, 256), torch.randint(10, (128,))
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after 20 steps: {loss.item():.4f}; its gradient has the shape {tuple(model[0].values.grad.shape)}")

    # Saved as one file; loading makes a freshly built dense model sparse.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlp.safetensors"
        sk.save(model, path)
        again = mlp()
        sk.load_(again, path)
    assert torch.equal(again(x), model(x))

    # Back to plain torch, with zeros where no block was: the same function.
    sk.densify_(again)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)

    # One convolution by hand. Its weight is seen as the matrix [out, kernel height * kernel width * in], tap by tap.
    conv = nn.Conv2d(32, 64, 3, padding=1)
    pattern = sk.BlockPattern.from_mask(torch.rand(8, 36) < 0.1, (8, 8))
    layer = sk.SparseConv2d.from_dense(conv, pattern)
    images = torch.randn(4, 32, 16, 16, requires_grad=True)
    layer(images).square().mean().backward()
    print(layer)
    print(f"gradients: input {tuple(images.grad.shape)}, values {tuple(layer.values.grad.shape)}")


if __name__ == "__main__":
    main()
