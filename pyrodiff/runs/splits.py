"""The evaluation of a split, in batches that outlive the process that computes them.

RUN/evaluation/SPLIT-ESTIMATOR/ holds, until all samples are done,

settings.yaml        all that the values depend on
pilot.safetensors    what the termwise bound learned on another split
batch-000000.nc      the result of each finished batch, in model units

and then becomes RUN/evaluation.nc.  A sample's value is a function of these settings and its index
alone: it does not matter which process computes it, in which order, or after which interruption.
"""

import contextlib
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodiff import serialization
from pyrodiff._version import __version__
from pyrodiff.chains import ReverseChain
from pyrodiff.data import DataSet
from pyrodiff.likelihood import Estimator, LogLikelihood, Pilot
from pyrodiff.likelihood.particles.twists import MarginalTwist
from pyrodiff.runs.batches import Batches, checksum, identity, seal
from pyrodiff.runs.build import load_model, make_estimator
from pyrodiff.runs.chain_settings import ChainSettings
from pyrodiff.runs.respacing import Fits, Respacing, respacing
from pyrodiff.runs.settings import EvaluationSettings
from pyrodiff.runs.summary import Counter
from pyrodiff.runs.workers import share

__all__ = ["Evaluation", "evaluate_split", "model_checksum"]

# of a pilot, at most, times the root of a step's calls; never more than the evaluation itself
_PILOT_CALLS = 20_000
_MIXTURE_DIMENSIONS = 256  # up to which a mixture with full covariances is fitted
_TYPICAL_CALLS = 128  # per sample, where they are as many as an error asks for


def model_checksum(config: Path, weights: bytes) -> str:
    """A checksum of a model.

    Args:
        config: the file of its configuration.
        weights: the content of the file of its weights.
    """
    model = serialization.entry(serialization.read_config(config), "model")
    return checksum(repr(model).encode(), weights)


@dataclass(frozen=True)
class Evaluation:
    """What the values of an evaluation depend on.

    Args:
        model: the checksum of the model.
        dataset: data with the run's transform.
        settings: the estimator, the samples, and the seed of the noise.
    """

    model: str
    dataset: DataSet
    settings: EvaluationSettings

    def samples(self) -> tuple[Tensor, Tensor | None]:
        """The samples that are evaluated, and their context."""
        split, limit = self.settings.split, self.settings.limit
        x_0, context = _samples(self.dataset, split)
        return x_0[:limit], None if context is None else context[:limit]

    def learning_samples(self) -> tuple[Tensor, Tensor | None]:
        """Samples of another split, from which an estimator may learn."""
        return _samples(self.dataset, "validation" if self.settings.split == "train" else "train")

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        x_0, context = self.samples()
        contents = [x_0.numpy().tobytes(), b"" if context is None else context.numpy().tobytes()]
        return self._settings() | {
            "pyrodiff": __version__,
            "data": self.dataset.name,
            "samples": len(x_0),
            "samples_checksum": checksum(*contents),
            "model_checksum": self.model,
        }

    def _settings(self) -> dict[str, Any]:
        """Those of the run's own chain are as in the files of versions that had no other."""
        own = ChainSettings().to_dict().keys() - self.settings.chain().keys()
        return {name: v for name, v in self.settings.to_dict().items() if name not in own}

    def identity(self) -> str:
        """A checksum of all of it."""
        return identity(self.record())


def _samples(dataset: DataSet, split: str) -> tuple[Tensor, Tensor | None]:
    return getattr(dataset, split), getattr(dataset, f"{split}_context")


def evaluate_split(
    folder: Path,
    dataset: DataSet,
    settings: EvaluationSettings,
    *,
    resume: bool = False,
    processes: int = 1,
    quiet: bool = False,
    model: str | None = None,
    fits: Path | None = None,
) -> LogLikelihood:
    """log p of each sample of a split, in the units of the data as given.

    Args:
        folder: the run, locked by the caller (``folders.locked``).
        dataset: data with the run's transform.
        settings: the estimator, the samples, and the seed of the noise.
        resume: go on with the finished batches of an interrupted evaluation; without it they are
            discarded.
        processes: worker processes among which batches are shared; 1: this process alone.
        quiet: show no progress.
        model: the checksum of the model, where the caller knows it.
        fits: the folder for what is fitted for another chain; default: ``folder``.

    Raises:
        ValueError: batches of another evaluation in ``folder`` (``resume``); a chain that the
            network cannot serve; what the estimator raises.
        ChildProcessError: a worker that died; finished batches are kept.
    """
    if model is None:
        weights = (folder / "model.safetensors").read_bytes()
        model = model_checksum(folder / "config.yaml", weights)
    evaluation = Evaluation(model, dataset, settings)
    record = evaluation.record()
    batches = Batches(folder / "evaluation" / f"{settings.split}-{settings.estimator}", record)
    batches.prepare(resume)
    learning, size = evaluation.learning_samples, settings.batch_size
    stored_fits = Fits(fits or folder, model, learning, size)
    chain = respacing(settings, lambda: load_model(folder), stored_fits)
    run = _Run(folder, chain)
    results = _results(run, evaluation, batches, processes=processes, quiet=quiet)
    result = LogLikelihood.concatenate(results) + dataset.log_density_offset()
    names = ("data", "split", "seed", "samples_checksum")
    attributes = {name: record[name] for name in names} | settings.chain()
    attributes["seal"] = seal(result, batches.identity)
    result.save(folder / "evaluation.nc", **attributes)
    batches.remove()
    return result


