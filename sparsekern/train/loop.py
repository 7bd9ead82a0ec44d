"""The training loop, the same for dense and sparse networks: :class:`Trainer`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batches, Dataset, flip_and_shift

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
# Steps between two looks at the clock; progress is drawn, and not timed, in between.
CHUNK = 50
EVALUATION_BATCH = 1000


Schedule = Literal["one-cycle", "steps", "constant"]


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9 and weight decay 5e-4.

    ``schedule`` of the learning rate: "one-cycle" peaks at ``lr``; "steps" begins there and is a tenth after each
    quarter of the training, as in SNIP (every 25,000 of 100,000 steps); "constant".
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    schedule: Schedule = "one-cycle"


@dataclass(frozen=True)
class Point:
    """A point of the learning curve: after ``epoch`` epochs and ``seconds`` of training steps, evaluation left out."""

    model: str
    epoch: int
    step: int
    seconds: float
    loss: float
    accuracy: float


class Trainer:
    """A network, its optimizer and its stream of batches.

    The optimizer is torch's fused SGD, for dense and sparse networks alike: it is the fastest of torch's three on
    both. Images in colour are mirrored and shifted at random. The order of the batches follows from ``recipe.seed``
    alone, so every network sees the same.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        recipe: Recipe,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.memory_format = memory_format
        self.model: nn.Module = model.to(memory_format=memory_format)  # type: ignore[call-overload]  # not in torch's stubs
        self.dataset, self.recipe = dataset, recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        # As in the papers; grey sets, of clothes or digits, are left as they are there too.
        augment = flip_and_shift if dataset.train_images.shape[1] > 1 else None
        self.batches = Batches(dataset.train_images, dataset.train_labels, recipe.batch_size, generator, augment)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=recipe.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.rates = rates(recipe.schedule, recipe.lr, recipe.epochs * len(self.batches))
        self.parameters = list(self.model.parameters())
        self.steps, self.seconds = 0, 0.0
        self._stream = self._endless()
        self._loss_sum = torch.zeros(())

    def fit(
        self,
        on_progress: Callable[[int, int], object] = lambda done, total: None,
        on_epoch: Callable[[int, float, float], object] = lambda epoch, loss, accuracy: None,
    ) -> None:
        """Train for the recipe's epochs.

        Args:
            on_progress: called with (steps done, steps in all) between chunks of steps; its time is not counted.
            on_epoch: called with (epoch, mean training loss, test accuracy) after each epoch; not counted either.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self.model.train()
        for epoch in range(1, self.recipe.epochs + 1):
            self._loss_sum.zero_()
            for begin in range(0, len(self.batches), CHUNK):
                count = min(CHUNK, len(self.batches) - begin)
                start = time.perf_counter()
                for _ in range(count):
                    self._loss_sum += self.step()
                self.seconds += time.perf_counter() - start
                on_progress(self.steps, len(self.rates))
            loss = float(self._loss_sum) / len(self.batches)
            if not torch.isfinite(self._loss_sum):
                raise FloatingPointError(f"the training loss became {loss} in epoch {epoch}; try a smaller lr")
            on_epoch(epoch, loss, self.accuracy())

    def step(self) -> Tensor:
        """One whole training step on the next batch; returns its loss, detached."""
        images, labels = self.batch()
        loss = self.loss(images, labels)
        loss.backward()
        self.update()
        return loss.detach()

    def batch(self) -> tuple[Tensor, Tensor]:
        return next(self._stream)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)

    def update(self) -> None:
        """Optimizer step at this step's learning rate; drops the gradients."""
        self.optimizer.param_groups[0]["lr"] = self.rates[min(self.steps, len(self.rates) - 1)]
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None  # a tenth of what optimizer.zero_grad() takes
        self.steps += 1

    def accuracy(self) -> float:
        """Share of the test images classified correctly."""
        training = self.model.training
        self.model.eval()
        images = self.dataset.test_images.split(EVALUATION_BATCH)
        labels = self.dataset.test_labels.split(EVALUATION_BATCH)
        with torch.inference_mode():
            right = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in zip(images, labels, strict=True))
        self.model.train(training)
        return right / len(self.dataset.test_labels)

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.batches


def rates(schedule: Schedule, lr: float, steps: int) -> tuple[float, ...]:
    """The learning rate of every step."""
    if schedule == "one-cycle":
        return one_cycle(lr, steps)
    if schedule == "steps":
        return tuple(lr * 0.1 ** (4 * step // steps) for step in range(steps))
    if schedule == "constant":
        return (lr,) * steps
    raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {schedule!r}")


@functools.cache
def one_cycle(peak: float, steps: int) -> tuple[float, ...]:
    """The learning rates of ``torch.optim.lr_scheduler.OneCycleLR``, one per step.

    Read off once, before training: stepping the scheduler itself would cost more than a sparse layer's update.
    Source: Smith & Topin, "Super-convergence", 2018.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    # Shorter than this, torch divides by a warm-up of zero steps.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=max(steps, 10), cycle_momentum=False)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return tuple(rates)
