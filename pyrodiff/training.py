"""Training with Lightning: ``DiffusionModule`` for any trainer, ``fit`` for a whole run.

A run is a folder.  Step k's batch, timesteps, noise and dropout are functions of (seed, k), so a
run that was killed goes on from its last checkpoint as if nothing had happened.  Checkpoints are
read as tensors and plain values only.
"""

import contextlib
import csv
import io
import logging
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyrodiff.chains import ReverseChain
from pyrodiff.data import DataSet
from pyrodiff.likelihood import TermwiseBound
from pyrodiff.objectives import Objective
from pyrodiff.progress import progress_bar
from pyrodiff.serialization import write_atomically
from pyrodiff.settings import FitSettings
from pyrodiff.streams import derived_seed

__all__ = ["DiffusionModule", "SeededBatches", "fit"]

METRIC = "validation_bits_per_dim"


_STEP, _PASS = 0, 1


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

    Batches are lists [x_0] or [x_0, context].

    Args:
        reverse: the model.
        objective: what to minimise.
        settings: the optimizer's part is read: steps, learning rate, decay, evaluations, seed.
        offset: nats to add to a log-likelihood for the units of the data as given.
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
        self.running_loss = math.nan

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(derived_seed(self.settings.seed, _STEP, self.global_step))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x_0, context = _unpack(batch)
        chain = self.reverse.forward_chain
        loss = self.objective.differentiable_loss(self.reverse, chain, x_0, context)
        return loss / (x_0.numel() * math.log(2))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        value = float(outputs["loss"]) - self.offset / (
            self.reverse.event_shape.numel() * math.log(2)
        )
        if not math.isfinite(value):
            raise ValueError(
                f"Expected a finite loss; got {value} at step {self.global_step}. "
                "A lower learning rate or gradient_clip may help."
            )
        self.running_loss = (
            value if math.isnan(self.running_loss) else 0.99 * self.running_loss + 0.01 * value
        )

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x_0, context = _unpack(batch)
        bound = TermwiseBound(self.settings.validation_evaluations)
        result = bound.estimate(self.reverse, x_0, seed=self.settings.seed, context=context)
        mean, between, _ = (result + self.offset).bits_per_dim()
        values = {METRIC: mean, "validation_std_error": between}
        self.log_dict(values, batch_size=len(x_0))

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


class MetricsLog(Callback):
    """``metrics.csv``: a row for every validation, rewritten whole and atomically.

    The rows travel in the checkpoint, so that a resumed run's file is an uninterrupted run's.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "step": trainer.global_step,
                "training_loss": module.running_loss,
                METRIC: float(metrics[METRIC]),
                "validation_std_error": float(metrics["validation_std_error"]),
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, lambda name: name.write_text(text.getvalue()))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class Progress(Callback):
    """A bar over the whole training: steps, time left, the running loss and the last validation."""

    def __init__(self, label: str, total: int):
        self.label, self.total = label, total

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.bar = progress_bar()
        self.task = self.bar.add_task(
            "training", total=self.total, completed=trainer.global_step, figures=""
        )
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        figures = f"{self.label} {module.running_loss:.3f}"
        if METRIC in trainer.callback_metrics:
            value = float(trainer.callback_metrics[METRIC])
            error = float(trainer.callback_metrics["validation_std_error"])
            figures += f" · validation {value:.3f} ± {error:.3f} bits/dim"
        self.bar.update(self.task, completed=trainer.global_step, figures=figures)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.bar.stop()

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def _averaging(decay: float) -> WeightAveraging:
    """An exponential moving average whose decay grows as (1 + k)/(10 + k) up to ``decay``."""

    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        floats = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [c for _, c in floats], 1 - rate)
        for a, c in zip(averaged, current, strict=True):
            if not a.is_floating_point():
                a.copy_(c)

    return WeightAveraging(multi_avg_fn=torch.no_grad()(average), use_buffers=False)


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

    Writes ``metrics.csv`` and ``checkpoints/best.ckpt`` and ``last.ckpt`` into ``folder``.

    Args:
        reverse: the model.
        objective: what to minimise.
        data: its train split is learned from, its validation split judged on.
        settings: complete settings (``settings.recipe``).
        folder: the run.
        resume: go on from ``last.ckpt`` where there is one.
        progress: show a bar.

    Raises:
        ValueError: settings that are not complete, data that the model cannot explain (before any
            work), a checkpoint that is truncated or holds more than tensors and plain values, a
            loss that is not finite.
    """
    needed = ("steps", "batch_size", "learning_rate", "weight_decay")
    if missing := [name for name in needed if getattr(settings, name) is None]:
        raise ValueError(
            f"Expected settings with {', '.join(missing)} (settings.recipe gives them); got None."
        )
    assert settings.steps and settings.batch_size
    reverse.check_data(data.train, data.train_context)
    reverse.check_data(data.validation, data.validation_context)
    objective.check_model(reverse)
    checkpoints = Path(folder) / "checkpoints"
    module = DiffusionModule(reverse, objective, settings, data.log_density_offset())
    # Lightning resumes whole epochs exactly: an epoch here is the steps between two validations.
    epochs = math.ceil(settings.steps / settings.validate_every)
    epoch = math.ceil(settings.steps / epochs)
    batches = SeededBatches(len(data.train), settings.batch_size, epoch, settings.seed)
    best = ModelCheckpoint(
        checkpoints,
        "best",
        monitor=METRIC,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [_averaging(settings.ema_decay), best]
    callbacks.append(MetricsLog(Path(folder) / "metrics.csv"))
    if settings.patience:
        callbacks.append(EarlyStopping(METRIC, patience=settings.patience))
    if progress:
        is_bound = settings.objective == "vlb"
        callbacks.append(Progress("bits/dim" if is_bound else "loss/dim", epochs * epoch))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=settings.gradient_clip,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        devices=1,
        default_root_dir=str(folder),
    )
    last = checkpoints / "last.ckpt"
    start = str(last) if resume and last.is_file() else None
    if start is not None:
        read_checkpoint(last)
    with torch.random.fork_rng():
        trainer.fit(
            module,
            _loader(data.train, data.train_context, batch_sampler=batches),
            _loader(data.validation, data.validation_context, batch_size=len(data.validation)),
            ckpt_path=start,
            weights_only=True,
        )
    state = read_checkpoint(checkpoints / "best.ckpt")["state_dict"]
    module.load_state_dict(state)
    reverse.eval()
    return reverse


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as tensors and plain values; anything else is refused, unexecuted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not such a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint {path}; got nothing there.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"Expected a checkpoint of tensors and plain values in {path}; got {reason}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"Expected a training checkpoint in {path}; got another kind of file.")
    return checkpoint
