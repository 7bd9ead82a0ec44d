"""One run from data to figures: prune, train each network, measure them against each other, write the results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import checkpoint, data, info, isometry, models, ops, plots, prune
from ..convert import sparsify_
from ..nn import SparseLayer
from ..pattern import BlockPattern
from ..timing import speedup
from . import output
from .loop import Point, Recipe, Trainer
from .measure import (
    THROUGHPUT_BATCH,
    bytes_held,
    equal_time_width,
    faster_format,
    macs_per_layer,
    parameters,
    split_step,
    time_inference,
    time_steps,
    trustworthy,
)
from .settings import Settings

SCORING_IMAGES = 1000

# Called with (what is going on, done, total, a note); total is 0 where it is not known.
Progress = Callable[[str, int, int, str], object]


class Interrupted(Exception):
    """The run was stopped; ``result`` holds what was measured until then and has been written."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.result = result


def run(
    settings: Settings, command: list[str], progress: Progress = lambda what, done, total, note: None
) -> dict[str, Any]:
    """Do what ``settings`` ask and write ``settings.out``: result.json, history.csv, model.safetensors and plots.

    Args:
        command: the command line, for the record.
        progress: called now and then, never within a timed stretch.

    Returns:
        What result.json holds. Times are in seconds, sizes in bytes.

    Raises:
        Interrupted: on KeyboardInterrupt, after writing what there is, marked ``complete: false``.
        KeyboardInterrupt: as long as no epoch is done; nothing has been written, and no file of an earlier run is gone.
        FloatingPointError: a training loss is no longer finite; what there is has been written likewise.
        FileNotFoundError, ValueError: the data set cannot be had, or not be pruned for; nothing has been written.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    state = _Run(settings, command, progress)
    try:
        state.work()
        state.result["complete"] = True
        state.write()
    except KeyboardInterrupt:
        if not state.history:
            raise
        state.write()
        raise Interrupted(state.result) from None
    except FloatingPointError:
        if state.history:
            state.write()
        raise
    finally:
        torch.set_num_threads(threads)
    return state.result


class _Run:
    def __init__(self, settings: Settings, command: list[str], progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.recipe = Recipe(settings.epochs, settings.batch_size, settings.peak_rate, settings.seed)
        self.trainers: dict[str, Trainer] = {}
        self.history: list[Point] = []
        self.patterns: dict[str, BlockPattern] = {}
        self.result: dict[str, Any] = {
            "complete": False,
            "command": shlex.join(command),
            "settings": settings.as_dict(),
            "seed": settings.seed,
            "threads": torch.get_num_threads(),
            "environment": info.collect(),
            **dict.fromkeys(plots.NETWORKS),
            "macs_kept": None,
            "speedup": None,
            "trustworthy": None,  # until it is timed
            "model_file": None,
        }

    def work(self) -> None:
        self.progress("loading data", 0, 0, "")
        self.dataset = data.load(self.settings.dataset, self.settings.data)
        self.result["dataset"] = {
            "name": self.dataset.name,
            "source": self.dataset.source,
            "image_shape": list(self.dataset.train_images.shape[1:]),
            "train_images": len(self.dataset.train_labels),
            "test_images": len(self.dataset.test_labels),
        }
        self._build()
        for name in plots.NETWORKS:
            if name in self.trainers:
                self._train(name)
        self._measure()

    def write(self) -> None:
        output.write(self.settings.out, self.result, self.history)
        plots.draw(self.settings.out, self.result, self.history, self.patterns)

    # ---- the networks ---------------------------------------------------------------------------------------------

    def _fresh(self, width: float = 1.0) -> nn.Sequential:
        """The dense network with the weights of this seed."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        channels, height, across = self.dataset.train_images.shape[1:]
        return models.build(self.settings.model, width, generator, image_shape=(channels, height, across))

    def _trainer(self, model: nn.Module, memory_format: torch.memory_format | None = None) -> Trainer:
        trainer = Trainer(model, self.dataset, self.recipe)
        if memory_format is None:
            memory_format = faster_format(trainer, self.settings.rounds)
        return Trainer(model, self.dataset, self.recipe, memory_format)

    def _build(self) -> None:
        settings = self.settings
        self.progress("pruning", 0, 0, "")
        start = time.perf_counter()
        try:
            self.patterns = self._prune()
        except ValueError as error:
            blocks = "x".join(map(str, settings.blocksize))
            raise ValueError(
                f"cannot prune with --sparsity {settings.sparsity} --blocksize {blocks}: {error}"
            ) from error
        self.result["prune_seconds"] = time.perf_counter() - start
        sparse = self._sparse(self.patterns)
        self.trainers["sparse"] = self._trainer(sparse)
        if settings.compare_dense:
            dense = self._trainer(self._fresh())
            generator = torch.Generator().manual_seed(settings.seed)
            twin = self._sparse(prune.shuffle(self.patterns, generator))
            self.progress("sizing small_dense", 0, 0, "")
            width = equal_time_width(
                self.trainers["sparse"],
                lambda width: self._trainer(self._fresh(width), dense.memory_format),
                rounds=max(1, settings.rounds // 5),
            )
            self.trainers["dense"] = dense
            self.trainers["small_dense"] = self._trainer(self._fresh(width), dense.memory_format)
            self.trainers["random_mask"] = self._trainer(twin, self.trainers["sparse"].memory_format)

        image = self.dataset.test_images[:1]
        full = sum(macs_per_layer(self._fresh(), image).values())
        for name, trainer in self.trainers.items():
            macs = sum(macs_per_layer(trainer.model, image).values())
            self.result[name] = {
                "parameters": parameters(trainer.model),
                "bytes": bytes_held(trainer),
                "macs": macs,
                "macs_kept": macs / full,
                "memory_format": str(trainer.memory_format).removeprefix("torch."),
            }
        if settings.compare_dense:
            self.result["small_dense"]["width"] = width
        self.result["macs_kept"] = self.result["sparse"]["macs_kept"]
        self.result["ceiling"] = 1 / self.result["macs_kept"]

    def _prune(self) -> dict[str, BlockPattern]:
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        if settings.pruner == "random":
            return prune.random(self._fresh(), settings.sparsity, settings.blocksize, generator=generator)
        sample = torch.randperm(len(self.dataset.train_labels), generator=generator)[:SCORING_IMAGES]
        # At most a training batch at a time: a thousand images in colour would take gigabytes. Of nearly the same size,
        # as batch norm refuses a single image.
        parts = sample.tensor_split(-(-len(sample) // settings.batch_size))
        batches = [(self.dataset.train_images[part], self.dataset.train_labels[part]) for part in parts]
        return prune.snip(
            self._fresh(), batches, F.cross_entropy, settings.sparsity, settings.blocksize, generator=generator
        )

    def _sparse(self, patterns: dict[str, BlockPattern]) -> nn.Module:
        """The network of this seed, really sparse."""
        model = self._fresh()
        if self.settings.isometry:
            self.progress("restoring isometry", 0, 0, "")
            start = time.perf_counter()
            isometry.approximate_isometry_(model, patterns)
            self.result.setdefault("isometry_seconds", time.perf_counter() - start)
        report = sparsify_(model, patterns)
        for module in model.modules():
            if isinstance(module, SparseLayer):
                module.backend = self.settings.backend
        self.result.setdefault("layers", report.as_dict()["converted"])
        self.result.setdefault("sparsity_achieved", report.sparsity)
        kernels = self.settings.backend != "reference" and not ops.CPU_KERNELS_MISSING
        self.result["kernels"] = "cpu" if kernels else "reference"
        return model

    # ---- training and measuring -----------------------------------------------------------------------------------

    def _train(self, name: str) -> None:
        trainer, column = self.trainers[name], self.result[name]
        note = ""

        def on_progress(done: int, total: int) -> None:
            column["train_steps"], column["train_seconds"] = trainer.steps, trainer.seconds
            self.progress(f"training {name}", done, total, note)

        def on_epoch(epoch: int, loss: float, accuracy: float) -> None:
            nonlocal note
            note = f"loss {loss:.3f}, test {accuracy:.2%}"
            self.history.append(Point(name, epoch, trainer.steps, trainer.seconds, loss, accuracy))
            column["train_loss"], column["test_accuracy"] = loss, accuracy
            if len(self.history) == 1:
                output.clear(self.settings.out)
            # Now, so that even a killed process leaves its figures and its network.
            if name == "sparse":
                checkpoint.save(trainer.model, self.settings.out / output.MODEL)
                self.result["model_file"] = {"name": output.MODEL, "epoch": epoch}
            output.write(self.settings.out, self.result, self.history)
            self.progress(f"training {name}", trainer.steps, len(trainer.rates), note)

        trainer.fit(on_progress, on_epoch)

    def _measure(self) -> None:
        rounds = self.settings.rounds
        self.progress("timing training steps", 0, 0, "")
        steps = time_steps(self.trainers, rounds)
        for name, trainer in self.trainers.items():
            self.result[name]["step_seconds"] = steps[name].quantiles() | split_step(trainer)
        self.progress("timing inference", 0, 0, "")
        batched, single, large = (
            time_inference(self.trainers, size, rounds) for size in (self.settings.batch_size, 1, THROUGHPUT_BATCH)
        )
        for name in self.trainers:
            self.result[name]["inference"] = {
                "latency_seconds": single[name].median,
                "images_per_second": min(THROUGHPUT_BATCH, len(self.dataset.test_labels)) / large[name].median,
                "batch_seconds": batched[name].quantiles(),
            }
        if "dense" not in self.trainers:
            self.result["trustworthy"] = trustworthy(steps, (), self.result["ceiling"])
            return
        for name in self.trainers:
            detail = {
                "train_step": speedup(steps["dense"], steps[name]),
                "inference": speedup(batched["dense"], batched[name]),
            }
            total = self.result["dense"]["train_seconds"] / self.result[name]["train_seconds"]
            self.result[name]["speedup"] = {
                "train_step": detail["train_step"]["p50"],
                "train_total": total,
                "inference": detail["inference"]["p50"],
                "quantiles": detail,
            }
        ratios = self.result["speedup"] = self.result["sparse"]["speedup"]
        kinds = ("train_step", "train_total", "inference")
        self.result["trustworthy"] = trustworthy(steps, [ratios[kind] for kind in kinds], self.result["ceiling"])
        self.result["small_dense"]["step_ratio"] = speedup(steps["small_dense"], steps["sparse"])["p50"]
