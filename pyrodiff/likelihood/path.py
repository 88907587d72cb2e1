r"""The bound from whole paths: the mean of log w over paths x_1:T ~ q(x_1:T | x_0).

E[log w] is the same bound as the sum of the KL terms, at the same T network calls a path; on a good
model log w varies far less, as what the noise adds to one term it takes from another.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.paths import path_weights
from pyrodiff.likelihood.result import LogLikelihood

__all__ = ["PathBound", "check_count", "mean_of_draws"]


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected {name} to be an integer >= {least}; got {value!r}.")


def mean_of_draws(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last axis and its standard error s/√P, which one draw cannot know: NaN."""
    count, value = draws.shape[-1], draws.mean(-1)
    if count == 1:
        return value, torch.full_like(value, torch.nan)
    return value, draws.std(-1) / math.sqrt(count)


@dataclass(frozen=True)
class PathBound(Estimator):
    """A lower bound on log p_θ(x_0), unbiased for the ELBO, from ``paths`` · T network calls.

    Args:
        paths: P; the standard error, s/√P with s the spread of log w, is NaN for one path.

    Raises:
        ValueError: ``paths`` < 1.
    """

    paths: int = 2

    def __post_init__(self) -> None:
        check_count("paths", self.paths)

    @property
    def unbiased_weights(self) -> bool:
        return self.paths == 1

    def samples_per_batch(self, batch_size: int) -> int:
        return max(1, batch_size // self.paths)

    def _batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        log_w, count = path_weights(reverse, batch, self.paths), self.paths
        value, std_error = mean_of_draws(log_w)
        return LogLikelihood(
            value,
            std_error,
            "lower bound",
            torch.full(value.shape, count * reverse.num_steps),
            reverse.event_shape.numel(),
            repr(self),
            degrees_of_freedom=torch.full_like(value, count - 1),
            log_weights=log_w,
        )
