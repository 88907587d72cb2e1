"""The picture of samples, as a PNG file in memory."""

import io
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrodiff import plots

__all__ = ["png", "png_mark", "samples_png"]


def samples_png(
    x: Tensor, discrete: bool, reference: Tensor | None = None, mark: str = ""
) -> bytes:
    """Samples as a grid of images, or as points beside those of ``reference``.

    Args:
        x: in units of the model, (N, *event_shape).
        discrete: whether events are on [-1, 1].
        reference: data in the same units, for points.
        mark: what the file says of itself; see ``png_mark``.
    """
    if x.dim() == 4 and x.shape[1] in (1, 3):
        low, high = (-1.0, 1.0) if discrete else (float(x.min()), float(x.max()) + 1e-6)
        return png(plots.samples_grid(x, low=low, high=high), mark)
    return png(plots.samples_scatter(x, reference), mark)


def png(axes: Any, mark: str = "") -> bytes:
    """The figure of the axes as a file."""
    content = io.BytesIO()
    metadata = {"Source": mark} if mark else {}
    axes.figure.savefig(content, format="png", dpi=120, metadata=metadata)
    return content.getvalue()


def png_mark(path: Path) -> str:
    """What a picture says of itself; empty for any file that says nothing."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return str(image.info.get("Source", ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
