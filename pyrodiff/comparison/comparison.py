"""What a comparison of several models holds: figures, a table, lines to read, plain exports."""

import math
from dataclasses import dataclass
from typing import Any

from pyrodiff.comparison.paired import Difference
from pyrodiff.comparison.verdict import sentence

__all__ = ["Comparison", "Summary"]


@dataclass(frozen=True)
class Summary:
    """One model.

    Args:
        value: the mean over samples and training seeds, nats.
        std_error: of it: between samples, and between seeds where there are several.
        monte_carlo: the part of it that more network calls would remove.
        kind: lower bound, upper bound or estimate.
        seeds: training seeds, S.
        calls: network calls per sample and seed.
        gap: what a lower bound lacks at most, by its trend in K, nats; NaN where unknown.
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
    """Models beside each other, and each one's difference from the reference.

    Args:
        models: by name, best first.
        reference: the name of the model that the others are compared with.
        differences: of the others, model minus reference, in the order of ``models``.
        samples: N.
        level: of the intervals, all together.
        notes: what a reader must know of the errors.
    """

    models: dict[str, Summary]
    reference: str
    differences: tuple[Difference, ...]
    samples: int
    level: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Difference:
        for found in self.differences:
            if found.model == name:
                return found
        names = [found.model for found in self.differences]
        raise KeyError(f"Expected one of {names}; got {name!r}.")

    @property
    def verdicts(self) -> tuple[str, ...]:
        """A line for each difference."""
        return tuple(map(sentence, self.differences))

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame``, one row per model."""
        import pandas

        rows: dict[str, dict[str, Any]] = {name: vars(row) for name, row in self.models.items()}
        for found in self.differences:
            more = {f"difference_{key}": value for key, value in _exported(found).items()}
            rows[found.model] = rows[found.model] | more
        return pandas.DataFrame.from_dict(rows, orient="index")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as for JSON; None where something is unknown."""
        return {
            "reference": self.reference,
            "samples": self.samples,
            "level": self.level,
            "models": {name: _plain(vars(row)) for name, row in self.models.items()},
            "differences": {found.model: _plain(_exported(found)) for found in self.differences},
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
        other = f"minus {escape(self.reference)}"
        for name in ("mean ± error", other, "Monte Carlo", interval):
            table.add_column(name, justify="right")
        found = {each.model: each for each in self.differences}
        for name, model in self.models.items():
            label = f"{escape(name)}\n[dim]{model.kind}[/dim]"
            table.add_row(label, *_cells(model, found.get(name)))
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
)


def _exported(found: Difference) -> dict[str, Any]:
    names = (*_EXPORTED, "variance_reduction", "verdict")
    return {name: getattr(found, name) for name in names} | {"advice": str(found.advice)}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not know."""
    unknown = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: None if key in unknown else value for key, value in values.items()}


def _cells(model: Summary, found: Difference | None) -> tuple[str, ...]:
    mean = f"{model.value:.3f} ± {model.std_error:.2g}"
    if found is None:
        return mean, "reference", "", ""
    known = not math.isnan(found.monte_carlo)
    return (
        mean,
        f"{found.value:+.3f} ± {found.std_error:.2g}",
        f"{found.monte_carlo:.2g}" if known else "unknown",
        f"{found.low:.3f} to {found.high:.3f}",
    )
