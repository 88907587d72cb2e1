"""Training: batches, checkpoints, resuming exactly, and what is refused before any work."""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyrodiff import ForwardChain, ReverseChain, data, runs, training
from pyrodiff.cli import main
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import LogLikelihood, TermwiseBound
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import NoiseLoss
from pyrodiff.runs.build import make_model, make_objective
from pyrodiff.runs.choices import CHOICES
from pyrodiff.runs.settings import FitSettings, recipe
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.training import SeededBatches, SeededData, TrainingSettings, Validations
from pyrodiff.training.loop import without_advice

TINY = FitSettings(
    steps=30,
    validate_every=10,
    width=16,
    num_steps=50,
    calls=16,
    validation_calls=8,
    batch_size=32,
)
OPTIONS = "--steps 30 --validate_every 10 --width 16 --num_steps 50 --calls 16 "
OPTIONS += "--validation_calls 8 --batch_size 32 --quiet"


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.load("digits")


@pytest.fixture(scope="module")
def points() -> data.DataSet:
    return data.load("mixture", num_samples=300)


def fit(dataset: data.DataSet, settings: FitSettings, folder: Path, **options: Any) -> ReverseChain:
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    torch.manual_seed(settings.seed)
    reverse = make_model(settings, dataset.event_shape, dataset.levels)
    objective = make_objective(settings)
    return training.fit(reverse, objective, dataset, settings, folder, progress=False, **options)


def rows(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.csv").read_text().splitlines()
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(text)]


# -- batches -------------------------------------------------------------------------------------


def epoch(number: int, seed: int = 0, size: int = 23, length: int = 5) -> list[list[int]]:
    batches = SeededBatches(size, 4, length, seed)
    batches.set_epoch(number)
    return list(batches)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    first = epoch(3)
    torch.manual_seed(99)
    assert epoch(3) == first and len(first) == 5
    assert epoch(4) != first and epoch(3, seed=1) != first


def test_a_pass_repeats_no_sample() -> None:
    # 23 samples make passes of five whole batches; epochs of three do not line up with them
    steps = [batch for number in range(10) for batch in epoch(number, length=3)]
    passes = [sum(steps[start : start + 5], []) for start in range(0, 30, 5)]
    for indices in passes:
        assert len(set(indices)) == len(indices) == 20 and set(indices) <= set(range(23))
    assert len({tuple(indices) for indices in passes}) == 6


def test_batches_of_fewer_samples_than_asked_for() -> None:
    batches = list(SeededBatches(3, 32, 2, 0))
    assert [sorted(batch) for batch in batches] == [[0, 1, 2]] * 2


