"""The experiments of the thesis's first two papers, and those of our own, as tables of cells: :data:`EXPERIMENTS`.

Training is shorter than the papers': the one-cycle schedule over a few epochs reaches in minutes, on a CPU, what their
100,000 steps reach. The data are Fashion-MNIST's where theirs are MNIST's, whose figures are in brackets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .. import models
from . import blocks, connections, frontier, propagation, signals
from .cell import Cell
from .grid import Progress
from .study import Place, Study, run

SNIP = "SNIP (Lee et al., ICLR 2019)"
SPP = "A signal propagation perspective (Lee et al., ICLR 2020)"
ON_MNIST = "The papers' figures are errors on MNIST, ours accuracies on Fashion-MNIST: compare differences, not values."

LENET_300, LENET_5 = Cell("lenet-300-100"), Cell("lenet-5-caffe", epochs=3, lr=0.05)


def sparsity() -> Study:
    """LeNets over sparsity, SNIP beside random pruning."""
    levels = (0.0, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99)
    cells: dict[Place, Cell] = {}
    for base in (LENET_300, LENET_5):
        for level in levels:
            column = f"{level:.0%}"
            if not level:
                cells[base.model, column] = base.but(method="dense")
                continue
            cells[base.model, column] = base.but(sparsity=level)
            if level >= 0.9:
                cells[f"{base.model}, random", column] = base.but(sparsity=level, method="random")
    paper = {
        ("lenet-300-100", "0%"): "error 1.7", ("lenet-300-100", "95%"): "1.6", ("lenet-300-100", "98%"): "2.4",
        ("lenet-5-caffe", "0%"): "error 0.9", ("lenet-5-caffe", "98%"): "0.8", ("lenet-5-caffe", "99%"): "1.1",
    }  # fmt: skip
    return Study("SNIP over sparsity", f"{SNIP}, table 1 and figure 1", cells, "network \\ sparsity", paper, ON_MNIST)


def recipe() -> Study:
    """LeNets by the first paper's own recipe: constant steps of the rate, fresh weights after pruning."""
    cells: dict[Place, Cell] = {}
    rows = {
        "lenet-300-100": LENET_300.but(epochs=20),
        "lenet-5-caffe": LENET_5.but(epochs=8),
        "lenet-300-100, 100,000 steps": LENET_300.but(epochs=167),
    }
    for row, base in rows.items():
        base = base.but(schedule="steps")
        # LeNet-5, without ReLU after its convolutions, diverges from 0.1 in some seeds, the dense one from 0.05.
        cells[row, "dense"] = base.but(method="dense", lr=0.02 if base.model == LENET_5.model else base.lr)
        pruned = base.but(placement="global", fresh=True, images=100)
        for level in (0.9, 0.95, 0.98):
            cells[row, f"{level:.0%}"] = pruned.but(sparsity=level)
        cells[row, "98%, random"] = pruned.but(sparsity=0.98, method="random", placement="auto")
    note = (
        "20 and 8 epochs (12,000 and 4,800 steps), where it says so the 100,000 steps of the paper. The rate begins "
        "at 0.1, for LeNet-5, which diverges from that in some seeds, at 0.05 (dense: 0.02), and is a tenth after each "
        f"quarter. Biases are kept. {ON_MNIST}"
    )
    return Study("SNIP by the paper's recipe", f"{SNIP}, section 5", cells, "network \\ sparsity", note=note)


def scores() -> Study:
    """What other scores make of the same networks."""
    names = ("snip", "iterative_snip", "force", "grasp", "grasp-absolute", "synflow", "magnitude", "random")
    columns = {f"{level:.0%}": level for level in (0.9, 0.95, 0.98, 0.99)}
    cells = {
        (name, column): LENET_300.but(method=name, sparsity=level)
        for name in names
        for column, level in columns.items()
    }
    source = "Wang et al. 2020, Tanaka et al. 2020, de Jorge et al. 2021, Frankle et al. 2021"
    return Study("Scores, LeNet-300-100", source, cells, "score \\ sparsity")


def pruning_batch() -> Study:
    """How many images the scores need."""
    paper = dict(zip((1, 10, 100, 1000, 10_000), ("1.94", "1.72", "1.64", "1.56", "1.40"), strict=True))
    cells = {("lenet-300-100", f"{n:,}"): LENET_300.but(sparsity=0.9, images=n, fresh=True) for n in paper}
    found = {("lenet-300-100", f"{n:,}"): f"error {error}" for n, error in paper.items()}
    return Study(
        "Size of the pruning batch, 90 % sparse", f"{SNIP}, section 5.4", cells, "network \\ images", found, ON_MNIST
    )


