"""Figures; each function draws on given axes, or new ones, and returns them.

Colours are from the Okabe–Ito palette, which colour-blind readers can tell apart.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyrodiff.likelihood import LogLikelihood

__all__ = ["samples_grid", "samples_scatter", "terms"]

BLUE, ORANGE = "#0072B2", "#E69F00"


def _axes(axes: Any, size: tuple[float, float]) -> Any:
    if axes is not None:
        return axes
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window system

    return Figure(figsize=size, layout="constrained").add_subplot()


def samples_grid(images: Tensor, axes: Any = None, low: float = -1.0, high: float = 1.0) -> Any:
    """A square grid of images.

    Args:
        images: shape (N, C, H, W), C = 1 or 3, values from ``low`` (black) to ``high`` (white).
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: images of another shape.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"Expected images (N, 1 or 3, H, W); got shape {tuple(images.shape)}.")
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    pad = max(1, height // 8)
    canvas = torch.ones(rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    scaled = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
    for index, image in enumerate(scaled.permute(0, 2, 3, 1)):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        canvas[top : top + height, left : left + width] = image
    axes = _axes(axes, (6, 6 * rows / columns))
    picture = canvas.expand(-1, -1, 3) if channels == 1 else canvas
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_axis_off()
    return axes


def samples_scatter(samples: Tensor, data: Tensor | None = None, axes: Any = None) -> Any:
    """The first two dimensions of samples as points, over those of the data where given."""
    flat = samples.detach().flatten(1).cpu()
    axes = _axes(axes, (5.5, 5))
    style: dict[str, Any] = {"s": 8, "alpha": 0.6, "linewidths": 0}

    def second(values: Tensor) -> Tensor:
        return values[:, 1] if values.shape[1] > 1 else torch.zeros(len(values))

    if data is not None:
        points = data.detach().flatten(1).cpu()[: 4 * len(flat)]
        axes.scatter(points[:, 0], second(points), color=ORANGE, label="data", **style)
    axes.scatter(flat[:, 0], second(flat), color=BLUE, label="samples", **style)
    axes.set_xlabel("dimension 1")
    axes.set_ylabel("dimension 2" if flat.shape[1] > 1 else "")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return axes


def terms(result: LogLikelihood, axes: Any = None) -> Any:
    """L_t against t in nats, mean over samples with a band of two standard errors.

    Raises:
        ValueError: a result that holds no terms.
    """
    if result.terms is None or result.timesteps is None:
        raise ValueError(f"Expected a result with terms; got none from {result.estimator}.")
    mean = -result.terms.mean(0)
    error = result.terms.std(0) / math.sqrt(len(result.terms))
    axes = _axes(axes, (6.5, 4))
    t = result.timesteps.numpy()
    axes.plot(t, mean.numpy(), color=BLUE, marker="o", markersize=2.5, label="mean over samples")
    low, high = (mean - 2 * error).numpy(), (mean + 2 * error).numpy()
    axes.fill_between(
        t, low, high, color=BLUE, alpha=0.25, linewidth=0, label="± 2 standard errors"
    )
    axes.set_xlabel("timestep t (1: data, T: noise)")
    axes.set_ylabel("term of the bound $L_t$ (nats)")
    axes.set_xscale("log")
    if bool((mean > 0).all()):
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes
