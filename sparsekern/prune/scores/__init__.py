"""What a connection is worth: functions from a model, and mostly data and a loss, to a score for every weight.

Each returns ``{parameter name: scores of the parameter's shape}``, float64 on the CPU, for the weights of all layers
that can be sparse; higher is better. Anything else of that form can be pruned by, too: see
:func:`sparsekern.prune.from_scores`. None of them changes the model, or any random state but a generator's that it is
given.
"""

from .data_free import magnitude, random, synflow
from .gradients import Batches, LossFn, Scores
from .grasp import grasp
from .progressive import force, iterative_snip
from .snip import snip

__all__ = [
    "Batches",
    "LossFn",
    "Scores",
    "force",
    "grasp",
    "iterative_snip",
    "magnitude",
    "random",
    "snip",
    "synflow",
]
