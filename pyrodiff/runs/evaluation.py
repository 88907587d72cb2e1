"""Evaluation of a run, in batches that outlive whoever computes them.

RUN/evaluation/SPLIT-ESTIMATOR/ holds, until all samples are done,

settings.yaml        all that the values depend on
pilot.safetensors    what the termwise bound learned on another split
batch-000000.nc      the result of each finished batch, in model units

and then becomes RUN/evaluation.nc.  A sample's value is a function of these settings and its index
alone, so it does not matter which process computes it, in which order, or after which interruption.
"""

import contextlib
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pyrodiff
from pyrodiff import serialization
from pyrodiff.chains import ReverseChain
from pyrodiff.data import DataSet
from pyrodiff.likelihood import Estimator, LogLikelihood
from pyrodiff.runs.batches import Batches, checksum, seal
from pyrodiff.runs.settings import EvaluationSettings
from pyrodiff.runs.terminal import Counter
from pyrodiff.runs.workers import share

__all__ = ["evaluate_split", "identity", "load_model", "make_estimator"]

_MIXTURE_DIMENSIONS = 256  # up to which a mixture with full covariances is fitted


def load_model(folder: Path) -> ReverseChain:
    """The model of a run, in evaluation mode."""
    return ReverseChain.load(folder).eval()


def make_estimator(settings: EvaluationSettings, learned: Any = None) -> Estimator:
    """The estimator of the settings; ``particles`` of None is the estimator's own default.

    Args:
        settings: as checked by themselves.
        learned: from other data: the termwise bound's pilot, the particle bound's twist, or None.
    """
    if settings.estimator == "termwise":
        from pyrodiff.likelihood.termwise.bound import TermwiseBound

        return TermwiseBound(settings.evaluations, std_error=settings.std_error, pilot=learned)
    if settings.estimator == "path":
        from pyrodiff.likelihood.paths.elbo import PathBound

        return PathBound(**_given(paths=settings.particles))
    if settings.estimator == "importance":
        from pyrodiff.likelihood.paths.importance import ImportanceBound

        return ImportanceBound(**_given(particles=settings.particles))
    if settings.estimator == "particle":
        from pyrodiff.likelihood.particles.bound import ParticleBound

        return ParticleBound(**_given(particles=settings.particles, twist=learned))
    from pyrodiff.likelihood.flow.density import ProbabilityFlow

    return ProbabilityFlow(**_given(draws=settings.particles))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def evaluate_split(
    folder: Path,
    dataset: DataSet,
    settings: EvaluationSettings,
    *,
    resume: bool = False,
    processes: int = 1,
    quiet: bool = False,
) -> LogLikelihood:
    """log p of each sample of a split, in the units of the data as given.

    Args:
        folder: the run, locked by the caller (``folders.locked``).
        dataset: data with the run's transform.
        settings: the estimator and where its randomness comes from.
        resume: go on with the finished batches of an evaluation that was interrupted; without it
            they are discarded.
        processes: worker processes that batches are shared out to; 1: none but this one.
        quiet: show no progress.

    Raises:
        ValueError: batches of another evaluation in ``folder`` (``resume``); what the estimator
            raises.
        ChildProcessError: a worker that died; finished batches are kept.
    """
    x_0, context = _samples(dataset, settings.split, settings.limit)
    record = _record(folder, dataset, settings, x_0, context)
    parts = Batches(folder / "evaluation" / f"{settings.split}-{settings.estimator}", record)
    parts.prepare(resume)
    with Counter(dataset, quiet) as counter:
        estimator = make_estimator(settings, _learned(folder, parts, dataset, settings, counter))
        step = estimator.samples_per_batch(settings.batch_size)
        starts = range(0, len(x_0), step)
        batches = {n: range(i, min(i + step, len(x_0))) for n, i in enumerate(starts)}
        results = parts.read(batches)
        counter.start(len(x_0), results)
        tasks = [
            _Task(n, some, x_0[some].numpy(), None if context is None else context[some].numpy())
            for n, some in batches.items()
            if n not in results
        ]
        # closed at once on any exception, so that no worker goes on
        with contextlib.closing(_work(folder, estimator, settings, tasks, processes)) as arriving:
            for number, result in arriving:
                parts.write(number, batches[number], result)
                results[number] = result
                counter.show(results)
    whole = LogLikelihood.concatenate([results[number] for number in batches])
    result = whole + dataset.log_density_offset()
    kept = ("data", "split", "seed", "samples_checksum")
    attributes = {name: record[name] for name in kept}
    attributes["seal"] = seal(result, parts.identity)
    result.save(folder / "evaluation.nc", **attributes)
    parts.remove()
    return result


