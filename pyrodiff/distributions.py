"""Distributions of the reverse chain: of its steps, and of x_0 given x_1.

Each can sample from given standard normal noise (``from_noise``), so that one stream of normals is
all the randomness of a sample.
"""

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from pyrodiff.covariances import Covariance

__all__ = [
    "DiscretizedNormal",
    "GridCategorical",
    "LatentNormal",
    "LatentStructuredNormal",
    "Law",
    "Normal",
    "StructuredNormal",
    "from_noise",
    "latent",
    "of_one_dimension",
    "log_diff_exp",
    "log_normal_mass",
]

_Shape = torch.Size | list[int] | tuple[int, ...]


def log_diff_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(eᵃ − eᵇ) for a ≥ b, accurate for close and for distant a and b."""
    difference = b - a
    near = difference > -math.log(2)
    far_value = torch.log1p(-torch.where(near, -1.0, difference).exp())
    near_value = torch.log(-torch.expm1(torch.where(near, difference, -1.0)))
    return a + torch.where(near, near_value, far_value)


def log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Φ(upper) − Φ(lower)) for lower < upper, exact in both tails; ±∞ is allowed.

    The interval is mirrored so that its midpoint is negative: there both CDFs are small and
    their logarithms, not they themselves, are subtracted.
    """
    mirror = lower + upper > 0
    low, high = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
    open_end = torch.isinf(low)  # then the mass is Φ(high); −∞ must not meet a gradient,
    log_high = torch.special.log_ndtr(high)
    log_low = torch.special.log_ndtr(torch.where(open_end, 0.0, low))
    log_low = torch.where(open_end, log_high - 1.0, log_low)  # nor may log(e⁰ − e⁰)
    return torch.where(open_end, log_high, log_diff_exp(log_high, log_low))


class Normal(dist.Normal):
    """Pyro's normal, which can also say which sample a given noise stands for."""

    def from_noise(self, noise: Tensor) -> Tensor:
        """The sample that standard normal noise stands for: x̂_0 + s ε."""
        return self.loc + self.scale * noise

    def to_noise(self, value: Tensor) -> Tensor:
        """The noise that a sample stands for: (x − x̂_0)/s."""
        return (value - self.loc) / self.scale


def from_noise(law: "Law", noise: Tensor) -> Tensor:
    """The sample of a distribution over events that standard normal noise stands for."""
    if isinstance(law, StructuredNormal):
        return law.from_noise(noise)
    sample: Tensor = law.base_dist.from_noise(noise)
    return sample


def of_one_dimension(law: "Law") -> Distribution:
    """A distribution over events of one dimension as one over numbers."""
    if not isinstance(law, StructuredNormal):
        return law.base_dist
    scale = (0.5 * law.covariance.log_marginal(1)).exp()
    return Normal(law.loc, scale.expand(law.loc.shape), validate_args=False)


