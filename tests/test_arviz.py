"""The export to ArviZ 0.23 (``InferenceData``) and 1.x (``DataTree``): the same tests for both."""

import functools
import importlib
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from torch import Tensor

import pyrodiff
from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.comparison import stacking_weights, to_elpd, to_inference_data
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import (
    Estimator,
    ImportanceBound,
    LogLikelihood,
    PathBound,
    TermwiseBound,
)
from pyrodiff.likelihood.statistics import log_mean_exp
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, GaussianMixture, linear_log_prob
from pyrodiff.schedules import LogSNRSchedule

az = importlib.import_module("arviz")
NEW = int(az.__version__.split(".")[0]) >= 1
F64 = torch.float64
LAW = GaussianMixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 1.0], [-1.0, -0.5]], dtype=F64), 0.4
)


def chain(stretch: float = 1.0) -> ReverseChain:
    law = GaussianMixture(LAW.weights, stretch * LAW.means, 0.4)
    forward = ForwardChain(LogSNRSchedule(4.0, -6.0), 8)
    return ReverseChain(NoiseDenoiser(law.network()), forward, (2,))


def ensemble() -> list[LogLikelihood]:
    """Three models, of little noise, so that their densities may be averaged."""
    return list(_ensemble())


@functools.cache
def _ensemble() -> tuple[LogLikelihood, ...]:
    x, bound = LAW.sample(40, seed=1), TermwiseBound(1600)
    return tuple(bound.estimate(chain(s), x, batch_size=4096) for s in (1.0, 1.2, 1.5))


def result(value: Tensor) -> LogLikelihood:
    calls = torch.ones(len(value), dtype=torch.int64)
    return LogLikelihood(value, torch.zeros_like(value), "estimate", calls, 2, "exact")


def group(data: Any, name: str) -> Any:
    found = data[name]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


def groups(data: Any) -> set[str]:
    return set(data.children) if NEW else set(data.groups())


def read(path: Any) -> Any:
    return az.from_netcdf(path)


