"""What a training run is asked to do, checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from .. import data, models
from ..functional import Backend
from ..prune.blocksizes import check_blocksize
from . import output

PRUNERS = ("snip", "random")
MODELS = models.NAMES + models.MLP_NAMES + models.COLOUR_NAMES
DATASETS = data.NAMES + data.COLOUR_NAMES
PEAK_RATE = 0.1  # of the one-cycle schedule
# Lower where it has to be: at 0.1 dense LeNet-5-Caffe, which has no ReLU after its convolutions, diverges.
PEAK_RATES = {"lenet-5-caffe": 0.05, **dict.fromkeys((*models.MLP_NAMES, "vgg-c", "vgg-16", "vgg-d", "vgg-like"), 0.05)}
BACKENDS = tuple(name for name in get_args(Backend) if name != "triton")  # training runs on the CPU


@dataclass(frozen=True)
class Settings:
    """One run of ``sparsekern train``; every argument is checked here, so a bad one fails before any work.

    Args:
        out: folder for the results; made where missing.
        model, dataset: names of :func:`sparsekern.models.build` and :func:`sparsekern.data.load`.
        sparsity: fraction of the weights removed, in [0, 1).
        blocksize: (bh, bw).
        pruner: "snip", or "random" (the same density in every layer).
        isometry: restore approximate isometry after pruning, before training.
        epochs, batch_size, lr: of SGD with momentum; ``lr`` is the peak of the one-cycle schedule, by default 0.1, and
            0.05 for lenet-5-caffe, MLPs and VGGs.
        compare_dense: also train the dense network, a narrower dense one of equal step time, and a random mask.
        seed: of weights, batch order and pruning.
        data: folder of the data set's files; see :func:`sparsekern.data.load`.
        threads: for torch; its own choice where None.
        backend: of the sparse layers.
        rounds: samples per timing.
        overwrite: ``out`` may hold an earlier run, whose files go once the first epoch of this one is done.
    """

    out: Path
    model: str = "lenet-300-100"
    dataset: str = "fashion-mnist"
    sparsity: float = 0.9
    blocksize: tuple[int, int] = (8, 8)
    pruner: str = "snip"
    isometry: bool = False
    epochs: int = 10
    compare_dense: bool = False
    seed: int = 0
    batch_size: int = 100
    lr: float | None = None
    data: Path | None = None
    threads: int | None = None
    backend: Backend = "auto"
    rounds: int = 25
    overwrite: bool = False

    def as_dict(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return plain | {"blocksize": list(self.blocksize), "lr": self.peak_rate}

    @property
    def peak_rate(self) -> float:
        """``lr``, or the default of the model."""
        return PEAK_RATES.get(self.model, PEAK_RATE) if self.lr is None else self.lr

    def __post_init__(self) -> None:
        _check("model", self.model, self.model in MODELS, f"one of {', '.join(MODELS)}")
        _check("dataset", self.dataset, self.dataset in DATASETS, f"one of {', '.join(DATASETS)}")
        _check("pruner", self.pruner, self.pruner in PRUNERS, f"one of {', '.join(PRUNERS)}")
        _check("backend", self.backend, self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}")
        _check("sparsity", self.sparsity, 0 <= self.sparsity < 1, "the fraction removed, in [0, 1)")
        check_blocksize("blocksize", self.blocksize)
        _check("lr", self.lr, math.isfinite(self.peak_rate) and self.peak_rate > 0, "positive")
        _check("seed", self.seed, type(self.seed) is int and 0 <= self.seed < 2**63, "a whole number in [0, 2**63)")
        for name, count in (("epochs", self.epochs), ("batch_size", self.batch_size), ("rounds", self.rounds)):
            _check(name, count, type(count) is int and count >= 1, "a whole number of at least 1")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        in_the_way = next((p for p in (self.out, *self.out.parents) if p.exists() and not p.is_dir()), None)
        _check("out", str(self.out), in_the_way is None, f"a folder, but {in_the_way} is a file")
        if not self.overwrite and output.holds_run(self.out):
            raise ValueError(f"{self.out} holds an earlier run; give --overwrite or another --out")
        _check("data", str(self.data), self.data is None or self.data.is_dir(), "a folder that exists")


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