# -- settings and data for any trainer -----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "Expected steps to be an integer >= 1; got 0."),
        ({"batch_size": 2.5}, "Expected batch_size to be an integer >= 1; got 2.5."),
        ({"validation_calls": 1}, "Expected validation_calls to be an integer >= 2; got 1."),
        ({"patience": -1}, "Expected patience to be an integer >= 0; got -1."),
        ({"learning_rate": 0.0}, "Expected learning_rate to be positive and finite; got 0.0."),
        ({"gradient_clip": math.inf}, "Expected gradient_clip to be positive and finite; got inf."),
        ({"weight_decay": -1.0}, "Expected weight_decay >= 0; got -1.0."),
        ({"ema_decay": 1.0}, "Expected 0 <= ema_decay < 1; got 1.0."),
    ],
)
@pytest.mark.parametrize("kind", [TrainingSettings, FitSettings])
def test_wrong_settings(kind: type[Any], settings: dict[str, Any], message: str) -> None:
    """The settings of a run hold those of its training, and refuse the same."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kind(**settings)


def test_settings_of_a_run_hold_those_of_its_training() -> None:
    whole = recipe(replace(TINY, ema_decay=0.5, seed=3), image=False, levels=None)
    settings = whole.training()
    assert settings.to_dict().items() <= whole.to_dict().items()
    assert (settings.steps, settings.ema_decay, settings.seed) == (30, 0.5, 3)
    assert TrainingSettings(validation_evaluations=4).validation_calls == 4


def test_module_and_data_for_a_trainer_of_ones_own(points: data.DataSet, tmp_path: Path) -> None:
    """Nothing of a run is needed, and ``fit`` trains the same weights."""
    settings = TrainingSettings(
        steps=6, batch_size=16, validate_every=3, validation_calls=4, ema_decay=0.0
    )

    def fresh() -> ReverseChain:
        torch.manual_seed(0)
        network = ResidualMLP((2,), width=8, blocks=1)
        return ReverseChain(NoiseDenoiser(network), ForwardChain(LogSNRSchedule(), 20), (2,))

    reverse = fresh()
    module = training.DiffusionModule(reverse, NoiseLoss(), settings, points.log_density_offset())
    with without_advice():
        trainer = lightning.Trainer(
            max_steps=6,
            gradient_clip_val=settings.gradient_clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            devices=1,
        )
        trainer.fit(module, datamodule=SeededData(points, batch_size=16, length=3, seed=0))
    assert len(module.validation_losses()) == len(points.validation)
    fitted = training.fit(fresh(), NoiseLoss(), points, settings, tmp_path, progress=False)
    last = training.read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["current_model_state"]
    for name, value in reverse.state_dict().items():
        torch.testing.assert_close(value, last[f"reverse.{name}"])
    assert fitted.num_steps == 20


# -- what a step does ----------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of every step of ``fit``: the learning rate, the gradient that was applied, the weights."""
    seen: list[dict[str, Any]] = []

    def optimizer_step(module: Any, *arguments: Any, **options: Any) -> None:
        optimizer = arguments[2]
        seen.append({"rate": optimizer.param_groups[0]["lr"]})
        original(module, *arguments, **options)
        parameters = dict(module.named_parameters())
        squares = [p.grad.square().sum() for p in parameters.values() if p.grad is not None]
        seen[-1]["gradient"] = float(torch.stack(squares).sum().sqrt())
        seen[-1]["weights"] = {name: p.detach().clone() for name, p in parameters.items()}

    original = training.DiffusionModule.optimizer_step
    monkeypatch.setattr(training.DiffusionModule, "optimizer_step", optimizer_step)
    return seen


def test_average_follows_the_recursion(
    points: data.DataSet, tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    reverse = fit(points, replace(TINY, ema_decay=0.7, learning_rate=1e-2), tmp_path)
    assert rows(tmp_path)[-1]["gain_over_best"] > 0  # so the last average is what fit returns
    average = {name: value.double() for name, value in steps[0]["weights"].items()}
    for k, step in enumerate(steps[1:], start=1):
        rate = min(0.7, (1 + k) / (10 + k))  # 0.7 from the 20th step on
        for name, value in step["weights"].items():
            average[name] = rate * average[name] + (1 - rate) * value.double()
    for name, value in reverse.named_parameters():
        expected = average[f"reverse.{name}"].float()
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6)
    last = steps[-1]["weights"]
    assert max(float((average[name] - last[name]).abs().max()) for name in last) > 1e-3


def test_gradient_is_clipped(
    points: data.DataSet, tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    fit(points, replace(TINY, gradient_clip=1e6), tmp_path / "one")
    free = [step["gradient"] for step in steps]
    clip = sorted(free)[10]
    steps.clear()
    fit(points, replace(TINY, gradient_clip=clip), tmp_path / "two")
    norms = [step["gradient"] for step in steps]
    assert max(norms) <= clip * (1 + 1e-4)
    assert sum(norm > clip * (1 - 1e-4) for norm in norms) >= 5  # reached, not merely kept below


def test_learning_rate_warms_up_and_falls(
    points: data.DataSet, tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    fit(points, replace(TINY, learning_rate=0.5, steps=40), tmp_path)
    rates = [step["rate"] for step in steps]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])  # over a tenth of the steps
    assert all(one >= other for one, other in zip(rates[3:], rates[4:], strict=False))
    assert rates[22] == pytest.approx(0.25, rel=0.01) and rates[-1] < 0.01


def test_weights_decay_and_biases_and_norms_do_not(points: data.DataSet) -> None:
    """Without a gradient AdamW does nothing but decay."""
    settings = recipe(replace(TINY, weight_decay=0.5), image=False, levels=None)
    reverse = make_model(settings, points.event_shape, None)
    module = training.DiffusionModule(reverse, make_objective(settings), settings)
    optimizer = module.configure_optimizers()["optimizer"]
    before = {}
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p)
        p.grad, before[name] = torch.zeros_like(p), p.detach().clone()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert any("norm" in name for name in before) and any("bias" in name for name in before)
    for name, p in module.named_parameters():
        factor = 1.0 if name.endswith("bias") or "norm" in name else 1 - 0.5 * rate
        torch.testing.assert_close(p.detach(), factor * before[name])


