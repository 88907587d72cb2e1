r"""The reverse step given y, where y is expanded as a Gaussian (``likelihoods``).

With x_0 ~ N(x̂_0, V) given x_t, δ = x_{t−1} − E[x_{t−1} | x_t] has covariance Σ* = β̃_t I + c_0² V,

    E[r | δ] = H δ,   H = c_0 A V Σ*⁻¹,   Cov[r | δ] = R = w A V Aᵀ + S − c_0 H V Aᵀ
    ψ_t(x_t) = e^c N(r; 0, w A V Aᵀ + S)                                            the twist

for w = 1, and w > 1 where V is not to be believed.  The chain's own step is δ ~ N(0, Σ).  x_{t−1}
is drawn from its law given y under these H and R, by Matheron's rule (Journel and Huijbregts,
1978): with δ ~ N(0, Σ) and η ~ N(0, R),

    δ' = δ + Σ Hᵀ Q⁻¹ (r − H δ − η),   Q = H Σ Hᵀ + R,
    log p_θ(x_{t−1} | x_t) − log q(x_{t−1} | x_t) = log N(r; 0, Q) − log N(r; H δ', R),

which is exact for any H and R, whatever they are worth.  At t = 1 it is x_0 itself that is drawn:
H = A and R = S, where p_θ(x_0 | x_1) is normal; from other decoders x_0 is drawn without y.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.conditioning.likelihoods import Expansion, Likelihood
from pyrodiff.conditioning.programs import Program
from pyrodiff.covariances import Covariance, Spread
from pyrodiff.denoisers import Prediction
from pyrodiff.distributions import Law, StructuredNormal, from_noise
from pyrodiff.likelihood.particles.smc import Proposal
from pyrodiff.likelihood.paths.weights import Move, predict
from pyrodiff.streams import NoiseStreams

__all__ = ["Conditioned", "TwistedProposal"]

_JITTER = 1e-10  # of the mean variance, added to a covariance of y


def _cholesky(matrix: Tensor) -> Tensor:
    """The root of a covariance (…, m, m), to rounding."""
    symmetric = 0.5 * (matrix + matrix.mT)
    scale = symmetric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)
    identity = torch.eye(matrix.shape[-1]).to(matrix)
    return torch.linalg.cholesky(symmetric + _JITTER * scale[..., None, None] * identity)


def _log_normal(residual: Tensor, root: Tensor) -> Tensor:
    """log N(r; 0, L Lᵀ), nats, shape (rows,)."""
    whitened = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    size = residual.shape[-1]
    constant = 0.5 * size * torch.log(2 * residual.new_tensor(torch.pi))
    return -0.5 * whitened.square().sum((-2, -1)) - log_det - constant


@dataclass(frozen=True, eq=False)
class Conditioned:
    """The law of a Gaussian step and of r = y − E[y] given δ.

    Args:
        covariance: Σ of the step, float64.
        slope: H, shape (rows, m, d).
        noise: R, shape (rows or 1, m, m).
        residual: r, shape (rows, m).
    """

    covariance: Covariance
    slope: Tensor
    noise: Tensor
    residual: Tensor
    event_dim: int

    @cached_property
    def _noise_root(self) -> Tensor:
        return _cholesky(self.noise)

    @cached_property
    def _gain(self) -> tuple[Tensor, Tensor]:
        """Σ Hᵀ, shape (rows, d, m), and the root of Q."""
        spread = self.covariance.multiply(self.slope.mT, self.event_dim)
        return spread, _cholesky(self.slope @ spread + self.noise)

    def draw(self, noise: Tensor, observation_noise: Tensor) -> tuple[Tensor, Tensor]:
        """δ' for standard normals of shape (rows, *event_shape) and (rows, m), and log p/q."""
        spread, root = self._gain
        delta = self.covariance.color(noise.double(), self.event_dim).flatten(1)
        eta = (self._noise_root @ observation_noise.double().unsqueeze(-1)).squeeze(-1)
        gap = self.residual - (self.slope @ delta.unsqueeze(-1)).squeeze(-1) - eta
        delta = delta + (spread @ torch.cholesky_solve(gap.unsqueeze(-1), root)).squeeze(-1)
        left = self.residual - (self.slope @ delta.unsqueeze(-1)).squeeze(-1)
        log_ratio = _log_normal(self.residual, root) - _log_normal(left, self._noise_root)
        return delta.reshape(noise.shape), log_ratio


def _double(value: Tensor) -> Tensor:
    return value.double()


class Outlook(NamedTuple):
    """What is known of y at x_t: its expansion, V, V Aᵀ of shape (rows, d, m), w A V Aᵀ + S."""

    expansion: Expansion
    spread: Spread
    columns: Tensor
    total: Tensor


