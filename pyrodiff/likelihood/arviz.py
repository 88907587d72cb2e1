"""Results as ArviZ reads them: ``InferenceData`` of 0.23, ``xarray.DataTree`` of 1.x.

Draws of ArviZ are draws of parameters: PSIS-LOO weighs them by 1/p(x_i | θ_s) to leave x_i out of
the posterior (Vehtari, Gelman and Gabry, 2017).  Monte Carlo draws of a bound on one
model's log p are not (all have the same θ), and would give a number that means nothing.  Nor did a
posterior ever see the held-out samples: leaving one out of it would be wrong by hundreds of nats,
also for an ensemble.  So no group is called ``log_likelihood``, where ``arviz.loo`` looks, and
``arviz.compare`` takes models by their held-out log-likelihood, elpd = Σ_i log p(x_i)
(``to_elpd``), for which nothing has to be left out.

    held_out         value, std_error, calls, … (sample), term (sample, timestep), with the axes
                     chain and draw before them for several models, and for these
                     log_density (chain, draw, sample), whose exp may be averaged over models
    observed_data    x_0 (sample, …)

Exp of noisy values is averaged only where that is right (``pyrodiff.likelihood.densities``); the
attribute ``noise`` says why.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrodiff._version import __version__
from pyrodiff.likelihood.densities import as_densities, is_noisy
from pyrodiff.likelihood.estimates import Estimates
from pyrodiff.likelihood.samples import check_samples, same_model
from pyrodiff.likelihood.statistics import log_mean_exp

__all__ = ["assembled", "to_elpd", "to_inference_data"]

_DRAWS = ("chain", "draw")
_PER_SAMPLE = ("value", "std_error", "calls", "degrees_of_freedom")
_PROVENANCE = ("estimator", "kind", "dimensions", "shared_calls", "model")
_REASON = (
    "Monte Carlo draws of one model's bound (log_weights, repeats with other noise) are not draws "
    "of its parameters, and PSIS-LOO of them means nothing. For one model use to_elpd, which "
    "arviz.compare takes"
)


def _results(results: Any) -> list[Estimates]:
    """One result per model, or ValueError."""
    models = [results] if isinstance(results, Estimates) else results
    if not isinstance(models, Sequence) or isinstance(models, str):
        raise ValueError(
            f"Expected a LogLikelihood or a list of them; got {_named(results)}. {_REASON}."
        )
    others = [value for value in models if not isinstance(value, Estimates)]
    if others or not models:
        got = _named(others[0]) if others else "none"
        raise ValueError(f"Expected LogLikelihoods, one per trained model; got {got}. {_REASON}.")
    kinds = sorted({str(result.kind) for result in models})
    if len(kinds) > 1:
        raise ValueError(f"Expected results with one kind; got {kinds}.")
    check_samples([(f"result {number}", result) for number, result in enumerate(models)])
    if len(models) > 1:
        _check_draws(models)
    return list(models)


def _named(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return type(value).__name__ + shape


def _check_draws(results: Sequence[Estimates]) -> None:
    """Refuse evaluations of one model, the same or with other noise.

    Values alone do not tell them apart from those of several models, which with common noise may
    differ by less than their Monte Carlo errors.
    """
    for number, result in enumerate(results):
        for other in results[:number]:
            if same_model(result, other):
                raise ValueError(
                    f"Expected results of different models; got result {number} twice, "
                    f"or another of its model. {_REASON}."
                )


def _attributes(results: Sequence[Estimates], more: Mapping[str, Any]) -> dict[str, Any]:
    """Where the values come from, in types that netCDF holds."""
    first = results[0]
    provenance: dict[str, Any] = {name: getattr(first, name) for name in _PROVENANCE}
    estimators = list(dict.fromkeys(result.estimator for result in results))
    provenance["estimator"] = "; ".join(estimators)
    provenance["model"] = "; ".join(result.model for result in results if result.model)
    provenance["shared_calls"] = sum(result.shared_calls for result in results)
    calls = sum(result.network_evaluations for result in results)
    provenance["network_calls_per_sample"] = calls / len(results)
    library = {"inference_library": "pyrodiff", "inference_library_version": __version__}
    additions = {name: value for name, value in more.items() if value is not None}
    return provenance | library | {"units": "nats"} | additions


def _stacked(results: Sequence[Estimates], name: str) -> np.ndarray | None:
    """An attribute that all have, (N, …) of one result and (1, S, N, …) of several."""
    tensors = [getattr(result, name) for result in results]
    if any(value is None for value in tensors) or len({tuple(v.shape) for v in tensors}) > 1:
        return None
    if len(tensors) == 1:
        return tensors[0].detach().cpu().numpy()
    return torch.stack(tensors).unsqueeze(0).detach().cpu().numpy()


def _one_grid(results: Sequence[Estimates]) -> bool:
    """Whether the terms of all results belong to the same timesteps."""
    grids = [result.timesteps for result in results]
    first = grids[0]
    if first is None:
        return False
    return all(grid is not None and torch.equal(grid, first) for grid in grids)


def _held_out(results: Sequence[Estimates], coords: Mapping[str, Any]) -> Any:
    import xarray

    draws = _DRAWS if len(results) > 1 else ()
    data = {}
    for name in _PER_SAMPLE:
        if (values := _stacked(results, name)) is not None:
            data[name] = ((*draws, "sample"), values)
    terms = _stacked(results, "terms") if _one_grid(results) else None
    labels = dict(coords)
    if terms is not None and results[0].timesteps is not None:
        data["term"] = ((*draws, "sample", "timestep"), terms)
        labels.setdefault("timestep", results[0].timesteps.double().numpy())
    return xarray.Dataset(data, coords=labels)


def _coords(
    coords: Mapping[str, Any] | None, samples: int, draws: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The coordinates of samples and draws, and all others."""
    others = dict(coords or {})
    labels = np.asarray(others.pop("sample", np.arange(samples)))
    if labels.shape != (samples,):
        raise ValueError(
            f"Expected {samples} coordinates of sample, one each; got shape {labels.shape}."
        )
    result: dict[str, Any] = {"sample": labels}
    if draws > 1:
        result["chain"] = np.asarray(others.pop("chain", [0]))
        result["draw"] = np.asarray(others.pop("draw", np.arange(draws)))
    return result, others