# -- what is to be done --------------------------------------------------------------------------


class _Task(NamedTuple):
    """A batch of samples, as it is sent to a worker."""

    number: int
    indices: range
    x_0: np.ndarray
    context: np.ndarray | None


def _samples(
    dataset: DataSet, split: str, limit: int | None = None
) -> tuple[Tensor, Tensor | None]:
    x_0, context = getattr(dataset, split), getattr(dataset, f"{split}_context")
    return x_0[:limit], None if context is None else context[:limit]


def _record(
    folder: Path,
    dataset: DataSet,
    settings: EvaluationSettings,
    x_0: Tensor,
    context: Tensor | None,
) -> dict[str, Any]:
    """All that the values depend on, as plain values."""
    model = repr(serialization.entry(serialization.read_config(folder / "config.yaml"), "model"))
    weights = folder / "model.safetensors"
    samples = [x_0.numpy().tobytes(), b"" if context is None else context.numpy().tobytes()]
    return settings.to_dict() | {
        "pyrodiff": pyrodiff.__version__,
        "data": dataset.name,
        "samples": len(x_0),
        "samples_checksum": checksum(*samples),
        "model_checksum": checksum(model.encode(), weights.read_bytes()),
    }


def identity(folder: Path, dataset: DataSet, settings: EvaluationSettings) -> str:
    """A checksum of all that the values of an evaluation depend on."""
    samples = _samples(dataset, settings.split, settings.limit)
    return Batches(folder, _record(folder, dataset, settings, *samples)).identity


def _learned(
    folder: Path,
    parts: Batches,
    dataset: DataSet,
    settings: EvaluationSettings,
    counter: Counter,
) -> Any:
    """What the estimator learns from another split than is evaluated, or None."""
    x, context = _samples(dataset, "validation" if settings.split == "train" else "train")
    if settings.estimator == "particle" and dataset.dimensions <= _MIXTURE_DIMENSIONS:
        from pyrodiff.likelihood.particles.twists import MarginalTwist

        return MarginalTwist.fit(x, seed=settings.seed % 2**32)
    if settings.estimator != "termwise":
        return None
    from pyrodiff.likelihood.termwise.pilot import Pilot

    path = parts.folder / "pilot.safetensors"
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Pilot.load(path)
    pilot = Pilot.run(
        load_model(folder),
        x,
        context=context,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=counter.pilot,
    )
    pilot.save(path)
    return pilot


# -- doing it ------------------------------------------------------------------------------------


def _work(
    folder: Path,
    estimator: Estimator,
    settings: EvaluationSettings,
    tasks: list[_Task],
    processes: int,
) -> Generator[tuple[int, LogLikelihood], None, None]:
    """The result of each task, in order of arrival."""
    if processes > 1 and len(tasks) > 1:
        yield from share(_worker, (folder, estimator, settings), tasks, processes)
    elif tasks:
        yield from map(_evaluator(folder, estimator, settings), tasks)


def _worker(
    folder: Path, estimator: Estimator, settings: EvaluationSettings
) -> Callable[[_Task], tuple[int, LogLikelihood]]:
    torch.set_num_threads(1)
    return _evaluator(folder, estimator, settings)


def _evaluator(
    folder: Path, estimator: Estimator, settings: EvaluationSettings
) -> Callable[[_Task], tuple[int, LogLikelihood]]:
    reverse = load_model(folder)

    def evaluate(task: _Task) -> tuple[int, LogLikelihood]:
        with warnings.catch_warnings():
            # said of the whole, not of every batch
            warnings.filterwarnings("ignore", "Expected the particle bound to be no looser")
            result = estimator.estimate(
                reverse,
                torch.from_numpy(task.x_0),
                seed=settings.seed,
                batch_size=settings.batch_size,
                context=None if task.context is None else torch.from_numpy(task.context),
                indices=task.indices,
            )
        return task.number, result

    return evaluate
