"""Data sets with a name: scikit-learn's digits, and three plane densities drawn from a seed.

The plane densities are known, in the units of the data as given:

- ``mixture``: eight Gaussians of standard deviation 0.2 on a circle of radius 2, equally likely;
- ``checkerboard``: uniform, 1/32, on eight of the 4 x 4 squares of [-4, 4)²;
- ``moons``: p(x) = 1/(2π) Σ_m ∫_0^π N(x; c_m(θ), 0.1²) dθ with c_1 = (cos θ, sin θ) and
  c_2 = (1 − cos θ, 1/2 − sin θ).

Their points are independent draws.  (Those of scikit-learn's ``make_moons`` are not: they lie on an
equally spaced grid of angles.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodiff.data.files import Array
from pyrodiff.data.prepare import MIN_ROWS, Source

__all__ = ["NAMES", "MixtureParameters", "digits", "mixture_parameters", "plane"]

NAMES = ("checkerboard", "digits", "mixture", "moons")
DIGITS_LEVELS = 17
MOON_SCALE = 0.1


class MixtureParameters(NamedTuple):
    """Weights (8,), means (8, 2) and the common standard deviation (), float64."""

    weights: Tensor
    means: Tensor
    scale: Tensor


def mixture_parameters() -> MixtureParameters:
    """The parameters of ``load("mixture")``, in the units of the data as given.

    In model units the means are ``transform.forward(means)`` and the standard deviations, per
    coordinate, ``scale / transform.scale``.
    """
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return MixtureParameters(
        weights=torch.full((8,), 1 / 8, dtype=torch.float64),
        means=2 * torch.stack([angle.cos(), angle.sin()], dim=-1),
        scale=torch.tensor(0.2, dtype=torch.float64),
    )


def digits(context: str | None = None) -> Source:
    """Scikit-learn's 1797 digits, 8 x 8 pixels of 17 levels, in a fixed split 1150/147/500.

    The test set is that of ``train_test_split(images, test_size=500, random_state=0)``; the
    validation set, of 147, is drawn from the rest in the same way. With ``context="label"`` the
    digit is the context, one-hot (N, 10).

    Raises:
        ValueError: for another context.
    """
    if context not in (None, "label"):
        raise ValueError(f"Expected context='label' or none for 'digits'; got {context!r}.")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = bunch.images.astype(np.int64)[:, None]
    rest, test, rest_label, test_label = train_test_split(
        images, bunch.target, test_size=500, random_state=0
    )
    train, validation, train_label, validation_label = train_test_split(
        rest, rest_label, test_size=147, random_state=0
    )
    labels = {"train": train_label, "validation": validation_label, "test": test_label}
    return Source(
        name="digits",
        arrays={"train": train, "validation": validation, "test": test},
        contexts=labels if context else None,
    )


def plane(
    name: str, seed: int = 0, num_samples: int | None = None
) -> tuple[Source, Callable[[Tensor], Tensor]]:
    """``num_samples`` (10,000) points of a plane density, split 80/10/10, and its exact log p.

    Raises:
        ValueError: if ``num_samples`` is below 10.
    """
    count = 10_000 if num_samples is None else num_samples
    if count < MIN_ROWS:
        raise ValueError(f"Expected at least {MIN_ROWS} samples; got {count}.")
    draw, log_prob = _PLANE[name]
    points = draw(np.random.RandomState(seed), count)
    tenth = count // 10
    arrays = {
        "train": points[2 * tenth :],
        "validation": points[:tenth],
        "test": points[tenth : 2 * tenth],
    }
    return Source(name=name, arrays=arrays), log_prob


def _check_plane(x: Tensor) -> Tensor:
    """Points of the plane, in float64."""
    if x.ndim < 1 or x.shape[-1] != 2:
        raise ValueError(f"Expected points of the plane (..., 2); got shape {tuple(x.shape)}.")
    return x.to(torch.float64)


def _draw_mixture(random: np.random.RandomState, count: int) -> Array:
    weights, means, scale = mixture_parameters()
    component = random.choice(len(weights), size=count, p=weights.numpy())
    return means.numpy()[component] + float(scale) * random.standard_normal((count, 2))


def _mixture_log_prob(x: Tensor) -> Tensor:
    """log Σ_k w_k N(x; μ_k, s²) in nats, (…, 2) to (…)."""
    weights, means, scale = (parameter.to(x.device) for parameter in mixture_parameters())
    squared = ((_check_plane(x).unsqueeze(-2) - means) / scale).square().sum(-1)
    log_norm = (2 * math.pi * scale**2).log()
    return torch.logsumexp(weights.log() - squared / 2 - log_norm, dim=-1)


def _draw_checkerboard(random: np.random.RandomState, count: int) -> Array:
    """Uniform on the dark squares, less a rim of 2e-6 inside each.

    The rim keeps a point from being rounded out of its square, where log p is -inf, when it goes
    through float32; it changes log p by 4e-6 nats.
    """
    column = random.randint(4, size=count)
    row = 2 * random.randint(2, size=count) + column % 2
    inside = 1e-6 + (1 - 2e-6) * random.random_sample((count, 2))
    return 2 * (np.stack([column, row], axis=1) + inside) - 4


def _checkerboard_log_prob(x: Tensor) -> Tensor:
    """−log 32 on the dark squares and −∞ elsewhere, in nats, (…, 2) to (…)."""
    square = torch.floor(_check_plane(x) / 2 + 2)
    dark = ((square >= 0) & (square < 4)).all(-1) & (square.sum(-1) % 2 == 0)
    inside = torch.full(dark.shape, -math.log(32), dtype=torch.float64, device=x.device)
    return inside.masked_fill(~dark, -math.inf)


def _moon_centres(angle: Array) -> Array:
    """The two half circles at the given angles, (2, *angle.shape, 2)."""
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=-1)
    return np.stack([upper, lower])


def _draw_moons(random: np.random.RandomState, count: int) -> Array:
    moon = random.randint(2, size=count)
    centres = _moon_centres(np.pi * random.random_sample(count))[moon, np.arange(count)]
    return np.asarray(centres + MOON_SCALE * random.standard_normal((count, 2)))


def _moons_log_prob(x: Tensor) -> Tensor:
    """The integral by 256 Gauss-Legendre nodes (error below 1e-8 nats for |x| < 10), in nats."""
    nodes, weights = np.polynomial.legendre.leggauss(256)
    centres = torch.from_numpy(_moon_centres(np.pi / 2 * (nodes + 1)).reshape(-1, 2)).to(x.device)
    log_weights = torch.from_numpy(np.log(np.tile(weights / 4, 2))).to(x.device)
    log_norm = math.log(2 * math.pi * MOON_SCALE**2)

    def log_sum(points: Tensor) -> Tensor:
        distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.logsumexp(log_weights - (distance / MOON_SCALE).square() / 2, dim=-1)

    # In blocks: all distances at once would take 4 KB a point.
    flat = _check_plane(x).reshape(-1, 2)
    log_p = torch.cat([log_sum(flat[i : i + 4096]) for i in range(0, max(len(flat), 1), 4096)])
    return (log_p - log_norm).reshape(x.shape[:-1])


_PLANE: dict[
    str,
    tuple[Callable[[np.random.RandomState, int], Array], Callable[[Tensor], Tensor]],
] = {
    "checkerboard": (_draw_checkerboard, _checkerboard_log_prob),
    "mixture": (_draw_mixture, _mixture_log_prob),
    "moons": (_draw_moons, _moons_log_prob),
}
