"""The command ``add-variance``: a run with a learned variance, from one without.

The new run is like any other, of the same data and with the same mean; its configuration says what
it was made from.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pyrodiff import serialization, training
from pyrodiff.chains import ReverseChain
from pyrodiff.runs.build import load_model
from pyrodiff.runs.dataset import own_data
from pyrodiff.runs.evaluation import evaluate_dataset
from pyrodiff.runs.fitting import draw_samples
from pyrodiff.runs.folder import check_folder, prepare_folder, read_run, say_if_unsealed
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, read_settings
from pyrodiff.runs.splits import model_checksum
from pyrodiff.runs.terminal import say
from pyrodiff.runs.variance_settings import VarianceSettings
from pyrodiff.serialization.folders import locked

__all__ = ["add_variance"]


def add_variance(
    settings: VarianceSettings,
    run: str,
    output: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Train a learned variance for the network of a run, and write a new run; returns its folder.

    The mean stays what it is, bit for bit, and the run is not written to.

    Args:
        settings: of the variance and its training.
        run: the run's folder.
        output: the new run's folder; default: the run's, with ``-variance`` added.
        resume: go on from the last checkpoint, if there is one.
        overwrite: replace an existing run.  Files that pyrodiff did not write always stay.
        quiet: show no progress.

    Raises:
        ValueError: a run whose network predicts a variance already, or the mean of its own chain's
            steps; with ``resume``, other settings than the new run's.
        FileNotFoundError: no run there.
        FileExistsError: an existing run, or a folder that holds no run.
        BlockingIOError: another command writes to the folder.
    """
    source, config = Path(run), read_run(run)
    folder = Path(output) if output else source.with_name(f"{source.resolve().name}-variance")
    if folder.resolve() == source.resolve():
        raise ValueError(f"Expected another --output than the run itself; got {folder}.")
    check_folder(folder, resume, overwrite)  # before any long work
    say_if_unsealed(run, config)
    reverse = load_model(source)
    learned = training.with_variance_head(reverse, settings.width, seed=settings.seed)
    dataset = own_data(source, serialization.entry(config, "data"))
    fitted = replace(
        read_settings(FitSettings, serialization.entry(config, "fit")), variance="learned-posterior"
    )
    with locked(folder):
        new = _configuration(learned, config, fitted, settings, source)
        prepare_folder(folder, new, resume, overwrite)
        say(f"{dataset!r}, a variance for {source} -> {folder}")
        learned = training.fit_variance(
            reverse,
            dataset,
            settings,
            folder,
            target=settings.target,
            width=settings.width,
            num_steps=settings.num_steps,
            resume=resume,
            progress=not quiet,
        )
        serialization.write_weights(folder / "model.safetensors", learned.state_dict())
        evaluation = EvaluationSettings(calls=fitted.calls, seed=fitted.seed)
        evaluate_dataset(folder, dataset, evaluation, quiet=quiet)
        draw_samples(folder, learned, dataset, fitted)
    return folder


def _configuration(
    learned: ReverseChain,
    config: dict[str, Any],
    fitted: FitSettings,
    settings: VarianceSettings,
    source: Path,
) -> dict[str, Any]:
    """The new run's: the model, the data as they were, and what was done to the run before."""
    weights = (source / "model.safetensors").read_bytes()
    before = {
        "run": source.resolve().name,
        "model": model_checksum(source / "config.yaml", weights),
    }
    return {
        "model": learned.config(),
        "data": serialization.entry(config, "data"),
        "fit": fitted.to_dict(),
        "variance": before | settings.to_dict(),
    }
