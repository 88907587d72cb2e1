"""Evaluation in batches: what is kept, what is gone on with, and who computes it changes no value.

Nothing here is random beyond the seeds: equalities are exact where the batches are the same and
hold to the rounding of a float32 network where they are not.
"""

from __future__ import annotations

import functools
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pyrodiff import data, runs
from pyrodiff.cli import main
from pyrodiff.grids import Grid, OptimalGrid
from pyrodiff.likelihood import (
    ImportanceBound,
    LogLikelihood,
    PathBound,
    Pilot,
    TermwiseBound,
)
from pyrodiff.likelihood.result import read_result
from pyrodiff.runs.build import load_model, make_estimator
from pyrodiff.runs.choices import ESTIMATORS
from pyrodiff.runs.folder import sealed
from pyrodiff.runs.settings import EvaluationSettings
from pyrodiff.runs.splits import evaluate_split, model_checksum
from pyrodiff.runs.workers import share
from pyrodiff.variances import (
    AnalyticVariance,
    FixedLarge,
    FixedSmall,
    PosteriorCovariance,
    Variance,
)

TINY = "--network mlp --width 8 --blocks 1 --steps 4 --validate_every 2 --num_steps 12 --quiet "
TINY += "--validation_evaluations 8 --evaluations 16 --batch_size 32 --context label"
NAMES = ("value", "std_error", "calls", "log_weights", "reference", "degrees_of_freedom", "terms")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["fit", "digits", "--output", str(folder), *TINY.split()]) == 0
    return folder


def same(one: LogLikelihood, other: LogLikelihood) -> None:
    """Equal to the last bit."""
    for name in NAMES:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert one.estimator == other.estimator and one.shared_calls == other.shared_calls


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[range]:
    """Interrupt evaluations by importance after some batches; returns what they were asked for."""
    asked: list[range] = []
    estimate = ImportanceBound.estimate

    def interrupted(self, *args, indices, **options):
        if len(asked) == batches:
            raise KeyboardInterrupt
        asked.append(indices)
        return estimate(self, *args, indices=indices, **options)

    monkeypatch.setattr(ImportanceBound, "estimate", interrupted)
    return asked


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["termwise", "path", "importance"])
def test_values_are_the_estimators_own(run: Path, name: str) -> None:
    """Batches, files and all: what comes out is what the estimator gives for the whole split."""
    options = {"evaluations": 8} if name == "termwise" else {"particles": 3}
    result = runs.evaluate(
        str(run), seed=5, batch_size=32, quiet=True, estimator=name, limit=33, **options
    )
    same(result, LogLikelihood.load(run / "evaluation.nc"))
    assert not (run / "evaluation").exists()
    digits = data.load("digits", context="label", seed=0)
    if name == "termwise":
        assert result.estimator.startswith("TermwiseBound(calls=8")
        assert result.shared_calls > 0 and float(result.calls.max()) == 8
        return
    estimator = PathBound(3) if name == "path" else ImportanceBound(3)
    context = digits.test_context[:33]
    whole = estimator.estimate(load_model(run), digits.test[:33], seed=5, context=context)
    torch.testing.assert_close(result.value, whole.value, rtol=1e-5, atol=1e-3)


def test_values_of_every_split_are_in_units_of_the_data(tmp_path: Path) -> None:
    """Continuous data: the same values as in model units, moved by the offset of the scales."""
    options = "--steps 2 --width 8 --num_steps 10 --evaluations 8 --validation_evaluations 8"
    folder = tmp_path / "moons"
    assert main(["fit", "moons", "--output", str(folder), *options.split(), "--quiet"]) == 0
    moons = data.load("moons", seed=0)
    for split in ("train", "test"):
        settings = EvaluationSettings("path", particles=2, split=split, limit=9, seed=1)
        result = evaluate_split(folder, moons, settings, quiet=True)
        x_0 = getattr(moons, split)[:9]
        own = PathBound(2).estimate(load_model(folder), x_0, seed=1)
        shift = moons.log_density_offset()
        assert shift != 0
        torch.testing.assert_close(result.value, own.value + shift, rtol=1e-6, atol=1e-6)
    termwise = EvaluationSettings(std_error=0.5, split="train", limit=9)
    result = evaluate_split(folder, moons, termwise, quiet=True)
    assert result.shared_calls > 0 and result.std_error.median() < 1


