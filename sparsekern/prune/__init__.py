"""Pruning before training: from a dense model and a sparsity to ``{module name: BlockPattern}``.

``scores`` says what a connection is worth, ``allocation`` how much each layer keeps, ``placement`` where its blocks
stand; ``methods`` puts them together.

The paper's own SNIP, where all weights and biases of the model compete and training starts from fresh weights::

    model.eval()  # batch norm is an identity before training
    patterns = prune.snip(
        model, batches, loss_fn, sparsity, blocksize=(1, 1), placement="global", biases="score", min_blocks=0
    )
    for module in model.train().modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sparsify_(model, patterns)
"""

from sparsekern.prune.allocation import blocksizes
from sparsekern.prune.methods import random, shuffle, snip
from sparsekern.prune.patterns import Patterns

__all__ = ["Patterns", "blocksizes", "random", "shuffle", "snip"]
