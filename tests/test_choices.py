"""The table of choices: every name stands once and is built; settings reach what they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyrodiff.grids import GRIDS
from pyrodiff.likelihood import Estimator
from pyrodiff.objectives import Objective
from pyrodiff.runs.build import make_estimator, make_model, make_objective
from pyrodiff.runs.chain_settings import DEFAULT_GRID, VARIANCES, ChainSettings
from pyrodiff.runs.choices import CHOICES, ESTIMATORS, make
from pyrodiff.runs.respacing import Fits, respacing
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, recipe
from pyrodiff.variances import AnalyticVariance, PosteriorCovariance

MODEL = ("denoiser", "variance", "schedule", "decoder", "network")
NAMES = [(kind, name) for kind in CHOICES for name in CHOICES[kind]]
CHAIN = ("covariance", "grid")  # of a chain that a trained network is put on


def test_no_class_has_two_names() -> None:
    targets = [choice.target for choices in CHOICES.values() for choice in choices.values()]
    assert len(set(targets)) == len(targets) == len(NAMES)


@pytest.mark.parametrize(("kind", "name"), [row for row in NAMES if row[0] not in CHAIN])
def test_every_name_is_built(kind: str, name: str) -> None:
    target = CHOICES[kind][name].resolve()
    if kind == "estimator":
        estimator = make_estimator(EvaluationSettings(name))
        assert isinstance(estimator, Estimator) and type(estimator) is target
        return
    levels = None if name == "gaussian" else 17
    settings = FitSettings(width=32, num_steps=24, **{kind: name})
    settings = recipe(settings, image=True, levels=levels)
    if kind in MODEL:
        model = make_model(settings, (1, 8, 8), levels)
        assert model.sample(1, seed=0).shape == (1, 1, 8, 8)
        parts = {
            "denoiser": model.denoiser,
            "variance": model.variance,
            "schedule": model.forward_chain.schedule,
            "decoder": model.decoder,
        }
        assert kind == "network" or type(parts[kind]) is target
        return
    objective = make_objective(settings)
    assert isinstance(objective, Objective)
    assert kind == "objective" or type(objective.timesteps) is target
    assert name == "min-snr" or kind == "timesteps" or type(objective) is target


@pytest.mark.parametrize(("kind", "name"), [row for row in NAMES if row[0] in CHAIN])
def test_every_name_of_a_chain_is_built(kind: str, name: str, tmp_path: Path) -> None:
    settings = recipe(FitSettings(width=8, num_steps=24), image=False, levels=None)
    reverse = make_model(settings, (2,), None).eval()
    data = torch.Generator().manual_seed(0)
    fits = Fits(tmp_path, "a model", lambda: (torch.randn(9, 2, generator=data), None), 8)
    if kind == "grid":
        chain = respacing(ChainSettings(steps=5, grid=name), lambda: reverse, fits)
        assert type(chain.grid) is CHOICES[kind][name].resolve()
        assert chain.of(reverse).num_steps == 5
        return
    takes = {option: 1 for option in VARIANCES[name]}
    chain = respacing(ChainSettings(variance=name, **takes), lambda: reverse, fits)
    variance = chain.of(reverse).variance
    if name == "analytic":
        assert isinstance(variance, AnalyticVariance)
        return
    assert isinstance(variance, PosteriorCovariance) and variance.kind == name
    assert variance.probes == takes.get("probes") and variance.rank == takes.get("rank", 0)


def test_variances_of_a_chain_are_those_without_a_network_of_their_own() -> None:
    fixed = {n for n, choice in CHOICES["variance"].items() if not choice.resolve().learned}
    assert set(VARIANCES) == fixed | CHOICES["covariance"].keys()
    assert set(CHOICES["grid"]) == {*GRIDS, "optimal"} and DEFAULT_GRID in GRIDS


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Expected network to be one of .*; did you mean 'unet'"):
        make("network", "u-net")


def test_settings_of_estimators_reach_them() -> None:
    assert ESTIMATORS["termwise"] == ("calls", "std_error")
    assert all(ESTIMATORS[name] == ("particles",) for name in ESTIMATORS.keys() - {"termwise"})
    one, other = (make_estimator(EvaluationSettings("path", particles=n)) for n in (3, 5))
    assert one != other
    assert make_estimator(EvaluationSettings(calls=8)) != make_estimator(EvaluationSettings())
    assert make_estimator(EvaluationSettings("path")) == CHOICES["estimator"]["path"].resolve()()


def test_ends_of_the_schedule_reach_it() -> None:
    settings = FitSettings(log_snr_max=4.0, log_snr_min=-3.0, num_steps=5, width=8)
    settings = recipe(settings, image=False, levels=None)
    log_snr = make_model(settings, (2,), None).forward_chain.log_snr
    torch.testing.assert_close(log_snr[[0, -1]], torch.tensor([4.0, -3.0]).to(log_snr))


def test_names_are_known_without_torch() -> None:
    code = """
import sys
from pyrodiff.runs.settings import FitSettings
from pyrodiff.training import TrainingSettings
from pyrodiff.runs.choices import CHOICES
assert FitSettings(objective="simple").objective in CHOICES["objective"]
print([name for name in ("torch", "pyro", "lightning") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")
