"""The chain that a run's network is put on, and what is fitted for it to other data.

RUN/grids/ holds

analytic-errors.safetensors     the errors that the analytic variance is made of
VARIANCE.safetensors            the costs of single steps under a variance, for the optimal grid

each with a checksum of the model and of the samples that it was fitted to.  Both are parts of the
model that is evaluated or sampled, hence independent of the seed of its noise: every command that
asks for them finds them there.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff import serialization
from pyrodiff._version import __version__
from pyrodiff.chains import ReverseChain
from pyrodiff.denoisers import MeanDenoiser
from pyrodiff.grids import Grid, OptimalGrid
from pyrodiff.likelihood.termwise.bound import FEWEST_CALLS
from pyrodiff.runs.batches import checksum
from pyrodiff.runs.chain_settings import DEFAULT_GRID, ChainSettings
from pyrodiff.runs.choices import CHOICES, make
from pyrodiff.serialization import read_weights, write_weights
from pyrodiff.serialization.folders import check_links, remove
from pyrodiff.variances import AnalyticVariance, PosteriorCovariance, Variance

__all__ = [
    "FITS",
    "Fits",
    "Respacing",
    "analytic",
    "calls_per_step",
    "clear_fits",
    "default_calls",
    "diagonal",
    "full",
    "isotropic",
    "respacing",
]

FITS = "grids"
"""The folder's name."""

_ERRORS, _OURS = "analytic-errors", re.compile(r"[a-z]+(-[a-z0-9]+)*\.safetensors")
_POSTERIOR = CHOICES["covariance"].keys() - {"analytic"}
_GRID_SAMPLES, _ERROR_SAMPLES = 64, 1000  # the most that are fitted to


@dataclass(frozen=True)
class Respacing:
    """A chain of a network that was trained on another one.

    Args:
        num_steps: None for those of the network's own chain, and its grid.
        variance: None for the network's own.
        grid: of ``num_steps``.
    """

    num_steps: int | None = None
    variance: Variance | None = None
    grid: Grid | None = None

    def of(self, reverse: ReverseChain) -> ReverseChain:
        """The chain with the network of ``reverse``, in evaluation mode."""
        if self.num_steps is not None:
            assert self.grid is not None
            return reverse.respaced(self.num_steps, variance=self.variance, grid=self.grid).eval()
        if self.variance is None:
            return reverse
        return reverse.assemble(replace(reverse.parts(), variance=self.variance)).eval()


def respacing(settings: ChainSettings, load: Callable[[], ReverseChain], fits: "Fits") -> Respacing:
    """The chain of the settings; what it needs is fitted, or found where it was fitted before.

    Args:
        settings: names and numbers.
        load: the run's model, in evaluation mode; called where the settings change its chain.
        fits: to other data than are judged.

    Raises:
        ValueError: a network that cannot serve such a chain; more steps than the grid has levels.
    """
    if not settings.changes:
        return Respacing()
    reverse = load()
    _check(settings, reverse)
    variance = _variance(settings, reverse, fits)
    if settings.steps is None:
        return Respacing(variance=variance)
    name = settings.grid or DEFAULT_GRID
    if name == "optimal":
        grid: Grid = fits.optimal(Respacing(variance=variance).of(reverse), settings.label())
    else:
        grid = make("grid", name)
    grid.log_snrs(reverse.log_snrs, settings.steps)  # too many steps are refused here
    return Respacing(settings.steps, variance, grid)


def _check(settings: ChainSettings, reverse: ReverseChain) -> None:
    """Refuse networks whose output belongs to their own chain."""
    if reverse.variance.learned and settings.variance is not None:
        raise ValueError(
            f"Expected no variance for a run whose network predicts it, {reverse.variance!r}; "
            f"got variance {settings.variance!r}."
        )
    if isinstance(reverse.denoiser, MeanDenoiser) and settings.steps is not None:
        raise ValueError(
            "Expected no steps for a run whose network predicts the mean of its own chain's steps; "
            f"got steps = {settings.steps}."
        )


def _variance(settings: ChainSettings, reverse: ReverseChain, fits: "Fits") -> Variance | None:
    """The variance of the settings; None for the network's own."""
    name = settings.variance
    if name is None:
        return None
    if name not in CHOICES["covariance"]:
        return make("variance", name)  # type: ignore[no-any-return]
    fit = (reverse, fits) if name == "analytic" else ()
    return make("covariance", name, *fit, **settings.to_dict())  # type: ignore[no-any-return]


def calls_per_step(settings: ChainSettings, size: int) -> int:
    """Network calls in a step, products with the Jacobian counted, for events of ``size`` values.

    Args:
        settings: of the chain.
        size: d.
    """
    if settings.variance not in _POSTERIOR:
        return 1
    variance: Variance = make("covariance", settings.variance, **settings.to_dict())
    return 1 + variance.products(size)