@pytest.mark.parametrize(
    ("split", "other"), [("test", "train"), ("validation", "train"), ("train", "validation")]
)
def test_estimators_never_learn_from_the_samples_they_score(
    run: Path, split: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pilot that has seen the samples makes their bound look better known than it is."""
    digits, asked = data.load("digits", context="label", seed=0), []

    def ask(reverse: object, x: torch.Tensor, *, context: torch.Tensor, **_: object) -> None:
        asked.append((x, context))
        raise KeyboardInterrupt

    monkeypatch.setattr("pyrodiff.likelihood.termwise.pilot.Pilot.fit", ask)
    folder = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        evaluate_split(folder, digits, EvaluationSettings(calls=8, split=split), quiet=True)
    ((x, context),) = asked
    assert torch.equal(x, getattr(digits, other))
    assert torch.equal(context, getattr(digits, f"{other}_context"))


def test_existing_arguments_by_position(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = runs.evaluate(str(run), None, "validation", 8, 3, 64, True)
    assert result.estimator.startswith("TermwiseBound(calls=8")
    assert (run / "terms.png").is_file()
    with pytest.raises(ValueError, match="Expected split to be one of"):
        runs.evaluate(str(run), split="tset")


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_weights_are_hashed_once(run: Path, command: str, tmp_path: Path, monkeypatch) -> None:
    """Of every run, whatever the number of repeats."""
    hashed: list[bytes] = []

    def counted(config: Path, weights: bytes) -> str:
        hashed.append(weights)
        return model_checksum(config, weights)

    other = shutil.copytree(run, tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["fit"]["objective"] = "simple"
    (other / "config.yaml").write_text(yaml.safe_dump(sealed(config), sort_keys=False))
    for module in ("splits", "comparison"):
        monkeypatch.setattr(f"pyrodiff.runs.{module}.model_checksum", counted)
    folders = [str(run)] if command == "evaluate" else [str(run), str(other), "--repeats", "3"]
    if command == "compare":
        folders += ["--output", str(tmp_path / "page.html")]
    options = ["--estimator", "path", "--limit", "4", "--quiet"]
    assert main([command, *folders, *options]) == 0
    assert len(hashed) == (1 if command == "evaluate" else 2)


def test_a_pilot_takes_no_more_calls_than_the_evaluation(run: Path) -> None:
    """And where these are too few for one, there is none."""
    least = Pilot.least_calls(load_model(run))
    for calls in (least // 3 - 1, least // 3 + 1, least):
        result = runs.evaluate(str(run), calls=calls, limit=3, quiet=True)
        assert (result.shared_calls > 0) == (3 * calls >= least)
        assert result.shared_calls <= 3 * calls


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_by_name(run: Path, name: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["evaluate", str(run), "--estimator", name, "--limit", "3", "--quiet"]
    if name == "importance":
        arguments += ["--particles", "30"]
    if name == "termwise":
        arguments += ["--calls", "400"]  # enough for a pilot to pay
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "of which Monte Carlo" in text and "network calls per sample" in text
    kind = "an estimate of log p" if name == "flow" else "a lower bound on log p"
    assert kind in text
    texts = {
        "termwise": "for all together",
        "path": "PathBound(particles=2)",
        "importance": "effective number of particles: median",
        "particle": "looser than the importance bound for",
        "flow": "estimate of bits/dim",
    }
    assert texts[name] in text
    assert ("Pareto k̂ above 0.7 for" in text) == (name == "importance")


# -- interruptions -------------------------------------------------------------------------------


def test_killed_evaluation_is_resumed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 with finished batches in any order, one of them torn: the file is as if never."""
    options = "--estimator importance --particles 32 --batch-size 32 --limit 60 --quiet"
    command = ["evaluate", str(run), *options.split()]
    assert main(command) == 0
    whole = LogLikelihood.load(run / "evaluation.nc")
    (run / "evaluation.nc").unlink()
    parts = run / "evaluation" / "test-importance"
    program = [sys.executable, "-m", "pyrodiff.cli", *command, "--processes", "2"]
    process = subprocess.Popen(program, start_new_session=True)
    end = time.monotonic() + 60
    while len(list(parts.glob("batch-*.nc"))) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.wait()
    while time.monotonic() < end:  # no worker outlives the main process
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers left behind")
    assert not (run / "evaluation.nc").exists()
    done = sorted(parts.glob("batch-*.nc"))
    assert 3 <= len(done) < 60
    done[0].write_bytes(done[0].read_bytes()[:1000])
    done[1].write_bytes(b"")
    asked = stop_after(monkeypatch, 60)
    assert main([*command, "--resume"]) == 0
    assert len(asked) == 60 - (len(done) - 2)
    same(LogLikelihood.load(run / "evaluation.nc"), whole)
    assert not (run / "evaluation").exists()


def test_resume_refuses_other_settings(run: Path, monkeypatch, capsys) -> None:
    command = ["evaluate", str(run), "--estimator", "importance", "--particles", "2"]
    command += ["--limit", "12", "--batch_size", "4", "--quiet"]
    assert main(command) == 0
    whole = LogLikelihood.load(run / "evaluation.nc")
    with monkeypatch.context() as patch:
        asked = stop_after(patch, 4)
        assert main(command) == 130
        assert "interrupted; --resume goes on" in capsys.readouterr().err
    folder = run / "evaluation" / "test-importance"
    record = yaml.safe_load((folder / "settings.yaml").read_text())
    assert record["particles"] == 2 and record["samples"] == 12 and record["data"] == "digits"
    for other, messages in (
        (["--seed", "1"], "seed: 1 instead of 0"),
        (["--particles", "3"], "particles: 3 instead of 2"),
        (["--batch-size", "8", "--seed", "2"], "batch_size: 8 instead of 4; seed: 2 instead of 0"),
    ):
        assert main([*command, *other, "--resume"]) == 2
        assert messages in capsys.readouterr().err
    weights = run / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"\0\0\0\1")
        assert main([*command, "--resume"]) == 2
        assert "got model_checksum: " in capsys.readouterr().err
    finally:
        weights.write_bytes(before)
    assert len(list(folder.glob("batch-*.nc"))) == len(asked) == 4
    with monkeypatch.context() as patch:
        asked = stop_after(patch, 6)
        assert main([*command, "--resume"]) == 0
        assert asked == [range(8, 10), range(10, 12)]
    same(LogLikelihood.load(run / "evaluation.nc"), whole)


