"""The outcome of a comparison: figures, a table, sentences, plain exports."""

import math
from dataclasses import dataclass
from typing import Any

from pyrodiff.comparison.difference import Difference, sentence

__all__ = ["Comparison", "Summary"]


@dataclass(frozen=True)
class Summary:
    """The mean of one model.

    Args:
        value: the mean over samples and training seeds, nats.
        std_error: of the mean: between samples, and between seeds where there are several.
        monte_carlo: the part of it that more network calls would remove.
        kind: lower bound, upper bound or estimate.
        seeds: training seeds, S.
        calls: network calls per sample and seed.
        gap: the most that a lower bound lacks, by its trend in K, nats; NaN where unknown.
    """

    value: float
    std_error: float
    monte_carlo: float
    kind: str
    seeds: int
    calls: float
    gap: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models side by side, and the difference of each from the reference.

    Args:
        models: by name, best first.
        reference: the name of the model that the others are compared with.
        differences: of the others, model minus reference, in the order of ``models``.
        samples: N.
        level: of all intervals together.
        notes: what a reader has to know about the errors.
    """

    models: dict[str, Summary]
    reference: str
    differences: tuple[Difference, ...]
    samples: int
    level: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Difference:
        for difference in self.differences:
            if difference.model == name:
                return difference
        names = [difference.model for difference in self.differences]
        raise KeyError(f"Expected one of {names}; got {name!r}.")

    @property
    def verdicts(self) -> tuple[str, ...]:
        """A line for each difference."""
        return tuple(map(sentence, self.differences))

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame``, one row per model."""
        import pandas

        rows: dict[str, dict[str, Any]] = {
            name: dict(vars(summary)) for name, summary in self.models.items()
        }
        for difference in self.differences:
            figures = {f"difference_{k}": value for k, value in _exported(difference).items()}
            rows[difference.model] |= figures
        return pandas.DataFrame.from_dict(rows, orient="index")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as for JSON; None where something is unknown."""
        return {
            "reference": self.reference,
            "samples": self.samples,
            "level": self.level,
            "models": {name: _plain(vars(summary)) for name, summary in self.models.items()},
            "differences": {each.model: _plain(_exported(each)) for each in self.differences},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        means = (
            f"{name}: {model.value:.4f} ± {model.std_error:.2g} nats per sample, {model.kind}"
            for name, model in self.models.items()
        )
        return "\n".join([*means, *self.verdicts, *self.notes])

    def __rich__(self) -> Any:
        from rich.box import SIMPLE
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{self.samples} samples, nats per sample", box=SIMPLE)
        table.add_column("model")
        interval = f"{100 * self.level:g} % interval"
        minus = f"minus {escape(self.reference)}"
        for heading in ("mean ± error", minus, "Monte Carlo", interval):
            table.add_column(heading, justify="right")
        differences = {difference.model: difference for difference in self.differences}
        for name, model in self.models.items():
            label = f"{escape(name)}\n[dim]{model.kind}[/dim]"
            table.add_row(label, *_cells(model, differences.get(name)))
        return Group(table, *map(escape, [*self.verdicts, *self.notes]))


_EXPORTED = (
    "value",
    "std_error",
    "between_samples",
    "between_seeds",
    "monte_carlo",
    "independent",
    "degrees_of_freedom",
    "low",
    "high",
    "probability",
    "status",
    "variance_reduction",
    "verdict",
)


def _exported(difference: Difference) -> dict[str, Any]:
    """The figures and sentences of a difference, by name."""
    figures = {name: getattr(difference, name) for name in _EXPORTED}
    return figures | {"advice": str(difference.advice)}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not have."""
    unknown = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: None if key in unknown else value for key, value in values.items()}


def _cells(model: Summary, difference: Difference | None) -> tuple[str, ...]:
    """The row of a model in the table; ``difference`` is None for the reference."""
    mean = f"{model.value:.3f} ± {model.std_error:.2g}"
    if difference is None:
        return mean, "reference", "", ""
    unknown = math.isnan(difference.monte_carlo)
    return (
        mean,
        f"{difference.value:+.3f} ± {difference.std_error:.2g}",
        "unknown" if unknown else f"{difference.monte_carlo:.2g}",
        f"{difference.low:.3f} to {difference.high:.3f}",
    )
