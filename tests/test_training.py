"""Training: batches, checkpoints, resuming exactly, and what is refused before any work."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyrodiff import ReverseChain, data, recipes, training
from pyrodiff.cli import main
from pyrodiff.settings import CHOICES, FitSettings, recipe
from pyrodiff.training import SeededBatches

TINY = FitSettings(
    steps=30,
    validate_every=10,
    width=16,
    num_steps=50,
    evaluations=16,
    validation_evaluations=8,
    batch_size=32,
)
OPTIONS = "--steps 30 --validate_every 10 --width 16 --num_steps 50 --evaluations 16 "
OPTIONS += "--validation_evaluations 8 --batch_size 32 --quiet"


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.load("digits")


@pytest.fixture(scope="module")
def points() -> data.DataSet:
    return data.load("mixture", num_samples=300)


def fit(dataset: data.DataSet, settings: FitSettings, folder: Path, **options: Any) -> ReverseChain:
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    torch.manual_seed(settings.seed)
    reverse = recipes.make_model(settings, dataset.event_shape, dataset.levels)
    objective = recipes.make_objective(settings)
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


# -- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["fit", "digits", "--output", str(folder), *OPTIONS.split()]) == 0
    return folder


def test_fit_improves_and_leaves_its_files(uninterrupted: Path) -> None:
    found = rows(uninterrupted)
    assert [row["step"] for row in found] == [10, 20, 30]
    bounds = [row["validation_bits_per_dim"] for row in found]
    assert bounds[-1] < bounds[0] - 4 * found[0]["validation_std_error"]
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
    deadline = time.monotonic() + 60
    try:
        while not (last.is_file() and metrics.is_file()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= len(rows(folder)) < 3 and not (folder / "model.safetensors").exists()
    assert main([*arguments, "--resume"]) == 0
    expected, found = rows(uninterrupted), rows(folder)
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights, other = (load_file(run / "model.safetensors") for run in (folder, uninterrupted))
    assert weights.keys() == other.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


class Trap:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_hostile_checkpoint_is_not_executed(points: data.DataSet, tmp_path: Path) -> None:
    marker, last = tmp_path / "marker", tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    for write in (
        lambda: last.write_bytes(pickle.dumps(Trap(marker), protocol=2)),
        lambda: torch.save({"state_dict": Trap(marker)}, last),
    ):
        write()
        with pytest.raises(ValueError, match="Expected a checkpoint of tensors and plain values"):
            fit(points, TINY, tmp_path, resume=True)
        assert not marker.exists() and not (tmp_path / "metrics.csv").exists()
    torch.load(last, weights_only=False)
    assert marker.exists()  # the trap works: it was avoided above


def test_truncated_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    whole = (uninterrupted / "checkpoints" / "last.ckpt").read_bytes()
    path = tmp_path / "last.ckpt"
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="Expected a checkpoint of tensors and plain values"):
            training.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint .*; got nothing there"):
        training.read_checkpoint(tmp_path / "none.ckpt")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="Expected a training checkpoint in .*another kind"):
        training.read_checkpoint(path)


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
    fresh = recipes.make_model(complete, points.event_shape, None).state_dict()
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
        with pytest.raises(ValueError, match="Expected finite data; got NaN or infinity in 1 of"):
            fit(replace(points, **{split: bad}), TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_are_complete(points: data.DataSet, tmp_path: Path) -> None:
    whole = recipe(TINY, image=False, levels=None)
    reverse = recipes.make_model(whole, (2,), None)
    objective = recipes.make_objective(whole)
    settings = replace(TINY, learning_rate=None, weight_decay=None)
    with pytest.raises(ValueError, match="with learning_rate, weight_decay .*; got None"):
        training.fit(reverse, objective, points, settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_gives_no_advice(points: data.DataSet, tmp_path: Path) -> None:
    """In a process of its own, whose output pytest does not hold."""
    code = """
import logging, sys
from pyrodiff import ForwardChain, ReverseChain, data, training
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import NoiseLoss
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.settings import FitSettings, recipe
network = ResidualMLP((2,), width=4, blocks=1)
reverse = ReverseChain(NoiseDenoiser(network), ForwardChain(LogSNRSchedule(), 3), (2,))
settings = recipe(FitSettings(steps=2, batch_size=8, validate_every=2), image=False, levels=None)
data = data.load("moons")
before = logging.getLogger("lightning.pytorch").level
training.fit(reverse, NoiseLoss(), data, settings, sys.argv[1], progress=False)
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
    reverse = recipes.make_model(settings, points.event_shape, None)
    twin = copy.deepcopy(reverse)
    names = [{name for name, _ in chain.named_pyro_params()} for chain in (reverse, twin)]
    assert names[0] == names[1] and names[0]
    assert reverse._pyro_name != twin._pyro_name
    assert reverse.forward_chain._pyro_name != twin.forward_chain._pyro_name
