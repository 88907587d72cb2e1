r"""The importance-weighted bound: log of the mean of K path weights (Burda et al., 2016, eq. 8).

    L_K = E log (1/K) Σ_k w_k,   w = p_θ(x_0:T)/q(x_1:T | x_0),
    L_1 = ELBO ≤ L_2 ≤ … ≤ log p_θ(x_0)

Its bias falls as 1/K where the weights have a variance; the jackknife removes that part,

    K L̂_K − (K − 1) mean_k L̂_{K−1}^{(−k)}                        (Nowozin, 2018)

which is no longer a bound.  Either has the standard error of the jackknife (``statistics``).
"""

from dataclasses import dataclass

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.paths.weights import path_weights
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_of_weights

__all__ = ["ImportanceBound"]


@dataclass(frozen=True)
class ImportanceBound(Estimator):
    """A lower bound on log p_θ(x_0), tighter with every particle, from K · T network calls.

    Standard errors are NaN for fewer than 8 particles, and for weights so heavy that their number
    does not tell the error; ``remarks`` says so.

    Args:
        particles: K.
        jackknife: remove the bias of order 1/K; the result is an estimate then, not a bound.

    Raises:
        ValueError: ``particles`` < 1, or < 2 with the jackknife.
    """

    particles: int = 32
    jackknife: bool = False

    def __post_init__(self) -> None:
        check_count("particles", self.particles, 2 if self.jackknife else 1)

    @property
    def unbiased_weights(self) -> bool:
        return not self.jackknife

    def samples_per_batch(self, batch_size: int) -> int:
        return max(1, batch_size // self.particles)

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        log_w = path_weights(reverse, batch, self.particles)
        return self.result(
            reverse,
            log_mean_of_weights(log_w, debiased=self.jackknife),
            kind="estimate" if self.jackknife else "lower bound",
            calls=self.particles * reverse.calls_per_path,
            log_weights=log_w,
        )
