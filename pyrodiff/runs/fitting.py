"""The command ``fit``: train a model, evaluate it, draw samples; a run is what remains."""

from pathlib import Path

import torch

from pyrodiff import serialization, training
from pyrodiff.chains import ReverseChain
from pyrodiff.data import DataSet
from pyrodiff.runs.build import make_model, make_objective
from pyrodiff.runs.dataset import describe, load_source
from pyrodiff.runs.evaluation import evaluate_dataset
from pyrodiff.runs.folder import check_folder, prepare_folder
from pyrodiff.runs.pictures import samples_png
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, recipe
from pyrodiff.runs.terminal import say
from pyrodiff.serialization.folders import locked

__all__ = ["draw_samples", "fit"]


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
        settings: those that are None are chosen for the data.
        data: a name or a path (``pyrodiff.data.load``).
        output: the run's folder; default: ``runs/`` and the name of the data.
        context, key, levels: see ``pyrodiff.data.load``.
        resume: go on from the last checkpoint, if there is one.
        overwrite: replace an existing run.  Files that pyrodiff did not write always stay.
        quiet: show no progress.
        data_seed: of the split, and of data that are drawn; default: the settings' seed.  Runs that
            differ in their training seed can be compared if this is the same.

    Raises:
        ValueError: bad settings or data; with ``resume``, other settings than the run's.
        FileExistsError: an existing run, or a folder that holds no run.
        BlockingIOError: another command writes to the folder.
    """
    split = settings.seed % 2**32 if data_seed is None else data_seed
    source = {"source": data, "seed": split, "context": context, "key": key, "levels": levels}
    folder = Path(output) if output else Path("runs") / Path(data).name.split(".")[0]
    check_folder(folder, resume, overwrite)  # before any long work
    dataset = load_source(source)
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    reverse = _fresh_model(settings, dataset)
    config = {
        "model": reverse.config(),
        "data": source | describe(dataset),
        "fit": settings.to_dict(),
    }
    with locked(folder):
        prepare_folder(folder, config, resume, overwrite)
        count = sum(p.numel() for p in reverse.parameters())
        say(f"{dataset!r}, {count:,} parameters -> {folder}")
        objective, bar = make_objective(settings), not quiet
        training.fit(reverse, objective, dataset, settings, folder, resume=resume, progress=bar)
        serialization.write_weights(folder / "model.safetensors", reverse.state_dict())
        evaluation = EvaluationSettings(calls=settings.calls, seed=settings.seed)
        evaluate_dataset(folder, dataset, evaluation, quiet=quiet)
        draw_samples(folder, reverse, dataset, settings)
    return folder


def _fresh_model(settings: FitSettings, dataset: DataSet) -> ReverseChain:
    torch.manual_seed(settings.seed)
    contexts = dataset.train_context
    size = 0 if contexts is None else contexts[0].numel()
    return make_model(settings, dataset.event_shape, dataset.levels, context_size=size)


def draw_samples(
    folder: Path, reverse: ReverseChain, dataset: DataSet, settings: FitSettings
) -> None:
    """Write the picture of samples, with the contexts of the test split.

    Args:
        folder: of the run.
        reverse: its model.
        dataset: its data.
        settings: how many samples, and the seed of their noise.
    """
    count, context = settings.samples, dataset.test_context
    if context is not None:
        context = context[:count]
        count = len(context)
    x = reverse.sample(count, context=context, seed=settings.seed)
    reference = None if dataset.is_image else dataset.test
    picture = samples_png(x, dataset.levels is not None, reference)
    serialization.write_bytes(folder / "samples.png", picture)