class _Run(NamedTuple):
    """A model to be evaluated.

    Args:
        folder: of the run.
        chain: that its network is put on.
    """

    folder: Path
    chain: Respacing

    def model(self) -> ReverseChain:
        """The model, in evaluation mode."""
        return self.chain.of(load_model(self.folder))


def _results(
    run: _Run, evaluation: Evaluation, batches: Batches, *, processes: int, quiet: bool
) -> list[LogLikelihood]:
    """The results of all batches in order; each is written to its file as soon as it is there."""
    settings, (x_0, context) = evaluation.settings, evaluation.samples()
    with Counter(evaluation.dataset, quiet) as counter:
        estimator = make_estimator(settings, _learned(run, evaluation, batches.folder, counter))
        step = estimator.samples_per_batch(settings.batch_size)
        starts = range(0, len(x_0), step)
        rows = {n: range(i, min(i + step, len(x_0))) for n, i in enumerate(starts)}
        results = batches.read(rows)
        counter.start(len(x_0), results)
        tasks = [
            _Task(n, i, x_0[i].numpy(), None if context is None else context[i].numpy())
            for n, i in rows.items()
            if n not in results
        ]
        work = _Work(run, estimator, settings)
        # closed at once on any exception, so that no worker goes on
        with contextlib.closing(work.results(tasks, processes)) as arriving:
            for number, result in arriving:
                batches.write(number, rows[number], result)
                results[number] = result
                counter.show(results)
    return [results[number] for number in rows]


def _learned(
    run: _Run, evaluation: Evaluation, batches: Path, counter: Counter
) -> Pilot | MarginalTwist | None:
    """What the estimator learns from another split than is evaluated, or None."""
    settings, (x, context) = evaluation.settings, evaluation.learning_samples()
    if settings.estimator == "particle" and evaluation.dataset.dimensions <= _MIXTURE_DIMENSIONS:
        return MarginalTwist.fit(x, seed=settings.seed % 2**32)
    if settings.estimator != "termwise":
        return None
    path = batches / "pilot.safetensors"
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Pilot.load(path)
    reverse, count = run.model(), len(evaluation.samples()[0])
    most = round(_PILOT_CALLS * reverse.calls_per_step**0.5)
    calls = min(most, count * (settings.calls or _TYPICAL_CALLS))
    if calls < Pilot.least_calls(reverse):
        return None
    pilot = Pilot.fit(
        reverse,
        x,
        calls=calls,
        context=context,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=counter.pilot,
    )
    pilot.save(path)
    return pilot


# -- batches by this process or by workers -------------------------------------------------------


class _Task(NamedTuple):
    """A batch of samples, as it is sent to a worker."""

    number: int
    indices: range
    x_0: np.ndarray
    context: np.ndarray | None


class _Work(NamedTuple):
    """What is done with every task.

    Args:
        run: the model.
        estimator: with what it has learned.
        settings: the seed of the noise, and the rows of a network call.
    """

    run: _Run
    estimator: Estimator
    settings: EvaluationSettings

    def results(
        self, tasks: list[_Task], processes: int
    ) -> Generator[tuple[int, LogLikelihood], None, None]:
        """The result of each task, in order of arrival."""
        if processes > 1 and len(tasks) > 1:
            yield from share(_worker, (self,), tasks, processes)
        elif tasks:
            yield from map(self.evaluator(), tasks)

    def evaluator(self) -> Callable[[_Task], tuple[int, LogLikelihood]]:
        """The function of a task, with the model that it needs."""
        reverse = self.run.model()

        def evaluate(task: _Task) -> tuple[int, LogLikelihood]:
            with warnings.catch_warnings():
                # said once of the whole result, not of every batch
                warnings.filterwarnings("ignore", "Expected the particle bound to be no looser")
                result = self.estimator.estimate(
                    reverse,
                    torch.from_numpy(task.x_0),
                    seed=self.settings.seed,
                    batch_size=self.settings.batch_size,
                    context=None if task.context is None else torch.from_numpy(task.context),
                    indices=task.indices,
                )
            return task.number, result

        return evaluate


def _worker(work: _Work) -> Callable[[_Task], tuple[int, LogLikelihood]]:
    torch.set_num_threads(1)
    return work.evaluator()
