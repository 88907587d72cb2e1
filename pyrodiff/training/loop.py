"""A whole training: from fresh weights, or a checkpoint, to the best averaged weights.

Lightning resumes whole epochs exactly; an epoch here is the steps between two validations.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import reason
from pyrodiff.data import DataSet
from pyrodiff.objectives import Objective
from pyrodiff.training.averaging import averaging
from pyrodiff.training.batches import SeededData
from pyrodiff.training.checkpoints import (
    BEST,
    LAST,
    PREVIOUS,
    DurableCheckpoints,
    first_sound,
    read_checkpoint,
)
from pyrodiff.training.module import DiffusionModule
from pyrodiff.training.progress import Progress
from pyrodiff.training.settings import HoldsTraining, TrainingSettings, training_settings
from pyrodiff.training.signals import Terminated, stoppable
from pyrodiff.training.validations import Validations

__all__ = ["fit", "without_advice"]


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Within, Lightning gives no advice on devices, loaders and clusters."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@without_advice()
def fit(
    reverse: ReverseChain,
    objective: Objective,
    data: DataSet,
    settings: TrainingSettings | HoldsTraining,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> ReverseChain:
    """Train ``reverse`` in place and return it with the best averaged weights.

    Writes ``metrics.csv`` and ``checkpoints/`` into ``folder`` after every validation.  SIGTERM and
    SIGINT end it at once (``signals.Terminated``, ``KeyboardInterrupt``) and lose what came after
    the last validation; with ``resume`` those steps are done again.

    Args:
        reverse: the model.
        objective: what to minimise.
        data: its train split is learned from, its validation split judged on.
        settings: of the training; or of more, in which they are complete.
        folder: of the run; without ``resume``, the checkpoints of an earlier training are removed.
        resume: go on from the newest sound checkpoint if there is one; warns of the others.
        progress: show a bar.

    Raises:
        ValueError: settings that are not complete, data that the model cannot explain (before any
            work), checkpoints none of which is sound and of this model, a loss that is not finite,
            no finite validation bound.
    """
    complete = training_settings(settings)
    reverse.check_data(data.train, data.train_context)
    reverse.check_data(data.validation, data.validation_context)
    objective.check_model(reverse)
    folder = Path(folder)
    module = DiffusionModule(reverse, objective, complete, data.log_density_offset())
    state = module.state_dict()
    start = _start(folder / "checkpoints", state, resume)
    with torch.random.fork_rng(), stoppable():
        _train(module, data, folder, start, progress)
    module.load_state_dict(_best(folder / "checkpoints", state))
    reverse.eval()
    return reverse


def _start(checkpoints: Path, state: dict[str, Tensor], resume: bool) -> Path | None:
    """The checkpoint to go on from; where there is none, those of another training are removed."""
    if resume and (start := first_sound(checkpoints, (LAST, PREVIOUS, BEST), state)) is not None:
        return start
    for name in (LAST, PREVIOUS, BEST):
        (checkpoints / name).unlink(missing_ok=True)
    return None


def _best(checkpoints: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the module with the best averaged weights."""
    if not (checkpoints / BEST).exists():
        raise ValueError("Expected a finite bound in one validation at least; got none.")
    best = first_sound(checkpoints, (BEST, LAST, PREVIOUS), state)
    assert best is not None
    return read_checkpoint(best)["state_dict"]


def _train(
    module: DiffusionModule, data: DataSet, folder: Path, start: Path | None, progress: bool
) -> None:
    """Train to the end, from the checkpoint ``start`` where there is one."""
    settings = module.settings
    epochs = math.ceil(settings.steps / settings.validate_every)
    length = math.ceil(settings.steps / epochs)
    batches = SeededData(data, batch_size=settings.batch_size, length=length, seed=settings.seed)
    callbacks: list[Callback] = [averaging(settings.ema_decay)]
    callbacks.append(Validations(folder, settings.patience))
    if progress:
        callbacks.append(Progress(epochs * length))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=settings.gradient_clip,
        callbacks=callbacks,
        plugins=[DurableCheckpoints(), LightningEnvironment()],  # no cluster resumes it by itself
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        devices=1,
        default_root_dir=str(folder),
    )
    checkpoint = None if start is None else str(start)
    with _signals_as_exceptions(), _errors_name_checkpoint(start, module):
        trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Lightning answers SIGINT and SIGTERM by ``SystemExit``: raise their own exceptions."""
    try:
        yield
    except SystemExit as end:
        cause = end.__context__
        raise (cause if isinstance(cause, KeyboardInterrupt) else Terminated()) from None


@contextlib.contextmanager
def _errors_name_checkpoint(start: Path | None, module: DiffusionModule) -> Iterator[None]:
    """Attribute errors before the first step of a resumed run to its checkpoint."""
    try:
        yield
    except Exception as error:
        if start is None or module.steps_done or isinstance(error, OSError):
            raise
        got = f"{type(error).__name__}: {reason(error)}"
        raise ValueError(f"Expected a checkpoint of this run in {start}; got {got}") from error
