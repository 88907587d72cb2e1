r"""Covariances of the reverse step, by their structure: a diagonal, and a few directions or all.

Every one of them is a diagonal D, widened by r columns B,

    Σ = D^½ (I + B Bᵀ) D^½,

so that all that is needed of it costs r products of vectors and the matrix M = I + Bᵀ B, r × r:

    log |Σ|   = Σ log D + log |M|
    ‖y‖²_Σ    = yᵀ Σ⁻¹ y = ‖y'‖² − (Bᵀ y')ᵀ M⁻¹ Bᵀ y',           y' = D^−½ y       (Woodbury, 1950)
    Σ^½ z     = D^½ (z + B f(BᵀB) Bᵀ z),                          f(s) = 1/(1 + √(1 + s))
    Σ^−½ y    = y' − B g(BᵀB) Bᵀ y',                              g(s) = f(s)/√(1 + s)

and for r = 0 nothing but the diagonal's.  (D^½ (I + B Bᵀ)^½ is a root of Σ, not the symmetric one.)
An isotropic D stays one number for each sample; then orthonormal directions make a diagonal M, and
nothing is factorised.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyrodiff.kernels import gaussian_kl

__all__ = ["Covariance", "Spread"]


@dataclass(frozen=True, eq=False)
class Spread:
    """A positive semidefinite V = diag(a) + U diag(v) Uᵀ of one event, for each sample.

    Args:
        diagonal: a ≥ 0, of the shape of x, or (N, 1, …) where it is isotropic.
        directions: U, orthonormal, shape (N, d, r), or None for r = 0.
        values: v ≥ 0, shape (N, r), or None.
        clipped: the share of a and v that were negative and set to 0, shape (N,), or None where
            it is not known.
    """

    diagonal: Tensor
    directions: Tensor | None = None
    values: Tensor | None = None
    clipped: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Spread":
        """V with every tensor changed alike: rows of it, say."""
        diagonal, *others = (
            None if value is None else change(value)
            for value in (self.diagonal, self.directions, self.values, self.clipped)
        )
        assert diagonal is not None
        return Spread(diagonal, *others)

    def multiply(self, columns: Tensor) -> Tensor:
        """V Y, shape (N, d, m), of Y of shape (N, d, m) or (1, d, m)."""
        product = self.diagonal.flatten(1).unsqueeze(-1) * columns
        if self.directions is None or self.values is None:
            return product
        along = self.values.unsqueeze(-1) * (self.directions.mT @ columns)
        return product + self.directions @ along

    def calibrated(self, weight: Tensor, scale: Tensor, event_shape: tuple[int, ...]) -> "Spread":
        """scale · (weight · V + (1 − weight) diag V), which is positive semidefinite, too.

        Args:
            weight: in [0, 1], shape (N,) or (1,).
            scale: positive, shape (N,) or (1,).
            event_shape: of x.
        """
        axes = (-1, *(1 for _ in self.diagonal.shape[1:]))
        diagonal = scale.reshape(axes) * self.diagonal
        if self.directions is None or self.values is None:
            return replace(self, diagonal=diagonal)
        of_directions = (self.directions.square() * self.values.unsqueeze(1)).sum(-1)
        moved = (scale * (1 - weight)).unsqueeze(-1) * of_directions
        diagonal = diagonal + moved.reshape(-1, *event_shape)
        return replace(self, diagonal=diagonal, values=(scale * weight).unsqueeze(-1) * self.values)


def _per_sample(value: Tensor, event_dim: int) -> Tensor:
    """An isotropic coefficient as shape (*batch, 1), or ()."""
    return value.flatten(-event_dim) if value.dim() else value


def _root_of(values: Tensor) -> Tensor:
    """√v, with the gradient 0 at 0."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