class DiscretizedNormal(dist.TorchDistribution):
    """A normal whose mass is collected in bins around the values of a grid; end bins are open."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real

    def __init__(self, loc: Tensor, scale: Tensor, bin_width: float, low: float, high: float):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.bin_width, self.low, self.high = bin_width, low, high
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> "DiscretizedNormal":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedNormal(loc, scale, self.bin_width, self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        half = self.bin_width / 2
        centered, infinity = value - self.loc, torch.full_like(value, math.inf)
        upper = torch.where(value > self.high - half, infinity, (centered + half) / self.scale)
        lower = torch.where(value < self.low + half, -infinity, (centered - half) / self.scale)
        return log_normal_mass(lower, upper)

    def sample(self, sample_shape: _Shape = ()) -> Tensor:
        return self.from_noise(torch.randn(self.shape(torch.Size(sample_shape))).to(self.loc))

    def from_noise(self, noise: Tensor) -> Tensor:
        """The sample that standard normal noise stands for: x̂_0 + s ε, rounded to the grid."""
        value = (self.loc + self.scale * noise).clamp(self.low, self.high)
        return self.low + ((value - self.low) / self.bin_width).round() * self.bin_width


class GridCategorical(dist.TorchDistribution):
    """A categorical distribution over the values of an even grid from ``low`` to ``high``."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real

    def __init__(self, logits: Tensor, low: float, high: float):
        self.logits, self.low, self.high = logits, low, high
        super().__init__(logits.shape[:-1], validate_args=False)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> "GridCategorical":
        shape = (*batch_shape, self.logits.shape[-1])
        return GridCategorical(self.logits.expand(shape), self.low, self.high)

    def _spacing(self) -> float:
        return (self.high - self.low) / (self.logits.shape[-1] - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        index = ((value - self.low) / self._spacing()).round().long().unsqueeze(-1)
        logits, index = torch.broadcast_tensors(self.logits, index)
        return logits.log_softmax(-1).gather(-1, index[..., :1]).squeeze(-1)

    def sample(self, sample_shape: _Shape = ()) -> Tensor:
        return self.from_noise(torch.randn(self.shape(torch.Size(sample_shape))).to(self.logits))

    def from_noise(self, noise: Tensor) -> Tensor:
        """The sample that standard normal noise stands for: the inverse CDF at Φ(ε)."""
        cumulative = self.logits.double().softmax(-1).cumsum(-1)[..., :-1]
        uniform = torch.special.ndtr(noise.double()).unsqueeze(-1)
        index = (uniform > cumulative).sum(-1)
        return self.low + index.to(noise) * self._spacing()


class StructuredNormal(dist.TorchDistribution):
    """A normal over events with a structured covariance.

    Args:
        loc: the mean, shape (*batch, *event_shape).
        covariance: Σ.
        event_dim: how many axes an event has.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, covariance: Covariance, event_dim: int):
        self.loc, self.covariance = loc, covariance
        batch, event = loc.shape[: loc.dim() - event_dim], loc.shape[loc.dim() - event_dim :]
        super().__init__(batch, event, validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: _Shape, _instance: object = None) -> "StructuredNormal":
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return type(self)(loc, self.covariance, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        event_dim, size = len(self.event_shape), self.event_shape.numel()
        squares = self.covariance.squared_norm(value - self.loc, event_dim)
        log_det = self.covariance.log_det(size, event_dim)
        return -0.5 * (squares + log_det + size * math.log(2 * math.pi))

    def rsample(self, sample_shape: _Shape = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.from_noise(torch.randn(shape, dtype=self.loc.dtype).to(self.loc.device))

    def from_noise(self, noise: Tensor) -> Tensor:
        """The sample that standard normal noise stands for: μ + Σ^½ ε."""
        return self.loc + self.covariance.color(noise, len(self.event_shape))

    def to_noise(self, value: Tensor) -> Tensor:
        """The noise that a sample stands for: Σ^−½ (x − μ)."""
        return self.covariance.whiten(value - self.loc, len(self.event_shape))


Law = dist.Independent | StructuredNormal
"""What the steps of a reverse chain are: distributions over events."""


class LatentNormal(Normal):
    """p_θ(x_0 | x_1) of a latent x_0; its analytic KL is refused (see below)."""


class LatentStructuredNormal(StructuredNormal):
    """The same with a structured covariance."""


def latent(law: Law) -> Law:
    """The distribution of an x_0 that a guide may draw."""
    if isinstance(law, StructuredNormal):
        return LatentStructuredNormal(law.loc, law.covariance, len(law.event_shape))
    normal = law.base_dist
    if not isinstance(normal, Normal):
        return law
    event_dim = law.reinterpreted_batch_ndims
    return LatentNormal(normal.loc, normal.scale, validate_args=False).to_event(event_dim)


@register_kl(torch.distributions.Normal, LatentNormal)
@register_kl(dist.Normal, LatentNormal)
@register_kl(dist.Independent, LatentStructuredNormal)
def _refuse_latent_kl(p: object, q: object) -> Tensor:
    raise ValueError(
        "Expected an observed x_0 for analytic KL terms (TraceMeanField_ELBO); got one that the "
        "guide draws: p(x_0 | x_1) depends on x_1, which the guide draws from x_0, so that the sum "
        "of the KLs is not the bound. Use Trace_ELBO."
    )


@register_kl(dist.Independent, StructuredNormal)
def _kl_of_structured(p: dist.Independent, q: StructuredNormal) -> Tensor:
    """KL of an isotropic normal, such as the posterior of the forward chain."""
    event_dim, scale = len(q.event_shape), p.base_dist.scale
    axes = zip(scale.shape[-event_dim:], scale.stride()[-event_dim:], strict=True)
    expanded = all(size == 1 or stride == 0 for size, stride in axes)
    if not isinstance(p.base_dist, dist.Normal) or not expanded:
        raise NotImplementedError  # one scale for the event is all that is known here
    one = scale.flatten(-event_dim)[..., 0].reshape(*scale.shape[:-event_dim], *(1,) * event_dim)
    return q.covariance.kl_from_isotropic(2 * one.log(), p.mean - q.loc, event_dim)
