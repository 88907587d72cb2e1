"""The commands ``fit``, ``evaluate`` and ``sample``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff import data as datasets
from pyrodiff import plots, serialization
from pyrodiff.chains import ReverseChain
from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.runs import folder as run_folder
from pyrodiff.runs import samples as run_samples
from pyrodiff.runs.evaluation import evaluate_split
from pyrodiff.runs.folder import opened, read_run
from pyrodiff.runs.pictures import png, samples_png
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, recipe
from pyrodiff.runs.terminal import print_evaluation
from pyrodiff.serialization.folders import locked
from pyrodiff.training.progress import say

__all__ = ["evaluate", "fit", "own_data", "read_run", "sample"]


def fit(
    settings: FitSettings,
    data: str,
    output: str | None = None,
    context: str | None = None,
    key: str | None = None,
    levels: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    *,
    data_seed: int | None = None,
) -> Path:
    """Train a model, evaluate it on the test split, draw samples; returns the run's folder.

    Args:
        settings: what is None in them is chosen for the data.
        data: a name or a path (``pyrodiff.data.load``).
        output: the run's folder; default ``runs/`` and the data's name.
        context, key, levels: see ``pyrodiff.data.load``.
        resume: go on from the last checkpoint, where there is one.
        overwrite: replace a run that is there.  What pyrodiff did not write stays in any case.
        quiet: show no progress.
        data_seed: of the split, and of data that are drawn; default the settings' seed.  Runs that
            differ in their training seed can be compared where this is the same.

    Raises:
        ValueError: bad settings or data, other settings than those of the run to go on with.
        FileExistsError: a run that is there already, or a folder of somebody else's.
        BlockingIOError: another command writes to the folder.
    """
    from pyrodiff import training
    from pyrodiff.runs import build as recipes

    split = settings.seed % 2**32 if data_seed is None else data_seed
    source = {"source": data, "seed": split, "context": context, "key": key}
    folder = Path(output) if output else Path("runs") / Path(data).name.split(".")[0]
    run_folder.check(folder, resume, overwrite)  # before any long work
    dataset = _load(source | {"levels": levels})
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    torch.manual_seed(settings.seed)
    contexts = dataset.train_context
    reverse = recipes.make_model(
        settings,
        dataset.event_shape,
        dataset.levels,
        context_size=0 if contexts is None else contexts[0].numel(),
    )
    config = {
        "model": reverse.config(),
        "data": source | {"levels": levels} | _describe(dataset),
        "fit": settings.to_dict(),
    }
    with locked(folder):
        run_folder.prepare(folder, config, resume, overwrite)
        say(f"{dataset!r}, {_count(reverse):,} parameters -> {folder}")
        objective, bar = recipes.make_objective(settings), not quiet
        training.fit(reverse, objective, dataset, settings, folder, resume=resume, progress=bar)
        serialization.write_weights(folder / "model.safetensors", reverse.state_dict())
        _finish(folder, reverse, dataset, settings, quiet)
    return folder


def evaluate(
    run: str,
    data: str | None = None,
    split: str = "test",
    evaluations: int | None = None,
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
) -> LogLikelihood:
    """log p of each sample of a split; writes ``evaluation.nc`` and, with terms, ``terms.png``.

    Args:
        run: the run's folder.
        data: other data than the run's own, with the same transform applied.
        split, evaluations, seed, batch_size, estimator, std_error, particles, limit: see
            ``EvaluationSettings``.
        quiet: show no progress.
        processes: worker processes that batches are shared out to.  They import the main module
            anew, so a script that asks for them keeps its work under ``__name__ == "__main__"``.
        resume: go on with the finished batches of an evaluation that was interrupted.

    Raises:
        ValueError: unknown names, numbers out of range, options of another estimator, data of
            another kind than the run's, other settings than those of the batches to go on with.
        FileNotFoundError: no run there.
        ChildProcessError: a worker that died; finished batches are kept.
        BlockingIOError: another command writes to the run, another evaluation of it say.
    """
    settings = EvaluationSettings(
        estimator, evaluations, std_error, particles, split, seed, batch_size, limit
    )
    if processes < 1:
        raise ValueError(f"Expected processes >= 1; got {processes}.")
    with opened(run) as (folder, config):
        dataset = own_data(folder, serialization.entry(config, "data"), data)
        if estimator == "termwise" and evaluations is None and std_error is None:
            own = int(serialization.entry(config, "fit")["evaluations"])
            settings = replace(settings, evaluations=own)
        return _evaluate(folder, dataset, settings, resume, processes, quiet)


def sample(
    run: str,
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    label: int | None = None,
    output: str | None = None,
) -> Tensor:
    """Draw samples, in the units of the data as given; writes a ``.npy`` file and a picture.

    Args:
        run: the run's folder.
        num_samples: how many.
        seed: of the noise; sample i depends on (seed, i) alone.
        batch_size: samples per network call.
        label: the class of all of them, where the run is conditioned on classes.
        output: the ``.npy`` file, default ``samples.npy`` in the run; the picture lies beside it.
            A file there is replaced where an earlier call wrote it, and no other.

    Raises:
        ValueError: a label missing, superfluous or out of range; an output of another kind.
        FileNotFoundError: no run there.
        FileExistsError: a file in the output's place that was not written here.
        BlockingIOError: another command writes to the run.
    """
    options = (num_samples, seed, batch_size, label)
    if output is None or Path(output).resolve() == (Path(run) / "samples.npy").resolve():
        with opened(run) as (folder, config):
            return run_samples.draw(folder, config, folder / "samples.npy", *options)
    run_samples.check_output(Path(output))
    config = read_run(run)
    run_folder.say_if_unsealed(run, config)
    return run_samples.draw(Path(run), config, Path(output), *options)


# -- parts ---------------------------------------------------------------------------------------


def _load(source: dict[str, Any]) -> DataSet:
    names = ("source", "seed", "context", "key", "levels")
    options = {name: source[name] for name in names if source.get(name) is not None}
    return datasets.load(options.pop("source"), **options)


def own_data(folder: Path, held: dict[str, Any], data: str | None = None) -> DataSet:
    """A run's data, or others with its transform."""
    dataset = _load(held if data is None else held | {"source": data})
    if _describe(dataset) != {name: held[name] for name in _describe(dataset)}:
        raise ValueError(
            f"Expected the data that {folder} was fitted on, or data with the same transform; "
            f"got {dataset!r} with another one."
        )
    return dataset


