"""The pictures of a comparison, as PNG files in memory."""

import io
import warnings
from collections.abc import Callable, Iterator
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


def draw_figures(comparison: Comparison, results: dict[str, LogLikelihood]) -> list[Figure]:
    """The figures that the results allow.

    Args:
        comparison: of the models.
        results: one evaluation of each model.
    """
    labels = _labels(list(results))
    shown = {labels[name]: result for name, result in results.items()}
    named = _relabelled(comparison, labels)
    drawings = [
        _Drawing(
            "differences",
            f"Differences from {comparison.reference}, sample by sample; "
            "the line at 0 is no difference.",
            lambda: _forest(named, named.reference),
        ),
        _Drawing(
            "means",
            "The means by themselves. Whether two of them differ is seen above, "
            "not by their overlap.",
            lambda: _forest(named),
        ),
        *_of_results(shown),
    ]
    return [Figure(name, caption, _png(draw)) for name, caption, draw in drawings]


class _Drawing(NamedTuple):
    """A figure that is still to be drawn."""

    name: str
    caption: str
    draw: Callable[[], Any]


def _of_results(results: dict[str, LogLikelihood]) -> Iterator[_Drawing]:
    """The figures of terms and weights, where the results have them."""
    if all(result.terms is not None for result in results.values()):
        caption = "What each step of the chain costs: the terms of the bound (one run per model)."
        yield _Drawing("terms", caption, lambda: plots.terms(results))
    count = min(map(_independent_weights, results.values()))
    if count > 1:
        caption = "The bound by the number of particles: where it still rises, it is loose."
        yield _Drawing("ladder", caption, lambda: plots.bound_ladder(results))
    if count >= FEWEST_WEIGHTS:
        caption = "Whether the weights can be trusted: Pareto k̂ below 0.7 is good."
        yield _Drawing("weights", caption, lambda: plots.pareto_k(results)[0])


def _independent_weights(result: LogLikelihood) -> int:
    """The number of independent finite weights of each sample; 0 where there are none."""
    log_w = result.log_weights
    if log_w is None or result.reference is not None or result.kind == "upper bound":
        return 0
    return log_w.shape[1] if bool(log_w.isfinite().all()) else 0


def _labels(names: list[str]) -> dict[str, str]:
    """Names that fit beside an axis; matplotlib reads $ as mathematics and hides names in _."""
    labels = dict[str, str]()
    for name in names:
        short = name if len(name) <= _LONGEST else f"{name[:11]}…{name[-12:]}"
        short = short.replace("$", r"\$")
        short = f" {short}" if short.startswith("_") else short
        while short in labels.values():
            short += "′"
        labels[name] = short
    return labels


def _relabelled(comparison: Comparison, labels: dict[str, str]) -> Comparison:
    """The comparison with the names that fit."""
    return replace(
        comparison,
        models={labels[name]: row for name, row in comparison.models.items()},
        reference=labels[comparison.reference],
        differences=tuple(
            replace(difference, model=labels[difference.model])
            for difference in comparison.differences
        ),
    )


def _forest(comparison: Comparison, reference: str | None = None) -> Any:
    """A forest plot narrow enough for a telephone."""
    from matplotlib.figure import Figure as Canvas

    rows = len(comparison.models) - (reference is not None)
    axes = Canvas(figsize=(5.8, 1.1 + 0.4 * rows), layout="constrained").subplots()
    return plots.forest(comparison, reference, axes)


def _png(draw: Callable[[], Any]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # of names, and of k̂ from many weights: the picture is drawn all the same
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        draw().figure.savefig(file, format="png", dpi=160)
    return file.getvalue()
