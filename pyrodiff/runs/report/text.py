"""A comparison of runs in words: tables, conclusions, and where the figures come from.

The same words go to the terminal and to the page (``pyrodiff.runs.report.page``).
"""

import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import NamedTuple

import pyro
import torch

from pyrodiff._version import __version__
from pyrodiff.comparison import Comparison, Difference
from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.plots.style import decimals
from pyrodiff.runs.groups import Model
from pyrodiff.runs.settings import FLAGS, ComparisonSettings, EvaluationSettings
from pyrodiff.runs.terminal import console

__all__ = ["Report", "Table", "facts", "print_comparison", "reading", "tables", "words"]


class Report(NamedTuple):
    """All that a report says of a comparison.

    Args:
        comparison: of the models.
        models: which runs they are.
        runs: the runs' folders, as given.
        names: of the runs.
        results: for each run its evaluations, one per repeat.
        dataset: the data of all of them.
        evaluation, settings: of the command.
        noise: the seed of each repeat.
    """

    comparison: Comparison
    models: Sequence[Model]
    runs: Sequence[str]
    names: Sequence[str]
    results: Sequence[Sequence[LogLikelihood]]
    dataset: DataSet
    evaluation: EvaluationSettings
    settings: ComparisonSettings
    noise: Sequence[int]

    @property
    def first(self) -> dict[str, LogLikelihood]:
        """One evaluation of each model, best model first."""
        runs = {model.name: self.results[model.runs[0]][0] for model in self.models}
        return {name: runs[name] for name in self.comparison.models}


