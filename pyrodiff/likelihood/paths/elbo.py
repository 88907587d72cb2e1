r"""The bound from whole paths: the mean of log w over paths x_1:T ~ q(x_1:T | x_0).

E[log w] is the same bound as the sum of the KL terms, at the same T network calls a path.  On a
good model log w varies far less, as the noise moves neighbouring terms in opposite directions.

As a sum over many steps log w is nearly normal, and its mean has an interval from few paths.  That
fails where one step dominates: at the end of a cosine schedule λ jumps by 7, the error of x̂_0 is
the network's over α_T ≈ 0, and a rare large one there costs a hundred times the usual spread.  A
few paths are likely to miss it.  So the standard error is NaN where the step over which λ jumps
makes more than a quarter of the variance of log w, and for fewer than 8 paths over a jump.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count, renamed
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.jumps import widest_jump
from pyrodiff.likelihood.paths.weights import weights_and_summand
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.statistics import Summary, mean_of_draws

__all__ = ["PathBound", "summary", "weights_and_jump"]

_SHARE = 0.25  # of the variance of log w, up to which a jump may make it
_FEWEST = 8  # paths, to estimate that share from
JUMP = (
    "Some standard errors are NaN: the step over which the log-SNR jumps makes over a quarter of "
    "the variance of log w, and few paths do not tell how heavy its tail is."
)
FEW_PATHS = (
    f"Standard errors are NaN: the log-SNR jumps, and fewer than {_FEWEST} paths do not tell "
    "whether that step makes the variance of log w."
)


@renamed(paths="particles")
@dataclass(frozen=True)
class PathBound(Estimator):
    """A lower bound on log p_θ(x_0), unbiased for the ELBO, from K · T network calls.

    Args:
        particles: K paths; the standard error, s/√K with s the spread of log w, is NaN for one
            path, and where a jump of λ decides (above).

    Raises:
        ValueError: ``particles`` < 1.
    """

    particles: int = 2

    def __post_init__(self) -> None:
        check_count("particles", self.particles)

    @property
    def unbiased_weights(self) -> bool:
        return self.particles == 1

    def samples_per_batch(self, batch_size: int) -> int:
        return max(1, batch_size // self.particles)

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        log_w, jump = weights_and_jump(reverse, batch, self.particles)
        return self.result(
            reverse,
            summary(log_w, jump),
            kind="lower bound",
            calls=self.particles * reverse.calls_per_path,
            log_weights=log_w,
        )


def weights_and_jump(reverse: ReverseChain, batch: Batch, particles: int) -> tuple[Tensor, Tensor]:
    """log w, and its summand at the jump of λ, or zeros: nats, float64 on the CPU, (n, K)."""
    t = widest_jump(reverse.forward_chain.log_snr)
    number = None if t is None else reverse.num_steps + 1 - t
    return weights_and_summand(reverse, batch, particles, number)


def summary(log_w: Tensor, jump: Tensor) -> Summary:
    """The mean of log w, (n, K), with an error of NaN where the jump dominates its variance."""
    mean, count = mean_of_draws(log_w), log_w.shape[1]
    unknown = jump.var(1, correction=0) > _SHARE * log_w.var(1, correction=0)
    if 1 < count < _FEWEST:
        unknown = (jump != 0).any(1)
    if not bool(unknown.any()):
        return mean
    remarks = JUMP if count >= _FEWEST else FEW_PATHS
    std_error = mean.std_error.masked_fill(unknown, torch.nan)
    return mean._replace(std_error=std_error, remarks=remarks)
