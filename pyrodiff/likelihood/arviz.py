"""Results as ArviZ reads them: ``InferenceData`` of 0.23, ``xarray.DataTree`` of 1.x.

Draws of ArviZ are draws of parameters: PSIS-LOO weighs them by 1/p(x_i | θ_s) to leave x_i out of
the posterior (Vehtari, Gelman and Gabry, 2017).  Monte Carlo draws of a bound on one
model's log p are no such thing (all have the same θ), and would give a number that means nothing.
Nor are held-out samples those that a posterior was made from: to leave one out that was never in
would be wrong by hundreds of nats, also for an ensemble.  So no group is called ``log_likelihood``,
where ``arviz.loo`` looks; and models go to ``arviz.compare`` by their held-out log-likelihood,
elpd = Σ_i log p(x_i) (``to_elpd``), for which nothing has to be left out.

    held_out         value, std_error, calls, … (sample), term (sample, timestep), with the axes
                     chain and draw before them for several models, and for these
                     log_density (chain, draw, sample), of which exp may be averaged over models
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

__all__ = ["to_elpd", "to_inference_data"]

_DRAWS = ("chain", "draw")
_KEPT = ("value", "std_error", "calls", "degrees_of_freedom")
_PROVENANCE = ("estimator", "kind", "dimensions", "shared_calls", "model")
_REASON = (
    "Monte Carlo draws of one model's bound (log_weights, repeats with other noise) are not draws "
    "of its parameters, and PSIS-LOO of them means nothing. For one model use to_elpd, which "
    "arviz.compare takes"
)


def _results(results: Any) -> list[Estimates]:
    """One result per model, or ValueError."""
    several = [results] if isinstance(results, Estimates) else results
    if not isinstance(several, Sequence) or isinstance(several, str):
        raise ValueError(
            f"Expected a LogLikelihood or a list of them; got {_named(results)}. {_REASON}."
        )
    wrong = [each for each in several if not isinstance(each, Estimates)]
    if wrong or not several:
        got = _named(wrong[0]) if wrong else "none"
        raise ValueError(f"Expected LogLikelihoods, one per trained model; got {got}. {_REASON}.")
    kinds = sorted({str(each.kind) for each in several})
    if len(kinds) > 1:
        raise ValueError(f"Expected results with one kind; got {kinds}.")
    check_samples([(f"result {place}", each) for place, each in enumerate(several)])
    if len(several) > 1:
        _check_draws(several)
    return list(several)


def _named(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return type(value).__name__ + shape


def _check_draws(results: Sequence[Estimates]) -> None:
    """Refuse evaluations of one model, the same or with other noise.

    Their values don't tell them from those of several models: with common noise these may differ
    by less than their Monte Carlo errors.
    """
    for place, each in enumerate(results):
        for other in results[:place]:
            if same_model(each, other):
                raise ValueError(
                    f"Expected results of different models; got result {place} twice, "
                    f"or another of its model. {_REASON}."
                )


def _attributes(results: Sequence[Estimates], more: Mapping[str, Any]) -> dict[str, Any]:
    """Where the values come from, in types that netCDF holds."""
    first = results[0]
    held: dict[str, Any] = {name: getattr(first, name) for name in _PROVENANCE}
    estimators = list(dict.fromkeys(result.estimator for result in results))
    held["estimator"] = "; ".join(estimators)
    held["model"] = "; ".join(result.model for result in results if result.model)
    held["shared_calls"] = sum(result.shared_calls for result in results)
    held["network_calls_per_sample"] = sum(r.network_evaluations for r in results) / len(results)
    library = {"inference_library": "pyrodiff", "inference_library_version": __version__}
    return held | library | {"units": "nats"} | {k: v for k, v in more.items() if v is not None}


def _stacked(results: Sequence[Estimates], name: str) -> np.ndarray | None:
    """An attribute that all have, (N, …) of one result and (1, S, N, …) of several."""
    held = [getattr(result, name) for result in results]
    if any(each is None for each in held) or len({tuple(each.shape) for each in held}) > 1:
        return None
    if len(held) == 1:
        return held[0].detach().cpu().numpy()
    return torch.stack(held).unsqueeze(0).detach().cpu().numpy()


def _one_grid(results: Sequence[Estimates]) -> bool:
    """Whether the terms of all results belong to the same timesteps."""
    grids = [result.timesteps for result in results]
    first = grids[0]
    if first is None:
        return False
    return all(each is not None and torch.equal(each, first) for each in grids)


def _held_out(results: Sequence[Estimates], coords: Mapping[str, Any]) -> Any:
    import xarray

    draws = _DRAWS if len(results) > 1 else ()
    data = {}
    for name in _KEPT:
        if (values := _stacked(results, name)) is not None:
            data[name] = ((*draws, "sample"), values)
    terms = _stacked(results, "terms") if _one_grid(results) else None
    own = dict(coords)
    if terms is not None and results[0].timesteps is not None:
        data["term"] = ((*draws, "sample", "timestep"), terms)
        own.setdefault("timestep", results[0].timesteps.double().numpy())
    return xarray.Dataset(data, coords=own)


def _coords(
    given: Mapping[str, Any] | None, samples: int, draws: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The coordinates of samples and draws, and all others."""
    given = dict(given or {})
    labels = np.asarray(given.pop("sample", np.arange(samples)))
    if labels.shape != (samples,):
        raise ValueError(
            f"Expected {samples} coordinates of sample, one each; got shape {labels.shape}."
        )
    held: dict[str, Any] = {"sample": labels}
    if draws > 1:
        held["chain"] = np.asarray(given.pop("chain", [0]))
        held["draw"] = np.asarray(given.pop("draw", np.arange(draws)))
    return held, given


