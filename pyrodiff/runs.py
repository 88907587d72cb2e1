"""Runs: folders that hold a model, how it came about, and what came of it.

config.yaml          model, data and settings, as plain values
model.safetensors    the averaged weights with the best validation bound
metrics.csv          a row for every validation
evaluation.nc        per-sample bound on the test split
samples.png          samples, and terms.png: L_t against t
checkpoints/         best.ckpt and last.ckpt, for --resume
"""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrodiff import data as datasets
from pyrodiff import plots, serialization
from pyrodiff.chains import ReverseChain
from pyrodiff.data import Affine, DataSet
from pyrodiff.likelihood import LogLikelihood, TermwiseBound
from pyrodiff.progress import progress_bar
from pyrodiff.settings import FitSettings, recipe

__all__ = ["evaluate", "fit", "sample"]

_SPLITS = ("train", "validation", "test")


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

    Raises:
        ValueError: bad settings or data, or a run that is there already (``FileExistsError``).
    """
    from pyrodiff import recipes, training

    source = {"source": data, "seed": settings.seed % 2**32, "context": context, "key": key}
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
    _silence_lightning()
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
) -> LogLikelihood:
    """Bound log p of each sample of a split; writes ``evaluation.nc`` and ``terms.png``.

    Args:
        run: the run's folder.
        data: other data than the run's own, with the same transform applied.
        split: train, validation or test.
        evaluations: network calls per sample; default the run's own setting.
        seed: of the noise.
        batch_size: samples per network call.
        quiet: show no progress.

    Raises:
        ValueError: an unknown split, or data of another kind than the run's.
        FileNotFoundError: no run there.
    """
    if split not in _SPLITS:
        raise ValueError(f"Expected split to be one of {_SPLITS}; got {split!r}.")
    folder, config = Path(run), _read(run)
    held = serialization.entry(config, "data")
    dataset = _load(held if data is None else held | {"source": data})
    if _describe(dataset) != {name: held[name] for name in _describe(dataset)}:
        raise ValueError(
            f"Expected the data that {folder} was fitted on, or data with the same transform; "
            f"got {dataset!r} with another one."
        )
    reverse = ReverseChain.load(folder)
    if evaluations is None:
        evaluations = int(serialization.entry(config, "fit")["evaluations"])
    return _evaluate(folder, reverse, dataset, split, evaluations, seed, batch_size, quiet)


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
    folder, config = Path(run), _read(run)
    held = serialization.entry(config, "data")
    reverse = ReverseChain.load(folder)
    context = _one_hot(label, held, num_samples)
    x = reverse.eval().sample(num_samples, seed=seed, batch_size=batch_size, context=context)
    path = Path(output) if output else folder / "samples.npy"
    values = _affine(held).inverse(x).numpy()
    serialization.write_atomically(path, lambda name: np.save(name, values, allow_pickle=False))
    _draw(x, held["levels_found"] is not None, path.with_suffix(".png"))
    print(f"{num_samples} samples -> {path}, {path.with_suffix('.png')}")
    return torch.as_tensor(values)


# -- parts ---------------------------------------------------------------------------------------


def _load(source: dict[str, Any]) -> DataSet:
    names = ("source", "seed", "context", "key", "levels")
    options = {name: source[name] for name in names if source.get(name) is not None}
    return datasets.load(options.pop("source"), **options)


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


def _read(run: str) -> dict[str, Any]:
    if not Path(run).is_dir():
        raise FileNotFoundError(f"Expected a run's folder; got {run!r}, which is none.")
    return serialization.read_config(Path(run) / "config.yaml")


def _prepare(folder: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make the folder ready, or refuse: a run that is there is never lost by accident."""
    path = folder / "config.yaml"
    if path.exists() and resume:
        before = serialization.read_config(path)
        for section in ("model", "data", "fit"):
            old, new = serialization.entry(before, section), config[section]
            changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            if changed:
                raise ValueError(
                    f"Expected the settings of {folder} in order to resume it; got another "
                    f"{changed[0]} ({section}): {new.get(changed[0])!r}, it has "
                    f"{old.get(changed[0])!r}."
                )
        return
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"Expected a new folder; got {folder}, which holds a run. "
            "Use --resume to go on with it, --overwrite to replace it, or another --output."
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("model.safetensors", "metrics.csv", "evaluation.nc", "terms.png", "samples.png"):
        (folder / name).unlink(missing_ok=True)
    serialization.write_config(path, config)


def _finish(
    folder: Path, reverse: ReverseChain, dataset: DataSet, settings: FitSettings, quiet: bool
) -> None:
    _evaluate(folder, reverse, dataset, "test", settings.evaluations, settings.seed, 256, quiet)
    context = None
    if dataset.test_context is not None:
        context = dataset.test_context[: settings.samples]
    count = settings.samples if context is None else len(context)
    x = reverse.sample(count, context=context, seed=settings.seed)
    reference = None if dataset.is_image else dataset.test
    _draw(x, dataset.levels is not None, folder / "samples.png", reference)


def _evaluate(
    folder: Path,
    reverse: ReverseChain,
    dataset: DataSet,
    split: str,
    evaluations: int,
    seed: int,
    batch_size: int,
    quiet: bool,
) -> LogLikelihood:
    x_0, context = getattr(dataset, split), getattr(dataset, f"{split}_context")
    offset = dataset.log_density_offset()
    with _Counter(len(x_0), reverse.event_shape.numel(), offset, quiet) as counter:
        model_units = TermwiseBound(evaluations).estimate(
            reverse, x_0, seed=seed, batch_size=batch_size, context=context, progress=counter
        )
    result = model_units + offset
    result.save(folder / "evaluation.nc", data=dataset.name, split=split, seed=seed)
    _save(plots.terms(result), folder / "terms.png")
    _report(result, dataset, split)
    return result


class _Counter:
    """A progress bar over samples with the running mean and its error."""

    def __init__(self, total: int, dimensions: int, offset: float, quiet: bool):
        self.bar = progress_bar(quiet)
        self.task = self.bar.add_task("evaluation", total=total, figures="")
        self.unit, self.offset = dimensions * float(np.log(2)), offset

    def __enter__(self) -> "_Counter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, values: Tensor) -> None:
        bits = -(values + self.offset) / self.unit
        error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else float("nan")
        figures = f"{float(bits.mean()):.3f} ± {error:.3f} bits/dim"
        self.bar.update(self.task, completed=done, figures=figures)


def _report(result: LogLikelihood, dataset: DataSet, split: str) -> None:
    from rich.console import Console
    from rich.table import Table

    nats, bits = result.mean(), result.bits_per_dim()
    table = Table(title=f"{dataset.name}, {split}: {len(result.value)} samples")
    for name in ("", "value", "± between samples", "of which Monte Carlo"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("bound on bits/dim (lower is better)", *(f"{v:.4f}" for v in bits))
    table.add_row("bound on log p (nats, higher is better)", *(f"{v:.3f}" for v in nats))
    if dataset.log_prob is not None and dataset.levels is None:
        exact = dataset.log_prob(dataset.transform.inverse(getattr(dataset, split)))
        error = float(exact.std() / len(exact) ** 0.5)
        table.add_row(
            "exact log p of the data's law", f"{float(exact.mean()):.3f}", f"{error:.3f}", ""
        )
    Console().print(table)
    print(f"{result.network_evaluations} network calls per sample; {result.kind} on log p")


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
    serialization.write_atomically(path, lambda name: axes.figure.savefig(name, dpi=120))


def _count(reverse: ReverseChain) -> int:
    return sum(p.numel() for p in reverse.parameters())


def _silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