@dataclass(frozen=True, eq=False)
class Covariance:
    """Σ of the flattened event, for each sample.

    Args:
        log_diagonal: log D, broadcastable to x of shape (*batch, *event_shape).
        factor: B, shape (*batch, d, r), or None for r = 0.
        orthogonal: whether the columns of B are orthogonal.
    """

    log_diagonal: Tensor
    factor: Tensor | None = None
    orthogonal: bool = False

    @classmethod
    def of(cls, floor: Tensor, scale: Tensor, spread: Spread, event_dim: int) -> "Covariance":
        """floor · I + scale² V.

        Args:
            floor: the variance that every direction has, broadcastable to x, isotropic.
            scale: c_0, broadcastable to x, isotropic.
            spread: V.
            event_dim: how many axes an event has.
        """
        diagonal = floor + scale.square() * spread.diagonal
        if spread.directions is None or spread.values is None:
            return cls(diagonal.log())
        widths = _per_sample(scale.abs(), event_dim) * _root_of(spread.values)
        columns = spread.directions * widths.unsqueeze(-2)
        flat = diagonal.flatten(-event_dim)
        factor = columns / flat.unsqueeze(-1).sqrt()
        return cls(diagonal.log(), factor, orthogonal=flat.shape[-1] == 1)

    @cached_property
    def _gram(self) -> Tensor:
        """Bᵀ B, shape (*batch, r, r), or its diagonal, (*batch, r), where it has no more."""
        assert self.factor is not None
        return self.factor.square().sum(-2) if self.orthogonal else self.factor.mT @ self.factor

    @cached_property
    def _root(self) -> Tensor:
        """L of M = L Lᵀ, shape (*batch, r, r), or its diagonal, (*batch, r)."""
        if self.orthogonal:
            return (1 + self._gram).sqrt()
        return torch.linalg.cholesky(self._gram + torch.eye(self._gram.shape[-1]).to(self._gram))

    def _along(self, y: Tensor) -> Tensor:
        """L⁻¹ Bᵀ y, shape (*batch, r), of y of shape (*batch, d)."""
        assert self.factor is not None
        along = (self.factor.mT @ y.unsqueeze(-1)).squeeze(-1)
        if self.orthogonal:
            return along / self._root
        return torch.linalg.solve_triangular(self._root, along.unsqueeze(-1), upper=False).squeeze(
            -1
        )

    def log_det(self, size: int, event_dim: int) -> Tensor:
        """log |Σ| of events of ``size`` values, shape (*batch,) or ()."""
        return self._total(self.log_diagonal, size, event_dim) + self._log_excess()

    def squared_norm(self, y: Tensor, event_dim: int) -> Tensor:
        """yᵀ Σ⁻¹ y, shape (*batch,), of y of shape (*batch, *event_shape)."""
        scaled = ((-0.5 * self.log_diagonal).exp() * y).flatten(-event_dim)
        squares = scaled.square().sum(-1)
        if self.factor is None:
            return squares
        return squares - self._along(scaled).square().sum(-1)

    def multiply(self, columns: Tensor, event_dim: int) -> Tensor:
        """Σ Y, shape (*batch, d, m), of Y of that shape."""
        root = self._flat_root(event_dim)
        scaled = root * columns
        if self.factor is not None:
            scaled = scaled + self.factor @ (self.factor.mT @ scaled)
        return root * scaled

    def solve(self, columns: Tensor, event_dim: int) -> Tensor:
        """Σ⁻¹ Y, shape (*batch, d, m), of Y of that shape."""
        root = self._flat_root(event_dim)
        scaled = columns / root
        if self.factor is not None:
            along = self.factor.mT @ scaled
            if self.orthogonal:
                along = along / (1 + self._gram).unsqueeze(-1)
            else:
                along = torch.cholesky_solve(along, self._root)
            scaled = scaled - self.factor @ along
        return scaled / root

    def _flat_root(self, event_dim: int) -> Tensor:
        """D^½, shape (*batch, d or 1, 1)."""
        root = (0.5 * self.log_diagonal).exp()
        return root.flatten(-event_dim).unsqueeze(-1) if root.dim() else root

    def map(self, change: Callable[[Tensor], Tensor]) -> "Covariance":
        """Σ with every tensor changed alike."""
        factor = None if self.factor is None else change(self.factor)
        return replace(self, log_diagonal=change(self.log_diagonal), factor=factor)

    def color(self, noise: Tensor, event_dim: int) -> Tensor:
        """D^½ (I + B Bᵀ)^½ z, of the shape of ``noise``, (*batch, *event_shape)."""
        if self.factor is not None:
            noise = noise + self._shares(noise, event_dim, lambda root: 1 / (1 + root))
        return (0.5 * self.log_diagonal).exp() * noise

    def whiten(self, y: Tensor, event_dim: int) -> Tensor:
        """(I + B Bᵀ)^−½ D^−½ y, the noise that ``color`` takes to y; of the shape of ``y``."""
        scaled = (-0.5 * self.log_diagonal).exp() * y
        if self.factor is None:
            return scaled
        return scaled - self._shares(scaled, event_dim, lambda root: 1 / (root * (1 + root)))

    def _shares(self, x: Tensor, event_dim: int, share: Callable[[Tensor], Tensor]) -> Tensor:
        """B h(√(1 + BᵀB)) Bᵀ x for a function h of the eigenvalues, of the shape of ``x``."""
        assert self.factor is not None
        along = self.factor.mT @ x.flatten(-event_dim).unsqueeze(-1)
        if self.orthogonal:
            along = share((1 + self._gram).sqrt()).unsqueeze(-1) * along
        else:
            gram, basis = torch.linalg.eigh(self._gram)
            shares = share((1 + gram.clamp(min=0.0)).sqrt()).unsqueeze(-1)
            along = basis @ (shares * (basis.mT @ along))
        return (self.factor @ along).squeeze(-1).reshape(x.shape)

    def log_marginal(self, event_dim: int) -> Tensor:
        """log diag Σ, of the shape of x or isotropic."""
        if self.factor is None:
            return self.log_diagonal
        return self.log_diagonal.flatten(-event_dim) + self.factor.square().sum(-1).log1p()

    def kl_from_isotropic(self, log_variance: Tensor, difference: Tensor, event_dim: int) -> Tensor:
        """KL(N(m + y, s I) ‖ N(m, Σ)), nats, shape (*batch,).

            ½ (tr s Σ⁻¹ − d − log s^d/|Σ| + yᵀ Σ⁻¹ y)

        Args:
            log_variance: log s, broadcastable to x, isotropic.
            difference: y, shape (*batch, *event_shape).
            event_dim: how many axes an event has.
        """
        if self.factor is None:
            return gaussian_kl(difference, log_variance, self.log_diagonal, event_dim)
        nothing = torch.zeros_like(difference)
        diagonal = gaussian_kl(nothing, log_variance, self.log_diagonal, event_dim)
        ratio = (log_variance - self.log_diagonal).exp().expand(difference.shape)
        squares = self.squared_norm(difference, event_dim)
        trace = self._trace(ratio.flatten(-event_dim))
        return diagonal + 0.5 * (squares + self._log_excess() - trace)

    def _trace(self, weights: Tensor) -> Tensor:
        """tr M⁻¹ Bᵀ diag(w) B, shape (*batch,)."""
        assert self.factor is not None
        if self.orthogonal:
            inner = (weights.unsqueeze(-1) * self.factor.square()).sum(-2)
            return (inner / (1 + self._gram)).sum(-1)
        inner = self.factor.mT @ (weights.unsqueeze(-1) * self.factor)
        return torch.cholesky_solve(inner, self._root).diagonal(dim1=-2, dim2=-1).sum(-1)

    def log_ratio(
        self, noise: Tensor, difference: Tensor, log_variance: Tensor, event_dim: int
    ) -> Tensor:
        """log N(m + y; m, Σ) − log N(√s z; 0, s I), nats, shape (*batch,).

            ½ (‖z‖² − yᵀ Σ⁻¹ y − log |Σ|/s^d)

        Args:
            noise: z.
            difference: y, how far the draw is from the mean of Σ's normal.
            log_variance: log s, broadcastable to x, isotropic.
            event_dim: how many axes an event has.
        """
        size = noise.shape[-event_dim:].numel()
        squares = noise.flatten(-event_dim).square().sum(-1)
        log_ratio = self._total(self.log_diagonal - log_variance, size, event_dim)
        norm = self.squared_norm(difference, event_dim)
        return 0.5 * (squares - norm - log_ratio - self._log_excess())

    def _total(self, values: Tensor, size: int, event_dim: int) -> Tensor:
        """The sum over an event of ``size`` values, of which isotropic ones hold one."""
        if values.dim() == 0:
            return values * size
        flat = values.flatten(-event_dim)
        return flat.sum(-1) * (size // flat.shape[-1])

    def _log_excess(self) -> Tensor | float:
        """log |M|."""
        if self.factor is None:
            return 0.0
        root = self._root if self.orthogonal else self._root.diagonal(dim1=-2, dim2=-1)
        return 2 * root.log().sum(-1)
