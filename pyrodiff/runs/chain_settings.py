"""Settings of the chain that a run's network is put on: plain values; no torch is imported."""

from dataclasses import dataclass, fields
from typing import Any

from pyrodiff.checks import check_choice, check_count
from pyrodiff.runs.choices import CHOICES
from pyrodiff.training.settings import Settings

__all__ = ["DEFAULT_GRID", "VARIANCES", "ChainSettings"]

DEFAULT_GRID = "log-snr"

VARIANCES: dict[str, tuple[str, ...]] = {
    "fixed-small": (),
    "fixed-large": (),
    **{name: tuple(choice.takes) for name, choice in CHOICES["covariance"].items()},
}
"""Of each variance that needs no training of its own, the settings that go with it."""


@dataclass(frozen=True, kw_only=True)
class ChainSettings(Settings):
    """The chain that a run's network is put on; by default the run's own.

    Args:
        steps: of a chain between the same ends, other than the run's own.
        variance: of the reverse step instead of the run's own: fixed-small, fixed-large, analytic
            (fitted on another split), isotropic, diagonal or full (the posterior covariance, from
            the network's Jacobian).
        grid: the noise levels that the steps visit: uniform, quadratic, log-snr (default) or
            optimal (fitted on another split for this variance).
        probes: products with the Jacobian per step for variance isotropic or diagonal; without it
            as many as an event has values, for the exact one.
        rank: directions beside the diagonal, two products each, for variance diagonal.

    Raises:
        ValueError: an unknown name, a number out of range, an option without effect.
    """

    steps: int | None = None
    variance: str | None = None
    grid: str | None = None
    probes: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "probes", "rank"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.grid is not None:
            check_choice("grid", self.grid, CHOICES["grid"])
            if self.steps is None:
                raise ValueError(f"Expected steps with a grid; got grid {self.grid!r} alone.")
        if self.variance is not None:
            check_choice("variance", self.variance, VARIANCES)
        self._check_options()

    def _check_options(self) -> None:
        """Refuse options of another variance."""
        allowed = () if self.variance is None else VARIANCES[self.variance]
        for name in ("probes", "rank"):
            if (value := getattr(self, name)) is not None and name not in allowed:
                takers = [variance for variance, takes in VARIANCES.items() if name in takes]
                got = "no variance" if self.variance is None else f"variance {self.variance!r}"
                raise ValueError(
                    f"Expected {name} with variance {' or '.join(takers)}; "
                    f"got {name} = {value} with {got}."
                )

    @property
    def changes(self) -> bool:
        """Whether it is another chain than the run's own."""
        return self.steps is not None or self.variance is not None

    def chain(self) -> dict[str, Any]:
        """The settings of the chain that were made, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(ChainSettings)}
        return {name: value for name, value in values.items() if value is not None}

    def label(self) -> str:
        """The variance as a name of a file: ``diagonal-probes-1-rank-3``, say."""
        options = [f"{name}-{getattr(self, name)}" for name in ("probes", "rank")]
        given = [option for option in options if not option.endswith("None")]
        return "-".join([self.variance or "own", *given])