def _observed(x_0: Any, samples: int, held: Mapping[str, Any], rest: Mapping[str, Any]) -> Any:
    import xarray

    values = x_0.detach().cpu().numpy() if isinstance(x_0, Tensor) else np.asarray(x_0)
    if values.ndim < 1 or len(values) != samples:
        raise ValueError(f"Expected {samples} observed samples; got shape {values.shape}.")
    axes = [f"x_0_dim_{axis}" for axis in range(values.ndim - 1)]
    coords = {"sample": held["sample"]} | {name: rest[name] for name in axes if name in rest}
    return xarray.Dataset({"x_0": (("sample", *axes), values)}, coords=coords)


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
        attributes: kept in every group beside the version, the estimator, the kind and the calls:
            ``seed``, for one.

    Raises:
        ValueError: weights or other Monte Carlo draws in place of results, one result given twice,
            results of different samples, observed samples of another number, several models whose
            noise forbids a mean of their densities.
    """
    several = _results(results)
    samples = len(several[0].value)
    held, rest = _coords(coords, samples, len(several))
    steps = {"timestep": rest["timestep"]} if "timestep" in rest else {}
    groups = {"held_out": _held_out(several, held | steps)}
    provenance = _attributes(several, attributes)
    if len(several) > 1:
        values, provenance["noise"] = as_densities(several, "an ensemble's densities")
        log_density = ((*_DRAWS, "sample"), values.unsqueeze(0).numpy())
        groups["held_out"] = groups["held_out"].assign(log_density=log_density)
    if observed is not None:
        groups["observed_data"] = _observed(observed, samples, held, rest)
    return _assembled({name: group.assign_attrs(provenance) for name, group in groups.items()})


def _assembled(groups: Mapping[str, Any]) -> Any:
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
    several = _results(results)
    values, noise = as_densities(several, "densities, of which arviz.compare makes weights")
    elpd_i = log_mean_exp(values.T).numpy()
    figures = {
        "elpd": float(elpd_i.sum()),
        "se": float(np.sqrt(len(elpd_i) * elpd_i.var())),
        "p": 0.0,
        "n_samples": len(several),
        "n_data_points": len(elpd_i),
        "warning": any(is_noisy(result) for result in several),
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

    named = {"elpd_loo": figures["elpd"], "se": figures["se"], "p_loo": figures["p"]}
    rest = {key: figures[key] for key in ("n_samples", "n_data_points", "warning")}
    # ArviZ 0.23 reads them by their order, too
    held = named | rest | {"loo_i": values, "scale": "log"}
    return ELPDData(data=list(held.values()), index=list(held))