# -- noise ---------------------------------------------------------------------------------------


def gradients(accumulate: int, count: int) -> torch.Tensor:
    """Gradients of ``count`` optimizer steps of ``accumulate`` micro-batches, of one model.

    The network predicts 0 and its last bias b has the gradient −2ε of (ε − b)², for one sample of
    one dimension: normal, of variance 4.
    """
    network = ResidualMLP((1,), width=4, blocks=1)
    reverse = ReverseChain(NoiseDenoiser(network), ForwardChain(LogSNRSchedule(), 20), (1,))
    settings = replace(recipe(TINY, image=False, levels=None), steps=count, learning_rate=1e-30)
    module, seen = training.DiffusionModule(reverse, NoiseLoss(), settings), []

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            assert network.last.bias.grad is not None
            seen.append(float(network.last.bias.grad))

    samples = torch.utils.data.TensorDataset(torch.ones(count * accumulate, 1))
    with without_advice():
        trainer = lightning.Trainer(
            max_steps=count,
            accumulate_grad_batches=accumulate,
            callbacks=[Watch()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            devices=1,
        )
        trainer.fit(module, torch.utils.data.DataLoader(samples, batch_size=1))
    return torch.tensor(seen, dtype=torch.float64)


def test_variance_falls_as_one_over_the_number_of_micro_batches() -> None:
    """With noise in common it would not fall.

    The variance of 150 normal values has a relative standard error of 12 %, a ratio of two 16 %:
    four of them are allowed.
    """
    one, many = gradients(1, 150), gradients(4, 150)
    assert len(one) == len(many) == 150
    assert float(one.var()) == pytest.approx(4, rel=0.48)
    assert float(one.var() / many.var()) == pytest.approx(4, rel=0.64)


def test_every_step_micro_batch_and_rank_has_noise_of_its_own(
    points: data.DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(TINY, image=False, levels=None)
    reverse = make_model(settings, points.event_shape, None)
    module = training.DiffusionModule(reverse, make_objective(settings), settings)
    cluster = SimpleNamespace(accumulate_grad_batches=3, global_step=0, global_rank=0)
    for name in ("trainer", "global_step", "global_rank"):
        value = property(lambda _, name=name: getattr(cluster, name, cluster))
        monkeypatch.setattr(training.DiffusionModule, name, value)

    def noise(step: int, batch_idx: int, rank: int) -> float:
        cluster.global_step, cluster.global_rank = step, rank
        module.on_train_batch_start([], batch_idx)
        return float(torch.randn(()))

    places = list(itertools.product(range(4), range(3), range(4)))
    values = [noise(step, 3 * step + micro, rank) for step, micro, rank in places]
    assert len(set(values)) == len(places)
    again = [noise(step, 3 * step + micro, rank) for step, micro, rank in places]
    assert again == values


def test_validation_does_not_depend_on_batches(
    points: data.DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(TINY, image=False, levels=None)
    reverse = make_model(settings, points.event_shape, None)
    module = training.DiffusionModule(reverse, make_objective(settings), settings)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    losses = []
    for size in (30, 7):
        module.on_validation_epoch_start()
        for number, x_0 in enumerate(points.validation.split(size)):
            module.validation_step([x_0], number)
        losses.append(module.validation_losses())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


# -- what is kept --------------------------------------------------------------------------------


def scaled(dataset: data.DataSet, factor: float) -> data.DataSet:
    """The same data in other units: what the model sees is the same."""
    affine = data.Affine(factor * dataset.transform.shift, factor * dataset.transform.scale)
    return replace(dataset, transform=affine, log_prob=None)


def bound(reverse: ReverseChain, dataset: data.DataSet, settings: FitSettings) -> float:
    """The validation bound, bits per dimension, for the units of the data as given."""
    estimator = TermwiseBound(settings.validation_calls)
    result = estimator.estimate(reverse, dataset.validation, seed=settings.seed)
    log_scale = float(dataset.transform.scale.expand(dataset.event_shape).log().sum())
    return -(float(result.value.mean()) - log_scale) / (result.dimensions * math.log(2))


def test_weights_of_the_best_validation_are_returned(points: data.DataSet, tmp_path: Path) -> None:
    """Trained on data that all lie near 0, the model becomes worse for those that do not."""
    few = replace(scaled(points, 1e3), train=0.05 * points.train)
    settings = replace(TINY, width=32, steps=60, learning_rate=1e-2, ema_decay=0.8, patience=0)
    reverse = fit(few, settings, tmp_path)
    bounds = [row["validation_bits_per_dim"] for row in rows(tmp_path)]
    assert min(bounds) < bounds[-1] - 1
    assert bound(reverse, few, settings) == pytest.approx(min(bounds), rel=1e-6)
    best = training.read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["global_step"] == 10 * (1 + bounds.index(min(bounds)))


def test_units_of_the_data_change_bounds_alone(points: data.DataSet, tmp_path: Path) -> None:
    """Values a thousand times as large cost log₂ 1000 bits more each, and no squared error more."""
    shift, metric = math.log2(1e3), "validation_bits_per_dim"
    for objective, name, expected in (
        ("vlb", "training_bits_per_dim", shift),
        ("simple", "training_loss_per_dim", 0.0),
        ("min-snr", "training_loss_per_dim", 0.0),
    ):
        last = []
        for factor in (1.0, 1e3):
            folder = tmp_path / f"{objective}-{factor}"
            fit(scaled(points, factor), replace(TINY, objective=objective, steps=10), folder)
            last.append(rows(folder)[-1])
        assert last[1][metric] - last[0][metric] == pytest.approx(shift, rel=1e-5)
        assert last[1][name] - last[0][name] == pytest.approx(expected, abs=1e-4)


def test_loss_is_that_of_the_objective_not_of_the_settings(tmp_path: Path) -> None:
    """L_simple of a network that predicts 0 is 1 per dimension, whatever the settings say.

    The mean of 2000 values of ε² has a standard error of 0.032.
    """
    dataset = scaled(data.load("mixture", num_samples=1500), 1e3)
    settings = replace(TINY, learning_rate=1e-30, steps=10, batch_size=1000)
    settings = recipe(settings, image=False, levels=None)
    reverse = make_model(settings, dataset.event_shape, None)
    assert settings.objective == "vlb"
    training.fit(reverse, NoiseLoss(), dataset, settings, tmp_path, progress=False)
    (row,) = rows(tmp_path)
    assert row["training_loss_per_dim"] == pytest.approx(1, abs=0.13)
    assert not any(name.startswith("training") and "bits" in name for name in row)


def test_validation_is_what_evaluate_says(tmp_path: Path) -> None:
    x = 1e6 * np.random.default_rng(0).normal(size=(400, 2)) @ np.array([[1.0, 0.5], [0.0, 0.3]])
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    arguments = ["fit", str(tmp_path / "x.csv"), "--output", str(tmp_path / "run")]
    assert main([*arguments, *OPTIONS.split()]) == 0
    best = min(row["validation_bits_per_dim"] for row in rows(tmp_path / "run"))
    dataset, settings = data.load(tmp_path / "x.csv", seed=0), replace(TINY, num_steps=50)
    reverse = ReverseChain.load(tmp_path / "run").eval()
    assert bound(reverse, dataset, settings) == pytest.approx(best, rel=1e-5)
    # evaluate draws its noise in another way: the two agree within their Monte Carlo errors
    few = TermwiseBound(8).estimate(reverse, dataset.validation, seed=0).bits_per_dim()
    result = runs.evaluate(str(tmp_path / "run"), split="validation", quiet=True).bits_per_dim()
    assert abs(best - result.value) < 4 * math.hypot(few.monte_carlo, result.monte_carlo) < 5


def test_the_figures_of_the_bar_are_those_of_the_metrics(
    points: data.DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits per dimension for the units of the data as given, with their error."""
    logged: list[dict[str, float]] = []
    log_dict = training.DiffusionModule.log_dict

    def keep(module: Any, values: dict[str, float], **options: Any) -> None:
        logged.append(values)
        log_dict(module, values, **options)

    monkeypatch.setattr(training.DiffusionModule, "log_dict", keep)
    fit(scaled(points, 1e3), TINY, tmp_path)
    assert len(logged) == len(rows(tmp_path)) == 3
    for values, row in zip(logged, rows(tmp_path), strict=True):
        for name, value in values.items():
            assert float(value) == pytest.approx(row[name], rel=1e-5)


# -- the end -------------------------------------------------------------------------------------


def estimates(losses: Callable[[int], torch.Tensor]) -> Any:
    """A stand-in for ``TermwiseBound`` that says at the k-th validation what ``losses`` gives."""
    count = itertools.count()

    class Fake:
        def __init__(self, *_: Any):
            pass

        def estimate(self, reverse: ReverseChain, x_0: torch.Tensor, **_: Any) -> LogLikelihood:
            value = -losses(next(count)).expand(len(x_0)).double()
            zeros = torch.zeros(len(x_0))
            return LogLikelihood(value, zeros, "lower bound", zeros.long(), 2, "fake")

    return Fake


def validations(
    losses: Callable[[int], torch.Tensor], dataset: data.DataSet, folder: Path, **options: Any
) -> int:
    """How many validations a run of twelve makes that has a patience of three."""
    settings = replace(TINY, steps=12, validate_every=1, patience=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrodiff.training.module.TermwiseBound", estimates(losses))
        fit(dataset, settings, folder, **options)
    return len(rows(folder))


def test_heavy_noise_does_not_end_an_improving_run(points: data.DataSet, tmp_path: Path) -> None:
    """All samples become better but one, whose large term makes the mean worse every time."""

    def losses(k: int) -> torch.Tensor:
        values = torch.full((30,), -0.1 * k)
        values[0] = 30.0 * k
        return values

    assert validations(losses, points, tmp_path) == 12
    assert [row["gain_over_best"] < 0 for row in rows(tmp_path)][1:] == [True] * 11


def test_noise_around_a_falling_bound_ends_no_run(points: data.DataSet) -> None:
    """Of 200 runs with noise of Student's t with 1.5 degrees of freedom: none ends early.

    By the means alone, without their error, most do.
    """
    noise = torch.distributions.StudentT(1.5)
    ended = by_mean = 0
    for _ in range(200):
        judge = Validations(Path(), patience=8)
        means = []
        for k in range(40):
            losses = noise.sample((147,)).double() * 0.3 - 0.01 * k
            means.append(float(losses.mean()))
            judge.judge(losses)
            ended += judge.exhausted
        best = [means.index(min(means[: k + 1])) for k in range(40)]
        by_mean += any(k - b >= 8 for k, b in enumerate(best))
    assert ended == 0 and by_mean > 100


def test_a_little_worse_is_not_the_best(tmp_path: Path) -> None:
    """The best yet is what has gained, by however little; NaN and what lost by little have not."""
    judge, losses = Validations(tmp_path, patience=0), torch.linspace(0, 1, 30)
    judge.judge(losses)
    for worse in (losses + 0.1, losses + math.nan, losses.clone()):
        judge.judge(worse)
        assert judge.best is losses
    judge.judge(better := losses - 1e-3)
    assert judge.best is better


def test_a_worsening_model_ends_the_run(points: data.DataSet, tmp_path: Path) -> None:
    spread = torch.linspace(-1, 1, 30)

    def losses(k: int) -> torch.Tensor:
        return 5 * spread + abs(k - 3) * (0.1 + 0.1 * spread)  # best at the fourth

    assert validations(losses, points, tmp_path) == 4 + 3
    assert [row["gain_over_best"] > 0 for row in rows(tmp_path)][1:] == [True] * 3 + [False] * 3
    # it has ended: to resume it trains nothing more
    assert validations(losses, points, tmp_path, resume=True) == 4 + 3


def test_plateaus_and_zero_patience_end_no_run(points: data.DataSet, tmp_path: Path) -> None:
    assert validations(lambda k: torch.ones(30), points, tmp_path / "one") == 12
    judge = Validations(tmp_path, patience=0)
    for k in range(100):
        judge.judge(torch.linspace(0, 1, 30) + k)
        assert not judge.exhausted


def test_bound_that_is_never_finite_is_an_error(points: data.DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a finite bound in one validation at least"):
        validations(lambda k: torch.tensor(math.inf), points, tmp_path)


# -- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["fit", "digits", "--output", str(folder), *OPTIONS.split()]) == 0
    return folder


def test_fit_improves_and_leaves_its_files(uninterrupted: Path) -> None:
    table = rows(uninterrupted)
    assert [row["step"] for row in table] == [10, 20, 30]
    bounds = [row["validation_bits_per_dim"] for row in table]
    assert bounds[-1] < bounds[0] - 4 * table[0]["validation_std_error"]
    names = {path.name for path in (uninterrupted / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_resume_after_kill_is_exact(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["fit", "digits", "--output", str(folder), *OPTIONS.split()]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyrodiff.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics, last = folder / "metrics.csv", folder / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 600
    try:
        while not (last.is_file() and metrics.is_file()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= len(rows(folder)) < 3 and not (folder / "model.safetensors").exists()
    assert main([*arguments, "--resume"]) == 0
    expected, table = rows(uninterrupted), rows(folder)
    assert len(table) == len(expected) == 3
    for one, other in zip(table, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6, nan_ok=True)
    weights, other = (load_file(run / "model.safetensors") for run in (folder, uninterrupted))
    assert weights.keys() == other.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


# -- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", CHOICES["denoiser"])
@pytest.mark.parametrize("objective", CHOICES["objective"])
def test_every_objective_trains_every_denoiser(
    objective: str, denoiser: str, points: data.DataSet, tmp_path: Path
) -> None:
    settings = replace(TINY, objective=objective, denoiser=denoiser, steps=2, validate_every=2)
    complete = recipe(settings, image=False, levels=None)
    assert (complete.variance == "learned-range") == (objective == "hybrid")
    torch.manual_seed(0)
    fresh = make_model(complete, points.event_shape, None).state_dict()
    fresh = {name: value.clone() for name, value in fresh.items()}
    trained = fit(points, settings, tmp_path).state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in trained.items())
    assert all(bool(value.isfinite().all()) for value in trained.values())
    assert [row["step"] for row in rows(tmp_path)] == [2]


# -- refusals ------------------------------------------------------------------------------------


def test_data_are_checked_before_any_training(points: data.DataSet, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        bad = getattr(points, split).clone()
        bad[1, 0] = torch.nan
        with pytest.raises(
            ValueError, match="Expected finite values; got NaN or infinity in row 1"
        ):
            fit(replace(points, **{split: bad}), TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_are_complete(points: data.DataSet, tmp_path: Path) -> None:
    whole = recipe(TINY, image=False, levels=None)
    reverse = make_model(whole, (2,), None)
    objective = make_objective(whole)
    settings = replace(TINY, learning_rate=None, weight_decay=None)
    with pytest.raises(ValueError, match="with learning_rate, weight_decay .*; got None"):
        training.fit(reverse, objective, points, settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_gives_no_advice(points: data.DataSet, tmp_path: Path) -> None:
    """In a process of its own, whose output pytest does not hold."""
    code = """
import logging, sys
from pyrodiff import ForwardChain, ReverseChain, data
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import NoiseLoss
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.training import fit
from pyrodiff.runs.settings import FitSettings, recipe
network = ResidualMLP((2,), width=4, blocks=1)
reverse = ReverseChain(NoiseDenoiser(network), ForwardChain(LogSNRSchedule(), 3), (2,))
settings = recipe(FitSettings(steps=2, batch_size=8, validate_every=2), image=False, levels=None)
data = data.load("moons")
before = logging.getLogger("lightning.pytorch").level
fit(reverse, NoiseLoss(), data, settings, sys.argv[1], progress=False)
assert logging.getLogger("lightning.pytorch").level == before
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_decoder_suits_the_data(digits: data.DataSet, points: data.DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected decoder categorical or discretized for disc"):
        fit(digits, replace(TINY, decoder="gaussian"), tmp_path)
    with pytest.raises(ValueError, match="Expected decoder gaussian for continuous data; got 'c"):
        fit(points, replace(TINY, decoder="categorical"), tmp_path)


def test_hybrid_needs_a_learned_variance(points: data.DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a learned variance"):
        fit(points, replace(TINY, objective="hybrid", variance="fixed-large"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_loss_that_is_not_finite_raises(points: data.DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a finite loss; got .* at step"):
        fit(points, replace(TINY, learning_rate=1e30, gradient_clip=1e30), tmp_path)


def test_averaging_copies_the_chain_with_names_of_its_own(points: data.DataSet) -> None:
    import copy

    settings = recipe(TINY, image=False, levels=None)
    reverse = make_model(settings, points.event_shape, None)
    twin = copy.deepcopy(reverse)
    names = [{name for name, _ in chain.named_pyro_params()} for chain in (reverse, twin)]
    assert names[0] == names[1] and names[0]
    assert reverse._pyro_name != twin._pyro_name
    assert reverse.forward_chain._pyro_name != twin.forward_chain._pyro_name
