r"""Samplers that need few steps, on any chain (``ReverseChain.respaced`` makes short ones).

With ε̂ = (x_t − α_t x̂_0)/σ_t the step from t to s = t − 1, where h = λ_s − λ_t > 0, is

    DDIM(η)    x_s = α_s x̂_0 + √(σ_s² − σ̂²) ε̂ + σ̂ z,     σ̂² = η² β̃_t = η² σ_s² (1 − e^{−h})

(Song, Meng and Ermon, 2021, equations 12 and 16).  η = 1 is ancestral sampling with the small
variance; η = 0 is Euler's method for the probability flow in y = x/α and ρ = σ/α = e^{−λ/2},

    dy/dρ = ε̂,

to which ``ProbabilityFlowSampler`` applies Heun's method (Karras, Aittala, Aila and Laine, 2022,
algorithm 1): x' is the step of Euler, and

    x_s = α_s/α_t x_t + α_s (ρ_s − ρ_t) ½ (ε̂(x_t) + ε̂(x'))

The last step, from x_1 to data, is the decoder's: its mean, or its median over levels, where the
sampler adds no noise.  Coefficients are computed in float64 from λ.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrodiff.checks import check_count, short
from pyrodiff.denoisers import Prediction
from pyrodiff.distributions import from_noise
from pyrodiff.finite import check_finite
from pyrodiff.kernels import Level, Step, marginal_coefficients
from pyrodiff.samplers.ancestral import SampledChain, count_samples, sample
from pyrodiff.streams import NoiseStreams

__all__ = ["DDIM", "ProbabilityFlowSampler", "Sampler"]


@runtime_checkable
class DenoisingChain(SampledChain, Protocol):
    """What these samplers ask of a reverse chain."""

    @property
    def log_snrs(self) -> Tensor:
        """λ_1 … λ_T."""

    def step(self, t: int, x: Tensor) -> Step:
        """Step t, cast and shaped like ``x``."""

    def predict(
        self, x_t: Tensor, level: Level, context: Tensor | None, *, mean_only: bool
    ) -> Prediction:
        """The denoiser at x_t."""


class Sampler(ABC):
    """A way from noise to data through the levels of a chain."""

    @abstractmethod
    def states(
        self, chain: DenoisingChain, streams: NoiseStreams, context: Tensor | None = None
    ) -> Iterator[Tensor]:
        """x_T, …, x_1, x_0 in turn, of shape (N, *event_shape), of which x_T = ``streams.normal``.

        Args:
            chain: the model.
            streams: one per sample.
            context: shape (N, …) or None.
        """

    @torch.no_grad()
    def sample(
        self,
        reverse: DenoisingChain,
        num_samples: int | None = None,
        *,
        context: Tensor | None = None,
        seed: int | None = None,
        batch_size: int = 256,
        trajectory: bool = False,
    ) -> Tensor:
        """Samples of x_0, each a function of (seed, its index) and its context alone.

        Args:
            reverse: the model, in evaluation mode.
            num_samples, context, seed, batch_size, trajectory: see ``ReverseChain.sample``.

        Returns:
            x_0 of shape (N, *event_shape), or x_0, x_1, …, x_T stacked.

        Raises:
            ValueError: contexts that are not one per sample, or not finite.

        Warns:
            UserWarning: a network that returned NaN or infinity: such samples are NaN.
        """
        num_samples = count_samples(num_samples, context)
        check_count("batch_size", batch_size)
        if context is not None:
            check_finite(context, "contexts")
        states = sample(
            reverse,
            num_samples,
            context=context,
            seed=int(torch.randint(2**31, ())) if seed is None else seed,
            batch_size=batch_size,
            trajectory=trajectory,
            states=self.states,
        )
        return states if trajectory else states[0]


def _x0_and_noise(
    chain: DenoisingChain, x_t: Tensor, t: int, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x̂_0 and ε̂ = (x_t − α_t x̂_0)/σ_t, by one network call."""
    step = chain.step(t, x_t)
    x0_hat = chain.predict(x_t, step, context, mean_only=True).x0_hat
    return x0_hat, (x_t - step.alpha * x0_hat) / step.sigma


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models: T network calls, and noise as much as η says.

    Args:
        eta: from 0, no noise but x_T, to 1, ancestral sampling with ``FixedSmall``.

    The noise of the decoder is scaled by η, too.

    Raises:
        ValueError: an η outside [0, 1].

    Examples:
        >>> from pyrodiff import ForwardChain, LogSNRSchedule, NoiseDenoiser, ReverseChain
        >>> from pyrodiff import DDIM, ResidualMLP
        >>> forward = ForwardChain(LogSNRSchedule(), num_steps=1000)
        >>> reverse = ReverseChain(NoiseDenoiser(ResidualMLP((2,))), forward, event_shape=(2,))
        >>> DDIM().sample(reverse.respaced(10), 5, seed=0).shape
        torch.Size([5, 2])
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Expected eta between 0 and 1; got {short(self.eta)}.")

    def states(
        self, chain: DenoisingChain, streams: NoiseStreams, context: Tensor | None = None
    ) -> Iterator[Tensor]:
        x_t = streams.normal(chain.prototype())
        yield x_t
        log_snrs = chain.log_snrs
        alphas, sigmas = (value.tolist() for value in marginal_coefficients(log_snrs))
        shares = torch.expm1(log_snrs.diff()).tolist()  # e^{−h} − 1
        for t in range(chain.num_steps, 1, -1):
            alpha, sigma, share = alphas[t - 2], sigmas[t - 2], shares[t - 2]
            x0_hat, noise_hat = _x0_and_noise(chain, x_t, t, context)
            x_t = alpha * x0_hat + sigma * math.sqrt(1 + self.eta**2 * share) * noise_hat
            if self.eta > 0:
                x_t = x_t + self.eta * sigma * math.sqrt(-share) * streams.normal(x_t)
            yield x_t
        noise = self.eta * streams.normal(x_t) if self.eta > 0 else torch.zeros_like(x_t)
        yield from_noise(chain.decode(x_t, context), noise)


@dataclass(frozen=True)
class ProbabilityFlowSampler(Sampler):
    """The probability flow from x_T to x_1 by Heun's method: second order, 2T − 1 network calls."""

    def states(
        self, chain: DenoisingChain, streams: NoiseStreams, context: Tensor | None = None
    ) -> Iterator[Tensor]:
        x_t = streams.normal(chain.prototype())
        yield x_t
        log_snrs = chain.log_snrs
        alpha, sigma = marginal_coefficients(log_snrs)
        ratios = (alpha[:-1] / alpha[1:]).tolist()  # α_s/α_t
        lengths = (-sigma[:-1] * torch.expm1(-0.5 * log_snrs.diff())).tolist()  # α_s (ρ_s − ρ_t)
        for t in range(chain.num_steps, 1, -1):
            ratio, length = ratios[t - 2], lengths[t - 2]
            _, slope = _x0_and_noise(chain, x_t, t, context)
            euler = ratio * x_t + length * slope
            _, slope_there = _x0_and_noise(chain, euler, t - 1, context)
            x_t = ratio * x_t + length * 0.5 * (slope + slope_there)
            yield x_t
        yield from_noise(chain.decode(x_t, context), torch.zeros_like(x_t))