def initialisers() -> Study:
    """What the weights that are scored are drawn from; training starts from fresh ones."""
    inits = {"RN": "normal:0.01", "TN": "truncated:0.01", "VS-X": "glorot", "VS-H": "he"}
    paper = {
        "lenet-300-100": ("1.90±.09", "1.96±.11", "1.91±.10", "1.88±.10"),
        "lenet-5-caffe": (".89±.04", ".87±.05", ".88±.07", ".85±.05"),
    }
    cells, found = {}, {}
    for base in (LENET_300, LENET_5):
        for (label, init), error in zip(inits.items(), paper[base.model], strict=True):
            cells[base.model, label] = base.but(sparsity=0.9, init=init, fresh=True)
            found[base.model, label] = f"error {error}"
    note = "RN and TN have variance 0.01. " + ON_MNIST
    return Study("Initialisation while pruning, 90 % sparse", f"{SNIP}, table 3", cells, "network \\ init", found, note)


def supervision() -> Study:
    """True labels, the network's own predictions, and none, for tanh networks of 3, 5 and 7 layers."""
    errors = {
        "true": ("2.46", "2.43", "2.61"),
        "predicted": ("3.11", "3.37", "3.56"),
        "uniform": ("2.77", "2.77", "2.94"),
    }
    cells: dict[Place, Cell] = {}
    found: dict[Place, str] = {}
    for labels, of in errors.items():
        for depth, error in zip((3, 5, 7), of, strict=True):
            base = Cell(f"mlp-{depth}", sparsity=0.9, init="orthogonal", labels=labels, lr=0.05)
            cells[labels, f"mlp-{depth}"], found[labels, f"mlp-{depth}"] = base, f"error {error}"
    note = "Predicted: the class with the largest output; the paper's figure is for soft predictions. " + ON_MNIST
    return Study("Pruning without labels, 90 % sparse", f"{SPP}, section 6", cells, "labels \\ network", found, note)


def trainability() -> Study:
    """What approximate isometry brings: 7 layers of tanh, pruned in three ways, accuracy after each of 8 epochs."""
    cells: dict[Place, Cell] = {}
    metrics = {f"epoch {n}": f"curve:{n - 1}" for n in (1, 2, 4, 8)}
    dense = Cell("mlp-7", init="orthogonal", lr=0.05, schedule="constant")
    for column in metrics:
        cells["dense", column] = dense.but(method="dense")
        for method in ("snip", "magnitude", "random"):
            cell = dense.but(method=method, sparsity=0.9)
            cells[method, column] = cell
            cells[f"{method} + isometry", column] = cell.but(isometry=True)
            cells[f"{method} + fan-in rescaling", column] = cell.but(rescaled=True)
    source = f"{SPP}, figure 2"
    return Study("Trainability of mlp-7, 90 % sparse", source, cells, "mask \\ after", metrics=metrics)


def activations() -> Study:
    """Activations and initialisations, with and without approximate isometry."""
    cells: dict[Place, Cell] = {}
    starts = {"VS-L": ("lecun-normal", False), "VS-G": ("glorot", False), "VS-H": ("he", False)}
    starts |= {"LDI": ("orthogonal", False), "LDI-AI": ("orthogonal", True)}
    for activation in ("linear", "tanh", "relu", "leaky-relu", "selu"):
        for column, (init, isometry) in starts.items():
            cells[activation, column] = Cell(
                "mlp-7", activation=activation, sparsity=0.9, init=init, isometry=isometry, lr=0.02
            )
    note = "The paper's table is of VGG16 and ResNet32 on CIFAR-10."
    return Study("Activations, mlp-7, 90 % sparse", f"{SPP}, table 3", cells, "activation \\ init", note=note)


def sculpting() -> Study:
    """Networks pruned, without labels, to the number of weights of a small reference that was designed by hand."""
    cells: dict[Place, Cell] = {}
    groups = (
        (LENET_300.but(width=0.25), (("lenet-300-100", 1.0), ("lenet-300-100", 4.0), ("mlp-5", 1.0), ("mlp-5", 4.0))),
        (
            Cell("resnet-20", width=0.25, epochs=1),
            (("resnet-20", 0.5), ("resnet-32", 0.5)),
        ),
    )
    for reference, bulky in groups:
        budget = _weights(reference)
        cells[f"{reference.model}, width {reference.width:g}, dense", "dense"] = reference.but(method="dense")
        for model, width in bulky:
            start = reference.but(model=model, width=width, init="orthogonal", labels="uniform", isometry=True)
            start = start.but(activation="relu" if model.startswith("mlp") else None)
            for block in ((1, 1), (8, 8)):
                cell = start.but(sparsity=1 - budget / _weights(start), blocksize=block)
                cells[f"{model}, width {width:g}, to {budget:,} weights", f"{block[0]}x{block[1]}"] = cell
    note = (
        "Uniform labels, orthogonal weights, approximate isometry. The paper's are larger ResNets on CIFAR-10, cut to "
        "the 269,034 weights of ResNet-20."
    )
    return Study("Architecture sculpting", f"{SPP}, section 6", cells, "network \\ blocks", note=note)


