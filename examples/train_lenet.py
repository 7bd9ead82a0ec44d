"""Prune LeNet-300-100 before training, train what is left, and save it: the library without its command line.

Run it with::

    python examples/train_lenet.py                    # Fashion-MNIST, 5 epochs
    python examples/train_lenet.py synthetic 1        # a smoke run that needs no files
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsekern import checkpoint, data, models, prune
from sparsekern.convert import sparsify_


def accuracy(model: torch.nn.Module, dataset: data.Dataset) -> float:
    with torch.inference_mode():
        return (model(dataset.test_images).argmax(1) == dataset.test_labels).float().mean().item()


def main(name: str = "fashion-mnist", epochs: int = 5) -> float:
    generator = torch.Generator().manual_seed(0)
    dataset = data.load(name)
    batches = data.Batches(dataset.train_images, dataset.train_labels, 100, generator)

    # Which tenth of the weights matters, from the gradient on 1,000 images; in blocks of 8 x 8.
    model = models.build("lenet-300-100", generator=generator)
    sample = (dataset.train_images[:1000], dataset.train_labels[:1000])
    patterns = prune.snip(model, [sample], F.cross_entropy, sparsity=0.9, blocksize=(8, 8))

    # From here on only the kept weights exist: in memory, in the gradients, in the optimizer.
    print(sparsify_(model, patterns))
    steps = epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, cycle_momentum=False)
    for epoch in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {dataset.name} test accuracy {accuracy(model, dataset):.2%}")

    # Saved and loaded into a freshly built dense network, which becomes sparse by it.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lenet.safetensors"
        checkpoint.save(model, path)
        again = models.build("lenet-300-100")
        checkpoint.load_(again, path)
        print(f"saved as {path.stat().st_size:,} bytes; loaded again: {accuracy(again, dataset):.2%}")
    return accuracy(again, dataset)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