def _describe(dataset: DataSet) -> dict[str, Any]:
    """What must be kept of the data to read samples and judge likelihoods without them."""
    context = dataset.train_context
    return {
        "levels_found": dataset.levels,
        "shift": dataset.transform.shift.tolist(),
        "scale": dataset.transform.scale.tolist(),
        "context_shape": None if context is None else list(context.shape[1:]),
    }


def _finish(
    folder: Path, reverse: ReverseChain, dataset: DataSet, settings: FitSettings, quiet: bool
) -> None:
    evaluation = EvaluationSettings(evaluations=settings.evaluations, seed=settings.seed)
    _evaluate(folder, dataset, evaluation, quiet=quiet)
    context = None
    if dataset.test_context is not None:
        context = dataset.test_context[: settings.samples]
    count = settings.samples if context is None else len(context)
    x = reverse.sample(count, context=context, seed=settings.seed)
    reference = None if dataset.is_image else dataset.test
    picture = samples_png(x, dataset.levels is not None, reference)
    serialization.write_bytes(folder / "samples.png", picture)


def _evaluate(
    folder: Path,
    dataset: DataSet,
    settings: EvaluationSettings,
    resume: bool = False,
    processes: int = 1,
    quiet: bool = False,
) -> LogLikelihood:
    result = evaluate_split(
        folder, dataset, settings, resume=resume, processes=processes, quiet=quiet
    )
    if result.terms is not None:
        serialization.write_bytes(folder / "terms.png", png(plots.terms(result)))
    print_evaluation(result, dataset, settings)
    return result


def _count(reverse: ReverseChain) -> int:
    return sum(p.numel() for p in reverse.parameters())
