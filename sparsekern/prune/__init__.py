"""Pruning before training: from a dense model and a sparsity to ``{module name: BlockPattern}``.

``scores`` says what a connection is worth, ``allocation`` how much each layer keeps, ``placement`` where its blocks
stand; ``selection`` puts the two together for any scores, and ``methods`` has a function for each score. ``losses``
holds those that need no labels.

The paper's own SNIP, where all weights and biases of the model compete (biases are 0, as ``models.build`` leaves them)
and training starts from fresh weights::

    model.eval()  # batch norm is an identity before training
    patterns = prune.snip(
        model, batches, loss_fn, sparsity, blocksize=(1, 1), placement="global", biases="score", min_blocks=0
    )
    for module in model.train().modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sparsify_(model, patterns)
"""

from . import losses, scores
from .blocksizes import blocksizes
from .by_time import InTime, in_time
from .connectivity import Connectivity, connectivity, reconnect
from .methods import force, grasp, iterative_snip, magnitude, random, shuffle, snip, synflow
from .patterns import Patterns
from .placement import Balance, Placement
from .selection import from_scores

__all__ = [
    "Balance",
    "Connectivity",
    "InTime",
    "Patterns",
    "Placement",
    "blocksizes",
    "connectivity",
    "force",
    "from_scores",
    "grasp",
    "in_time",
    "iterative_snip",
    "losses",
    "magnitude",
    "random",
    "reconnect",
    "scores",
    "shuffle",
    "snip",
    "synflow",
]