def compared(models: dict[str, Any], **options: Any) -> Any:
    """``az.compare``; its own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return az.compare(models, **({"round_to": "none"} if NEW else {}), **options)


# -- groups ----------------------------------------------------------------------------------------


def test_trained_models_are_the_draws() -> None:
    results, x = ensemble(), LAW.sample(40, seed=1)
    data = to_inference_data(results, x, seed=0)
    assert type(data).__name__ == ("DataTree" if NEW else "InferenceData")
    assert groups(data) == {"held_out", "observed_data"}
    log_p = group(data, "held_out")["log_density"]
    assert log_p.dims == ("chain", "draw", "sample") and log_p.shape == (1, 3, 40)
    for draw, each in enumerate(results):
        np.testing.assert_array_equal(log_p.sel(chain=0, draw=draw), each.value.numpy())
    held_out = group(data, "held_out")
    assert held_out["term"].dims == ("chain", "draw", "sample", "timestep")
    assert held_out["std_error"].dims == ("chain", "draw", "sample")
    np.testing.assert_array_equal(held_out["calls"].isel(chain=0, draw=1), results[1].calls)
    observed = group(data, "observed_data")["x_0"]
    assert observed.dims == ("sample", "x_0_dim_0")
    np.testing.assert_array_equal(observed, x.numpy())


def test_one_model_has_no_draws() -> None:
    found = ensemble()[0]
    data = found.to_inference_data(seed=3)
    assert groups(data) == {"held_out"}
    held_out = group(data, "held_out")
    np.testing.assert_array_equal(held_out["value"], found.value)
    np.testing.assert_array_equal(held_out["term"], found.terms)
    np.testing.assert_array_equal(held_out["timestep"], found.timesteps.double())
    assert held_out["value"].dims == ("sample",)
    assert held_out["term"].dims == ("sample", "timestep")


def test_every_group_says_where_it_comes_from() -> None:
    results = ensemble()
    data = to_inference_data(results, LAW.sample(40, seed=1), seed=0, data="mixture", split=None)
    for name in groups(data):
        held = group(data, name).attrs
        assert held["inference_library"] == "pyrodiff"
        assert held["inference_library_version"] == pyrodiff.__version__
        assert held["estimator"] == results[0].estimator
        assert held["kind"] == "lower bound" and held["units"] == "nats"
        assert held["network_calls_per_sample"] == results[0].network_evaluations
        assert held["seed"] == 0 and held["data"] == "mixture" and "split" not in held


def test_coordinates_are_taken() -> None:
    labels, names = [f"image {i}" for i in range(40)], ["height", "width"]
    given = {"sample": labels, "draw": [7, 8, 9], "x_0_dim_0": names}
    data = to_inference_data(ensemble(), LAW.sample(40, seed=1), given)
    log_p = group(data, "held_out")["log_density"]
    assert list(log_p["sample"].values) == labels and list(log_p["draw"].values) == [7, 8, 9]
    observed = group(data, "observed_data")["x_0"]
    assert list(observed["x_0_dim_0"].values) == names
    with pytest.raises(ValueError, match=r"Expected 40 coordinates of sample, one each; got"):
        to_inference_data(ensemble(), coords={"sample": labels[:3]})


@pytest.mark.parametrize("several", [True, False], ids=["ensemble", "one model"])
def test_a_file_holds_all_of_it(tmp_path: Any, several: bool) -> None:
    results = ensemble() if several else ensemble()[0]
    data = to_inference_data(results, LAW.sample(40, seed=1), seed=0)
    path = tmp_path / "data.nc"
    if NEW:
        data.to_netcdf(path, engine="h5netcdf")
    else:
        data.to_netcdf(str(path), engine="h5netcdf")
    back = read(path) if NEW else az.from_netcdf(str(path), engine="h5netcdf")
    assert groups(back) == groups(data)
    for name in groups(data):
        xarray.testing.assert_equal(group(back, name).load(), group(data, name))
        assert dict(group(back, name).attrs) == dict(group(data, name).attrs)
    if NEW:
        back.close()


# -- held-out elpd ---------------------------------------------------------------------------------


def test_elpd_is_the_sum_of_the_values_with_its_error() -> None:
    found = result(LAW.log_prob(LAW.sample(200, seed=2)))
    elpd = to_elpd(found)
    total, error = float(found.value.sum()), float(found.value.std(correction=0)) * 200**0.5
    names = ("elpd", "p", "elpd_i") if NEW else ("elpd_loo", "p_loo", "loo_i")
    assert elpd[names[0]] == pytest.approx(total) and elpd["se"] == pytest.approx(error)
    assert elpd[names[1]] == 0 and not elpd["warning"] and elpd["scale"] == "log"
    np.testing.assert_array_equal(elpd[names[2]], found.value)
    assert f"{total:.2f}" in str(elpd) and "200" in str(elpd)


def test_arviz_compares_held_out_models() -> None:
    x = LAW.sample(300, seed=2)
    values = {
        name: result(GaussianMixture(LAW.weights, stretch * LAW.means, 0.4).log_prob(x))
        for name, stretch in (("wide", 1.2), ("true", 1.0), ("wider", 1.5))
    }
    table = compared({name: to_elpd(each) for name, each in values.items()})
    assert list(table.index) == ["true", "wide", "wider"]
    elpd = "elpd" if NEW else "elpd_loo"
    for name, each in values.items():
        d = each.value - values["true"].value
        assert table.loc[name, elpd] == pytest.approx(float(each.value.sum()))
        # the sign of differences changed with 1.0
        assert table.loc[name, "elpd_diff"] == pytest.approx(float(d.sum()) * (1 if NEW else -1))
        assert table.loc[name, "dse"] == pytest.approx(float(d.std(correction=0)) * 300**0.5)
    ours = stacking_weights(values)
    for name, weight in ours.items():
        assert table.loc[name, "weight"] == pytest.approx(weight, abs=0.01)


def test_stacking_stands_where_that_of_arviz_underflows() -> None:
    """At −2000 nats exp gives 0 in ArviZ (0.23 and 1.3), and weights stay where they started."""
    a = -2000 + torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=F64)
    values = {"better": result(a), "worse": result(a - 3)}
    table = compared({name: to_elpd(each) for name, each in values.items()})
    assert table.loc["better", "weight"] == pytest.approx(0.5)
    assert stacking_weights(values)["better"] == pytest.approx(1, abs=1e-6)


def test_the_elpd_of_an_ensemble_is_that_of_its_mean_density() -> None:
    results = ensemble()
    elpd = to_elpd(results)
    values = torch.stack([each.value for each in results], 1)
    assert elpd["elpd" if NEW else "elpd_loo"] == pytest.approx(float(log_mean_exp(values).sum()))
    assert elpd["n_samples"] == 3 and elpd["n_data_points"] == 40


# -- noise -----------------------------------------------------------------------------------------


def alike(bound: Estimator, seed: int, models: int = 5, n: int = 50) -> tuple[Any, float]:
    """Models that differ by next to nothing, each with noise of its own, and their exact elpd."""
    law = Gaussian(torch.zeros(2, dtype=F64), 0.5 * torch.eye(2, dtype=F64))
    x, forward = law.sample(n, seed=100 + seed), ForwardChain(LogSNRSchedule(4.0, -6.0), 8)
    several = [
        ReverseChain(
            NoiseDenoiser(Gaussian(law.mean + 1e-9 * m, law.covariance).network()), forward, (2,)
        )
        for m in range(models)
    ]
    results = [
        bound.estimate(model, x, seed=10 * seed + m, batch_size=4096)
        for m, model in enumerate(several)
    ]
    return results, float(linear_log_prob(several[0], x).sum())


@pytest.mark.parametrize("export", [to_inference_data, to_elpd])
def test_noise_that_raises_a_mean_density_is_refused(export: Any) -> None:
    """Five models alike: the mean density of noisy values lies above the truth by nats."""
    results, exact = alike(TermwiseBound(16), 0)
    values = torch.stack([each.value for each in results], 1)
    assert float(log_mean_exp(values).sum()) > exact + 10  # what was reported
    with pytest.raises(ValueError, match="or with noise that is negligible for .*Termwise.* nats"):
        export(results)
    with pytest.raises(ValueError, match="compare\\(\\) needs no exp"):
        to_elpd(results[0])  # arviz.compare makes weights of it
    with pytest.raises(ValueError, match="noise adds up to nan nats"):
        export([replace(each, std_error=each.std_error * torch.nan) for each in results])


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (ImportanceBound(2), "unbiased for the density"),
        (PathBound(1), "unbiased for the density"),
        (PathBound(4), "log of the mean of the weights"),
        (ImportanceBound(4, jackknife=True), "log of the mean of the weights"),
        (TermwiseBound(6000), "noise adds at most"),
    ],
    ids=str,
)
def test_the_elpd_of_models_that_are_alike_is_not_above_the_truth(
    bound: Estimator, said: str
) -> None:
    """Over 12 seeds; 3 standard errors of the mean are allowed (one in 370, with few seeds 70)."""
    above = []
    little = isinstance(bound, TermwiseBound)
    for seed in range(1 if little else 12):
        results, exact = alike(bound, seed, models=2 if little else 5)
        elpd = to_elpd(results)
        assert said in elpd.noise
        above.append(float(elpd["elpd" if NEW else "elpd_loo"]) - exact)
        noise = group(to_inference_data(results), "held_out").attrs["noise"]
        assert noise == elpd.noise
    if little:
        assert max(above) < 0  # the ELBO lacks more than its noise adds
        return
    mean, spread = np.mean(above), np.std(above, ddof=1) / len(above) ** 0.5
    assert mean < 3 * spread


def test_what_is_averaged_are_the_values_whose_exp_is_unbiased() -> None:
    results, _ = alike(PathBound(4), 0, models=2)
    log_density = group(to_inference_data(results), "held_out")["log_density"]
    for draw, each in enumerate(results):
        assert each.log_weights is not None
        np.testing.assert_allclose(
            log_density.sel(chain=0, draw=draw), each.log_weights.exp().mean(1).log()
        )


def test_elpd_of_noisy_unbiased_values_warns() -> None:
    (result_of_one, *_), _ = alike(PathBound(1), 0, models=1)
    assert to_elpd(result_of_one)["warning"]
    assert not to_elpd(result(result_of_one.value))["warning"]


def test_loo_does_not_take_held_out_values_for_a_posterior() -> None:
    data = to_inference_data(ensemble(), LAW.sample(40, seed=1))
    assert "log_likelihood" not in groups(data)
    with pytest.raises((TypeError, KeyError, AttributeError, ValueError)):
        az.loo(data)


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [to_inference_data, to_elpd])
def test_monte_carlo_draws_are_no_posterior_draws(export: Any) -> None:
    found = ImportanceBound(8).estimate(chain(), LAW.sample(5, seed=1))
    assert found.log_weights is not None
    for wrong in (found.log_weights, found.log_weights.numpy(), list(found.log_weights.T), []):
        with pytest.raises(ValueError, match="PSIS-LOO of them means nothing"):
            export(wrong)
    with pytest.raises(ValueError, match=r"got Tensor of shape \(5, 8\)"):
        export(found.log_weights)


@pytest.mark.parametrize("export", [to_inference_data, to_elpd])
def test_one_evaluation_is_not_two_draws(export: Any) -> None:
    first, second, _ = ensemble()
    with pytest.raises(ValueError, match="results of different models; got result 2 twice"):
        export([first, second, first])


@pytest.mark.parametrize("export", [to_inference_data, to_elpd])
def test_evaluations_of_one_model_with_other_noise_are_no_draws(export: Any) -> None:
    forward, x = ForwardChain(LogSNRSchedule(4.0, -6.0), 3), LAW.sample(5, seed=1)
    models = [
        ReverseChain(NoiseDenoiser(ResidualMLP((2,), width=8, blocks=1).double()), forward, (2,))
        for _ in range(2)
    ]
    first, again, other = (
        PathBound(2).estimate(model, x, seed=seed)
        for model, seed in ((models[0], 0), (models[0], 1), (models[1], 0))
    )
    with pytest.raises(ValueError, match="or another of its model. Monte Carlo draws of one"):
        export([first, again])
    export([first, other])  # an untrained network says 0, so these have equal values


def test_results_of_different_samples_are_refused() -> None:
    results, x = ensemble(), LAW.sample(39, seed=1)
    shorter = TermwiseBound(24).estimate(chain(), x)
    with pytest.raises(ValueError, match=r"results of the same samples; got numbers: \[39, 40\]"):
        to_inference_data([results[0], shorter])
    with pytest.raises(ValueError, match="results with one kind; got"):
        to_inference_data([results[0], replace(results[1], kind="estimate")])
    with pytest.raises(ValueError, match=r"40 observed samples; got shape \(39, 2\)"):
        to_inference_data(results, x)


def test_terms_of_different_timesteps_are_left_out() -> None:
    first, second, _ = ensemble()
    assert second.timesteps is not None
    mixed = [first, replace(second, timesteps=second.timesteps / 2, estimator="another")]
    held_out = group(to_inference_data(mixed), "held_out")
    assert "term" not in held_out and "timestep" not in held_out.coords
    both = group(to_inference_data(mixed), "held_out").attrs["estimator"]
    assert both == f"{mixed[0].estimator}; {mixed[1].estimator}"


@pytest.mark.parametrize("shape", [0.3, 0.9])
def test_pareto_k_is_the_shape_of_the_largest_weights(shape: float) -> None:
    """Of weights u^(−k) it is k: mean over 50 sets of 2000, whose own spread is about 0.1."""
    uniform = torch.rand(50, 2000, dtype=F64, generator=torch.Generator().manual_seed(0))
    log_w = -shape * uniform.log()
    unknown = torch.full((50,), torch.nan, dtype=F64)
    calls = torch.full((50,), 2000)
    found = LogLikelihood(unknown, unknown, "lower bound", calls, 2, "made", log_weights=log_w)
    assert found.pareto_k is not None
    assert abs(float(found.pareto_k.mean()) - shape) < 0.1
