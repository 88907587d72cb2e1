r"""What an observation says of x_0, as a Gaussian: the twists of conditioning.

Near x̂_0, a likelihood p(y | x_0) is replaced by

    e^c N(r; A (x_0 − x̂_0), S)

so that with x_0 ~ N(x̂_0, V) its mean is e^c N(r; 0, A V Aᵀ + S).

    LinearGaussian    y = A x_0 + b + noise: exact, with r = y − A x̂_0 − b and c = 0
    Moments           y of mean m(x_0) and covariance S(x_0): A = ∂m/∂x_0, S and r = y − m at x̂_0
    Gradient          any p(y | x_0): log p + gᵀ(x_0 − x̂_0) − ½ (gᵀ(x_0 − x̂_0))², with g = ∇ log p
                      and g gᵀ for the information, so that A = gᵀ, r = S = 1
    Blind             nothing: the particles of the prior, weighted in the end

The first is found from the program where it holds.  A wrong one costs particles, never truth.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.conditioning.programs import ObservedSite, Program

__all__ = ["Blind", "Expansion", "Gradient", "Likelihood", "LinearGaussian", "Moments", "found"]

_TOLERANCE = 1e-4  # of a mean that counts as affine, relative
_POINTS = 3  # at which it is tried


class Expansion(NamedTuple):
    """e^c N(r; A (x_0 − x̂_0), S) at each row; float64.

    ``matrix`` A (rows or 1, m, d), ``residual`` r (rows, m), ``noise`` S (rows or 1, m, m),
    ``log_constant`` c (rows,).
    """

    matrix: Tensor
    residual: Tensor
    noise: Tensor
    log_constant: Tensor


class Likelihood(ABC):
    """How p(y | x_0) is expanded around x̂_0."""

    @abstractmethod
    def expand(self, program: Program, x0_hat: Tensor) -> Expansion | None:
        """The expansion at x̂_0 of shape (rows, *event_shape), or None for no information."""


@dataclass(frozen=True, eq=False)
class LinearGaussian(Likelihood):
    """y = A x_0 + b + noise of covariance S.

    Args:
        matrix: A, shape (m, d), of the flattened x_0.
        noise: S, shape (m, m), or its diagonal (m,), or one variance ().
        value: y, shape (m,).
        offset: b, shape (m,) or None.

    Raises:
        ValueError: shapes that do not fit.
    """

    matrix: Tensor
    noise: Tensor
    value: Tensor
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        size = len(self.value)
        shapes = {"noise": self.noise.shape in ((), (size,), (size, size))}
        shapes["matrix"] = self.matrix.dim() == 2 and self.matrix.shape[0] == size
        shapes["offset"] = self.offset is None or self.offset.shape == (size,)
        for name, fits in shapes.items():
            if not fits:
                shape = tuple(getattr(self, name).shape)
                raise ValueError(f"Expected {name} to fit {size} observations; got {shape}.")

    def __repr__(self) -> str:
        return f"LinearGaussian({len(self.value)} values)"

    def expand(self, program: Program, x0_hat: Tensor) -> Expansion:
        matrix = self.matrix.to(x0_hat.device, torch.float64)
        flat = x0_hat.flatten(1).double()
        if matrix.shape[1] != flat.shape[1]:
            raise ValueError(
                f"Expected a matrix for events of {flat.shape[1]} values; got {matrix.shape[1]}."
            )
        residual = self.value.to(matrix) - flat @ matrix.mT
        if self.offset is not None:
            residual = residual - self.offset.to(matrix)
        noise = self.noise.to(matrix)
        if noise.dim() < 2:
            noise = torch.diag(noise.expand(len(self.value)))
        return Expansion(matrix[None], residual, noise[None], flat.new_zeros(len(flat)))


@dataclass(frozen=True)
class Moments(Likelihood):
    """The mean of the observed sites, linearised at x̂_0, and their variance there."""

    def expand(self, program: Program, x0_hat: Tensor) -> Expansion:
        def moments(x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _moments(program.sites(x_0))

        def expansion(x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, noise, value = moments(x_0)
            matrix = torch.func.jacrev(lambda x: moments(x)[0])(x_0)
            return matrix.flatten(1), value - mean, noise

        matrix, residual, noise = program.map(expansion, x0_hat)
        zero = residual.new_zeros(len(residual), dtype=torch.float64)
        return Expansion(matrix.double(), residual.double(), noise.double(), zero)


@dataclass(frozen=True)
class Gradient(Likelihood):
    """The log-likelihood's gradient at x̂_0, and its square for the information."""

    def expand(self, program: Program, x0_hat: Tensor) -> Expansion:
        with torch.enable_grad():
            x = x0_hat.detach().requires_grad_()
            log_likelihood = program.log_likelihood(x)
            (gradient,) = torch.autograd.grad(log_likelihood.sum(), x)
        matrix = gradient.flatten(1).double().unsqueeze(1)
        one = matrix.new_ones(len(matrix), 1)
        # log N(1; u, 1) = u − ½ u² − ½ − ½ log 2π
        constant = log_likelihood.detach() + 0.5 + 0.5 * torch.log(2 * one.new_tensor(torch.pi))
        return Expansion(matrix, one, one.unsqueeze(-1), constant)


