"""The result of every estimator: per-sample log-likelihood, its error, and what it cost."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrodiff.serialization import write_atomically

__all__ = ["LogLikelihood", "Mean"]

Kind = Literal["lower bound", "upper bound", "estimate"]


class Mean(NamedTuple):
    """A mean over samples and the two sources of its error, as standard errors.

    ``between_samples`` is the spread of the samples' values over √N, which holds the Monte Carlo
    error within it; ``monte_carlo`` is that part alone, what more network calls would remove.
    """

    value: float
    between_samples: float
    monte_carlo: float


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """log p_θ(x) of each sample.

    Args:
        value: nats, shape (N,), in units of the model plus ``offset``.
        std_error: the Monte Carlo standard error of each value, nats, shape (N,); NaN where the
            estimator cannot know it.
        kind: what the value's expectation is: a lower or upper bound, or neither.
        network_evaluations: network calls per sample.
        dimensions: values in one sample.
        estimator: how it was made.
        terms: −L of parts of the chain, nats per step, shape (N, S), or None.
        timesteps: the mean t of each part, shape (S,), or None.
    """

    value: Tensor
    std_error: Tensor
    kind: Kind
    network_evaluations: int
    dimensions: int
    estimator: str
    terms: Tensor | None = None
    timesteps: Tensor | None = None

    def mean(self) -> Mean:
        """The mean over samples in nats; errors of NaN where there are too few samples to know."""
        n = len(self.value)
        between = float(self.value.std() / math.sqrt(n)) if n > 1 else math.nan
        monte_carlo = float(self.std_error.square().sum().sqrt() / n)
        return Mean(float(self.value.mean()), between, monte_carlo)

    def bits_per_dim(self) -> Mean:
        """The mean of −value / (dimensions · ln 2) over samples, in bits per dimension."""
        unit = self.dimensions * math.log(2)
        value, between, monte_carlo = self.mean()
        return Mean(-value / unit, between / unit, monte_carlo / unit)

    def __add__(self, offset: float) -> "LogLikelihood":
        """The result with ``offset`` nats added, as for a change of units of the data."""
        from dataclasses import replace

        return replace(self, value=self.value + offset)

    def to_dataset(self, **attributes: Any) -> Any:
        """An ``xarray.Dataset`` with dimensions ``sample`` and ``timestep``."""
        import xarray

        data: dict[str, Any] = {
            "log_likelihood": ("sample", self.value.double().numpy()),
            "std_error": ("sample", self.std_error.double().numpy()),
        }
        coords: dict[str, Any] = {}
        if self.terms is not None and self.timesteps is not None:
            data["term"] = (("sample", "timestep"), self.terms.double().numpy())
            coords["timestep"] = self.timesteps.double().numpy()
        held = {
            "kind": self.kind,
            "units": "nats",
            "network_evaluations": self.network_evaluations,
            "dimensions": self.dimensions,
            "estimator": self.estimator,
        }
        return xarray.Dataset(data, coords=coords, attrs=held | attributes)

    def save(self, path: str | Path, **attributes: Any) -> None:
        """Write netCDF, atomically; ``attributes`` are kept beside the result's own."""
        dataset = self.to_dataset(**attributes)
        write_atomically(Path(path), lambda name: dataset.to_netcdf(name, engine="h5netcdf"))

    @classmethod
    def load(cls, path: str | Path) -> "LogLikelihood":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
        """
        import xarray

        if not Path(path).is_file():
            raise FileNotFoundError(f"Expected a file {path}; got nothing there.")
        with xarray.open_dataset(path, engine="h5netcdf") as dataset:
            dataset.load()
        held = dataset.attrs

        def tensor(name: str) -> Tensor | None:
            return torch.tensor(dataset[name].values) if name in dataset else None

        value, std_error = tensor("log_likelihood"), tensor("std_error")
        assert value is not None and std_error is not None
        return cls(
            value,
            std_error,
            held["kind"],
            int(held["network_evaluations"]),
            int(held["dimensions"]),
            held["estimator"],
            tensor("term"),
            tensor("timestep"),
        )
