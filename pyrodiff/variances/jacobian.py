"""What the posterior covariance is made of: probes that are functions of t, and V from products."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrodiff.covariances import Spread

__all__ = ["full_spread", "largest_directions", "negative_share", "random_signs", "random_words"]

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def random_words(t: Tensor, count: int, size: int) -> Tensor:
    """Random words as a function of t, the probe and the dimension, (*t.shape, count, size), int64.

    SplitMix64 (Steele, Lea and Flood, 2014) of their number, in integers that wrap, so that every
    device gives the same.
    """
    number = t.to(torch.int64)[..., None, None] * count
    number = number + torch.arange(count, device=t.device)[:, None]
    number = number * size + torch.arange(size, device=t.device) + 1
    mixed = number * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def random_signs(t: Tensor, count: int, size: int) -> Tensor:
    """±1, shape (*t.shape, count, size), int64."""
    return torch.where(random_words(t, count, size) < 0, -1, 1)


def negative_share(values: Tensor) -> Tensor:
    """The share of values below 0, (N, m) to (N,)."""
    return (values.detach() < 0).to(values.dtype).mean(1)


_BREAKDOWN = 1e-5  # of the length of a product: below it the rest is rounding


def _normalised(vector: Tensor, length: Tensor) -> Tensor:
    """Of length 1, or 0 where it is shorter than rounding of something of that length."""
    norm = vector.norm(dim=1, keepdim=True)
    sound = norm > _BREAKDOWN * length
    return torch.where(sound, vector / torch.where(sound, norm, 1.0), 0.0)


def largest_directions(
    products: Callable[..., Tensor], start: Tensor, rank: int, steps: int
) -> tuple[Tensor, Tensor]:
    """The r largest Ritz values and vectors after a few steps of Lanczos' method (Lanczos, 1950).

    Every vector is made orthogonal to all before it, twice; of a matrix that is not symmetric, the
    symmetric part is projected.

    Args:
        products: of the matrix with the columns of (N, d, 1).
        start: the first vector, shape (N, d, 1).
        rank: r.
        steps: products, no fewer than r.

    Returns:
        directions (N, d, r), orthonormal or 0, and values (N, r), ascending.
    """
    basis, images = [_normalised(start, torch.zeros_like(start[:, :1]))], list[Tensor]()
    for step in range(steps):
        images.append(products(basis[-1], last=step == steps - 1))
        if step < steps - 1:
            rest, seen = images[-1], torch.cat(basis, -1)
            for _ in range(2):
                rest = rest - seen @ (seen.mT @ rest)
            basis.append(_normalised(rest, images[-1].norm(dim=1, keepdim=True)))
    vectors = torch.cat(basis, -1)
    inner = vectors.mT @ torch.cat(images, -1)
    values, rotation = torch.linalg.eigh(0.5 * (inner + inner.mT))
    return vectors @ rotation[..., -rank:], values[..., -rank:]


def full_spread(products: Callable[..., Tensor], x: Tensor) -> Spread:
    """V from all d products, its negative eigenvalues set to 0."""
    count, size = len(x), x[0].numel()
    units = torch.eye(size, dtype=x.dtype, device=x.device).expand(count, size, size)
    jacobian = products(units, last=True)
    values, directions = torch.linalg.eigh(0.5 * (jacobian + jacobian.mT))
    clipped = negative_share(values)
    values = values.clamp(min=0.0)
    first = values[:, :1]
    diagonal = first.reshape(-1, *(1,) * (x.dim() - 1))
    return Spread(diagonal, directions, values - first, clipped)
