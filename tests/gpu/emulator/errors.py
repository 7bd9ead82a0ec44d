"""The one exception of the emulator."""

import numpy as np


class EmulatorError(RuntimeError):
    """The kernel did something wrong, or something that the emulator does not model.

    `bad` marks the threads at fault (shaped like the values of the instruction); the scheduler turns it into a CTA
    and adds the PTX line.
    """

    def __init__(self, message: str, bad: np.ndarray | None = None) -> None:
        super().__init__(message)
        self.bad = bad


def require(ok: np.ndarray, message: str) -> None:
    """Raise `message` for the threads where `ok` is false. A trailing axis (cells of one access) is folded."""
    if not ok.all():
        raise EmulatorError(message, ~ok)
