"""Runs: folders that hold a model, how it came about, and what came of it.

config.yaml          model, data and settings, as plain values
model.safetensors    the averaged weights with the best validation bound
metrics.csv          a row for every validation
evaluation.nc        per-sample bound on the test split
samples.png          samples, and terms.png: L_t against t
checkpoints/         best.ckpt and last.ckpt, for fit --resume
evaluation/          finished batches of evaluations under way, for evaluate --resume
"""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrodiff import data as datasets
from pyrodiff import plots, serialization
from pyrodiff.chains import ReverseChain
from pyrodiff.data import Affine, DataSet
from pyrodiff.evaluation import evaluate_split, load_model
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.reports import print_evaluation
from pyrodiff.settings import EvaluationSettings, FitSettings, check_unchanged, recipe

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
        overwrite: replace a run that is there.
        quiet: show no progress.
        data_seed: of the split, and of data that are drawn; default the settings' seed.  Runs that
            differ in their training seed can be compared where this is the same.

    Raises:
        ValueError: bad settings or data, or a run that is there already (``FileExistsError``).
    """
    from pyrodiff import recipes, training

    split = settings.seed % 2**32 if data_seed is None else data_seed
    source = {"source": data, "seed": split, "context": context, "key": key}
    dataset = _load(source | {"levels": levels})
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    folder = Path(output) if output else Path("runs") / Path(data).name.split(".")[0]
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
    _prepare(folder, config, resume, overwrite)
    print(f"{dataset!r}, {_count(reverse):,} parameters -> {folder}")
    objective = recipes.make_objective(settings)
    training.fit(reverse, objective, dataset, settings, folder, resume=resume, progress=not quiet)
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
    """
    settings = EvaluationSettings(
        estimator, evaluations, std_error, particles, split, seed, batch_size, limit
    )
    if processes < 1:
        raise ValueError(f"Expected processes >= 1; got {processes}.")
    folder, config = Path(run), read_run(run)
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

    Raises:
        ValueError: a label missing, superfluous or out of range.
        FileNotFoundError: no run there.
    """
    folder, config = Path(run), read_run(run)
    held = serialization.entry(config, "data")
    reverse = load_model(folder)
    context = _one_hot(label, held, num_samples)
    x = reverse.sample(num_samples, seed=seed, batch_size=batch_size, context=context)
    path = Path(output) if output else folder / "samples.npy"
    values = _affine(held).inverse(x).numpy()
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    serialization.write_bytes(path, content.getvalue())
    _draw(x, held["levels_found"] is not None, path.with_suffix(".png"))
    print(f"{num_samples} samples -> {path}, {path.with_suffix('.png')}")
    return torch.as_tensor(values)


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


def _affine(held: dict[str, Any]) -> Affine:
    shift, scale = (torch.tensor(held[name], dtype=torch.float64) for name in ("shift", "scale"))
    return Affine(shift, scale)


def read_run(run: str) -> dict[str, Any]:
    """A run's configuration."""
    if not Path(run).is_dir():
        raise FileNotFoundError(f"Expected a run's folder; got {run!r}, which is none.")
    return serialization.read_config(Path(run) / "config.yaml")


def _prepare(folder: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make the folder ready, or refuse: a run that is there is never lost by accident."""
    path = folder / "config.yaml"
    if path.exists() and resume:
        before = serialization.read_config(path)
        for section in ("model", "data", "fit"):
            check_unchanged(folder, serialization.entry(before, section), config[section])
        return
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"Expected a new folder; got {folder}, which holds a run. "
            "Use --resume to go on with it, --overwrite to replace it, or another --output."
        )
    for name in ("checkpoints", "evaluation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("model.safetensors", "metrics.csv", "evaluation.nc", "terms.png", "samples.png"):
        (folder / name).unlink(missing_ok=True)
    serialization.write_config(path, config)


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
    _draw(x, dataset.levels is not None, folder / "samples.png", reference)


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
        _save(plots.terms(result), folder / "terms.png")
    print_evaluation(result, dataset, settings)
    return result


def _one_hot(label: int | None, held: dict[str, Any], num_samples: int) -> Tensor | None:
    shape = held.get("context_shape")
    if (label is None) != (shape is None):
        got = "none" if label is None else f"label {label}"
        expected = "no label (the run is unconditional)" if shape is None else "a label"
        raise ValueError(f"Expected {expected}; got {got}.")
    if label is None or shape is None:
        return None
    if len(shape) != 1 or not 0 <= label < shape[0]:
        raise ValueError(f"Expected a label from 0 to {shape[0] - 1}; got {label}.")
    return torch.eye(shape[0])[label].expand(num_samples, -1)


def _draw(x: Tensor, discrete: bool, path: Path, reference: Tensor | None = None) -> None:
    if x.dim() == 4 and x.shape[1] in (1, 3):
        low, high = (-1.0, 1.0) if discrete else (float(x.min()), float(x.max()) + 1e-6)
        _save(plots.samples_grid(x, low=low, high=high), path)
    else:
        _save(plots.samples_scatter(x, reference), path)


def _save(axes: Any, path: Path) -> None:
    content = io.BytesIO()
    axes.figure.savefig(content, format="png", dpi=120)
    serialization.write_bytes(path, content.getvalue())


def _count(reverse: ReverseChain) -> int:
    return sum(p.numel() for p in reverse.parameters())
