r"""Probabilities of discrete data under a model with a density, by dequantization.

The probability of a value v is the density's integral over the bin of width h around it,

    P(v) = ∫_{v + h [−½, ½]^d} p_θ(x) dx = E_{q(x|v)} p_θ(x)/q(x|v),
    x = v + h (u − ½),   q(x|v) = r(u|v) h^{−d},   u ~ r(u|v) on [0, 1]^d

so that with R draws, in nats,

    (1/R) Σ_r (log p_θ(x_r) − log q(x_r|v))     a lower bound                (Jensen)
    log (1/R) Σ_r p̂_θ(x_r)/q(x_r|v)             a tighter one: importance weights
                                                (Hoogeboom et al., 2020)

The second needs an unbiased estimate p̂ of the density itself.  The laws r are in ``dequantizers``.

Bins are closed: mass beyond the outermost ones belongs to no value, and Σ_v P(v) < 1 by as much.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.likelihood.dequantizers import Dequantizer, check_density
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.result import Kind, LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_of_weights, mean_of_draws
from pyrodiff.streams import NoiseStreams, derived_seed

__all__ = ["Dequantized"]

_PLACES, _INNER = 2, 3  # words of derived seeds: of u, and of the estimator inside


@dataclass(frozen=True)
class Dequantized(Estimator):
    """log P of discrete data under a model with a density, from ``draws`` inner estimates.

    Args:
        estimator: of log p_θ(x) at each draw.
        dequantizer: q(x|v).
        draws: R; the standard error, which holds the inner one, is NaN for one draw.
        importance: the log of the draws' mean weight, not the mean of their logs: tighter, and
            unbiased for P(v) in its exponential; the standard error is NaN for fewer than 8
            draws, or weights too heavy for it.

    Raises:
        ValueError: ``draws`` < 1; importance weights from an estimator whose exponential is not
            unbiased for the density; on ``estimate``, a discrete decoder.
    """

    estimator: Estimator
    dequantizer: Dequantizer
    draws: int = 8
    importance: bool = False

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        if self.importance and not self.estimator.unbiased_weights:
            raise ValueError(
                "Expected an estimator whose exponential is unbiased for the density, as that of "
                "ImportanceBound or of PathBound(particles=1), for importance weights; got "
                f"{self.estimator!r}."
            )

    @property
    def unbiased_weights(self) -> bool:
        return self.importance

    def check(self, reverse: ReverseChain) -> None:
        check_density(reverse)

    def samples_per_batch(self, batch_size: int) -> int:
        return self.estimator.samples_per_batch(batch_size)

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        inner, log_ratios = [], []
        for draw in range(self.draws):
            result, log_density = self._one(reverse, batch, draw)
            inner.append(result)
            log_ratios.append(result.value - log_density)
        log_w = torch.stack(log_ratios, 1)
        result = self.result(
            reverse,
            log_mean_of_weights(log_w) if self.importance else mean_of_draws(log_w),
            kind=self._kind(inner[0].kind),
            calls=torch.stack([result.calls for result in inner]).sum(0),
            log_weights=log_w if self.importance else None,
        )
        return replace(result, shared_calls=inner[0].shared_calls)

    def _one(self, reverse: ReverseChain, batch: Batch, draw: int) -> tuple[LogLikelihood, Tensor]:
        """The inner result at x ~ q(x|v), and log q(x|v) on the CPU."""
        seed = derived_seed(batch.seed, _PLACES)
        paths = [draw] * len(batch)
        streams = NoiseStreams(seed, batch.indices, reverse.event_shape, paths)
        x, log_density = self.dequantizer.draw(batch.x_0, streams.normal(batch.x_0))
        inner = self.estimator.estimate(
            reverse,
            x,
            seed=derived_seed(batch.seed, _INNER, draw),
            batch_size=batch.rows,
            context=batch.context,
            indices=batch.indices,
        )
        return inner, log_density.cpu()

    def _kind(self, inner: Kind) -> Kind:
        # averaged logs lie below the log of the average: what was above may now be anywhere
        return "estimate" if inner == "upper bound" else inner
