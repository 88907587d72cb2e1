"""The pictures of a comparison, as PNG files in memory."""

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from pyrodiff import plots
from pyrodiff.comparison import Comparison
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.estimates import FEWEST_WEIGHTS

__all__ = ["Figure", "draw_figures"]

_LONGEST = 24  # characters of a name beside an axis


class Figure(NamedTuple):
    """A picture: its name as a file, what it shows, and the file itself."""

    name: str
    caption: str
    png: bytes


def draw_figures(found: Comparison, results: dict[str, LogLikelihood]) -> list[Figure]:
    """All that the results have to show.

    Args:
        found: the comparison.
        results: one evaluation of each model.
    """
    labels = _labels(list(results))
    shown = {labels[name]: result for name, result in results.items()}
    named = _relabelled(found, labels)
    chosen: list[tuple[str, str, Callable[[], Any]]] = []
    text = f"Differences from {found.reference}, sample by sample; the line at 0 is no difference."
    chosen.append(("differences", text, lambda: _forest(named, named.reference)))
    text = (
        "The means by themselves. Whether two of them differ is seen above, not by their overlap."
    )
    chosen.append(("means", text, lambda: _forest(named)))
    if all(result.terms is not None for result in results.values()):
        text = "What each step of the chain costs: the terms of the bound (one run of each model)."
        chosen.append(("terms", text, lambda: plots.terms(shown)))
    weights = [result.log_weights for result in results.values()]
    counts = {0 if log_w is None else log_w.shape[1] for log_w in weights}
    independent = all(
        result.reference is None
        and result.kind != "upper bound"
        and log_w is not None
        and bool(log_w.isfinite().all())
        for result, log_w in zip(results.values(), weights, strict=True)
    )
    if independent and min(counts) > 1:
        text = "The bound by the number of particles: where it still rises, it is loose."
        chosen.append(("ladder", text, lambda: plots.bound_ladder(shown)))
    if independent and min(counts) >= FEWEST_WEIGHTS:
        text = "Whether the weights are to be trusted: Pareto k̂ below 0.7 is good."
        chosen.append(("weights", text, lambda: plots.pareto_k(shown)[0]))
    return [Figure(name, caption, _png(draw)) for name, caption, draw in chosen]


def _labels(names: list[str]) -> dict[str, str]:
    """Names that fit beside an axis; matplotlib reads $ as mathematics and hides what begins _."""
    labels = dict[str, str]()
    for name in names:
        short = name if len(name) <= _LONGEST else f"{name[:11]}…{name[-12:]}"
        short = short.replace("$", r"\$")
        short = f" {short}" if short.startswith("_") else short
        while short in labels.values():
            short += "′"
        labels[name] = short
    return labels


def _relabelled(found: Comparison, labels: dict[str, str]) -> Comparison:
    """The comparison with the names that fit."""
    return replace(
        found,
        models={labels[name]: row for name, row in found.models.items()},
        reference=labels[found.reference],
        differences=tuple(replace(each, model=labels[each.model]) for each in found.differences),
    )


def _forest(found: Comparison, reference: str | None = None) -> Any:
    """Narrow enough to be read on a telephone."""
    from matplotlib.figure import Figure as Canvas

    rows = len(found.models) - (reference is not None)
    axes = Canvas(figsize=(5.8, 1.1 + 0.4 * rows), layout="constrained").subplots()
    return plots.forest(found, reference, axes)


def _png(draw: Callable[[], Any]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # names and k̂ of many weights: the picture is drawn all the same
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        draw().figure.savefig(file, format="png", dpi=160)
    return file.getvalue()