@dataclass(eq=False)
class TwistedProposal(Proposal):
    """Particles from the chain's steps given y, and the twist that they are resampled by.

    Args:
        reverse: the chain.
        program: what is observed of x_0.
        likelihood: how it is expanded.
        widening: w.
    """

    reverse: ReverseChain
    program: Program
    likelihood: Likelihood
    widening: float = 1.0
    _last: tuple[Tensor, Outlook | None] | None = field(default=None, init=False)

    def first(self, streams: NoiseStreams) -> Move:
        """x_T given y, where x_0 is expanded at x_T = 0: x̂_0(0) + (α/σ²) V(0) x_T."""
        reverse, noise = self.reverse, streams.normal(self.reverse.prototype())
        origin, t = torch.zeros_like(noise[:1]), reverse.num_steps
        prediction = predict(reverse, origin, t, self.program.context)
        ahead = self._outlook(origin, t, prediction)
        if ahead is None:
            return Move(noise, noise.new_zeros(len(noise), dtype=torch.float64))
        level = reverse.step(t, origin).map(_double)
        slope = (level.alpha / level.sigma.square()).reshape(-1, 1, 1) * ahead.columns.mT
        rows = len(noise)
        conditioned = Conditioned(
            covariance=Covariance(slope.new_zeros(rows, *(1 for _ in reverse.event_shape))),
            slope=slope.expand(rows, -1, -1),
            noise=ahead.total,
            residual=ahead.expansion.residual.expand(rows, -1),
            event_dim=reverse.event_dim,
        )
        x, log_ratio = conditioned.draw(noise, self._more(streams, noise, ahead.expansion))
        return Move(x.to(noise), log_ratio)

    def potential(self, x_t: Tensor, t: int, prediction: Prediction) -> Tensor:
        """log ψ_t, nats, float64, shape (rows,)."""
        ahead = self._outlook(x_t, t, prediction)
        if ahead is None:
            return x_t.new_zeros(len(x_t), dtype=torch.float64)
        density = _log_normal(ahead.expansion.residual, _cholesky(ahead.total))
        return ahead.expansion.log_constant + density

    def move(self, x_t: Tensor, t: int, prediction: Prediction, streams: NoiseStreams) -> Move:
        if t == 1:
            return self._decode(x_t, prediction, streams)
        step = self.reverse.step(t, x_t)
        ahead = self._outlook(x_t, t, prediction)
        covariance = self.reverse.variance.covariance(step, prediction, self.reverse.event_dim)
        mean = step.mean(prediction.x0_hat, x_t)
        noise = streams.normal(x_t)
        if ahead is None:
            delta = covariance.color(noise, self.reverse.event_dim)
            return Move(mean + delta, x_t.new_zeros(len(x_t), dtype=torch.float64))
        wide = step.map(_double)
        own = Covariance.of(wide.log_small.exp(), wide.c_0, ahead.spread, self.reverse.event_dim)
        c_0 = wide.c_0.reshape(-1, 1, 1)
        slope = c_0 * own.solve(ahead.columns, self.reverse.event_dim).mT
        conditioned = Conditioned(
            covariance=covariance.map(_double),
            slope=slope,
            noise=ahead.total - c_0 * slope @ ahead.columns,
            residual=ahead.expansion.residual,
            event_dim=self.reverse.event_dim,
        )
        delta, log_ratio = conditioned.draw(noise, self._more(streams, x_t, ahead.expansion))
        return Move((mean + delta).to(x_t), log_ratio)

    def _decode(self, x_1: Tensor, prediction: Prediction, streams: NoiseStreams) -> Move:
        """x_0 given y, and the rest of the target, log p_θ(x_0 | x_1) p(y | x_0)/q."""
        step = self.reverse.step(1, x_1)
        law, noise = self.reverse.reconstruction(x_1, step, prediction), streams.normal(x_1)
        covariance = _covariance(law)
        ahead = self._outlook(x_1, 1, prediction)
        if ahead is None or covariance is None:
            x = from_noise(law, noise)
            return Move(x, self.program.log_likelihood(x))
        conditioned = Conditioned(
            covariance=covariance.map(_double),
            slope=ahead.expansion.matrix.expand(len(x_1), -1, -1),
            noise=ahead.expansion.noise,
            residual=ahead.expansion.residual,
            event_dim=self.reverse.event_dim,
        )
        delta, log_ratio = conditioned.draw(noise, self._more(streams, x_1, ahead.expansion))
        x = (law.mean + delta).to(x_1)
        return Move(x, log_ratio + self.program.log_likelihood(x))

    def _more(self, streams: NoiseStreams, x: Tensor, expansion: Expansion) -> Tensor:
        """Standard normals for y, shape (rows, m)."""
        size, event = expansion.residual.shape[1], self.reverse.event_shape.numel()
        draws = [streams.normal(x).flatten(1) for _ in range(-(-size // event))]
        return torch.cat(draws, 1)[:, :size]

    def _outlook(self, x_t: Tensor, t: int, prediction: Prediction) -> Outlook | None:
        """What is known of y at x_t, kept for the move that follows without resampling."""
        if self._last is None or self._last[0] is not x_t:
            expansion = self.likelihood.expand(self.program, prediction.x0_hat)
            self._last = x_t, None
            if expansion is not None:
                step = self.reverse.step(t, x_t)
                spread = self.reverse.variance.spread(step, prediction)
                columns = spread.multiply(expansion.matrix.mT)
                total = self.widening * (expansion.matrix @ columns) + expansion.noise
                self._last = x_t, Outlook(expansion, spread, columns, total)
        return self._last[1]


def _covariance(law: Law) -> Covariance | None:
    """Σ of a normal law, or None for another."""
    if isinstance(law, StructuredNormal):
        return law.covariance
    if isinstance(law, dist.Independent) and isinstance(law.base_dist, dist.Normal):
        return Covariance(2 * law.base_dist.scale.log())
    return None
