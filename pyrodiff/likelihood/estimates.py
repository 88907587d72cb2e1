"""Per-sample estimates of log p_θ(x): values, their errors and their cost.

``Estimates`` has the numbers and their statistics; ``LogLikelihood`` (``result``) is the same with
formats and files.  Code that only reads the numbers takes ``Estimates``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from pyrodiff.likelihood.statistics import unskewed

__all__ = ["AXES", "FEWEST_WEIGHTS", "SHARED", "Estimates", "Kind", "Mean", "pareto_k"]

Kind = Literal["lower bound", "upper bound", "estimate"]
Result = TypeVar("Result", bound="Estimates")

AXES: dict[str, tuple[str, ...]] = {
    "value": ("sample",),
    "std_error": ("sample",),
    "calls": ("sample",),
    "degrees_of_freedom": ("sample",),
    "skewness": ("sample",),
    "terms": ("sample", "timestep"),
    "log_weights": ("sample", "particle"),
    "reference": ("sample",),
    "indices": ("sample",),
    "checksums": ("sample",),
}
"""The tensors that have a row for each sample, and what their axes are."""
SHARED = ("kind", "dimensions", "estimator", "shared_calls")
"""What is the same for all batches of one estimate."""
_SAMPLES = ("indices", "checksums")  # they identify the samples; some parts may lack them

FEWEST_WEIGHTS = 30
"""For a Pareto k̂.  It rests on the largest fifth, and ArviZ 1.x fits nothing to five of them."""


def _fitted_k(log_weights: np.ndarray) -> np.ndarray:
    """k̂ of each row, by either generation of ArviZ."""
    import arviz

    if hasattr(arviz, "psislw"):
        return arviz.psislw(log_weights)[1]
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights, axis=-1)[1]  # it takes log-likelihoods


def pareto_k(log_weights: Tensor) -> Tensor:
    """k̂ of each row of log weights (N, K) in float64; NaN for fewer than 30, and for equal ones."""
    result = log_weights.new_full((len(log_weights),), torch.nan)
    if log_weights.shape[1] < FEWEST_WEIGHTS:
        return result
    # equal or vanishing weights have no tail to fit
    varied = (log_weights.amax(1) - log_weights.amin(1)) > 0
    if bool(varied.any()):
        result[varied] = torch.as_tensor(_fitted_k(log_weights[varied].numpy()))
    return result


class Mean(NamedTuple):
    """A mean over samples and the two sources of its error, as standard errors.

    ``between_samples`` is the spread of the samples' values over √N, which holds the Monte Carlo
    error within it; ``monte_carlo`` is that part alone, what more network calls would remove.
    """

    value: float
    between_samples: float
    monte_carlo: float


@dataclass(frozen=True, eq=False)
class Estimates:
    """log p_θ(x) of each sample.

    Args:
        value: nats, shape (N,), in units of the model plus ``offset``.
        std_error: the Monte Carlo standard error of each value, nats, shape (N,); NaN where it is
            unknown.
        kind: whether the value's expectation is a lower bound, an upper bound, or neither.
        calls: network calls that each sample took, shape (N,), int64.
        dimensions: how many numbers a sample has.
        estimator: the ``repr`` of the estimator.
        terms: −L of parts of the chain, nats per step, shape (N, S), or None.
        timesteps: the mean t of each part, shape (S,), or None.
        degrees_of_freedom: of each standard error, shape (N,), or None for many; NaN where they
            are too few for an interval.
        skewness: of each value's Monte Carlo error, shape (N,), or None for none.
        log_weights: log of the importance weights that the value was made of, (N, K), or None.
        reference: the importance bound with as many particles, nats, (N,), where the estimator
            compares itself with it; else None.
        shared_calls: network calls made once for all samples, on other data (a pilot).
        model: a checksum that identifies the model, or empty.
        remarks: why some errors are NaN, a sentence a line; or empty.
        unbiased_weights: whether exp(value) is unbiased for p_θ(x); False also where unknown.
        indices: of each sample in its data set, int64, (N,), or None where unknown.
        checksums: of each sample and its context (``sample_checksums``), int64, (N,), or None.
    """

    value: Tensor
    std_error: Tensor
    kind: Kind
    calls: Tensor
    dimensions: int
    estimator: str
    terms: Tensor | None = None
    timesteps: Tensor | None = None
    degrees_of_freedom: Tensor | None = None
    log_weights: Tensor | None = None
    reference: Tensor | None = None
    shared_calls: int = 0
    model: str = ""
    remarks: str = ""
    unbiased_weights: bool = False
    indices: Tensor | None = None
    checksums: Tensor | None = None
    skewness: Tensor | None = None

    @property
    def network_evaluations(self) -> float:
        """Network calls per sample, on average; without the shared ones."""
        return float(self.calls.double().mean())

    def mean(self) -> Mean:
        """The mean over samples in nats; errors of NaN where there are too few samples to know.

        Values that are not finite are left out.  ``monte_carlo`` is NaN where the error of any
        sample is: the known ones are not those of the others.  ``between_samples`` holds it all
        the same.

        Warns:
            UserWarning: how many were.
        """
        finite = self._finite()
        value, std_error, n = self.value[finite], self.std_error[finite], int(finite.sum())
        between = float(value.std() / math.sqrt(n)) if n > 1 else math.nan
        monte_carlo = float(std_error.square().sum().sqrt()) / n if n else math.nan
        return Mean(float(value.mean()), between, monte_carlo)

    def _finite(self) -> Tensor:
        """Whether each value is finite, (N,) bool; warns where any is not."""
        finite = self.value.isfinite()
        if not bool(finite.all()):
            warnings.warn(
                f"Expected finite values; got NaN or infinity for {int((~finite).sum())} of "
                f"{len(finite)} samples, the first at position {int((~finite).nonzero()[0])}. "
                "The mean is over the others.",
                UserWarning,
                stacklevel=3,
            )
        return finite

    def bits_per_dim(self) -> Mean:
        """The mean of −value / (dimensions · ln 2) over samples, in bits per dimension."""
        unit = self.dimensions * math.log(2)
        value, between, monte_carlo = self.mean()
        return Mean(-value / unit, between / unit, monte_carlo / unit)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of a confidence interval for the expectation of each value, nats, (N,) each.

        T = (value − θ)/std_error is taken for Student's t with the degrees of freedom, or for
        standard normal where they are None; with a skewness g, its transform

            h(T) = T + g T²/3 + g² T³/27 + g/6                       (Hall, 1992)

        is taken for that.  For a bound it is an interval for the bound, not for log p.  NaN where
        the error is unknown or rests on too little; ``remarks`` says why.

        Raises:
            ValueError: a level outside (0, 1).
        """
        from scipy import stats

        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1; got {level}.")
        upper = 0.5 + level / 2
        if self.degrees_of_freedom is None:
            quantile = torch.full_like(self.std_error, float(stats.norm.ppf(upper)))
        else:
            quantile = torch.as_tensor(stats.t.ppf(upper, self.degrees_of_freedom.double().numpy()))
        ends = (quantile, -quantile)
        if self.skewness is not None:
            ends = (unskewed(quantile, self.skewness), unskewed(-quantile, self.skewness))
        return self.value - self.std_error * ends[0], self.value - self.std_error * ends[1]

    @property
    def effective_sample_size(self) -> Tensor | None:
        """(Σ w)² / Σ w² of the weights, shape (N,), between 1 and K; None without weights."""
        if self.log_weights is None:
            return None
        weights = self.log_weights.softmax(1)
        return 1 / weights.square().sum(1)

    @property
    def pareto_k(self) -> Tensor | None:
        """k̂, the shape of the Pareto law fitted to the largest weights, (N,); None without weights.

        Below 0.7 the weights' mean is to be trusted at practical K (Vehtari et al., 2024); NaN
        with too few weights to say (K < 30).
        """
        if self.log_weights is None:
            return None
        return pareto_k(self.log_weights.double()).to(self.value)

    @property
    def looser(self) -> Tensor | None:
        """Whether each value lies below the importance bound of as many particles, (N,) bool."""
        return None if self.reference is None else self.value < self.reference

    def __add__(self, offset: float) -> Self:
        """The result with ``offset`` nats added, as for a change of units of the data."""
        shifted: dict[str, Any] = {"value": self.value + offset}
        for name in ("reference", "log_weights"):
            if (tensor := getattr(self, name)) is not None:
                shifted[name] = tensor + offset
        return replace(self, **shifted)

    def select(self, samples: slice | Sequence[int] | Tensor) -> Self:
        """The result of some of the samples, by their positions in this one."""
        rows = samples if isinstance(samples, slice | Tensor) else torch.tensor(list(samples))
        tensors = {name: getattr(self, name) for name in AXES}
        return replace(self, **{k: v[rows] for k, v in tensors.items() if v is not None})

    @staticmethod
    def concatenate(parts: Sequence[Result]) -> Result:
        """One result from those of the parts of a data set, all by the same estimator.

        Parts of several models (training seeds, say) give a result whose ``model`` is empty.  The
        result identifies its samples only where every part does.

        Raises:
            ValueError: no parts, or parts of different estimators.
        """
        if not parts:
            raise ValueError("Expected at least one part; got none.")
        first = parts[0]
        for name in SHARED:
            values = {getattr(part, name) for part in parts}
            if len(values) > 1:
                raise ValueError(f"Expected parts with one {name}; got {sorted(map(str, values))}.")
        names = [name for name in AXES if name not in _SAMPLES]
        present = {tuple(n for n in names if getattr(part, n) is not None) for part in parts}
        if len(present) > 1:
            raise ValueError(f"Expected parts that hold the same; got {sorted(present)}.")
        lines = (line for part in parts for line in part.remarks.splitlines())
        joined: dict[str, Any] = {
            "remarks": "\n".join(dict.fromkeys(lines)),
            "unbiased_weights": all(part.unbiased_weights for part in parts),
        }
        if any(part.model != first.model for part in parts):
            joined["model"] = ""
        for name in AXES:
            tensors = [getattr(part, name) for part in parts]
            complete = all(tensor is not None for tensor in tensors)
            joined[name] = torch.cat(tensors) if complete else None
        return replace(first, **joined)
