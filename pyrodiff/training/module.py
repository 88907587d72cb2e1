"""Training with Lightning: ``DiffusionModule`` for any trainer, ``fit`` for a whole run.

Step k's batch is a function of (seed, k), and its timesteps, noise and dropout are functions of
(seed, k, micro-batch, rank).  So a run that was killed goes on from its last checkpoint as if
nothing had happened, and what is added up to one gradient is independent.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import reason
from pyrodiff.data import DataSet
from pyrodiff.likelihood import TermwiseBound
from pyrodiff.objectives import Objective, VariationalBound
from pyrodiff.runs.settings import FitSettings
from pyrodiff.streams import derived_seed
from pyrodiff.training.callbacks import METRIC, Progress, Validations, averaging
from pyrodiff.training.checkpoints import (
    BEST,
    LAST,
    PREVIOUS,
    DurableCheckpoints,
    first_sound,
    read_checkpoint,
)
from pyrodiff.training.signals import Terminated, stoppable

__all__ = ["DiffusionModule", "SeededBatches", "fit"]

_STEP, _PASS = 0, 1
_RANKS = 2**32  # indices of validation samples per rank, at most


class SeededBatches:
    """Batches of indices for training: pass p over the data is a permutation of (seed, p).

    An epoch is ``length`` batches, whatever the size of the data; epoch e starts at step
    e · ``length``.  Within a pass every sample comes at most once; what is left of a pass after its
    last whole batch comes first in no other (it is drawn anew).

    Args:
        size: samples.
        batch_size: at most ``size`` are taken.
        length: batches per epoch.
        seed: of the permutations.
    """

    def __init__(self, size: int, batch_size: int, length: int, seed: int):
        self.size, self.batch_size = size, min(batch_size, size)
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        per_pass = self.size // self.batch_size
        current, order = -1, []
        for step in range(self.epoch * self.length, (self.epoch + 1) * self.length):
            number, place = divmod(step, per_pass)
            if number != current:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, _PASS, number))
                order = torch.randperm(self.size, generator=generator).tolist()
                current = number
            yield order[place * self.batch_size : (place + 1) * self.batch_size]


class DiffusionModule(lightning.LightningModule):
    """A reverse chain and an objective as a ``LightningModule``.

    Batches are lists [x_0] or [x_0, context].  A loss is per dimension: of a bound, in bits and for
    the units of the data as given; of any other objective, as the objective has it.

    Args:
        reverse: the model.
        objective: what to minimise.
        settings: the optimizer's part is read: steps, learning rate, decay, evaluations, seed.
        offset: nats to add to a log-likelihood for the units of the data as given.

    Attributes:
        loss_name: ``training_bits_per_dim`` for a bound, else ``training_loss_per_dim``.
        running_loss: an exponential moving average of the loss over some hundred batches.
        validated: the bound of each sample of this validation so far, nats, in units of the model.
    """

    def __init__(
        self,
        reverse: ReverseChain,
        objective: Objective,
        settings: FitSettings,
        offset: float = 0.0,
    ):
        super().__init__()
        self.reverse = reverse
        self.objective = objective
        if isinstance(objective.timesteps, nn.Module):
            self.rule = objective.timesteps  # its history belongs into checkpoints
        self.settings = settings
        self.offset = offset
        is_bound = isinstance(objective, VariationalBound)
        self.loss_name = "training_bits_per_dim" if is_bound else "training_loss_per_dim"
        self._unit = math.log(2) if is_bound else 1.0
        self._shift = offset / reverse.event_shape.numel() if is_bound else 0.0
        self._loss = self.running_loss = math.nan
        self.validated: list[Tensor] = []
        self.steps_done = 0  # by this process

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        words = self.global_step, micro_batch, self.global_rank
        torch.manual_seed(derived_seed(self.settings.seed, _STEP, *words))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x_0, context = _unpack(batch)
        chain = self.reverse.forward_chain
        loss = self.objective.differentiable_loss(self.reverse, chain, x_0, context)
        loss = loss / (x_0.numel() * self._unit)
        self._loss = float(loss.detach()) - self._shift / self._unit
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps_done += 1
        if not math.isfinite(self._loss):
            raise ValueError(
                f"Expected a finite loss; got {self._loss} at step {self.global_step}. "
                "A lower learning rate or gradient_clip may help."
            )
        before = self._loss if math.isnan(self.running_loss) else self.running_loss
        self.running_loss = 0.99 * before + 0.01 * self._loss

    def on_validation_epoch_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x_0, context = _unpack(batch)
        first = self.global_rank * _RANKS + sum(map(len, self.validated))
        bound = TermwiseBound(self.settings.validation_evaluations).estimate(
            self.reverse,
            x_0,
            seed=self.settings.seed,
            context=context,
            indices=range(first, first + len(x_0)),
        )
        self.validated.append(bound.value)
        mean = between = math.nan  # of a model that is not finite everywhere: never the best
        if bool(bound.value.isfinite().all()):
            mean, between, _ = (bound + self.offset).bits_per_dim()
        values = {METRIC: mean, "validation_std_error": between}
        self.log_dict(values, batch_size=len(x_0))

    def validation_losses(self) -> Tensor:
        """The last validation's bound of each sample, bits per dimension, shape (N,)."""
        nats = torch.cat(self.validated) + self.offset
        return -nats / (self.reverse.event_shape.numel() * math.log(2))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["running_loss"] = self.running_loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.running_loss = float(checkpoint["running_loss"])

    def configure_optimizers(self) -> Any:
        settings = self.settings
        assert settings.steps and settings.learning_rate is not None
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}]
        groups.append({"params": others, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay or 0.0,
        )
        total = settings.steps
        warm_up = max(1, total // 10)

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            done = min(1.0, (step - warm_up) / max(1, total - warm_up))
            return 0.001 + 0.4995 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _unpack(batch: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return batch[0], (batch[1] if len(batch) > 1 else None)


def _loader(x: Tensor, context: Tensor | None, **options: Any) -> DataLoader[Any]:
    tensors = (x,) if context is None else (x, context)
    return DataLoader(
        TensorDataset(*tensors), collate_fn=torch.utils.data.default_collate, **options
    )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Lightning's lines on devices, loaders and other machines are left out."""
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


@_without_advice()
def fit(
    reverse: ReverseChain,
    objective: Objective,
    data: DataSet,
    settings: FitSettings,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> ReverseChain:
    """Train ``reverse`` in place and return it with the best averaged weights.

    Writes ``metrics.csv`` and ``checkpoints/`` into ``folder`` after every validation.  SIGTERM and
    SIGINT end it at once (``signals.Terminated``, ``KeyboardInterrupt``) and lose what came after
    the last validation, which ``resume`` makes again.

    Args:
        reverse: the model.
        objective: what to minimise.
        data: its train split is learned from, its validation split judged on.
        settings: complete settings (``settings.recipe``).
        folder: the run; without ``resume``, the checkpoints of an earlier one are removed.
        resume: go on from the newest sound checkpoint where there is one; others are warned of.
        progress: show a bar.

    Raises:
        ValueError: settings that are not complete, data that the model cannot explain (before any
            work), checkpoints none of which is sound and of this model, a loss that is not finite,
            no finite validation bound.
    """
    needed = ("steps", "batch_size", "learning_rate", "weight_decay")
    if missing := [name for name in needed if getattr(settings, name) is None]:
        raise ValueError(
            f"Expected settings with {', '.join(missing)} (settings.recipe gives them); got None."
        )
    reverse.check_data(data.train, data.train_context)
    reverse.check_data(data.validation, data.validation_context)
    objective.check_model(reverse)
    folder = Path(folder)
    module = DiffusionModule(reverse, objective, settings, data.log_density_offset())
    checkpoints, state = folder / "checkpoints", module.state_dict()
    start = first_sound(checkpoints, (LAST, PREVIOUS, BEST), state) if resume else None
    if start is None:
        for name in (LAST, PREVIOUS, BEST):  # of another training: nobody is to go on from them
            (checkpoints / name).unlink(missing_ok=True)
    with torch.random.fork_rng(), stoppable():
        _train(module, data, settings, folder, start, progress)
    if not (checkpoints / BEST).exists():
        raise ValueError("Expected a finite bound in one validation at least; got none.")
    best = first_sound(checkpoints, (BEST, LAST, PREVIOUS), state)
    assert best is not None
    module.load_state_dict(read_checkpoint(best)["state_dict"])
    reverse.eval()
    return reverse


def _train(
    module: DiffusionModule,
    data: DataSet,
    settings: FitSettings,
    folder: Path,
    start: Path | None,
    progress: bool,
) -> None:
    """Train to the end, from the checkpoint ``start`` where there is one."""
    assert settings.steps and settings.batch_size
    # Lightning resumes whole epochs exactly: an epoch here is the steps between two validations.
    epochs = math.ceil(settings.steps / settings.validate_every)
    length = math.ceil(settings.steps / epochs)
    batches = SeededBatches(len(data.train), settings.batch_size, length, settings.seed)
    validations = Validations(folder, settings.patience)
    callbacks: list[Callback] = [averaging(settings.ema_decay), validations]
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
    with _signals_as_exceptions(), _blamed(start, module):
        trainer.fit(
            module,
            _loader(data.train, data.train_context, batch_sampler=batches),
            _loader(data.validation, data.validation_context, batch_size=len(data.validation)),
            ckpt_path=None if start is None else str(start),
            weights_only=True,
        )


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Lightning answers SIGINT by the status 1 and SIGTERM by 0: make them exceptions again."""
    try:
        yield
    except SystemExit as end:
        cause = end.__context__
        raise (cause if isinstance(cause, KeyboardInterrupt) else Terminated()) from None


@contextlib.contextmanager
def _blamed(start: Path | None, module: DiffusionModule) -> Iterator[None]:
    """Errors before the first step of a resumed run is done are the checkpoint's."""
    try:
        yield
    except Exception as error:
        if start is None or module.steps_done or isinstance(error, OSError):
            raise
        got = f"{type(error).__name__}: {reason(error)}"
        raise ValueError(f"Expected a checkpoint of this run in {start}; got {got}") from error
