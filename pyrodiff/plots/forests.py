r"""Forest plots: one row per model, with its mean and interval.

The thin bar spans two standard errors between samples to either side, or the interval that a
comparison gives; the thick bar spans two errors of the Monte Carlo part, which more network calls
would remove.  A difference is paired, sample by sample: (1/N) Σ_i (a_i − b_i), with the standard
error of its own spread.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.plots.style import Axes, legend_above, new_axes, plus_minus, style

__all__ = ["Row", "forest"]

# The marker of a bound points to where the truth lies.
_MARKERS = {"lower bound": ">", "upper bound": "<", "estimate": "o"}

_THICK: dict[str, Any] = {"linewidth": 6.0, "alpha": 0.45, "solid_capstyle": "butt"}


class Row(NamedTuple):
    """A row of a forest plot.

    Args:
        name: its label.
        value: nats.
        error: standard error.
        monte_carlo: the part of it that is due to Monte Carlo; NaN where unknown.
        kind: "lower bound", "upper bound" or "estimate".
        low, high: ends of an interval, or NaN for two standard errors to either side.
    """

    name: str
    value: float
    error: float
    monte_carlo: float = math.nan
    kind: str = "estimate"
    low: float = math.nan
    high: float = math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the thin bar."""
        if not math.isnan(self.low):
            return self.low, self.high
        return self.value - 2 * self.error, self.value + 2 * self.error


def forest(models: object, reference: str | None = None, axes: Axes = None) -> Axes:
    """Means with intervals, the first model on top.

    Args:
        models: name → ``LogLikelihood``; a ``Comparison``; or rows, or an object with ``rows``,
            each with ``name`` (or ``model``), ``value`` and ``error`` (or ``std_error``), and,
            where known, ``monte_carlo``, ``kind``, ``low`` and ``high``; the object may have the
            ``level`` of the intervals.
        reference: the model from which differences are shown: any of a mapping, or the reference
            of a ``Comparison``.  The differences of a mapping have no Monte Carlo part: it
            depends on whether the models were given the same noise.
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: no models, an unknown reference, a reference with rows, rows that lack a field,
            results whose number of samples is not the reference's.
    """
    rows = [_row(*entry) for entry in _entries(models, reference)]
    if not rows:
        raise ValueError("Expected at least one model; got none.")
    axes = new_axes(axes, (7, 0.9 + 0.42 * len(rows)))
    for height, row in enumerate(rows):
        _draw(axes, height, row)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    quantity = "log-likelihood, mean over samples"
    if reference is not None:
        axes.axvline(0, color="black", linestyle="--", linewidth=1)
        quantity = f"log-likelihood less that of {reference}"
    axes.set_xlabel(f"{quantity} (nats)")
    _legend(axes, rows, getattr(models, "level", None))
    return axes


def _entries(models: Any, reference: str | None) -> list[tuple[str | None, object]]:
    """What the rows are made of, each with its name, or None where it has one itself."""
    if hasattr(models, "models") and hasattr(models, "differences"):  # a Comparison
        if reference is None:
            return list(models.models.items())
        if reference != models.reference:
            raise ValueError(
                f"Expected the reference of the comparison, {models.reference!r}; "
                f"got {reference!r}."
            )
        return [(None, difference) for difference in models.differences]
    if isinstance(models, Mapping):
        return list((models if reference is None else _differences(models, reference)).items())
    if reference is not None:
        raise ValueError(f"Expected models by name to subtract {reference!r} from each; got rows.")
    rows = getattr(models, "rows", models)
    if not isinstance(rows, Iterable):
        raise ValueError(f"Expected name → LogLikelihood, or rows; got {type(rows).__name__}.")
    return [(None, row) for row in rows]


def _row(name: str | None, source: object) -> Row:
    """The row of a result, or of any object with the fields that ``forest`` names."""
    if isinstance(source, LogLikelihood):
        return Row(str(name), *source.mean(), kind=source.kind)
    name = _attribute(source, "name", "model") if name is None else name
    value, error = _attribute(source, "value"), _attribute(source, "error", "std_error")
    optional = ("monte_carlo", "low", "high")
    extra = {key: float(getattr(source, key, math.nan)) for key in optional}
    kind = getattr(source, "kind", "estimate")
    return Row(str(name), float(value), float(error), kind=kind, **extra)


def _attribute(source: object, *names: str) -> Any:
    """The first attribute that there is of several names."""
    for name in names:
        if hasattr(source, name):
            return getattr(source, name)
    raise ValueError(f"Expected rows with name, value and error; got {source!r}.")


def _differences(models: Mapping[str, LogLikelihood], reference: str) -> dict[str, LogLikelihood]:
    """Each model less the reference, which is left out."""
    if reference not in models:
        raise ValueError(f"Expected reference to be one of {sorted(models)}; got {reference!r}.")
    base, differences = models[reference].value, {}
    for name, model in models.items():
        if len(model.value) != len(base):
            raise ValueError(
                f"Expected results on the same {len(base)} samples; got {len(model.value)} "
                f"of {name!r}."
            )
        if name != reference:
            unknown = model.std_error * math.nan
            # the difference of two bounds is a bound on neither side
            differences[name] = replace(
                model, value=model.value - base, std_error=unknown, kind="estimate"
            )
    return differences


def _draw(axes: Axes, height: int, row: Row) -> None:
    color = style(0).color
    axes.plot(row.interval, (height, height), color=color, linewidth=1.5)
    if not math.isnan(row.monte_carlo):
        ends = (row.value - 2 * row.monte_carlo, row.value + 2 * row.monte_carlo)
        axes.plot(ends, (height, height), color=color, **_THICK)
    axes.plot(
        row.value,
        height,
        marker=_MARKERS.get(row.kind, "o"),
        color=color,
        markersize=6.5,
        markeredgecolor="white",
        linestyle="none",
    )
    axes.text(
        1.02,
        height,
        plus_minus(row.value, row.error),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize="small",
    )


def _interval_label(rows: list[Row], level: float | None) -> str:
    if any(math.isnan(row.low) for row in rows):
        return "± 2 standard errors"
    return "interval" if level is None else f"{100 * level:g} % interval"


def _legend(axes: Axes, rows: list[Row], level: float | None) -> None:
    color = style(0).color
    axes.plot([], [], color=color, linewidth=1.5, label=_interval_label(rows, level))
    if any(not math.isnan(row.monte_carlo) for row in rows):
        axes.plot([], [], color=color, label="Monte Carlo part", **_THICK)
    kinds = {row.kind for row in rows}
    for kind in sorted(kinds) if kinds != {"estimate"} else ():
        axes.plot(
            [],
            [],
            marker=_MARKERS.get(kind, "o"),
            color=color,
            markersize=6.5,
            linestyle="none",
            label=kind,
        )
    legend_above(axes, fontsize="small")
