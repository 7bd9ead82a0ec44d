"""Keep signals alive in a pruned network: approximate isometry, orthogonal initialisation, and how to measure both.

Source: Lee, Ajanthan, Gould & Torr, "A signal propagation perspective for pruning neural networks at initialization",
ICLR 2020.
"""

from sparsekern.isometry.approximate import (
    Mode,
    Report,
    approximate_isometry_,
    fan_in_rescale_,
    orthogonality_score,
)
from sparsekern.isometry.jacobian import (
    Statistics,
    jacobian_singular_values,
    layer_jacobian_singular_values,
    singular_value_statistics,
)
from sparsekern.isometry.orthogonal import block_orthogonal_, delta_orthogonal_, orthogonal_

__all__ = [
    "Mode",
    "Report",
    "Statistics",
    "approximate_isometry_",
    "block_orthogonal_",
    "delta_orthogonal_",
    "fan_in_rescale_",
    "jacobian_singular_values",
    "layer_jacobian_singular_values",
    "orthogonal_",
    "orthogonality_score",
    "singular_value_statistics",
]
