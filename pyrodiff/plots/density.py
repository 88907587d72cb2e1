"""Densities in two dimensions, side by side with the truth on one colour scale."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pyrodiff.plots.style import Axes, panels

__all__ = ["density_map", "map_points"]

Limits = tuple[float, float, float, float]


def map_points(limits: Limits, resolution: int = 100) -> Tensor:
    """The centres of the cells of a map, shape (resolution², 2), float64.

    x runs fastest: ``log_p.reshape(resolution, resolution)`` has a row per y, the lowest first.

    Args:
        limits: x from, x to, y from, y to.
        resolution: cells along each side.

    Raises:
        ValueError: limits that enclose no area, a resolution below 2.
    """
    left, right, bottom, top = limits
    if not (left < right and bottom < top) or resolution < 2:
        raise ValueError(
            "Expected limits (x from, x to, y from, y to) that rise, and resolution >= 2; "
            f"got {limits} and {resolution}."
        )
    centres = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
    y, x = torch.meshgrid(
        bottom + (top - bottom) * centres, left + (right - left) * centres, indexing="ij"
    )
    return torch.stack([x, y], -1).reshape(-1, 2)


def density_map(
    log_probs: Mapping[str, Callable[[Tensor], Tensor] | Tensor],
    limits: Limits,
    resolution: int = 100,
    axes: Iterable[Axes] | None = None,
) -> list[Axes]:
    """p(x) over a rectangle, a panel per density, all on the same colour scale from 0.

    Args:
        log_probs: by name, a function of points (M, 2), float64, to log p (M,) in nats; or log p
            at ``map_points(limits, resolution)``, shape (M,) or (resolution, resolution).
        limits: x from, x to, y from, y to.
        resolution: cells along each side.
        axes: matplotlib axes, one per density, or None for new ones.

    Returns:
        The axes, one per density.

    Raises:
        ValueError: no density; values of another shape, infinite or NaN; limits that enclose no
            area; another number of axes than of densities.
    """
    points = map_points(limits, resolution)
    if not log_probs:
        raise ValueError("Expected at least one density; got none.")
    maps = {
        name: _density(name, log_prob, points, resolution) for name, log_prob in log_probs.items()
    }
    drawn = panels(axes, len(maps), (3.1 * len(maps) + 0.9, 3.4))
    highest = max(float(values.max()) for values in maps.values())
    image = None
    for panel, (name, values) in zip(drawn, maps.items(), strict=True):
        image = panel.imshow(
            values.numpy(), origin="lower", extent=limits, vmin=0, vmax=highest, cmap="viridis"
        )
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel("dimension 1")
    drawn[0].set_ylabel("dimension 2")
    drawn[-1].figure.colorbar(image, ax=drawn, label="density", shrink=0.95, pad=0.02)
    return drawn


def _density(
    name: str, log_prob: Callable[[Tensor], Tensor] | Tensor, points: Tensor, resolution: int
) -> Tensor:
    """p on the map, (resolution, resolution)."""
    values = log_prob if isinstance(log_prob, Tensor) else log_prob(points)
    if values.shape not in ((len(points),), (resolution, resolution)):
        raise ValueError(
            f"Expected log p of {name!r} at {len(points)} points; got shape {tuple(values.shape)}."
        )
    values = values.detach().double().cpu().exp().reshape(resolution, resolution)
    if not bool(values.isfinite().all()):
        raise ValueError(f"Expected log p of {name!r} below infinity and not NaN; got others.")
    return values