def test_without_resume_it_starts_afresh(run: Path, monkeypatch) -> None:
    command = ["evaluate", str(run), "--estimator", "importance", "--particles", "2"]
    command += ["--limit", "6", "--batch_size", "4", "--quiet"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(command) == 130
    asked = stop_after(monkeypatch, 9)
    assert main([*command, "--seed", "9"]) == 0
    assert len(asked) == 3 and not (run / "evaluation").exists()


def test_pilot_is_reused_on_resume(run: Path, monkeypatch) -> None:
    """An evaluation cut short after its pilot goes on with the pilot as it was read."""
    command = ["evaluate", str(run), "--std-error", "20", "--limit", "80", "--batch-size=64"]
    assert main([*command, "--quiet"]) == 0
    whole = LogLikelihood.load(run / "evaluation.nc")
    estimate, asked = TermwiseBound.estimate, []

    def once(self, *args, **options):
        if asked:
            raise KeyboardInterrupt
        asked.append(options["indices"])
        return estimate(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TermwiseBound, "estimate", once)
        assert main([*command, "--quiet"]) == 130
    from pyrodiff.likelihood.termwise.pilot import Pilot

    monkeypatch.setattr(Pilot, "run", None)
    assert main([*command, "--resume"]) == 0
    same(LogLikelihood.load(run / "evaluation.nc"), whole)


# -- other chains --------------------------------------------------------------------------------


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimal grids of 16 candidates, fitted in no time."""
    fit = functools.partial(OptimalGrid.fit, candidates=16)
    monkeypatch.setattr(OptimalGrid, "fit", fit)


OTHER_CHAINS: list[tuple[dict[str, object], Variance | None]] = [
    ({"steps": 5}, None),
    ({"steps": 5, "grid": "uniform", "variance": "fixed-large"}, FixedLarge()),
    ({"steps": 5, "grid": "quadratic", "variance": "fixed-small"}, FixedSmall()),
    ({"steps": 4, "variance": "isotropic", "probes": 2}, PosteriorCovariance("isotropic", 0, 2)),
    (
        {"steps": 4, "variance": "diagonal", "probes": 1, "rank": 2},
        PosteriorCovariance("diagonal", 2, 1),
    ),
    ({"steps": 3, "variance": "full"}, PosteriorCovariance()),
]


def by_hand(
    folder: Path, variance: Variance | None, *, steps: int, grid: Grid | str = "log-snr"
) -> torch.Tensor:
    """The bound of nine samples under the respaced chain, which no command has made."""
    digits = data.load("digits", context="label", seed=0)
    few = load_model(folder).respaced(steps, variance=variance, grid=grid)
    context = digits.test_context[:9]
    return PathBound(2).estimate(few, digits.test[:9], seed=5, context=context).value


@pytest.mark.parametrize(("options", "variance"), OTHER_CHAINS, ids=lambda o: repr(o)[:40])
def test_values_of_other_chains(run: Path, options: dict, variance: Variance | None) -> None:
    """They are those of ``reverse.respaced``, and their file says which chain they are of."""
    command = {"estimator": "path", "particles": 2, "limit": 9, "seed": 5, "quiet": True}
    result = runs.evaluate(str(run), **command, **options)
    grid = options.get("grid", "log-snr")
    value = by_hand(run, variance, steps=options["steps"], grid=grid)
    torch.testing.assert_close(result.value, value, rtol=1e-5, atol=1e-3)
    attributes = read_result(run / "evaluation.nc")[1]
    assert {name: attributes[name] for name in options} == options
    assert not {"steps", "variance", "grid", "probes", "rank"} & (attributes.keys() - options)


def test_another_variance_on_the_steps_of_the_run(run: Path) -> None:
    command = {"estimator": "path", "particles": 2, "limit": 9, "seed": 5, "quiet": True}
    result = runs.evaluate(str(run), **command, variance="isotropic", probes=1)
    value = by_hand(run, PosteriorCovariance("isotropic", 0, 1), steps=12, grid="uniform")
    torch.testing.assert_close(result.value, value, rtol=1e-5, atol=1e-3)
    plain = runs.evaluate(str(run), **command)
    same(runs.evaluate(str(run), **command, variance="fixed-small"), plain)  # the run's own


@pytest.mark.usefixtures("few_candidates")
def test_fits_are_made_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another split than is judged; a new seed of the noise is no reason for a new fit."""
    folder = shutil.copytree(run, tmp_path / "run")
    command = {"estimator": "path", "particles": 2, "limit": 9, "quiet": True}
    command |= {"steps": 4, "variance": "analytic", "grid": "optimal"}
    digits, asked = data.load("digits", context="label", seed=0), list[object]()
    fits = {AnalyticVariance: AnalyticVariance.fit, OptimalGrid: OptimalGrid.fit}
    for kind, fit in fits.items():

        def ask(reverse, x, *, context, batch_size, fit=fit):
            asked.append((x, context))
            return fit(reverse, x, context=context, batch_size=batch_size)

        monkeypatch.setattr(kind, "fit", ask)
    result = runs.evaluate(str(folder), **command, seed=5)
    assert [len(x) for x, _ in asked] == [1000, 64]
    for x, context in asked:
        assert torch.equal(x, digits.train[: len(x)])
        assert torch.equal(context, digits.train_context[: len(x)])
    files = {path.name for path in (folder / "grids").iterdir()}
    assert files == {"analytic.safetensors", "analytic-errors.safetensors"}
    runs.evaluate(str(folder), **command, seed=6)
    same(runs.evaluate(str(folder), **command, seed=5), result)
    assert len(asked) == 2
    grid = OptimalGrid.load(folder / "grids" / "analytic.safetensors")
    variance = fits[AnalyticVariance](
        load_model(folder), digits.train[:1000], context=digits.train_context[:1000]
    )
    value = by_hand(folder, variance, steps=4, grid=grid)
    torch.testing.assert_close(result.value, value, rtol=1e-5, atol=1e-3)
    for path in (folder / "grids").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    same(runs.evaluate(str(folder), **command, seed=5), result)
    assert len(asked) == 4  # damaged files are made anew
    runs.evaluate(str(folder), **command, split="train")
    assert torch.equal(asked[4][0], digits.validation[:1000])
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")  # another model
    with pytest.raises(ValueError, match="differ from its checksum"):
        runs.evaluate(str(folder), **command)
    monkeypatch.setattr("pyrodiff.runs.splits.model_checksum", lambda *_: "0" * 16)
    weights.write_bytes(content)
    runs.evaluate(str(folder), **command)
    assert len(asked) == 8


@pytest.mark.usefixtures("few_candidates")
def test_evaluations_of_other_chains_are_resumed(run: Path, monkeypatch, capsys) -> None:
    """With the chain that they began with, and no other; the run's own leaves no trace of it."""
    command = ["evaluate", str(run), "--estimator", "importance", "--particles", "2"]
    command += ["--limit", "12", "--batch_size", "4", "--quiet"]
    chain = "--steps 5 --grid optimal --variance diagonal --probes 1".split()
    assert main([*command, *chain]) == 0
    whole = LogLikelihood.load(run / "evaluation.nc")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert main([*command, *chain]) == 130
    record = yaml.safe_load((run / "evaluation" / "test-importance" / "settings.yaml").read_text())
    assert record["steps"] == 5 and record["grid"] == "optimal" and "rank" not in record
    for other, message in (
        ([], "grid: None instead of 'optimal'; probes: None instead of 1; steps: None instead"),
        (["--steps", "6", *chain[2:]], "steps: 6 instead of 5."),
        ([*chain, "--rank", "1"], "rank: 1 instead of None."),
    ):
        capsys.readouterr()
        assert main([*command, *other, "--resume"]) == 2
        assert message in capsys.readouterr().err
    with monkeypatch.context() as patch:
        asked = stop_after(patch, 9)
        assert main([*command, *chain, "--resume"]) == 0
    assert len(asked) == 2
    same(LogLikelihood.load(run / "evaluation.nc"), whole)
    stop_after(monkeypatch, 1)
    assert main(command) == 130
    record = yaml.safe_load((run / "evaluation" / "test-importance" / "settings.yaml").read_text())
    assert not record.keys() & {"steps", "variance", "grid", "probes", "rank"}


@pytest.mark.usefixtures("few_candidates")
def test_termwise_bound_of_few_steps(run: Path, capsys, monkeypatch) -> None:
    """With a pilot of that chain; products count, and the default pays for 32 terms."""
    monkeypatch.setenv("COLUMNS", "200")
    chain = "--steps 5 --variance diagonal --probes 1 --limit 6 --quiet".split()
    assert main(["evaluate", str(run), *chain]) == 0
    text = capsys.readouterr().out
    assert "chain: 5 steps, variance diagonal (probes 1), grid log-snr; 2 network calls" in text
    assert "64 network calls per sample, and " in text and "of 5 steps)" in text
    options = {"steps": 5, "variance": "diagonal", "probes": 1, "limit": 6, "quiet": True}
    one = runs.evaluate(str(run), **options, grid="optimal", batch_size=3)
    same(runs.evaluate(str(run), **options, grid="optimal", batch_size=3, processes=2), one)
    assert int(runs.evaluate(str(run), **options, calls=8).calls.max()) == 8
    with pytest.raises(ValueError, match="Expected calls to be an integer >= 4, as a term takes 2"):
        runs.evaluate(str(run), **options, calls=3)


@pytest.mark.usefixtures("few_candidates")
def test_runs_are_compared_on_another_chain(run: Path, tmp_path: Path, monkeypatch) -> None:
    """The grid is fitted once for all repeats, and neither runs nor report keep it."""
    other = shutil.copytree(run, tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["fit"]["objective"] = "simple"
    (other / "config.yaml").write_text(yaml.safe_dump(sealed(config), sort_keys=False))
    fit, fitted = OptimalGrid.fit, list[object]()

    def count(*args, **options):
        fitted.append(args)
        return fit(*args, **options)

    monkeypatch.setattr(OptimalGrid, "fit", count)
    before = {path.name for path in other.iterdir()}
    chain = "--estimator path --limit 4 --steps 3 --grid optimal --quiet --repeats 2"
    page = tmp_path / "page.html"
    assert main(["compare", str(run), str(other), *chain.split(), "--output", str(page)]) == 0
    assert len(fitted) == 1  # the runs have one model
    assert {path.name for path in other.iterdir()} == before
    assert not (tmp_path / "page" / "evaluation").exists()
    assert "--steps=3" in page.read_text("utf-8")


# -- processes -----------------------------------------------------------------------------------


def test_two_processes(run: Path) -> None:
    """The same batches, pilot, context and all, in two other processes: the same bits."""
    options = {"std_error": 20.0, "limit": 90, "quiet": True}
    one = runs.evaluate(str(run), batch_size=64, **options)
    same(runs.evaluate(str(run), batch_size=64, processes=2, **options), one)
    other = runs.evaluate(str(run), batch_size=256, **options)
    torch.testing.assert_close(other.value, one.value, rtol=1e-4, atol=1e-2)


def test_workers_answer_every_task_and_raise_errors() -> None:
    assert sorted(share(operator.methodcaller, ("__len__",), ["a", "bb", "ccc"], 2)) == [1, 2, 3]
    assert list(share(operator.methodcaller, ("__len__",), [], 2)) == []
    answers = share(functools.partial, (operator.truediv, 1), [2, 0, 4], 1)
    assert next(answers) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(answers)


def test_dead_worker_is_noticed() -> None:
    with pytest.raises(ChildProcessError, match=r"got one that ended \(exit code 3\)"):
        list(share(functools.partial, (os._exit,), [3, 3], 2))


def test_dead_worker_keeps_finished_batches(run: Path, monkeypatch, capsys) -> None:
    def dying(make, arguments, tasks, processes):
        work = make(*arguments)
        yield work(tasks[1])
        raise ChildProcessError("Expected every worker process to finish; got one that ended.")

    command = ["evaluate", str(run), "--estimator", "path", "--limit", "8", "--batch-size", "4"]
    command += ["--processes", "2", "--quiet"]
    monkeypatch.setattr("pyrodiff.runs.splits.share", dying)
    assert main(command) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    folder = run / "evaluation" / "test-path"
    assert {path.name for path in folder.iterdir()} == {"settings.yaml", "batch-000001.nc"}
    assert main([*command[:-3], "--quiet", "--resume"]) == 0


def test_defaults_of_particles() -> None:
    assert make_estimator(EvaluationSettings("importance")) == ImportanceBound()
    assert make_estimator(EvaluationSettings("path", particles=7)) == PathBound(7)
