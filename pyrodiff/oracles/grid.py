r"""log p_θ(x_0) of a chain over one dimension, whatever its network, by quadrature on a grid.

The density of x_t under the model, from p(x_T) = N(0, 1), is carried through every transition

    p_θ(x_{t−1}) = ∫ p_θ(x_t) N(x_{t−1}; μ_t(x_t), s_t(x_t)²) dx_t,   t = T … 2,
    p_θ(x_0)     = ∫ p_θ(x_1) p_θ(x_0 | x_1) dx_1,

with the trapezoid rule on an even grid of spacing h.  On a smooth integrand that vanishes at
both ends its error is of order exp(−2π² r²), with r the width of the kernel over h:

    r = s / (h max(1, |μ'|)),

as a slope of μ narrows the kernel in x_t.  At r = 1 the error is 3e-9 in the density, and
relatively more in far tails.  From points of r < 1 the transition's mass is put into the cells by
differences of the normal CDF, which loses none but widens s² by h²/12: a warning is given, and
below r = ½ an error.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.decoders import CategoricalDecoder
from pyrodiff.distributions import of_one_dimension
from pyrodiff.oracles.linear import network_tensor

__all__ = ["GridOracle"]

_NEGLIGIBLE = 1e-7  # mass that may be lost, or badly resolved, without a warning
_BLOCK = 2**20  # entries of the transition matrix formed at once


class GridOracle:
    """The exact density of a chain with event shape (1,), computed on construction.

    Args:
        reverse: any chain over one dimension: any network, variance (learned ones too) and
            decoder.  Its network is evaluated in the mode (train, eval) that it is in.
        low, high: the ends of the grid, the same for every x_t: wide enough for N(0, 1) as for
            every p_θ(x_t).
        points: the number of grid points, of order (high − low) / (smallest scale).
            Costs T · points² operations at most and keeps T · points values.
        context: one context, shape (…), given to the network at every point; None for none.

    Attributes:
        grid: shape (points,), float64.
        densities: p_θ(x_t) on the grid, shape (T, points), index t − 1.

    Raises:
        ValueError: another event shape, an empty range, fewer than 2 points; a grid too narrow
            (mass is lost over its ends) or too coarse (r < ½ above).

    Warns:
        UserWarning: a grid that is rather coarse (½ ≤ r < 1).
    """

    @torch.no_grad()
    def __init__(
        self,
        reverse: ReverseChain,
        low: float,
        high: float,
        points: int,
        context: Tensor | None = None,
    ):
        if reverse.event_shape != (1,):
            raise ValueError(
                f"Expected a chain with event_shape (1,); got {tuple(reverse.event_shape)}."
            )
        if not (low < high and math.isfinite(low) and math.isfinite(high)) or points < 2:
            raise ValueError(
                f"Expected finite low < high and points >= 2; got {low}, {high}, {points}."
            )
        self.reverse = reverse
        self.event_shape = reverse.event_shape
        self.grid = torch.linspace(low, high, points, dtype=torch.float64)
        self.spacing = (high - low) / (points - 1)
        like = reverse.forward_chain.carry(network_tensor(reverse), exact=True)
        self._inputs = self.grid.to(like).unsqueeze(-1)
        self._context = None if context is None else context.expand(points, *context.shape)
        normal = torch.exp(-0.5 * self.grid.square()) / math.sqrt(2 * math.pi)
        densities = [self._checked(normal, reverse.num_steps)]
        for t in range(reverse.num_steps, 1, -1):
            densities.append(self._checked(self._propagate(densities[-1], t), t - 1))
        self.densities: Float[Tensor, "T points"] = torch.stack(densities[::-1])
        self._decoder: Any = of_one_dimension(reverse.decode(self._inputs, self._context))
        self._check_decoder()

    def log_prob(self, x_0: Tensor) -> Float[Tensor, " n"]:
        """log p_θ(x_0) in nats (a log probability for a discrete decoder), (N, 1) to (N,).

        Exact between grid points too: x_0 enters through the decoder's own density.

        Raises:
            ValueError: data of another shape, not finite, or not for this decoder.
        """
        self.reverse.check_data(x_0)
        values, inverse = x_0.detach().to("cpu", torch.float64).unique(return_inverse=True)
        law, log_mass = self._decoder, self._log_mass()
        per_value = len(self.grid) * (law.logits.shape[-1] if hasattr(law, "logits") else 1)
        result = []
        with torch.no_grad():
            for block in values.split(max(1, _BLOCK // per_value)):
                log_likelihood = law.log_prob(block[:, None, None].to(self._inputs.device))
                log_likelihood = log_likelihood.squeeze(-1).to("cpu", torch.float64)
                result.append((log_mass + log_likelihood).logsumexp(-1))
        return torch.cat(result)[inverse.cpu()].reshape(len(x_0))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n 1"]:
        """n ancestral samples of the chain, shape (N, 1)."""
        context = (
            None if self._context is None else self._context[:1].expand(n, *self._context.shape[1:])
        )
        return self.reverse.sample(n, context=context, seed=seed)

    # -- the quadrature ------------------------------------------------------------------------

    def _log_mass(self) -> Tensor:
        """log of p_θ(x_1) h, normalised (its sum is 1 within the tolerance already checked)."""
        mass = self.densities[0]
        return (mass / mass.sum()).log()

    def _propagate(self, density: Tensor, t: int) -> Tensor:
        law: Any = of_one_dimension(self.reverse.transition(self._inputs, t, self._context))
        mean, scale = (v.squeeze(-1).to("cpu", torch.float64) for v in (law.loc, law.scale))
        resolution = self._resolution(mean, scale)
        self._check_resolution(resolution, density, f"the transition at t = {t}")
        mass, half = density * self.spacing, 0.5 * self.spacing
        used = (mass > 0).nonzero().flatten()
        result = torch.zeros_like(density)
        for block in used.split(max(1, _BLOCK // len(density))):
            wide = block[resolution[block] >= 1]
            z = (self.grid - mean[wide, None]) / scale[wide, None]
            weight = mass[wide] / (scale[wide] * math.sqrt(2 * math.pi))
            result += weight @ torch.exp(-0.5 * z.square())
            narrow = block[resolution[block] < 1]
            if len(narrow):
                centered = self.grid - mean[narrow, None]
                upper, lower = (
                    torch.special.ndtr((centered + shift) / scale[narrow, None])
                    for shift in (half, -half)
                )
                result += (mass[narrow] / self.spacing) @ (upper - lower)
        return result

    def _resolution(self, mean: Tensor, scale: Tensor) -> Tensor:
        """r of the module's docstring at each grid point."""
        (slope,) = torch.gradient(mean, spacing=self.spacing)
        return scale / (self.spacing * slope.abs().clamp(min=1.0))

    # -- the checks ----------------------------------------------------------------------------

    def _checked(self, density: Tensor, t: int) -> Tensor:
        mass = float(density.sum() * self.spacing)
        if not abs(mass - 1) <= 1e-6:
            raise ValueError(
                f"Expected a grid that holds all of p(x_{t}); got mass {mass:.9f} on "
                f"[{self.grid[0]:g}, {self.grid[-1]:g}]. Widen [low, high] or add points."
            )
        return density

    def _check_resolution(self, resolution: Tensor, density: Tensor, where: str) -> None:
        mass = density * self.spacing
        if float(mass[resolution < 0.5].sum()) > _NEGLIGIBLE:
            raise ValueError(self._coarse(resolution, mass, where))
        if float(mass[resolution < 1.0].sum()) > _NEGLIGIBLE:
            warnings.warn(self._coarse(resolution, mass, where), UserWarning, stacklevel=5)

    def _coarse(self, resolution: Tensor, mass: Tensor, where: str) -> str:
        least = float(resolution[mass > _NEGLIGIBLE / len(mass)].min())
        needed = math.ceil((len(self.grid) - 1) / least) + 1
        return (
            f"Expected a grid spacing below the width of {where}; got {len(self.grid)} points, "
            f"where about {needed} are needed."
        )

    def _check_decoder(self) -> None:
        decoder = self.reverse.decoder
        if isinstance(decoder, CategoricalDecoder):
            step = self.reverse.forward_chain.step(1, self.grid, 0)
            # p(v | x_1) turns from one level to the next as a logistic function of this width
            width = step.sigma.square() / (step.alpha * decoder.spacing)
            resolution = (width / self.spacing).expand(len(self.grid))
        else:
            mean, scale = (
                v.expand(self._inputs.shape).squeeze(-1).to("cpu", torch.float64)
                for v in (self._decoder.loc, self._decoder.scale)
            )
            resolution = self._resolution(mean, scale)
        self._check_resolution(resolution, self.densities[0], "the decoder")