def default_calls(config: Mapping[str, Any], settings: ChainSettings, size: int) -> int:
    """Network calls per sample of the termwise bound where none are asked for.

    The run's own setting, or more where it would not pay for enough terms.

    Args:
        config: of the run.
        settings: of the chain.
        size: d.
    """
    calls = int(serialization.entry(config, "fit")["calls"])
    per_step = calls_per_step(settings, size)
    return calls if per_step == 1 else max(calls, FEWEST_CALLS * per_step)


def isotropic(probes: int | None = None) -> PosteriorCovariance:
    """The mean of the posterior covariance's diagonal."""
    return PosteriorCovariance("isotropic", probes=probes)


def diagonal(probes: int | None = None, rank: int = 0) -> PosteriorCovariance:
    """The diagonal of the posterior covariance, and ``rank`` directions beside it."""
    return PosteriorCovariance("diagonal", rank=rank, probes=probes)


def full() -> PosteriorCovariance:
    """The whole posterior covariance."""
    return PosteriorCovariance("full")


def analytic(reverse: ReverseChain, fits: "Fits") -> AnalyticVariance:
    """The best variance that depends on t alone, fitted or found where it was before."""
    return fits.analytic(reverse)


# -- fits ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fits:
    """Fits to other data than are judged, each made once.

    Args:
        folder: which holds ``grids/``.
        model: the checksum of the model.
        samples: loads the data, shape (N, *event_shape), and their context, (N, …) or None.
        batch_size: rows per network call.
        saves: whether new fits are saved; False: only those that are there are used.
    """

    folder: Path
    model: str
    samples: Callable[[], tuple[Tensor, Tensor | None]]
    batch_size: int
    saves: bool = True

    def analytic(self, reverse: ReverseChain) -> AnalyticVariance:
        """``AnalyticVariance.fit`` for the network of ``reverse``."""
        x_0, context = self._first(_ERROR_SAMPLES)
        identity = self._identity(_ERRORS, x_0, context)
        path = self._find(_ERRORS, identity)
        if path is not None:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return _read_variance(path)
        variance = AnalyticVariance.fit(reverse, x_0, context=context, batch_size=self.batch_size)
        tensors = {
            "log_snrs": torch.tensor(variance.log_snrs, dtype=torch.float64),
            "errors": torch.tensor(variance.errors, dtype=torch.float64),
        }
        self._save(_ERRORS, identity, tensors)
        return variance

    def optimal(self, reverse: ReverseChain, label: str) -> OptimalGrid:
        """``OptimalGrid.fit`` for the variance of ``reverse``, whose name is ``label``."""
        x_0, context = self._first(_GRID_SAMPLES)
        identity = self._identity(repr(reverse.variance), x_0, context)
        path = self._find(label, identity)
        if path is not None:
            with contextlib.suppress(ValueError):
                return OptimalGrid.load(path)
        grid = OptimalGrid.fit(reverse, x_0, context=context, batch_size=self.batch_size)
        self._save(label, identity, {"candidates": grid.candidates, "costs": grid.costs})
        return grid

    def _first(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Some of the samples."""
        x_0, context = self.samples()
        return x_0[:count], None if context is None else context[:count]

    def _identity(self, what: str, x_0: Tensor, context: Tensor | None) -> Tensor:
        """A checksum of all that a fit depends on, 8 bytes."""
        facts = repr((__version__, self.model, what, tuple(x_0.shape))).encode()
        contexts = b"" if context is None else context.numpy().tobytes()
        digest = bytes.fromhex(checksum(facts, x_0.numpy().tobytes(), contexts))
        return torch.tensor(list(digest), dtype=torch.uint8)

    def _find(self, name: str, identity: Tensor) -> Path | None:
        """The file of a fit, if it is of this identity."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError, ValueError):
            saved = read_weights(path).get("identity")
            if saved is not None and torch.equal(saved, identity):
                return path
        return None

    def _save(self, name: str, identity: Tensor, tensors: dict[str, Tensor]) -> None:
        if self.saves:
            path = self._path(name)
            check_links(self.folder, [FITS])
            check_links(path.parent, [path.name])
            write_weights(path, tensors | {"identity": identity})

    def _path(self, name: str) -> Path:
        return self.folder / FITS / f"{name}.safetensors"


def _read_variance(path: Path) -> AnalyticVariance:
    tensors = read_weights(path)
    rows = tensors["errors"].tolist()
    return AnalyticVariance(tuple(tensors["log_snrs"].tolist()), tuple(tuple(row) for row in rows))


def clear_fits(folder: Path) -> None:
    """Remove what was fitted in a run's folder."""
    check_links(folder, [FITS])
    remove(folder / FITS, _OURS.fullmatch)
