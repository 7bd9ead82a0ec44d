"""sparsekern: neural networks pruned before training that really run faster.

Block-sparse ``Linear`` and ``Conv2d``, forward and backward, on compiled kernels behind drop-in layers::

    patterns = sparsekern.prune.snip(model, batches, loss_fn, sparsity=0.9, blocksize=(8, 8))
    report = sparsekern.sparsify_(model, patterns)    # now train as usual
"""

__version__ = "0.1.0"

from . import functional, isometry, models, nn, prune
from .checkpoint import load_, save
from .convert import densify_, sparsify_
from .cost.advise import advise
from .frozen import freeze
from .nn import SparseConv2d, SparseLinear
from .pattern import BlockPattern

__all__ = [
    "BlockPattern",
    "SparseConv2d",
    "SparseLinear",
    "advise",
    "densify_",
    "freeze",
    "functional",
    "isometry",
    "load_",
    "models",
    "nn",
    "prune",
    "save",
    "sparsify_",
]
