r"""The covariance of x_0 given x_t that a denoiser knows, in the reverse step.

With x̂_0(x_t) = E[x_0 | x_t] the second moment is in its Jacobian (Tweedie's formula of second
order; Efron, 2011; Meng, Song, Li and Ermon, 2021):

    V(x_t) = Cov[x_0 | x_t] = (σ_t²/α_t) ∂x̂_0/∂x_t,

and the normal with the first two moments of x_{t−1} given x_t is

    p_θ(x_{t−1} | x_t) = N(c_0 x̂_0 + c_t x_t, β̃_t I + c_0² V(x_t)).

A trained network's Jacobian is not symmetric and has negative eigenvalues: its symmetric part is
taken and what is negative of it set to 0, so that Σ is positive definite whatever the network.

    isotropic    (tr V/d) I
    diagonal     diag V
    rank = r     r directions, and the diagonal of the rest
    full         V

Traces and diagonals are exact, from d products of the Jacobian with unit vectors, or Hutchinson's
(1990) from ``probes`` products with signs ±1, which are a fixed function of t: only so has the step
a density.  The directions are the Ritz vectors of Lanczos' method (1950) after 2r products, or 4r
beside an exact diagonal.  A product is one backward pass, and counts as a network call.

``fit`` calibrates V on other data, V ← a_t (w_t V + (1 − w_t) diag V), as a trained network's
Jacobian is no covariance; ``clipped`` says how much of it was negative.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyrodiff.checks import check_choice, check_count, check_positive
from pyrodiff.covariances import Covariance, Spread
from pyrodiff.denoisers import Prediction
from pyrodiff.kernels import Level, Step
from pyrodiff.variances.analytic import Denoising, predictions
from pyrodiff.variances.calibration import (
    JUMPS,
    calibration_at,
    check_calibration,
    fit_calibration,
)
from pyrodiff.variances.jacobian import (
    full_spread,
    largest_directions,
    negative_share,
    random_signs,
    random_words,
)
from pyrodiff.variances.knots import knots_of
from pyrodiff.variances.variance import Variance, floor

__all__ = ["PosteriorCovariance"]

_KINDS = ("isotropic", "diagonal", "full")
_LEAST = 1e-2  # of σ_1²: the variance at t = 1 in any direction


@dataclass(frozen=True, repr=False)
class PosteriorCovariance(Variance):
    """Σ_θ = β̃_t I + c_0² V(x_t), with V from the denoiser's Jacobian (formulas above).

    Args:
        kind: what is kept of V: ``"isotropic"``, ``"diagonal"`` or ``"full"``.
        rank: r, directions beside the diagonal: 2r products of the Jacobian, or 4r without probes.
        probes: products for the trace or the diagonal; None for the exact one, in d products.
        log_snrs: λ at which V is calibrated, decreasing; empty, the default, where it is not.
        weights: w at each of them, in [0, 1], linear in λ between them.
        scales: a at each of them, log a linear in λ between them.

    ``fit`` finds the last three.  At t = 1, where β̃_1 = 0, Σ is V itself, at least a hundredth of
    σ_1² in every direction.

    Raises:
        ValueError: an unknown kind; a rank or probes that the kind has no use for; a calibration
            that is none.
    """

    learned: ClassVar[bool] = False
    differentiates: ClassVar[bool] = True

    kind: str = "full"
    rank: int = 0
    probes: int | None = None
    log_snrs: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _KINDS)
        check_count("rank", self.rank, 0)
        if self.probes is not None:
            check_count("probes", self.probes)
        if self.rank and self.kind != "diagonal":
            raise ValueError(f"Expected rank with kind 'diagonal'; got it with {self.kind!r}.")
        if self.probes is not None and self.kind == "full":
            raise ValueError("Expected no probes for kind 'full', which is exact; got some.")
        check_calibration(self.log_snrs, self.weights, self.scales)

    def __repr__(self) -> str:
        fitted = f", calibrated at {len(self.log_snrs)} log-SNRs" if self.log_snrs else ""
        return (
            f"PosteriorCovariance(kind={self.kind!r}, rank={self.rank}, probes={self.probes}"
            f"{fitted})"
        )

    @property
    def depends_on_x(self) -> bool:
        return True

    def products(self, size: int) -> int:
        return self._steps(size) + (size if self.probes is None else self.probes)

    def _steps(self, size: int) -> int:
        return min((4 if self.probes is None else 2) * self.rank, size)  # of Lanczos' method

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        """That of x_0 ~ N(0, I), β_t: what is known before x_t is."""
        return step.log_large

    def predict(
        self, denoise: Callable[[Tensor], Prediction], x_t: Tensor, level: Level
    ) -> Prediction:
        trains = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t if trains and x_t.requires_grad else x_t.detach().clone().requires_grad_()
            x0_hat, raw, _ = denoise(x)

            def product(v: Tensor, last: bool) -> Tensor:
                """vᵀ ∂x̂_0/∂x_t, of the shape of x_t; 0 for a network that does not read x_t."""
                if not x0_hat.requires_grad:
                    return torch.zeros_like(x)
                (row,) = torch.autograd.grad(
                    x0_hat,
                    x,
                    v,
                    retain_graph=trains or not last,
                    create_graph=trains,
                    materialize_grads=True,
                )
                return row

            spread = self._spread(product, x, level)
        if self.log_snrs:
            weight, scale = calibration_at(self, level.log_snr, like=x)
            spread = spread.calibrated(weight, scale, tuple(x.shape[1:]))
        return Prediction(x0_hat if trains else x0_hat.detach(), raw, spread)

    def _spread(self, product: Callable[[Tensor, bool], Tensor], x: Tensor, level: Level) -> Spread:
        """V at x of shape (N, *event_shape)."""
        count = len(x)
        unit = (level.sigma.square() / level.alpha).reshape(-1, 1)
        t = level.t.reshape(-1).expand(count)

        def products(vectors: Tensor, last: bool = False) -> Tensor:
            """Those of the Jacobian with the columns of (N, d, r)."""
            columns = vectors.unbind(-1)
            rows = [
                product(v.reshape(x.shape), last and n == len(columns) - 1).flatten(1)
                for n, v in enumerate(columns)
            ]
            return unit.unsqueeze(-1) * torch.stack(rows, -1)

        if self.kind == "full":
            return full_spread(products, x)
        diagonal, directions, values = self._diagonal(products, x, t), None, None
        if self.rank:
            directions, values = self._directions(products, diagonal, t)
            along = values.clamp(min=0.0)
            diagonal = diagonal - (directions.square() * along.unsqueeze(1)).sum(-1)
        if self.kind == "isotropic":
            diagonal = diagonal.mean(1, keepdim=True)
            shape: tuple[int, ...] = (count, *(1,) * (x.dim() - 1))
        else:
            shape = tuple(x.shape)
        clipped = negative_share(diagonal if values is None else torch.cat([diagonal, values], 1))
        diagonal = diagonal.clamp(min=0.0).reshape(shape)
        return Spread(diagonal, directions, None if values is None else along, clipped)

    def _diagonal(self, products: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        """diag V, shape (N, d)."""
        size = x[0].numel()
        if self.probes is not None:
            signs = random_signs(t, self.probes, size).mT.to(x)
            return (signs * products(signs, not self.rank)).mean(-1)
        total = x.new_zeros(len(x), size)
        for i, row in enumerate(torch.eye(size).to(x)):
            unit, last = row.expand(total.shape), i == size - 1 and not self.rank
            total = total + unit * products(unit.unsqueeze(-1), last).squeeze(-1)
        return total

    def _directions(
        self, products: Callable[..., Tensor], diagonal: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Directions of much of V − diag V, (N, d, r), and its values there, (N, r)."""

        def off_diagonal(vectors: Tensor, last: bool = False) -> Tensor:
            return products(vectors, last) - diagonal.unsqueeze(-1) * vectors

        size = diagonal.shape[1]
        # not signs, which in few dimensions are eigenvectors too often
        start = random_words(-t, 1, size).mT.to(diagonal) * 2.0**-63
        return largest_directions(off_diagonal, start, self.rank, self._steps(size))

    def kl(self, step: Step, error: Tensor, prediction: Prediction, event_dim: int) -> Tensor:
        covariance = self.covariance(step, prediction, event_dim)
        return covariance.kl_from_isotropic(step.log_small, step.c_0 * error, event_dim)

    def covariance(self, step: Step, prediction: Prediction, event_dim: int) -> Covariance:
        assert prediction.spread is not None
        first = step.c_t == 0  # t = 1
        least = torch.where(first, _LEAST * step.sigma.square(), 0.0)
        diagonal = torch.maximum(prediction.spread.diagonal, least)
        spread = replace(prediction.spread, diagonal=diagonal)
        return Covariance.of(floor(step), step.c_0, spread, event_dim)

    @torch.no_grad()
    def fit(
        self,
        reverse: Denoising,
        x_0: Tensor,
        *,
        knots: int = 25,
        jumps: tuple[float, ...] = JUMPS,
        context: Tensor | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> "PosteriorCovariance":
        """The same covariance, calibrated to the least mean KL of steps on other data.

        One calibration serves every grid between the ends of the chain.  Without directions,
        where w has no meaning, a alone is fitted.

        Args:
            reverse: the model, in evaluation mode; its own variance is not used.
            x_0: other data than is to be judged, shape (N, *event_shape).
            knots: how many log-SNRs, even between the ends of the chain; N predictions each.
            jumps: the steps in λ over which the KL is averaged: about those of the chain in use.
            context: shape (N, …) or None.
            seed: of the noise.
            batch_size: rows per network call.
        """
        check_count("knots", knots)
        check_count("batch_size", batch_size)
        for jump in jumps:
            check_positive("jumps", jump)
        bare = replace(self, log_snrs=(), weights=(), scales=())
        log_snrs = knots_of(reverse.log_snrs, knots)
        predicted = predictions(
            reverse,
            x_0,
            log_snrs,
            context=context,
            seed=seed,
            batch_size=batch_size,
            variance=bare,
        )
        weights, scales = fit_calibration(bare, x_0, log_snrs, predicted, jumps)
        return replace(self, log_snrs=tuple(log_snrs.tolist()), weights=weights, scales=scales)

    @torch.no_grad()
    def clipped(
        self,
        reverse: Denoising,
        x_0: Tensor,
        *,
        knots: int = 25,
        context: Tensor | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> tuple[Tensor, Tensor]:
        """How much of V is negative, and set to 0, by noise level.

        Args:
            reverse, x_0, knots, context, seed, batch_size: see ``fit``.

        Returns:
            log-SNRs, shape (knots,), and the mean share of eigenvalues (for kind ``"full"``), of
            diagonal entries and values of directions, or of traces that are negative.
        """
        check_count("knots", knots)
        check_count("batch_size", batch_size)
        log_snrs = knots_of(reverse.log_snrs, knots)
        total = torch.zeros(knots, dtype=torch.float64)
        for index, _, _, prediction in predictions(
            reverse,
            x_0,
            log_snrs,
            context=context,
            seed=seed,
            batch_size=batch_size,
            variance=self,
        ):
            assert prediction.spread is not None and prediction.spread.clipped is not None
            total[index] += prediction.spread.clipped.double().sum().cpu()
        return log_snrs, total / len(x_0)
