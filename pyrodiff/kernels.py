r"""The Gaussian kernels of the forward chain between any two times s < t.

With log-SNRs λ_s > λ_t (both in float64), α² = sigmoid(λ) and σ² = sigmoid(−λ):

    marginal     q(x_t | x_0)      = N(α_t x_0, σ_t² I)
    transition   q(x_t | x_s)      = N(α_t/α_s · x_s, σ²_{t|s} I)
                 σ²_{t|s} = σ_t² (−expm1(λ_t − λ_s))
    posterior    q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, σ̃² I)
                 c_0 = α_s σ²_{t|s}/σ_t²,   c_t = α_t/α_s · σ_s²/σ_t²,   σ̃² = σ²_{t|s} σ_s²/σ_t²

(Ho et al., 2020, equations 2, 4, 6 and 7; Kingma et al., 2021, appendix A).  Data has
λ_0 = +∞.  Coefficients are computed in float64 from λ and cast last: 1 − ᾱ is never formed by
subtraction.  Each formula is typed once, here.

``Level`` is where in the chain one stands, at a step or between two; ``Step`` adds what leads from
there to t − 1.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import logsigmoid
from typing_extensions import Self

__all__ = [
    "Level",
    "NoisingNormal",
    "Step",
    "StepTable",
    "gaussian_kl",
    "jump",
    "marginal",
    "marginal_coefficients",
    "posterior",
    "posterior_coefficients",
    "steps",
    "transition",
    "transition_coefficients",
]


def marginal_coefficients(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ at log-SNR λ: exp(½ log sigmoid(±λ))."""
    return (0.5 * logsigmoid(log_snr)).exp(), (0.5 * logsigmoid(-log_snr)).exp()


def transition_coefficients(log_snr_s: Tensor, log_snr_t: Tensor) -> tuple[Tensor, Tensor]:
    """α_t/α_s and log σ²_{t|s} for λ_s > λ_t; λ_s = +∞ is the data."""
    scale = (0.5 * (logsigmoid(log_snr_t) - logsigmoid(log_snr_s))).exp()
    log_variance = logsigmoid(-log_snr_t) + torch.log(-torch.expm1(log_snr_t - log_snr_s))
    return scale, log_variance