class Table(NamedTuple):
    """Rows of words under a header; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(report: Report) -> list[Table]:
    """The figures of the comparison as words, for the terminal and the page."""
    return [_means(report), _differences(report)]


def _means(report: Report) -> Table:
    dataset = report.dataset
    bits = dataset.is_image or dataset.levels is not None
    unit = dataset.dimensions * math.log(2)  # nats in a bit per dimension
    header = ("model", "mean", "± error", "of which Monte Carlo", *(("bits/dim",) if bits else ()))
    rows = []
    for name, row in report.comparison.models.items():
        error = row.std_error
        cells = [name, _number(row.value, error), _error(error), _error(row.monte_carlo)]
        if bits:
            cells.append(_number(-row.value / unit, error / unit))
        rows.append((*cells, row.kind, str(row.seeds), f"{row.calls:.6g}"))
    return Table("Mean log p of a sample, nats", (*header, "what it is", "seeds", "calls"), rows)


def _differences(report: Report) -> Table:
    comparison = report.comparison
    several_seeds = any(row.seeds > 1 for row in comparison.models.values())
    header = (
        "model",
        "difference",
        "± paired error",
        *(("of which seeds",) if several_seeds else ()),
        "of which Monte Carlo",
        f"{100 * comparison.level:g}\u00a0% interval",
    )
    rows = [
        (
            difference.model,
            _number(difference.value, difference.std_error, "+"),
            _error(difference.std_error),
            *((_error(difference.between_seeds),) if several_seeds else ()),
            _error(difference.monte_carlo),
            _interval(difference),
        )
        for difference in comparison.differences
    ]
    return Table(f"Difference from {comparison.reference}, nats", header, rows)


def _interval(difference: Difference) -> str:
    ends = difference.low, difference.high
    return " to ".join(_number(end, difference.std_error, "+") for end in ends)


def _number(value: float, error: float, sign: str = "-") -> str:
    """A value to the two digits of its error."""
    digits = decimals(error) if math.isfinite(error) and error > 0 else 4
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def _error(error: float) -> str:
    return "unknown" if math.isnan(error) else _number(error, error)


def words(difference: Difference, report: Report) -> tuple[str, str]:
    """What was measured; and what follows for log p, or would decide it."""
    comparison, error = report.comparison, difference.std_error
    side = "above" if difference.value > 0 else "below"
    chance = difference.low <= 0 <= difference.high
    measured = (
        f"{difference.model} is {side} {comparison.reference} by "
        f"{_number(abs(difference.value), error)} ± {_error(error)} nats per sample "
        f"({100 * comparison.level:g}\u00a0%: {_interval(difference)}), "
        f"{'which may be chance' if chance else 'more than chance'}."
    )
    verdict = f"{difference.verdict[:1].upper()}{difference.verdict[1:]}."
    return measured, f"{verdict} {to_decide(difference, report)}".rstrip()


def to_decide(difference: Difference, report: Report) -> str:
    """The command that would decide an open verdict, or what it takes; empty if unknown."""
    advice, evaluation = difference.advice, report.evaluation
    settings = replace(report.settings, saved=False, repeats=None)
    if advice.particles is not None:
        evaluation = replace(
            evaluation,
            estimator="importance",
            particles=advice.particles,
            calls=None,
            std_error=None,
        )
    elif advice.samples is not None:
        available = len(getattr(report.dataset, evaluation.split))
        if advice.samples > available:
            short = f"the {evaluation.split} split has {available}"
            return f"It would take about {advice.samples} samples; {short}."
        evaluation = replace(evaluation, limit=advice.samples)
    else:
        return ""
    return f"To decide: {_command(report._replace(evaluation=evaluation, settings=settings))}"


def reading(report: Report) -> list[str]:
    """How to read the tables, in paragraphs."""
    level = report.comparison.level
    lines = [
        "All models were given the same samples, so the difference is taken sample by sample "
        "(paired): its error is that of the differences, often far below the errors of the means. "
        "Compare by the difference, not by whether the errors of two means overlap.",
        "The error holds all chance: which samples were drawn, the noise of the estimate, and, "
        "of a model with several, its training seeds. “Of which Monte Carlo” is the noise alone, "
        "which more network calls would remove; the rest takes more samples or seeds. Means and "
        "differences are in nats per sample, where higher is better (bits per dimension: lower).",
        f"The intervals cover all expected differences in {100 * level:g} % of repetitions; "
        "against the best of several models, which chance helped to be the best, they are wider "
        "than for one pair.",
    ]
    kinds = {row.kind for row in report.comparison.models.values()}
    if "lower bound" in kinds:
        lines.append(
            "A lower bound lies below log p by an unknown gap. A higher bound is thus a better "
            "bound, not surely a better model: the lines on log p say what follows for the models. "
            "“Decided” follows from bounds on both sides, “likely” from the trend in the number "
            f"of particles; such a line is wrong in {50 * (1 - level):g} % of repetitions "
            "at most. Else nothing is said, and what would decide stands beside it."
        )
    return lines


def facts(report: Report) -> list[tuple[str, str]]:
    """Where the figures come from."""
    data, settings = report.dataset, report.evaluation
    kind = "continuous, densities" if data.levels is None else f"{data.levels} levels"
    lines = [
        ("Data", f"{data.name}: samples of shape {data.event_shape}, {kind}; in units as given"),
        ("Samples", f"{report.comparison.samples} of the {settings.split} split"),
        *((model.name, _origin(model, report)) for model in report.models),
    ]
    if report.settings.paired_seeds:
        lines.append(("Training seeds", "taken as pairs: what models owe to a seed alike cancels"))
    return [
        *lines,
        *((f"Estimator of {name}", _cost(result)) for name, result in report.first.items()),
        ("Noise", _noise(report)),
        *(
            (f"Monte Carlo error of {difference.model}", _common(difference))
            for difference in report.comparison.differences
            if _is_known(difference)
        ),
        ("Command", _command(report)),
        ("Versions", _versions()),
        ("Date", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"),
    ]


def _origin(model: Model, report: Report) -> str:
    runs = ", ".join(report.runs[index] for index in model.runs)
    seeds = ", ".join(map(str, model.seeds))
    return f"{runs}; training seed{'s' * (len(model.seeds) > 1)} {seeds}"


def _versions() -> str:
    return (
        f"pyrodiff {__version__}, torch {torch.__version__}, "
        f"Pyro {pyro.__version__}, Python {platform.python_version()}"
    )


def _cost(result: LogLikelihood) -> str:
    calls = f"{result.network_evaluations:.6g} network calls per sample"
    shared = f", and {result.shared_calls} on other data" if result.shared_calls else ""
    return f"{result.estimator}: {result.kind}; {calls}{shared}, each time"


def _noise(report: Report) -> str:
    if report.settings.saved:
        return f"saved evaluations; seed {report.evaluation.seed} of the first run's"
    count = len(report.noise)
    repeats = f"; mean of {count} evaluations with noise of their own" if count > 1 else ""
    return f"seed {report.evaluation.seed}, common to all models{repeats}"


def _is_known(difference: Difference) -> bool:
    return math.isfinite(difference.monte_carlo) and math.isfinite(difference.independent)


def _common(difference: Difference) -> str:
    common, independent = _error(difference.monte_carlo), _error(difference.independent)
    return f"{common} in its difference; {independent} if the noise were not common"


def _command(report: Report) -> str:
    words = ["pyrodiff", "compare", *report.runs]
    for settings in (report.evaluation, report.settings):
        defaults = type(settings)().to_dict()
        for name, value in settings.to_dict().items():
            if value == defaults[name] or (report.settings.saved and name not in FLAGS):
                continue
            option = name.replace("_", "-")
            words.append(f"--{option}" if name in FLAGS else f"--{option}={value}")
    return shlex.join(words)


def print_comparison(report: Report) -> None:
    """Print the tables, and what follows from them in words."""
    from rich.box import SIMPLE
    from rich.table import Table as RichTable
    from rich.text import Text

    terminal, comparison = console(), report.comparison
    title = f"{report.dataset.name}, {report.evaluation.split}: {comparison.samples} samples"
    terminal.print(Text(title, style="bold"))
    for table in tables(report):
        shown = RichTable(title=Text(table.title), box=SIMPLE, title_justify="left")
        for column, name in enumerate(table.header):
            shown.add_column(Text(name), justify="right" if column else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        terminal.print(shown)
    for difference in comparison.differences:
        for line in words(difference, report):
            terminal.print(Text(line))
    for note in comparison.notes:
        terminal.print(Text(note, style="dim"))
