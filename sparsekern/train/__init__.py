"""The main job: prune before training, train sparse, and measure it beside dense torch. See :func:`run`."""

from .run import Interrupted, run
from .settings import Settings

__all__ = ["Interrupted", "Settings", "run"]
