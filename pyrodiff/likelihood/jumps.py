r"""Steps over which λ jumps: where one term or one summand is unlike all others.

Two questions are asked of them, with thresholds of their own.

``jumps`` says which steps the termwise bound gives a stratum of their own.  A jump is relative
there: 2 nats of λ, and four times the chain's usual step, as neighbours of like size say enough of
each other.  A stratum too many costs next to nothing, so that a short jump counts.

``widest_jump`` says which summand of log w may decide the error of a mean over paths.  That depends
on the step alone: where the signal-to-noise ratio falls to less than a twentieth, x_{t−1} tells
much that x_t does not, also in a chain of such steps.  Errors are withheld on its account, so that
it must not be found where a normal law of log w serves.
"""

import torch
from torch import Tensor

__all__ = ["jumps", "widest_jump"]

_JUMP = 2.0  # nats of λ
_UNUSUAL = 4  # times the median
_WIDE = 3.0  # nats of λ, a twentieth in signal-to-noise ratio


def jumps(log_snr: Tensor) -> Tensor:
    """Whether λ jumps to a step t = 1 … T, (T,) bool."""
    falls = -log_snr.diff()
    result = torch.zeros(len(log_snr), dtype=torch.bool)
    if len(falls):
        result[1:] = (falls > _JUMP) & (falls > _UNUSUAL * falls.median())
    return result


def widest_jump(log_snr: Tensor) -> int | None:
    """The t of the step over which λ falls most, if by more than 3 nats; else None."""
    falls = -log_snr.diff()
    if len(falls) == 0 or float(falls.max()) <= _WIDE:
        return None
    return int(falls.argmax()) + 2
