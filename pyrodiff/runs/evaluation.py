"""The command ``evaluate``: the likelihood of each sample of a split, saved in the run."""

from dataclasses import replace
from pathlib import Path

from pyrodiff import plots, serialization
from pyrodiff.checks import check_count
from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.runs.dataset import own_data
from pyrodiff.runs.folder import opened
from pyrodiff.runs.pictures import png
from pyrodiff.runs.respacing import default_calls
from pyrodiff.runs.settings import EvaluationSettings
from pyrodiff.runs.splits import evaluate_split
from pyrodiff.runs.summary import print_evaluation

__all__ = ["evaluate", "evaluate_dataset"]


def evaluate(
    run: str,
    data: str | None = None,
    split: str = "test",
    calls: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    quiet: bool = False,
    *,
    estimator: str = "termwise",
    std_error: float | None = None,
    particles: int | None = None,
    limit: int | None = None,
    processes: int = 1,
    resume: bool = False,
    evaluations: int | None = None,
    steps: int | None = None,
    variance: str | None = None,
    grid: str | None = None,
    probes: int | None = None,
    rank: int | None = None,
) -> LogLikelihood:
    """log p of each sample of a split; writes ``evaluation.nc`` and, with terms, ``terms.png``.

    Args:
        run: the run's folder.
        data: other data than the run's own, to which the same transform is applied.
        split, calls, seed, batch_size, estimator, std_error, particles, limit: see
            ``EvaluationSettings``.
        quiet: show no progress.
        processes: worker processes among which batches are shared.  They import the main module
            anew, so a script that asks for them keeps its work under ``__name__ == "__main__"``.
        resume: go on with the finished batches of an interrupted evaluation.
        evaluations: the former name of ``calls``.
        steps, variance, grid, probes, rank: see ``ChainSettings``.

    Raises:
        ValueError: unknown names, numbers out of range, options of another estimator, a chain
            that the run's network cannot serve, data of another kind than the run's; with
            ``resume``, other settings than the batches'.
        FileNotFoundError: no run there.
        ChildProcessError: a worker that died; finished batches are kept.
        BlockingIOError: another command writes to the run.
    """
    if calls is not None and evaluations is not None:
        raise ValueError("Expected calls once; got it as evaluations, its former name, too.")
    settings = EvaluationSettings(
        estimator=estimator,
        calls=evaluations if calls is None else calls,
        std_error=std_error,
        particles=particles,
        split=split,
        seed=seed,
        batch_size=batch_size,
        limit=limit,
        steps=steps,
        variance=variance,
        grid=grid,
        probes=probes,
        rank=rank,
    )
    check_count("processes", processes)
    with opened(run) as (folder, config):
        dataset = own_data(folder, serialization.entry(config, "data"), data)
        if estimator == "termwise" and settings.calls is None and std_error is None:
            settings = replace(settings, calls=default_calls(config, settings, dataset.dimensions))
        return evaluate_dataset(
            folder, dataset, settings, resume=resume, processes=processes, quiet=quiet
        )


def evaluate_dataset(
    folder: Path,
    dataset: DataSet,
    settings: EvaluationSettings,
    *,
    resume: bool = False,
    processes: int = 1,
    quiet: bool = False,
) -> LogLikelihood:
    """See ``splits.evaluate_split``; draws the terms and prints a summary, too."""
    result = evaluate_split(
        folder, dataset, settings, resume=resume, processes=processes, quiet=quiet
    )
    if result.terms is not None:
        serialization.write_bytes(folder / "terms.png", png(plots.terms(result)))
    print_evaluation(result, dataset, settings)
    return result