@dataclass(frozen=True)
class Blind(Likelihood):
    """Nothing is known of y before x_0 is drawn."""

    def expand(self, program: Program, x0_hat: Tensor) -> None:
        return None


def _moments(sites: list[ObservedSite]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (m,), covariance (m, m) and value (m,) of all observed sites."""
    means, noises, values = [], [], []
    for site in sites:
        law = site.law
        mean = law.mean.expand(site.value.shape)
        covariance = getattr(law, "covariance_matrix", None)
        if covariance is not None:
            blocks = covariance.reshape(-1, *covariance.shape[-2:])
            noise = torch.block_diag(*blocks)
        else:
            noise = torch.diag(law.variance.expand(mean.shape).flatten())
        means.append(mean.flatten())
        noises.append(noise)
        values.append(site.value.flatten().to(mean))
    noise = noises[0] if len(noises) == 1 else torch.block_diag(*noises)
    return torch.cat(means), noise, torch.cat(values)


def _is_normal(law: object) -> bool:
    base = law
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    return isinstance(base, torch.distributions.Normal | torch.distributions.MultivariateNormal)


def found(program: Program, reverse: ReverseChain) -> Likelihood:
    """The sharpest expansion that the program allows.

    Linear and Gaussian where the observed sites are normal, with a mean that is affine in x_0 and
    a covariance that is constant, as tried at a few points; else by moments where the sites have
    finite ones that can be differentiated; else by the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_POINTS, *reverse.event_shape)
    points = torch.randn(shape, generator=generator).to(reverse.prototype())
    sites = program.sites(points[:1])
    if any(site.weighted for site in sites):
        return Gradient()
    try:
        expansion = Moments().expand(program, points)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):
        return Gradient()
    if not all(bool(part.isfinite().all()) for part in expansion):
        return Gradient()
    matrix, residual, noise, _ = expansion
    flat = points.flatten(1).double()
    # y − m(x) + A x is the same at every x where m is affine
    constant = residual + torch.einsum("kmd,kd->km", matrix, flat)
    affine = all(_same(part) for part in (matrix, constant, noise))
    if affine and all(_is_normal(site.law) for site in sites):
        return LinearGaussian(matrix[0], noise[0], constant[0])
    return Moments() if bool((noise.diagonal(dim1=-2, dim2=-1) > 0).all()) else Gradient()


def _same(rows: Tensor) -> bool:
    """Whether all rows are alike, to rounding."""
    scale = rows.abs().amax().clamp(min=1e-30)
    return bool(((rows - rows[:1]).abs() <= _TOLERANCE * scale).all())
