"""Losses for pruning without supervision: to be given to a score in place of the training loss. They ignore the target.

Source: Lee, Ajanthan, Gould & Torr, "A signal propagation perspective for pruning neural networks at initialization",
ICLR 2020, section 6 ("pruning without supervision").
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def uniform(output: Tensor, target: object = None) -> Tensor:
    """Cross entropy of logits [N, classes] against equal probabilities: gradient softmax(output) - 1 / classes."""
    return -F.log_softmax(output, 1).mean()


def predicted(output: Tensor, target: object = None) -> Tensor:
    """Cross entropy of logits [N, classes] against the class that the network itself predicts."""
    return F.cross_entropy(output, output.detach().argmax(1))


def entropy(output: Tensor, target: object = None) -> Tensor:
    """Entropy of the predicted probabilities: cross entropy against them, through which the gradient flows as well."""
    log_probabilities = F.log_softmax(output, 1)
    return -(log_probabilities.exp() * log_probabilities).sum(1).mean()
