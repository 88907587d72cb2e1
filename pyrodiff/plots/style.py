"""What all figures share: axes, a palette, and how results are named.

Colours are from the Okabe–Ito palette, which colour-blind readers can tell apart; markers and line
styles change with them, so that a print in black and white is readable too.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "BLUE",
    "ORANGE",
    "Axes",
    "Style",
    "colour_wheel",
    "decimals",
    "legend_above",
    "named",
    "new_axes",
    "panels",
    "plain_ticks",
    "plus_minus",
    "show_legend",
    "style",
]

BLUE, ORANGE = "#0072B2", "#E69F00"
_COLOURS = (BLUE, "#D55E00", "#009E73", "#CC79A7", ORANGE, "#56B4E9", "#000000")
_MARKERS = "os^Dv*XPh"
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

Value = TypeVar("Value")

Axes: TypeAlias = Any
"""Axes of matplotlib, which is imported only when something is drawn."""


class Style(NamedTuple):
    """The look of one of several series."""

    color: str
    marker: str
    linestyle: Any


def style(index: int) -> Style:
    """The look of series ``index``; the first 315 differ."""
    return Style(
        _COLOURS[index % len(_COLOURS)],
        _MARKERS[index % len(_MARKERS)],
        _LINES[index % len(_LINES)],
    )


def colour_wheel() -> Any:
    """A cyclic colour map for angles, from the palette, without colours too light to see."""
    from matplotlib.colors import LinearSegmentedColormap

    around = [_COLOURS[i] for i in (0, 2, 4, 1, 3, 0)]
    return LinearSegmentedColormap.from_list("wheel", around)


def new_axes(axes: Axes, size: tuple[float, float]) -> Axes:
    """``axes``, or where they are None new ones on a figure of ``size`` inches."""
    return panels(None if axes is None else [axes], 1, size)[0]


def panels(axes: Iterable[Axes] | None, columns: int, size: tuple[float, float]) -> list[Axes]:
    """``axes``, one per panel, or where they are None new ones side by side.

    Args:
        axes: matplotlib axes or None.
        columns: how many panels.
        size: of a new figure, in inches.

    Raises:
        ValueError: another number of axes than of panels.
    """
    if axes is None:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no window system

        figure = Figure(figsize=size, layout="constrained")
        return list(figure.subplots(1, columns, squeeze=False)[0])
    axes = list(axes)
    if len(axes) != columns:
        raise ValueError(f"Expected {columns} axes, one per panel; got {len(axes)}.")
    return axes


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, … instead of powers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def decimals(error: float) -> int:
    """Decimals that show two significant digits of a positive, finite error."""
    return max(0, 1 - math.floor(math.log10(error)))


def plus_minus(value: float, error: float) -> str:
    """A value and its error to two significant digits of the error, or the value alone."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}".replace("-", "−")
    digits = decimals(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def legend_above(axes: Axes, columns: int = 4, **options: Any) -> None:
    """The legend above the axes, where it hides no data; ``options`` as of ``axes.legend``."""
    position = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": columns}
    axes.legend(frameon=False, **position, **options)


def show_legend(axes: Axes, title: str | None = None) -> None:
    """The legend: inside the axes up to four entries, beside them where it has more."""
    long = len(axes.get_legend_handles_labels()[1]) > 4
    position = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if long else {}
    axes.legend(frameon=False, title=title, **position)


def named(values: Mapping[str, Value] | Value, default: str) -> dict[str, Value]:
    """Values by name; a single value gets the name ``default``.

    Raises:
        ValueError: an empty mapping.
    """
    if not isinstance(values, Mapping):
        return {default: values}
    if not values:
        raise ValueError("Expected at least one entry to draw; got none.")
    return dict(values)
