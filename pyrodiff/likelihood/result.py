"""The result of every estimator: its estimates, in the formats that they are passed on in.

netCDF      ``save`` and ``load``; variables and attributes as of ``to_dataset``
xarray      ``to_dataset``
ArviZ       ``to_inference_data``
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff.checks import check_types, short
from pyrodiff.likelihood.arviz import to_inference_data
from pyrodiff.likelihood.estimates import AXES, SHARED, Estimates, Kind, Mean
from pyrodiff.serialization import netcdf_content, write_bytes
from pyrodiff.serialization.netcdf import checksummed, read_netcdf

__all__ = ["Kind", "LogLikelihood", "Mean", "read_result"]

_FILE_NAMES = {"value": "log_likelihood", "terms": "term", "timesteps": "timestep"}
_INTEGERS = ("calls", "indices", "checksums")
_FLOAT_TYPES = ("float32", "float64")
_DEFAULTS: dict[str, Any] = {"model": "", "remarks": "", "unbiased_weights": 0}  # of older files
_SCALARS = (*SHARED, *_DEFAULTS)


@dataclass(frozen=True, eq=False)
class LogLikelihood(Estimates):
    """log p_θ(x) of each sample; for the arguments and the statistics see ``Estimates``."""

    def to_dataset(self, **attributes: Any) -> Any:
        """An ``xarray.Dataset``: dimensions ``sample``, ``timestep`` and ``particle``."""
        import xarray

        data: dict[str, Any] = {}
        for name, axes in AXES.items():
            value = getattr(self, name)
            if value is not None:
                data[_FILE_NAMES.get(name, name)] = (axes, value.numpy())
        coords = {} if self.timesteps is None else {"timestep": self.timesteps.double().numpy()}
        scalars = {name: getattr(self, name) for name in _SCALARS} | {"units": "nats"}
        scalars["unbiased_weights"] = int(self.unbiased_weights)  # netCDF has no bool
        return xarray.Dataset(data, coords=coords, attrs=scalars | attributes)

    def to_inference_data(self, observed: Any = None, coords: Any = None, **attributes: Any) -> Any:
        """For ArviZ; see the function ``to_inference_data``."""
        return to_inference_data(self, observed, coords, **attributes)

    def save(self, path: str | Path, **attributes: Any) -> None:
        """Write netCDF, atomically; ``attributes`` are kept beside the result's own."""
        dataset = self.to_dataset(**attributes)
        write_bytes(Path(path), checksummed(netcdf_content(dataset)))

    @classmethod
    def load(cls, path: str | Path) -> "LogLikelihood":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a result of another version.
        """
        return read_result(path)[0]


def read_result(path: str | Path) -> tuple[LogLikelihood, dict[str, Any]]:
    """What ``LogLikelihood.save`` wrote, and all attributes of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a result of another version, a damaged file, or none of ours.
    """
    variables, attributes = read_netcdf(Path(path))
    attributes = _DEFAULTS | attributes
    tensors = _read_tensors(variables, path)
    names = [*_SCALARS, "value", "std_error", "calls"]
    missing = [name for name in names if name not in attributes and name not in tensors]
    if missing:
        raise ValueError(
            f"Expected in {path} what this version of pyrodiff writes; got a file without "
            f"{missing[0]!r}. Evaluate the run again."
        )
    scalars: dict[str, Any] = {name: attributes[name] for name in _SCALARS}
    scalars["unbiased_weights"] = scalars["unbiased_weights"] == 1
    check_types(LogLikelihood, scalars)
    if scalars["dimensions"] < 1 or scalars["shared_calls"] < 0:
        raise ValueError(f"Expected a result in {path}; got {short(scalars)}.")
    return LogLikelihood(**(tensors | scalars)), attributes


def _read_tensors(variables: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a result, checked to be numbers of sizes that agree."""
    tensors, sizes = {}, dict[str, int]()
    for name, axes in (AXES | {"timesteps": ("timestep",)}).items():
        key = _FILE_NAMES.get(name, name)
        if key not in variables:
            continue
        array = variables[key]
        fits = array.ndim == len(axes) and all(
            sizes.setdefault(axis, size) == size
            for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits or array.dtype not in (("int64",) if name in _INTEGERS else _FLOAT_TYPES):
            raise ValueError(
                f"Expected a result in {path}; got {key!r} of shape {array.shape} and type "
                f"{array.dtype}."
            )
        tensors[name] = torch.tensor(array)
    return tensors
