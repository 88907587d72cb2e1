r"""Models side by side: a mean and its interval in a row each.

The thin bar is two standard errors between samples to either side, or the interval that a
comparison gives; the thick one two errors of the Monte Carlo part, which more network calls would
remove.  A difference is paired, sample by sample: (1/N) Σ_i (a_i − b_i), with the standard error of
its own spread.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.plots.style import legend_above, new_axes, plus_minus, style

__all__ = ["Row", "forest"]

# A bound points to where the truth lies.
_MARKERS = {"lower bound": ">", "upper bound": "<", "estimate": "o"}

_THICK: dict[str, Any] = {"linewidth": 6.0, "alpha": 0.45, "solid_capstyle": "butt"}


class Row(NamedTuple):
    """A line of a forest plot.

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


def forest(models: Any, reference: str | None = None, axes: Any = None) -> Any:
    """Means with intervals, the first model on top.

    Args:
        models: name → ``LogLikelihood``; a ``Comparison``; or rows, or an object with ``rows``,
            each with ``name``, ``value`` and ``error`` (``model`` and ``std_error`` will do), and,
            where known, ``monte_carlo``, ``kind``, ``low`` and ``high``; the object may have the
            ``level`` of the intervals.
        reference: the model from which differences are shown: of a mapping any, of a
            ``Comparison`` its own.  The differences of a mapping are without their Monte Carlo
            part: it depends on whether the models were given the same noise.
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: no models, an unknown reference, a reference with rows, rows that lack a field,
            results of other numbers of samples than the reference's.
    """
    rows = [_row(*row) for row in _rows(models, reference)]
    if not rows:
        raise ValueError("Expected at least one model; got none.")
    axes = new_axes(axes, (7, 0.9 + 0.42 * len(rows)))
    for place, row in enumerate(rows):
        _draw(axes, place, row)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    what = "log-likelihood, mean over samples"
    if reference is not None:
        axes.axvline(0, color="black", linestyle="--", linewidth=1)
        what = f"log-likelihood less that of {reference}"
    axes.set_xlabel(f"{what} (nats)")
    _legend(axes, rows, getattr(models, "level", None))
    return axes


def _rows(models: Any, reference: str | None) -> list[tuple[str | None, Any]]:
    """Names, where they are known beside, and what has value and error."""
    if hasattr(models, "models") and hasattr(models, "differences"):  # a Comparison
        if reference is None:
            return list(models.models.items())
        if reference != models.reference:
            raise ValueError(
                f"Expected the reference of the comparison, {models.reference!r}; "
                f"got {reference!r}."
            )
        return [(None, row) for row in models.differences]
    if isinstance(models, Mapping):
        return list((models if reference is None else _differences(models, reference)).items())
    if reference is not None:
        raise ValueError(f"Expected models by name to subtract {reference!r} from each; got rows.")
    rows = getattr(models, "rows", models)
    if not isinstance(rows, Iterable):
        raise ValueError(f"Expected name → LogLikelihood, or rows; got {type(rows).__name__}.")
    return [(None, row) for row in rows]


def _row(name: str | None, held: Any) -> Row:
    if isinstance(held, LogLikelihood):
        return Row(str(name), *held.mean(), kind=held.kind)
    name = _first(held, "name", "model") if name is None else name
    value, error = _first(held, "value"), _first(held, "error", "std_error")
    extra = {key: float(getattr(held, key, math.nan)) for key in ("monte_carlo", "low", "high")}
    return Row(
        str(name), float(value), float(error), kind=getattr(held, "kind", "estimate"), **extra
    )


def _first(held: Any, *names: str) -> Any:
    for name in names:
        if hasattr(held, name):
            return getattr(held, name)
    raise ValueError(f"Expected rows with name, value and error; got {held!r}.")


def _differences(models: Mapping[str, LogLikelihood], reference: str) -> dict[str, LogLikelihood]:
    """Each model less the reference, but the reference itself."""
    if reference not in models:
        raise ValueError(f"Expected reference to be one of {sorted(models)}; got {reference!r}.")
    base, result = models[reference].value, {}
    for name, model in models.items():
        if len(model.value) != len(base):
            raise ValueError(
                f"Expected results on the same {len(base)} samples; got {len(model.value)} "
                f"of {name!r}."
            )
        if name != reference:
            unknown = model.std_error * math.nan
            # neither bound nor bound: a difference of two of them has no side
            result[name] = replace(
                model, value=model.value - base, std_error=unknown, kind="estimate"
            )
    return result


def _draw(axes: Any, place: int, row: Row) -> None:
    color = style(0).color
    axes.plot(row.interval, (place, place), color=color, linewidth=1.5)
    if not math.isnan(row.monte_carlo):
        ends = (row.value - 2 * row.monte_carlo, row.value + 2 * row.monte_carlo)
        axes.plot(ends, (place, place), color=color, **_THICK)
    axes.plot(
        row.value,
        place,
        marker=_MARKERS.get(row.kind, "o"),
        color=color,
        markersize=6.5,
        markeredgecolor="white",
        linestyle="none",
    )
    axes.text(
        1.02,
        place,
        plus_minus(row.value, row.error),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize="small",
    )


def _interval_label(rows: list[Row], level: float | None) -> str:
    given = all(not math.isnan(row.low) for row in rows)
    if not given:
        return "± 2 standard errors"
    return "interval" if level is None else f"{100 * level:g} % interval"


def _legend(axes: Any, rows: list[Row], level: float | None) -> None:
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
