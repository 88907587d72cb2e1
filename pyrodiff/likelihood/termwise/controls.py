r"""Control variates for a term of the bound: what follows of it without the network.

A term is L_t = w ‖x_0 − x̂_0(x_t)‖² + const, x_t = α x_0 + σ ε.  Given x_0, these have mean zero:

    Σ_i φ_k(x_0,i) ε_i   and   Σ_i φ_k(x_0,i) (ε_i² − 1)

with hat functions φ_k of a dimension's value, whose sum is 1: among their combinations are
x_0·ε and ‖ε‖² − d.  For images there are hat functions of the mean and of the spread s of the 3×3
pixels around, too, and Σ s_i ε_i ε_j over neighbours i, j.  And for an affine denoiser, the best
one for data of mean m and covariance C = Q diag(e) Qᵀ, the term itself is a polynomial in ε of
known mean.  With z = Qᵀε,

    x̂_0 = m + Q diag(g) Qᵀ (x_t − α m),   g = α e/(α² e + σ²),   r = (1 − α g) Qᵀ(x_0 − m),
    ‖x_0 − x̂_0‖² = ‖r‖² − 2σ Σ_i r_i g_i z_i + σ² Σ_i g_i² z_i²

so Σ r g z and Σ g² (z² − 1) are correlated with L_t as far as the network resembles that denoiser,
and its mean over ε, E_t = Σ r² + σ² Σ g², predicts how L_t varies with x_0 and t.  Any functions of
(x_0, t) would do: the choice decides how much variance is removed, never the expectation.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.kernels import marginal_coefficients

__all__ = ["Controls", "Prepared", "is_image"]

_RANK = 1024  # directions of the covariance that are kept at most
_FLOOR = 1e-3  # least eigenvalue, relative to their mean: data hardly vary in such directions
_CLIP = 4.0  # standard deviations at which a sample's coordinates are clipped


class Prepared(NamedTuple):
    """What the controls need of a batch of samples; of the data's dtype."""

    hats: Tensor
    """φ_k(x_0,i), shape (n, d, K)."""
    centered: Tensor
    """Qᵀ(x_0 − m), shape (n, rank)."""
    spread: Tensor | None
    """s of images, shape (n, channels, height, width)."""


def is_image(event_shape: torch.Size) -> bool:
    """Whether events are (channels, height, width) of at least 3 × 3 pixels."""
    return len(event_shape) == 3 and min(event_shape[1:]) >= 3


def _fields(x_0: Tensor) -> list[Tensor]:
    """What hat functions are taken of, each of x_0's shape: the values, and for images also their
    surroundings, the mean and the standard deviation of 3×3 pixels, edges repeated.
    """
    if not is_image(x_0.shape[1:]):
        return [x_0]
    padded = torch.nn.functional.pad(x_0, (1, 1, 1, 1), mode="replicate")
    mean, square = (torch.nn.functional.avg_pool2d(v, 3, 1) for v in (padded, padded.square()))
    return [x_0, mean, (square - mean.square()).clamp(min=0).sqrt()]


def _knots(values: Tensor) -> Tensor:
    """The ends, points 1 % and 10 % inside (the ends may be atoms), and three in between."""
    low, high = float(values.min()), float(values.max())
    inside = values[(values > low) & (values < high)][:1_000_000]
    between: list[float] = []
    if len(inside):
        first, last = inside.quantile(torch.tensor([0.02, 0.98], dtype=values.dtype)).tolist()
        between = [first, (first + last) / 2, last]
    span, knots = high - low, [low]
    margins = [low + share * span for share in (0.01, 0.1, 0.9, 0.99)]
    for knot in sorted([*margins, *between]):
        if 0.005 * span < knot - knots[-1] and knot < high - 0.005 * span:
            knots.append(knot)
    return torch.tensor([*knots, high], dtype=values.dtype).unique()


def hat_functions(x: Tensor, knots: Tensor) -> Tensor:
    """Piecewise linear functions that are 1 at one knot and 0 at the others, (…) to (…, K)."""
    if len(knots) == 1:
        return torch.ones_like(x).unsqueeze(-1)
    x = x.clamp(float(knots[0]), float(knots[-1])).contiguous()
    right = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    left = right - 1
    share = (x - knots[left]) / (knots[right] - knots[left])
    hats = x.new_zeros(*x.shape, len(knots))
    hats.scatter_(-1, left.unsqueeze(-1), (1 - share).unsqueeze(-1))
    return hats.scatter_(-1, right.unsqueeze(-1), share.unsqueeze(-1))


