r"""Decoders p_θ(x_0 | x_1), the last factor of the reverse chain.

    GaussianDecoder             N(x_0; x̂_0, s² I)                                   a density
    DiscretizedGaussianDecoder  ∏_i ∫ over the bin of x_0,i of N(x; x̂_0,i, s²) dx    a probability
    CategoricalDecoder          ∏_i N(x_1,i; α_1 x_0,i, σ_1²) / Σ_v N(x_1,i; α_1 v, σ_1²)

The first two (Ho et al., 2020, equation 13) have a scale s, given or taken from the chain's
variance at t = 1: β_1 for fixed large, β̃_2 for fixed small, the learned one where learned.  (The
code of Ho and of Nichol puts β̃_2 there for fixed large too.)  The third (Kingma et al., 2021,
section 3.3) reads x_1 alone, without the network.

Their distributions are those of ``pyrodiff.distributions``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from pyrodiff.checks import check_count, check_positive
from pyrodiff.distributions import DiscretizedNormal, GridCategorical, Normal
from pyrodiff.finite import check_finite, check_tensor, has_values
from pyrodiff.kernels import Step

__all__ = [
    "CategoricalDecoder",
    "Decoder",
    "DiscretizedGaussianDecoder",
    "GaussianDecoder",
    "check_data",
]


class Decoder(ABC):
    """p_θ(x_0 | x_1); ``discrete`` says that it gives probabilities, not densities."""

    discrete: bool

    @abstractmethod
    def distribution(
        self, x_1: Tensor, x0_hat: Tensor, log_variance: Tensor, step: Step
    ) -> "Normal | DiscretizedNormal | GridCategorical":
        """The distribution of x_0, each dimension on its own.

        Args:
            x_1: shape (*batch, *event_shape).
            x0_hat: the denoiser's x̂_0(x_1), the same shape.
            log_variance: the chain's log variance at t = 1, broadcastable to ``x_1``.
            step: the chain's coefficients at t = 1.
        """

    def expected_log_prob(self, x_0: Tensor, step: Step) -> Tensor | None:
        """E_q(x_1 | x_0) log p_θ(x_0 | x_1) of each dimension, where no network is needed for it.

        Args:
            x_0: data, shape (N, *event_shape).
            step: the chain's coefficients at t = 1, of shape ().

        Returns:
            nats, float64, the shape of ``x_0``; None where the decoder reads x̂_0.
        """
        return None

    @abstractmethod
    def check(self, x_0: Tensor) -> None:
        """Raise ValueError where x_0 is finite but outside what the decoder can explain."""


def _scale(scale: float | None, log_variance: Tensor, like: Tensor) -> Tensor:
    if scale is not None:
        return like.new_full((), scale)
    return (0.5 * log_variance).exp().expand(like.shape)


def _check_scale(scale: float | None) -> None:
    if scale is not None:
        check_positive("scale", scale)


def _check_bounds(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"Expected low < high; got low={low}, high={high}.")


@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    """N(x̂_0, s² I): a density, in units of the data; s from the chain unless ``scale`` is given."""

    scale: float | None = None
    discrete = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def distribution(self, x_1: Tensor, x0_hat: Tensor, log_variance: Tensor, step: Step) -> Normal:
        scale = _scale(self.scale, log_variance, x0_hat)
        return Normal(x0_hat, scale.expand(x0_hat.shape), validate_args=False)

    def check(self, x_0: Tensor) -> None:
        return None


@dataclass(frozen=True)
class DiscretizedGaussianDecoder(Decoder):
    """The mass of N(x̂_0, s²) in the bin of width ``bin_width`` around x_0; end bins are open.

    Args:
        bin_width: 2/255 for 256 levels on [−1, 1] (codes with 2/256 exist: it is stated, not
            guessed).  ``high − low`` must be a whole number of bins.
        low, high: the outermost levels.
        scale: s, or None for the chain's own at t = 1.

    Raises:
        ValueError: a width that does not divide the range; data outside [low, high] (``check``).
    """

    bin_width: float
    low: float = -1.0
    high: float = 1.0
    scale: float | None = None
    discrete = True

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)
        _check_scale(self.scale)
        bins = (self.high - self.low) / self.bin_width if self.bin_width > 0 else math.nan
        if not abs(bins - round(bins) if bins == bins else 1.0) < 1e-6:
            raise ValueError(
                "Expected bin_width to divide high - low into whole bins, as 2/255 does for 256 "
                f"levels on [-1, 1]; got bin_width={self.bin_width}, high - low="
                f"{self.high - self.low}."
            )

    def distribution(
        self, x_1: Tensor, x0_hat: Tensor, log_variance: Tensor, step: Step
    ) -> DiscretizedNormal:
        scale = _scale(self.scale, log_variance, x0_hat)
        return DiscretizedNormal(x0_hat, scale, self.bin_width, self.low, self.high)

    def check(self, x_0: Tensor) -> None:
        least, most = (float(v) for v in x_0.detach().aminmax())
        slack = 1e-3 * self.bin_width
        if least < self.low - slack or most > self.high + slack:
            raise ValueError(
                f"Expected data within [{self.low:g}, {self.high:g}], the range of the "
                f"discretized decoder; got values from {least:g} to {most:g}."
            )


@lru_cache(maxsize=8)
def _expected_log_probs(levels: int, gap: float) -> Tensor:
    """E log p(v | α v + σ ε) of every level for a spacing of ``gap`` · σ/α, (levels,), float64.

    log p(v | α v + σ ε) = −½ ε² − log Σ_u exp(−½ (ε + (v − u) α/σ)²) has its singularities at
    |Im ε| ≥ π/gap, |Re ε| ≥ gap/2: the rule's error is below e^(−2π²/(h gap) − gap²/8) < 1e−20.
    """
    noise = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)
    weight = torch.softmax(-0.5 * noise.square(), 0)
    positions = gap * torch.arange(levels, dtype=torch.float64)
    table = []
    for position in positions:
        shifted = noise[:, None] + (position - positions)
        log_p = -0.5 * noise.square() - (-0.5 * shifted.square()).logsumexp(1)
        table.append(weight @ log_p)
    return torch.stack(table)


@dataclass(frozen=True)
class CategoricalDecoder(Decoder):
    """softmax over the levels v of log N(x_1; α_1 v, σ_1²), per dimension; no network.

    Args:
        levels: how many values the data takes.
        low, high: the first and the last of them; the rest are evenly spaced between.

    Raises:
        ValueError: data off the grid of levels (``check``).
    """

    levels: int
    low: float = -1.0
    high: float = 1.0
    discrete = True

    def __post_init__(self) -> None:
        check_count("levels", self.levels, 2)
        _check_bounds(self.low, self.high)

    @cached_property
    def values(self) -> Tensor:
        """The levels, shape (levels,), float64."""
        with torch.inference_mode(False):  # they are kept, and must serve training, too
            return torch.linspace(self.low, self.high, self.levels, dtype=torch.float64)

    def distribution(
        self, x_1: Tensor, x0_hat: Tensor, log_variance: Tensor, step: Step
    ) -> GridCategorical:
        alpha, sigma = step.alpha.unsqueeze(-1), step.sigma.unsqueeze(-1)
        logits = -0.5 * ((x_1.unsqueeze(-1) - alpha * self.values.to(x_1)) / sigma).square()
        return GridCategorical(logits, self.low, self.high)

    def expected_log_prob(self, x_0: Tensor, step: Step) -> Tensor:
        """By the trapezoid rule over ε, once for each level: exact to rounding."""
        spacing = (self.high - self.low) / (self.levels - 1)
        index = ((x_0.to("cpu", torch.float64) - self.low) / spacing).round().long()
        ratio = math.exp(0.5 * float(step.log_snr))
        return _expected_log_probs(self.levels, spacing * ratio)[index]

    def check(self, x_0: Tensor) -> None:
        spacing = (self.high - self.low) / (self.levels - 1)
        position = (x_0.double() - self.low) / spacing
        off = (position - position.round()).abs() > 1e-3
        off |= (position < -1e-3) | (position > self.levels - 1 + 1e-3)
        if bool(off.any()):
            raise ValueError(
                f"Expected data on the {self.levels} levels from {self.low:g} to {self.high:g}; "
                f"got {int(off.sum())} values off them, the first {float(x_0[off][0]):g}."
            )


def check_data(x_0: object, event_shape: torch.Size, decoder: Decoder, values: bool = True) -> None:
    """Raise ValueError unless ``x_0`` is finite data (N, *event_shape) for ``decoder``.

    With ``values=False`` the shape and the dtype alone are looked at, and so under ``torch.func``.

    Raises:
        TypeError: anything but a tensor.
        ValueError: see above.
    """
    check_tensor(x_0)
    assert isinstance(x_0, Tensor)
    if x_0.dim() != 1 + len(event_shape) or x_0.shape[1:] != event_shape:
        raise ValueError(
            f"Expected data of shape (N, {', '.join(map(str, event_shape))}); "
            f"got {tuple(x_0.shape)}."
        )
    if not x_0.dtype.is_floating_point:
        raise ValueError(f"Expected floating-point data; got {x_0.dtype}.")
    if not values or not has_values(x_0):
        return
    least, most = x_0.detach().aminmax()
    if not (math.isfinite(least) and math.isfinite(most)):
        check_finite(x_0)
    decoder.check(x_0)
