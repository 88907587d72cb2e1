"""Samples x_0, and trajectories x_0, x_1, …, x_T, as images or as points."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrodiff.plots.style import BLUE, ORANGE, Axes, colour_wheel, legend_above, new_axes, panels

__all__ = ["samples_grid", "samples_scatter", "trajectory_points", "trajectory_strip"]

_DIRECTIONS = ("forward", "reverse")


def _canvas(images: Tensor, columns: int, pad: int, low: float, high: float) -> Tensor:
    """Images (N, C, H, W) row by row on white, (height, width, C) in pixels, from 0 to 1."""
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    canvas = torch.ones(rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    scaled = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
    for index, image in enumerate(scaled.permute(0, 2, 3, 1)):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        canvas[top : top + height, left : left + width] = image
    return canvas.expand(-1, -1, 3) if channels == 1 else canvas


def samples_grid(images: Tensor, axes: Axes = None, low: float = -1.0, high: float = 1.0) -> Axes:
    """A square grid of images.

    Args:
        images: shape (N, C, H, W), C = 1 or 3, values from ``low`` (black) to ``high`` (white).
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: images of another shape.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"Expected images (N, 1 or 3, H, W); got shape {tuple(images.shape)}.")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    canvas = _canvas(images, columns, max(1, images.shape[2] // 8), low, high)
    axes = new_axes(axes, (6, 6 * rows / columns))
    axes.imshow(canvas.numpy(), interpolation="nearest")
    axes.set_axis_off()
    return axes


def _second_dimension(values: Tensor) -> Tensor:
    """The second column, or zeros where there is one only."""
    return values[:, 1] if values.shape[1] > 1 else torch.zeros(len(values))


def samples_scatter(samples: Tensor, data: Tensor | None = None, axes: Axes = None) -> Axes:
    """The first two dimensions of samples as points, over those of ``data`` unless it is None."""
    flat = samples.detach().flatten(1).cpu()
    axes = new_axes(axes, (5.5, 5))
    look: dict[str, Any] = {"s": 8, "alpha": 0.6, "linewidths": 0}
    if data is not None:
        points = data.detach().flatten(1).cpu()[: 4 * len(flat)]
        axes.scatter(points[:, 0], _second_dimension(points), color=ORANGE, label="data", **look)
    axes.scatter(flat[:, 0], _second_dimension(flat), color=BLUE, label="samples", **look)
    axes.set_xlabel("dimension 1")
    axes.set_ylabel("dimension 2" if flat.shape[1] > 1 else "")
    legend_above(axes, 2)
    return axes


def _timesteps(trajectory: Tensor, timesteps: Sequence[int] | None, direction: str) -> list[int]:
    """The timesteps to draw, in the order of the direction; by default eight, evenly spaced."""
    if direction not in _DIRECTIONS:
        raise ValueError(f"Expected direction to be one of {_DIRECTIONS}; got {direction!r}.")
    last = len(trajectory) - 1
    if timesteps is None:
        count = min(8, last + 1)
        chosen = [round(i * last / max(1, count - 1)) for i in range(count)]
    else:
        chosen = sorted(set(timesteps))
    if not chosen or chosen[0] < 0 or chosen[-1] > last:
        raise ValueError(f"Expected timesteps from 0 to {last}; got {timesteps}.")
    return chosen if direction == "forward" else chosen[::-1]


def trajectory_strip(
    trajectory: Tensor,
    timesteps: Sequence[int] | None = None,
    *,
    direction: str = "forward",
    axes: Axes = None,
    low: float = -1.0,
    high: float = 1.0,
) -> Axes:
    """Trajectories of images through the chain: a row per sample, a column per t.

    Args:
        trajectory: x_0 … x_T, shape (T + 1, N, C, H, W), C = 1 or 3, as
            ``reverse.sample(n, trajectory=True)`` gives it.
        timesteps: the t to draw; default eight, evenly spaced.
        direction: ``"forward"``, from the data on the left to noise, or ``"reverse"``.
        axes: matplotlib axes, or None for new ones.
        low, high: the values drawn black and white; values beyond them are clipped.

    Raises:
        ValueError: a trajectory of another shape, an unknown direction, a t not in 0 … T.
    """
    if trajectory.dim() != 5 or trajectory.shape[2] not in (1, 3) or 0 in trajectory.shape:
        shape = tuple(trajectory.shape)
        raise ValueError(f"Expected a trajectory (T + 1, N, 1 or 3, H, W); got shape {shape}.")
    chosen = _timesteps(trajectory, timesteps, direction)
    _, n, _, height, width = trajectory.shape
    pad, columns = max(1, height // 8), len(chosen)
    images = trajectory[chosen].transpose(0, 1).flatten(0, 1)  # (n · columns, C, H, W)
    canvas = _canvas(images, columns, pad, low, high)
    inches = 0.95 * columns
    axes = new_axes(axes, (inches, inches * canvas.shape[0] / canvas.shape[1] + 0.25))
    axes.imshow(canvas.numpy(), interpolation="nearest")
    axes.xaxis.tick_top()
    centres = [pad + (width - 1) / 2 + i * (width + pad) for i in range(columns)]
    axes.set_xticks(centres, [f"$t={t}$" for t in chosen])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes


def trajectory_points(
    trajectory: Tensor,
    timesteps: Sequence[int] | None = None,
    *,
    direction: str = "forward",
    axes: Iterable[Axes] | None = None,
) -> list[Axes]:
    """Trajectories of points through the chain, their first two dimensions, a panel per t.

    The colour of a point is the angle of its x_0 around the mean of all x_0.  It is the same on
    every panel, so that one sees where each point comes from.

    Args:
        trajectory: x_0 … x_T, shape (T + 1, N, d), d ≥ 2.
        timesteps: the t to draw; default eight, evenly spaced.
        direction: ``"forward"``, from the data on the left to noise, or ``"reverse"``.
        axes: matplotlib axes, one per t, or None for new ones.

    Returns:
        The axes, one per t, in the order of the direction, all with the same limits.

    Raises:
        ValueError: a trajectory of another shape, an unknown direction, a t not in 0 … T, another
            number of axes than of panels.
    """
    if trajectory.dim() != 3 or trajectory.shape[2] < 2 or 0 in trajectory.shape:
        shape = tuple(trajectory.shape)
        raise ValueError(f"Expected a trajectory (T + 1, N, d >= 2); got shape {shape}.")
    chosen = _timesteps(trajectory, timesteps, direction)
    points = trajectory[chosen, :, :2].detach().double().cpu()
    origin = trajectory[0, :, :2].detach().double().cpu()
    x, y = (origin - origin.mean(0)).unbind(1)
    look: dict[str, Any] = {"c": torch.atan2(y, x), "cmap": colour_wheel(), "s": 6, "alpha": 0.7}
    look |= {"vmin": -math.pi, "vmax": math.pi, "linewidths": 0}
    size, bound = 1.7, 1.05 * float(points.abs().max())
    drawn = panels(axes, len(chosen), (size * len(chosen), size + 0.3))
    for panel, t, cloud in zip(drawn, chosen, points, strict=True):
        panel.scatter(*cloud.T, **look)
        panel.set(xlim=(-bound, bound), ylim=(-bound, bound), xticks=[], yticks=[])
        panel.set_aspect("equal")
        panel.set_title(f"$t={t}$", fontsize="medium")
    return drawn