def posterior_coefficients(log_snr_s: Tensor, log_snr_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_0, c_t and log σ̃² for λ_s > λ_t; for λ_s = +∞ they are 1, 0 and −∞."""
    scale, log_variance = transition_coefficients(log_snr_s, log_snr_t)
    log_ratio = logsigmoid(-log_snr_s) - logsigmoid(-log_snr_t)  # log σ_s²/σ_t²
    c_0 = (0.5 * logsigmoid(log_snr_s) + log_variance - logsigmoid(-log_snr_t)).exp()
    return c_0, scale * log_ratio.exp(), log_variance + log_ratio


class NoisingNormal(dist.Normal):
    """A transition of the chain in noising order; its analytic KL is refused (see below)."""


@register_kl(NoisingNormal, dist.Normal)
@register_kl(NoisingNormal, torch.distributions.Normal)
def _refuse_noising_kl(p: NoisingNormal, q: torch.distributions.Normal) -> Tensor:
    raise ValueError(
        "Expected the forward chain in denoising order for analytic KL terms "
        "(TraceMeanField_ELBO); got order='noising', whose sites q(x_t | x_{t-1}) do not face the "
        "model's p(x_{t-1} | x_t): the sum of their KLs is not the bound. "
        "Use ForwardChain(..., order='denoising'), the same joint, or Trace_ELBO."
    )


def _normal(
    mean: Tensor, scale: Tensor, event_dim: int, kind: type = dist.Normal
) -> dist.Independent:
    scale = scale.to(mean.dtype).expand(mean.shape)
    return kind(mean, scale, validate_args=False).to_event(event_dim)


def _like(x: Tensor, event_dim: int, *values: Tensor) -> list[Tensor]:
    """Cast float64 coefficients of shape () or (N,) to x, one axis per event axis appended."""
    return [v.to(x)[(...,) + (None,) * event_dim] if v.dim() else v.to(x) for v in values]


def marginal(
    x_0: Tensor, log_snr_t: Tensor, event_dim: int, kind: type = dist.Normal
) -> dist.Independent:
    """q(x_t | x_0) as a Pyro distribution over the rightmost ``event_dim`` axes."""
    alpha, sigma = _like(x_0, event_dim, *marginal_coefficients(log_snr_t))
    return _normal(alpha * x_0, sigma, event_dim, kind)


def transition(
    x_s: Tensor, log_snr_s: Tensor, log_snr_t: Tensor, event_dim: int, kind: type = dist.Normal
) -> dist.Independent:
    """q(x_t | x_s), s < t, as a Pyro distribution over the rightmost ``event_dim`` axes."""
    scale, log_variance = transition_coefficients(log_snr_s, log_snr_t)
    scale, std = _like(x_s, event_dim, scale, (0.5 * log_variance).exp())
    return _normal(scale * x_s, std, event_dim, kind)


def posterior(
    x_t: Tensor, x_0: Tensor, log_snr_s: Tensor, log_snr_t: Tensor, event_dim: int
) -> dist.Independent:
    """q(x_s | x_t, x_0), s < t, as a Pyro distribution over the rightmost ``event_dim`` axes."""
    c_0, c_t, log_variance = posterior_coefficients(log_snr_s, log_snr_t)
    c_0, c_t, std = _like(x_t, event_dim, c_0, c_t, (0.5 * log_variance).exp())
    return _normal(c_0 * x_0 + c_t * x_t, std, event_dim)


@dataclass(frozen=True, eq=False, slots=True)
class Level:
    """A noise level: what networks and marginals need to know of one time.

    Args:
        t: the time in steps of the chain, 1 … T; between two steps, a fraction.
        log_snr: λ.
        alpha, sigma: α and σ, the scales of signal and noise.

    Tensors of shape () for all samples, or (N, 1, …) with one level per sample; ``t`` and
    ``log_snr`` are float32 at least.
    """

    t: Tensor
    log_snr: Tensor
    alpha: Tensor
    sigma: Tensor

    def noised(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """x_t = α x_0 + σ ε."""
        return self.alpha * x_0 + self.sigma * noise

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The level with every tensor changed alike: rows of it, or another shape."""
        names = type(self).__dataclass_fields__
        return type(self)(*map(change, map(getattr, itertools.repeat(self), names)))


@dataclass(frozen=True, eq=False, slots=True)
class Step(Level):
    """A level of a chain, and the coefficients of the step from t to t − 1.

    Args:
        t, log_snr, alpha, sigma: see ``Level``.
        c_0, c_t: of the mean of the posterior q(x_{t−1} | x_t, x_0).
        log_small: its log variance log β̃_t, with β̃_1 = 0 replaced by β̃_2 (by β_1 in a chain of
            one step).
        log_large: the transition's log variance log σ²_{t|t−1}, Ho's log β_t.
    """

    c_0: Tensor
    c_t: Tensor
    log_small: Tensor
    log_large: Tensor

    def mean(self, x_0: Tensor, x_t: Tensor) -> Tensor:
        """c_0 x_0 + c_t x_t: the posterior's mean, and with x̂_0 for x_0 the model's."""
        return self.c_0 * x_0 + self.c_t * x_t


def steps(log_snr: Tensor, times: Tensor | None = None) -> Step:
    """Every step of a chain with the table λ_1 … λ_T; tensors of shape (T,), float64.

    Args:
        log_snr: shape (T,), float64.
        times: what the network is told as t, shape (T,); default 1 … T.
    """
    previous = torch.cat([log_snr.new_full((1,), torch.inf), log_snr[:-1]])
    if times is None:
        times = torch.arange(1, len(log_snr) + 1, dtype=log_snr.dtype)
    step = jump(previous, log_snr, times)
    first = step.log_small[1:2] if len(log_snr) > 1 else step.log_large[:1]
    return replace(step, log_small=torch.cat([first, step.log_small[1:]]))


def jump(log_snr_s: Tensor, log_snr_t: Tensor, t: Tensor) -> Step:
    """The step from any level t to any less noisy level s, λ_s > λ_t, wherever a chain has them."""
    c_0, c_t, log_small = posterior_coefficients(log_snr_s, log_snr_t)
    _, log_large = transition_coefficients(log_snr_s, log_snr_t)
    alpha, sigma = marginal_coefficients(log_snr_t)
    return Step(
        t=t,
        log_snr=log_snr_t,
        alpha=alpha,
        sigma=sigma,
        c_0=c_0,
        c_t=c_t,
        log_small=log_small,
        log_large=log_large,
    )


class StepTable:
    """The steps of a chain, cast once to each dtype and device that they are asked for.

    Args:
        log_snr: λ_1 … λ_T, shape (T,), float64.
        times: what the network is told as t, shape (T,); default 1 … T.
    """

    def __init__(self, log_snr: Tensor, times: Tensor | None = None):
        self.log_snr = log_snr
        self._exact = steps(log_snr, times)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        self._single: dict[tuple[torch.dtype, torch.device, int], Step] = {}

    def at(self, t: Tensor | int, x: Tensor, event_dim: int) -> Step:
        """Steps ``t`` (1 … T), an integer or shape (N,), cast and shaped like ``x``."""
        if isinstance(t, int):
            key = (x.dtype, x.device, t)
            if key not in self._single:
                with torch.inference_mode(False):  # what is stored must serve training, too
                    self._single[key] = self.at(torch.tensor(t), x, event_dim)
            return self._single[key]
        if (x.dtype, x.device) not in self._cast:
            self._cast[x.dtype, x.device] = self._cast_to(x.dtype, x.device)
        times, coefficients = self._cast[x.dtype, x.device]
        index = (t - 1).to(x.device)
        times, coefficients = times[:, index], coefficients[:, index]
        if index.dim():
            axes = (..., *(None,) * event_dim)
            times, coefficients = times[axes], coefficients[axes]
        return Step(*times.unbind(), *coefficients.unbind())

    def between(self, log_snr: Tensor, x: Tensor, event_dim: int) -> Level:
        """The level of any λ, shape () or (N,), float64, cast and shaped like ``x``.

        Its t is linear in λ between the steps.
        """
        if log_snr.dim():
            log_snr = log_snr.reshape(-1, *(1,) * event_dim)
        alpha, sigma = (value.to(x) for value in marginal_coefficients(log_snr))
        wide = torch.promote_types(x.dtype, torch.float32)
        return Level(self.times(log_snr).to(wide), log_snr.to(x.device, wide), alpha, sigma)

    def times(self, log_snr: Tensor) -> Tensor:
        """t of any λ, linear between the steps, of the shape of ``log_snr``."""
        table, times = (v.to(log_snr.device) for v in (self.log_snr, self._exact.t))
        if len(table) == 1:
            return times.expand(log_snr.shape)
        right = torch.searchsorted(-table, -log_snr).clamp(1, len(table) - 1)
        above, below = table[right - 1], table[right]
        share = (above - log_snr) / (above - below)
        return times[right - 1] + share * (times[right] - times[right - 1])

    def _cast_to(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """t and λ, (2, T), and all other coefficients, (6, T)."""
        exact = torch.stack([getattr(self._exact, field.name) for field in fields(Step)])
        # The network reads t or λ as its time, which half precision would round.
        wide = torch.promote_types(dtype, torch.float32)
        with torch.inference_mode(False):
            return exact[:2].to(device, wide), exact[2:].to(device, dtype)


def gaussian_kl(
    mean_difference: Tensor,
    log_variance_q: Tensor,
    log_variance_p: Tensor,
    event_dim: int,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """KL(N(m_q, σ_q²) ‖ N(m_p, σ_p²)) in nats, summed over the event axes.

        ½ Σ (σ_q²/σ_p² − 1 − log σ_q²/σ_p² + (m_q − m_p)²/σ_p²),   m_q − m_p = scale · difference

    Variances are diagonal (of the shape of ``mean_difference``) or isotropic (event axes of
    size 1, or shape ()), in which case nothing of the event's size is formed but the square.
    """
    log_ratio = log_variance_q - log_variance_p
    # log σ_q²/σ_p² = 0 gives exactly 0 here, by expm1
    excess = torch.expm1(log_ratio) - log_ratio
    square = mean_difference.square()
    precision = scale * scale * (-log_variance_p).exp()
    event_axes = tuple(range(-event_dim, 0))
    if square.shape[-event_dim:] in (excess.shape[-event_dim:], log_variance_p.shape[-event_dim:]):
        return 0.5 * (excess + square * precision).sum(event_axes)
    size = square.shape[-event_dim:].numel()
    weighted = square.sum(event_axes, keepdim=True) * precision
    total = 0.5 * (size * excess + weighted)
    return total.squeeze(event_axes)