@dataclass(frozen=True, eq=False)
class Controls:
    """The functions of the module's docstring for a chain, from other data than those scored.

    Args:
        log_snr: λ_1 … λ_T, shape (T,), float64.
        knots: of the hat functions, increasing, a row for each field, the rest of it NaN.
        mean: m, shape (d,).
        eigenvalues: e, shape (rank,), positive.
        basis: Q, shape (d, rank).
    """

    log_snr: Tensor
    knots: Tensor
    mean: Tensor
    eigenvalues: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, x: Tensor, log_snr: Tensor) -> "Controls":
        """From data of shape (N, *event_shape), N ≥ 2."""
        flat = x.flatten(1).to("cpu", torch.float64)
        mean = flat.mean(0)
        centered = flat - mean
        covariance = centered.mT @ centered / (len(flat) - 1)
        eigenvalues, basis = torch.linalg.eigh(covariance)
        eigenvalues, basis = eigenvalues[-_RANK:], basis[:, -_RANK:]
        floor = _FLOOR * float(eigenvalues.clamp(min=0).mean()) + 1e-12
        sample = x[:: max(1, x.numel() // 2_000_000)].double().cpu()  # enough for quantiles
        rows = [_knots(field.flatten()) for field in _fields(sample)]
        knots = torch.nn.utils.rnn.pad_sequence(rows, True, torch.nan)
        eigenvalues = eigenvalues.clamp(min=floor)
        return cls(log_snr.cpu(), knots, mean, eigenvalues, basis.contiguous())

    @cached_property
    def gain(self) -> Tensor:
        """g, shape (T, rank)."""
        alpha, sigma = marginal_coefficients(self.log_snr[:, None])
        return alpha * self.eigenvalues / (alpha.square() * self.eigenvalues + sigma.square())

    @cached_property
    def residual(self) -> Tensor:
        """1 − α g = σ²/(α² e + σ²), shape (T, rank)."""
        alpha, sigma = marginal_coefficients(self.log_snr[:, None])
        return sigma.square() / (alpha.square() * self.eigenvalues + sigma.square())

    @cached_property
    def _tables(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        return {}

    def _weights(self, like: Tensor) -> Tensor:
        """What r₀ z and z² − 1 are summed with for the affine controls, (3, T, rank)."""
        key = (like.dtype, like.device)
        if key not in self._tables:
            g, rest, e = self.gain, self.residual, self.eigenvalues
            # divided by the spread over data and noise, so that coefficients change slowly with t
            weights = (
                (rest * g, (rest * g).square() * e),
                (g.square(), 2 * g**4),
                (rest, rest.square() * e),
            )
            rows = [value / square.sum(1, keepdim=True).sqrt() for value, square in weights]
            self._tables[key] = torch.stack(rows).to(like)
        return self._tables[key]

    def prepare(self, x_0: Tensor) -> Prepared:
        """What the controls need of samples (n, *event_shape)."""
        flat, fields = x_0.flatten(1), _fields(x_0)
        pairs = zip(fields, self.knots, strict=True)
        hats = [hat_functions(f.flatten(1), k[~k.isnan()].to(flat)) for f, k in pairs]
        spread = _CLIP * self.eigenvalues.sqrt().to(flat)
        centered = (flat - self.mean.to(flat)) @ self.basis.to(flat)
        centered = centered.clamp(-spread, spread)
        return Prepared(torch.cat(hats, -1), centered, fields[2] if len(fields) > 1 else None)

    @property
    def num_hats(self) -> int:
        """K."""
        return int((~self.knots.isnan()).sum())

    @property
    def num_controls(self) -> int:
        """How many controls ``noise`` gives."""
        return 2 * self.num_hats + self.num_affine

    @property
    def num_affine(self) -> int:
        """How many of them, the last, are of the affine denoiser and of neighbouring pixels."""
        return 5 if len(self.knots) > 1 else 3

    def noise(self, prepared: Prepared, t: Tensor, noise: Tensor) -> Tensor:
        """The controls of mean zero for c draws of each sample, shape (n, c, num_controls).

        Args:
            prepared: of the n samples.
            t: 1 … T, shape (n, c), on the CPU.
            noise: ε, shape (n, c, *event_shape).
        """
        flat = noise.flatten(2)
        unit = flat.shape[2] ** -0.5
        powers = torch.stack([flat, flat.square() - 1], 1).flatten(1, 2)
        hats = torch.bmm(powers, prepared.hats).unflatten(1, (2, -1)) * unit
        z = flat @ self.basis.to(flat)
        index = (t - 1).to(flat.device)
        rest_g, square_g, rest = (table[index] for table in self._weights(flat))
        linear, square = prepared.centered[:, None] * z, z.square() - 1
        pairs = ((rest_g, linear), (square_g, square), (rest, linear))
        affine = [(weight * value).sum(2) for weight, value in pairs]
        if prepared.spread is not None:
            weighted = prepared.spread[:, None] * noise * unit
            affine.append((weighted[..., 1:] * noise[..., :-1]).flatten(2).sum(2))
            affine.append((weighted[..., 1:, :] * noise[..., :-1, :]).flatten(2).sum(2))
        return torch.cat([hats[:, 0], hats[:, 1], torch.stack(affine, 2)], 2)

    def curves(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """What predicts L_t without noise; float64 on the CPU.

        Returns:
            Σ_i φ_k(x_0,i)/d, shape (n, K), and E_t over its mean over the data, shape (n, T).
        """
        hats = prepared.hats.double().mean(1).cpu()
        _, sigma = marginal_coefficients(self.log_snr)
        noise = sigma.square() * self.gain.square().sum(1)
        squares = self.residual.square()
        expected = prepared.centered.double().cpu().square() @ squares.mT + noise
        return hats, expected / (squares @ self.eigenvalues + noise)
