"""What is told of a comparison of runs: its figures in tables, what follows, where it comes from.

The same words go to the terminal and to the page (``pyrodiff.runs.report.page``).
"""

import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, NamedTuple

import pyro
import torch

import pyrodiff
from pyrodiff.comparison import Comparison, Difference
from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.plots.style import decimals
from pyrodiff.runs.groups import Model
from pyrodiff.runs.settings import FLAGS, ComparisonSettings, EvaluationSettings
from pyrodiff.training.progress import console

__all__ = ["Report", "Table", "facts", "print_comparison", "reading", "tables", "words"]


class Report(NamedTuple):
    """All that is told of a comparison.

    Args:
        comparison: of the models.
        models: which runs they are.
        runs: the runs' folders, as given.
        names: of the runs.
        results: for each run its evaluations, one per repeat.
        dataset: the data of all of them.
        evaluation, settings: what was asked for.
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
    found = report.comparison
    bits = report.dataset.is_image or report.dataset.levels is not None
    header = ("model", "mean", "± error", "of which Monte Carlo", *(("bits/dim",) if bits else ()))
    header += ("what it is", "seeds", "calls")
    means = []
    for name, row in found.models.items():
        error, unit = row.std_error, report.dataset.dimensions * math.log(2)
        more = (_number(-row.value / unit, error / unit),) if bits else ()
        cells = _number(row.value, error), _error(error), _error(row.monte_carlo)
        means.append((name, *cells, *more, row.kind, str(row.seeds), f"{row.calls:.6g}"))
    interval = f"{100 * found.level:g}\u00a0% interval"
    several = any(row.seeds > 1 for row in found.models.values())
    parts = (*(("of which seeds",) if several else ()), "of which Monte Carlo")
    columns = ("model", "difference", "± paired error", *parts, interval)
    rows = [(each.model, *_difference(each, several)) for each in found.differences]
    return [
        Table("Mean log p of a sample, nats", header, means),
        Table(f"Difference from {found.reference}, nats", columns, rows),
    ]


def _difference(found: Difference, seeds: bool) -> tuple[str, ...]:
    return (
        _number(found.value, found.std_error, "+"),
        _error(found.std_error),
        *((_error(found.between_seeds),) if seeds else ()),
        _error(found.monte_carlo),
        _interval(found),
    )


def _interval(found: Difference) -> str:
    return " to ".join(_number(end, found.std_error, "+") for end in (found.low, found.high))


def _number(value: float, error: float, sign: str = "-") -> str:
    """A value to the two digits of its error."""
    digits = decimals(error) if math.isfinite(error) and error > 0 else 4
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def _error(error: float) -> str:
    return "unknown" if math.isnan(error) else _number(error, error)


def words(found: Difference, report: Report) -> tuple[str, str]:
    """What was measured, and what follows for log p or would decide it."""
    chance, level = found.low <= 0 <= found.high, report.comparison.level
    figures = f"{_number(abs(found.value), found.std_error)} ± {_error(found.std_error)}"
    measured = (
        f"{found.model} is {'above' if found.value > 0 else 'below'} {found.reference} by {figures}"
        f" nats per sample ({100 * level:g}\u00a0%: {_interval(found)}), "
        + ("which may be chance." if chance else "more than chance.")
    )
    verdict = f"{found.verdict[:1].upper()}{found.verdict[1:]}."
    return measured, f"{verdict} {to_decide(found, report)}".rstrip()


def to_decide(found: Difference, report: Report) -> str:
    """The command that would decide an open verdict, or what it takes; empty where unknown."""
    advice, evaluation = found.advice, report.evaluation
    settings = replace(report.settings, saved=False, repeats=None)
    if advice.particles is not None:
        own: dict[str, Any] = {"evaluations": None, "std_error": None}
        own |= {"estimator": "importance", "particles": advice.particles}
        evaluation = replace(evaluation, **own)
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
    """How to read the tables, a paragraph each."""
    found = report.comparison
    lines = [
        "All models were given the same samples, so the difference is taken sample by sample "
        "(paired): its error is that of the differences, often far below the errors of the means. "
        "Compare by the difference, not by whether the errors of two means overlap.",
        "The error holds all chance: which samples were drawn, the noise of the estimate, and, "
        "of a model with several, its training seeds. “Of which Monte Carlo” is the noise alone, "
        "which more network calls would remove; the rest takes more samples or seeds. Means and "
        "differences are in nats per sample, where higher is better (bits per dimension: lower).",
        f"The intervals cover all expected differences in {100 * found.level:g} % of repetitions; "
        "against the best of several models, which chance helped to be the best, they are wider "
        "than for one pair.",
    ]
    kinds = {row.kind for row in found.models.values()}
    if "lower bound" in kinds:
        lines.append(
            "A lower bound lies below log p by an unknown gap. A higher bound is thus a better "
            "bound, not surely a better model: the lines on log p say what follows for the models. "
            "“Decided” follows from bounds on both sides, “likely” from the trend in the number "
            f"of particles; such a line is wrong in {50 * (1 - found.level):g} % of repetitions "
            "at most. Else nothing is said, and what would decide stands beside it."
        )
    return lines


def facts(report: Report) -> list[tuple[str, str]]:
    """Where the figures come from."""
    data, settings, found = report.dataset, report.evaluation, report.comparison.differences
    kind = "continuous, densities" if data.levels is None else f"{data.levels} levels"
    told = [
        ("Data", f"{data.name}: samples of shape {data.event_shape}, {kind}; in units as given"),
        ("Samples", f"{report.comparison.samples} of the {settings.split} split"),
    ]
    for model in report.models:
        runs = ", ".join(report.runs[place] for place in model.runs)
        seeds = ", ".join(map(str, model.seeds))
        told.append((model.name, f"{runs}; training seed{'s' * (len(model.seeds) > 1)} {seeds}"))
    if report.settings.paired_seeds:
        told.append(("Training seeds", "taken as pairs: what models owe to a seed alike cancels"))
    told += [(f"Estimator of {name}", _cost(result)) for name, result in report.first.items()]
    versions = f"pyrodiff {pyrodiff.__version__}, torch {torch.__version__}, "
    versions += f"Pyro {pyro.__version__}, Python {platform.python_version()}"
    return [
        *told,
        ("Noise", _noise(report)),
        *((f"Monte Carlo error of {each.model}", _common(each)) for each in found if _known(each)),
        ("Command", _command(report)),
        ("Versions", versions),
        ("Date", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"),
    ]


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


def _known(found: Difference) -> bool:
    return math.isfinite(found.monte_carlo) and math.isfinite(found.independent)


def _common(found: Difference) -> str:
    common, independent = _error(found.monte_carlo), _error(found.independent)
    return f"{common} in its difference; {independent} if the noise were not common"


def _command(report: Report) -> str:
    words = ["pyrodiff", "compare", *report.runs]
    for settings in (report.evaluation, report.settings):
        usual: Any = type(settings)().to_dict()
        for name, value in settings.to_dict().items():
            if value == usual[name] or (report.settings.saved and name not in FLAGS):
                continue
            words.append(f"--{name}" if name in FLAGS else f"--{name}={value}")
    return shlex.join(words)


def print_comparison(report: Report) -> None:
    """Tables, and what follows from them in words."""
    from rich.box import SIMPLE
    from rich.table import Table as RichTable
    from rich.text import Text

    terminal, found = console(), report.comparison
    title = f"{report.dataset.name}, {report.evaluation.split}: {found.samples} samples"
    terminal.print(Text(title, style="bold"))
    for table in tables(report):
        shown = RichTable(title=Text(table.title), box=SIMPLE, title_justify="left")
        for place, name in enumerate(table.header):
            shown.add_column(Text(name), justify="right" if place else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        terminal.print(shown)
    for each in found.differences:
        for line in words(each, report):
            terminal.print(Text(line))
    for note in found.notes:
        terminal.print(Text(note, style="dim"))