def _weights(cell: Cell) -> int:
    """Weights without biases and batch norm, of the network for grey images."""
    model = models.build(cell.model, cell.width, image_shape=models.image_shape("lenet-300-100"))
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def transfer() -> Study:
    """Masks of one data set on another, with and without labels."""
    cells: dict[Place, Cell] = {}
    paper = {
        ("mnist", "mnist"): ("2.42", "2.94", "15.56"), ("fashion-mnist", "mnist"): ("2.66", "2.80", "18.03"),
        ("fashion-mnist", "fashion-mnist"): ("11.90", "13.01", "24.72"),
        ("mnist", "fashion-mnist"): ("14.17", "13.39", "24.89"),
    }  # fmt: skip
    found: dict[Place, str] = {}
    for (on, to), errors in paper.items():
        row = f"{on} to {to}"
        base = LENET_300.but(dataset=to, prune_on=on if on != to else None, sparsity=0.98, init="orthogonal")
        cells[row, "true labels"] = base
        cells[row, "uniform"] = base.but(labels="uniform")
        cells[row, "random mask"] = base.but(method="random", prune_on=None)
        for column, error in zip(("true labels", "uniform", "random mask"), errors, strict=True):
            found[row, column] = f"error {error}"
    return Study(
        "Transfer of masks, LeNet-300-100, 98 % sparse",
        f"{SPP}, table 5",
        cells,
        "pruned on, trained on \\ labels",
        found,
    )


def equal_time() -> Study:
    """One speed-up of inference, bought in several ways: what is the best network that runs 5 times as fast?"""
    cells: dict[Place, Cell] = {}
    metrics = {"accuracy": "accuracy", "measured": "speedup:p50"}
    for base in (LENET_5, Cell("simple-cnn", epochs=3)):
        fast = base.but(speedup=5.0)
        ways = {
            "narrower": fast.but(method="dense"),
            "1x1, global SNIP": fast.but(by="sparsity", placement="global"),
            "1x1, by time": fast,
            "blocks of its choice, by time": fast.but(blocksize=None),
        }
        cells[f"{base.model}, dense", "accuracy"] = base.but(method="dense")
        cells |= {(f"{base.model}, {way}", column): cell for way, cell in ways.items() for column in metrics}
    note = (
        "Networks as sk.freeze deploys them, the narrower dense ones too, on 100 images and one thread, against dense "
        "torch in its faster memory format. The width of the narrower ones and the sparsity of those not pruned by "
        "time are searched by the clock."
    )
    return Study(
        "5 times as fast, in four ways", "Ours; no published table", cells, "network \\ of", note=note, metrics=metrics
    )


def random_labels() -> Study:
    """Whether a network can learn labels by heart: dense ones can, pruned ones should not."""
    base = LENET_5.but(epochs=6)
    cells: dict[Place, Cell] = {}
    for column, shuffled in (("true labels", False), ("shuffled labels", True)):
        cells["dense", column] = base.but(method="dense", shuffled=shuffled)
        cells["99 % sparse", column] = base.but(sparsity=0.99, shuffled=shuffled)
    note = "Share of 10,000 training images that are classified as labelled; chance is 10 %. 6 epochs only."
    return Study(
        "Random labels, LeNet-5-Caffe", f"{SNIP}, section 5.5", cells, "network \\ labels", note=note, metric="fit"
    )


def placements(base: Cell) -> Study:
    """Every block by every placement."""
    wide = f", width {base.width:g}" if base.width != 1 else ""
    title = f"Blocks and how they are placed: {base.model}{wide}"
    note = f"{base.epochs} epochs, one-cycle rate up to {base.lr:g}."
    return Study(title, "Ours; no published table", blocks.cells(base), "placement \\ block", note=note)


Experiment = Callable[[str, Path, int, int, bool, Progress], Path]


def _study(make: Callable[[], Study]) -> Experiment:
    def experiment(name: str, out: Path, seeds: int, jobs: int, quick: bool, progress: Progress) -> Path:
        return run(make(), name, out, seeds, jobs, quick, progress)

    return experiment


# What each does with (name, folder, seeds, processes, quick, progress): see ``study.run``.
EXPERIMENTS: dict[str, Experiment] = {
    "connections": connections.run,
    "propagation": propagation.run,
    "signals": signals.run,
    **{
        name: _study(make)
        for name, make in {
            "sparsity": sparsity,
            "recipe": recipe,
            "scores": scores,
            "pruning-batch": pruning_batch,
            "initialisers": initialisers,
            "transfer": transfer,
            "supervision": supervision,
            "trainability": trainability,
            "activations": activations,
            "sculpting": sculpting,
            "random-labels": random_labels,
            "equal-time": equal_time,
        }.items()
    },
    **{f"blocks-{network}": _study(partial(placements, base)) for network, base in blocks.NETWORKS.items()},
    **{f"time-{network}": partial(frontier.run, base) for network, base in blocks.NETWORKS.items()},
}
