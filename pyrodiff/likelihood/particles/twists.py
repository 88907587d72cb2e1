r"""Twists: positive functions ψ_t(x_t) by which a particle bound ranks its particles.

The best is ψ_t(x_t) = p_θ(x_0 | x_t), with which all weights would be equal.  Computable are

    DenoisedTwist    N(x_0; x̂_0(x_t), r_t I)      the denoiser's prediction; no further calls
    MarginalTwist    q(x_t | x_0) / q̂_t(x_t)       Bayes' rule, with a mixture fitted to other data
    NoTwist          1                             the weights of the path so far

The first is right where x_0 given x_t is nearly N(x̂_0, r_t I), and costs several nats where it is
not (data of separate modes, over a thousand steps); with r_t too small a weight 1/ψ may have no
variance.  The second is as good as its mixture.  The last shows what goes wrong without a twist:
p_θ(x_t:T)/q(x_t:T | x_0) is least for an x_t that is close to x_0, as few x_t of the model are, so
that resampling by it removes the good particles.  (Guarniero, Johansen and Lee, 2017; Wu et al.,
2023, for diffusion.)

Any ψ leaves the particle bound a bound; a poor one makes it a loose bound.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import Self

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.denoisers import Prediction
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.oracles import GaussianMixture
from pyrodiff.streams import NoiseStreams

__all__ = ["DenoisedTwist", "MarginalTwist", "NoTwist", "Twist"]


class Twist(ABC):
    """log ψ_t(x_t), up to a constant in x_t."""

    @abstractmethod
    def log_value(
        self, reverse: ReverseChain, x_t: Tensor, x_0: Tensor, t: int, prediction: Prediction
    ) -> Tensor:
        """Nats, float64, shape (rows,).

        Args:
            x_t, x_0: shape (rows, *event_shape).
            t: 1 … T.
            prediction: of the denoiser at (x_t, t).
        """


@dataclass(frozen=True)
class NoTwist(Twist):
    """ψ = 1: resampling by the weights of the path so far, which makes a bound far looser."""

    def log_value(
        self, reverse: ReverseChain, x_t: Tensor, x_0: Tensor, t: int, prediction: Prediction
    ) -> Tensor:
        return x_t.new_zeros(len(x_t), dtype=torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class DenoisedTwist(Twist):
    """N(x_0; x̂_0(x_t), r_t I).

    Args:
        variances: r_1 … r_T, shape (T,); default σ_t²/(α_t² + σ_t²) = σ_t², the variance of x_0
            given x_t for data that are N(0, 1) in every dimension.  ``fit`` measures them.

    Raises:
        ValueError: variances that are not positive, or (on use) not one per step.
    """

    variances: Tensor | None = None

    def __post_init__(self) -> None:
        if self.variances is not None and not bool((self.variances > 0).all()):
            raise ValueError(f"Expected positive variances; got {float(self.variances.min()):g}.")

    def __repr__(self) -> str:
        return f"DenoisedTwist({'' if self.variances is None else 'fitted'})"

    def log_value(
        self, reverse: ReverseChain, x_t: Tensor, x_0: Tensor, t: int, prediction: Prediction
    ) -> Tensor:
        difference = (x_0 - prediction.x0_hat).flatten(1)
        return -0.5 / self._variance(reverse, t) * difference.square().sum(1).double()

    def _variance(self, reverse: ReverseChain, t: int) -> float:
        if self.variances is None:
            return float(torch.sigmoid(-reverse.forward_chain.log_snr[t - 1]))
        if self.variances.shape != (reverse.num_steps,):
            raise ValueError(
                f"Expected {reverse.num_steps} variances, one per step of the chain; "
                f"got shape {tuple(self.variances.shape)}."
            )
        return float(self.variances[t - 1])

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        reverse: ReverseChain,
        x_0: Tensor,
        *,
        context: Tensor | None = None,
        points: int = 32,
        seed: int = 0,
    ) -> Self:
        """r_t = mean (x_0 − x̂_0(x_t))² over samples and dimensions of data that are not scored.

        Measured at ``points`` steps, with one network call of all samples at each, and
        interpolated between them in log r against λ.

        Args:
            x_0: shape (N, *event_shape).
            context: shape (N, …) or None.
        """
        reverse.check_data(x_0, context)
        x_0 = reverse.forward_chain.carry(x_0, exact=True)
        check_count("points", points)
        chain, streams = reverse.forward_chain, NoiseStreams(seed, range(len(x_0)), x_0.shape[1:])
        steps = sorted({round(t) for t in np.linspace(1, reverse.num_steps, points)})
        errors = []
        with evaluation_mode(reverse):
            for t in steps:
                x_t = chain.sample(x_0, t, streams.normal(x_0))
                error = (
                    x_0 - reverse.predict(x_t, reverse.step(t, x_t), context, mean_only=True).x0_hat
                )
                errors.append(float(error.square().mean()))
        noise = -chain.log_snr.numpy()  # ascending, as np.interp wants it
        log_r = np.interp(noise, noise[[t - 1 for t in steps]], np.log(errors))
        return cls(torch.from_numpy(np.exp(log_r)))


class MarginalTwist(Twist):
    """q(x_t | x_0) / q̂_t(x_t), with q̂_t the law that x_t has where x_0 follows a mixture.

    q̂_t has components N(α_t m_k, α_t² C_k + σ_t² I), at K d² operations a particle and step for
    full covariances; on the CPU, in float64.

    Args:
        mixture: of the data, flattened; ``fit`` makes one.
    """

    def __init__(self, mixture: GaussianMixture):
        self.mixture = mixture

    def __repr__(self) -> str:
        return f"MarginalTwist({len(self.mixture.weights)} components)"

    def log_value(
        self, reverse: ReverseChain, x_t: Tensor, x_0: Tensor, t: int, prediction: Prediction
    ) -> Tensor:
        chain = reverse.forward_chain
        log_snr = chain.log_snr[t - 1]
        step = reverse.step(t, x_t)
        squares = (x_t - step.alpha * x_0).flatten(1).square().sum(1).double()
        log_q = -0.5 * squares * (-logsigmoid(-log_snr)).exp().item()
        return log_q - self.mixture.noised(log_snr).log_prob(x_t.flatten(1)).to(log_q)

    @classmethod
    def fit(cls, x_0: Tensor, components: int = 10, *, ridge: float = 1e-3, seed: int = 0) -> Self:
        """A mixture with full covariances, by expectation and maximisation (scikit-learn).

        Args:
            x_0: shape (N, *event_shape), other data than those to be scored.
            components: K.
            ridge: added to every covariance's diagonal.
            seed: of the initialisation.
        """
        from sklearn import mixture

        options: dict[str, Any] = {"reg_covar": ridge, "random_state": seed}
        fitted = mixture.GaussianMixture(components, **options)
        fitted.fit(x_0.detach().flatten(1).double().cpu().numpy())
        arrays = (fitted.weights_, fitted.means_, fitted.covariances_)
        return cls(GaussianMixture(*map(torch.from_numpy, arrays)))