def _observed(x_0: Any, samples: int, coords: Mapping[str, Any]) -> Any:
    import xarray

    values = x_0.detach().cpu().numpy() if isinstance(x_0, Tensor) else np.asarray(x_0)
    if values.ndim < 1 or len(values) != samples:
        raise ValueError(f"Expected {samples} observed samples; got shape {values.shape}.")
    axes = [f"x_0_dim_{axis}" for axis in range(values.ndim - 1)]
    labels = {name: coords[name] for name in ("sample", *axes) if name in coords}
    return xarray.Dataset({"x_0": (("sample", *axes), values)}, coords=labels)


def to_inference_data(
    results: Any,
    observed: Tensor | np.ndarray | None = None,
    coords: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> Any:
    """``arviz.InferenceData`` (0.23) or ``xarray.DataTree`` (1.x) of results, groups as above.

    Args:
        results: a ``LogLikelihood`` of one model, or a list of them, one per trained model (an
            ensemble, training seeds), which are the draws; of the same samples.
        observed: the samples, shape (N, …).
        coords: of ``sample``, ``timestep``, ``draw`` or ``x_0_dim_0`` …; default 0, 1, 2, …
        attributes: kept in every group beside the version, the estimator, the kind and the calls,
            such as ``seed``.

    Raises:
        ValueError: weights or other Monte Carlo draws in place of results, one result given twice,
            results of different samples, observed samples of another number, several models whose
            noise forbids a mean of their densities.
    """
    models = _results(results)
    samples = len(models[0].value)
    labels, others = _coords(coords, samples, len(models))
    steps = {"timestep": others["timestep"]} if "timestep" in others else {}
    groups = {"held_out": _held_out(models, labels | steps)}
    provenance = _attributes(models, attributes)
    if len(models) > 1:
        values, provenance["noise"] = as_densities(models, "an ensemble's densities")
        log_density = ((*_DRAWS, "sample"), values.unsqueeze(0).numpy())
        groups["held_out"] = groups["held_out"].assign(log_density=log_density)
    if observed is not None:
        groups["observed_data"] = _observed(observed, samples, others | labels)
    return assembled({name: group.assign_attrs(provenance) for name, group in groups.items()})


def assembled(groups: Mapping[str, Any]) -> Any:
    """Groups of xarray data sets as the installed ArviZ wants them."""
    if _version() >= 1:
        import xarray

        return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    import arviz

    return arviz.InferenceData(**groups)


def _version() -> int:
    """ArviZ's major version."""
    import arviz

    return int(arviz.__version__.split(".")[0])


def to_elpd(results: Any) -> Any:
    """Held-out log-likelihood as ``ELPDData``, which ``arviz.compare`` and its plots take.

    elpd = Σ_i log p(x_i) with standard error √(N Var_i log p(x_i)) (Vehtari, Gelman and Gabry,
    2017, equation 23) and no parameters to allow for (p = 0).  ArviZ knows no held-out data, so the
    names are those of its leave-one-out values.  Its stacking weights underflow below about −745
    nats a sample: use ``stacking_weights``.

    Args:
        results: a ``LogLikelihood`` of one model, or a list of them, one per trained model, whose
            mean density is scored: log mean_s p_s(x_i).

    Returns:
        with an attribute ``noise`` that says why exp of the values may be taken, and a ``warning``
        where they are noisy all the same: differences hold, but ArviZ's weights of several models
        are drawn to equal ones.

    Raises:
        ValueError: as of ``to_inference_data``, and for one model, too: ``arviz.compare`` takes exp
            for its weights.
    """
    models = _results(results)
    values, noise = as_densities(models, "densities, of which arviz.compare makes weights")
    elpd_i = log_mean_exp(values.T).numpy()
    figures = {
        "elpd": float(elpd_i.sum()),
        "se": float(np.sqrt(len(elpd_i) * elpd_i.var())),
        "p": 0.0,
        "n_samples": len(models),
        "n_data_points": len(elpd_i),
        "warning": any(is_noisy(result) for result in models),
    }
    data = _elpd_data(figures, elpd_i)
    object.__setattr__(data, "noise", noise)
    return data


def _elpd_data(figures: dict[str, Any], elpd_i: np.ndarray) -> Any:
    import xarray

    values = xarray.DataArray(elpd_i, dims="sample", coords={"sample": np.arange(len(elpd_i))})
    if _version() >= 1:
        stats = importlib.import_module("arviz_stats.utils")
        options = figures | {"scale": "log", "good_k": None, "elpd_i": values}
        # since 1.3 the kind is the class
        if hasattr(stats, "ELPDDataLOO"):
            return stats.ELPDDataLOO(**options)
        return stats.ELPDData(kind="loo", **options)
    from arviz.stats.stats_utils import ELPDData

    # in the order in which ArviZ 0.23 reads them
    entries = {"elpd_loo": figures["elpd"], "se": figures["se"], "p_loo": figures["p"]}
    entries |= {key: figures[key] for key in ("n_samples", "n_data_points", "warning")}
    entries |= {"loo_i": values, "scale": "log"}
    return ELPDData(data=list(entries.values()), index=list(entries))
