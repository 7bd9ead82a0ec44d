"""Keep signals alive in a pruned network: approximate isometry, orthogonal initialisation, and how to measure both.

Source: Lee, Ajanthan, Gould & Torr, "A signal propagation perspective for pruning neural networks at initialization",
ICLR 2020.
"""

from sparsekern.isometry.approximate import Mode, Report, approximate_isometry_, orthogonality_score
from sparsekern.isometry.jacobian import jacobian_singular_values
from sparsekern.isometry.orthogonal import orthogonal_

__all__ = ["Mode", "Report", "approximate_isometry_", "jacobian_singular_values", "orthogonal_", "orthogonality_score"]
