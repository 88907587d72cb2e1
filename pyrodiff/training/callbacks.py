"""What happens beside the steps of a training: averaged weights, validations, a bar.

Every validation asks for the bound of the same samples with the same noise.  With ℓ_i the bound of
sample i in bits per dimension, and ℓ*_i that of the best model before,

    gain = mean_i (ℓ*_i − ℓ_i),    standard error = sd_i (ℓ*_i − ℓ_i)/√N,

an error far below that of either mean.  A model is the best yet where gain > 0, and worse beyond
doubt where gain < −2 errors.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from torch import Tensor

from pyrodiff.serialization.files import write_bytes
from pyrodiff.training.checkpoints import BEST, LAST, make_room
from pyrodiff.training.progress import progress_bar

__all__ = ["METRIC", "Progress", "Validations", "averaging"]

METRIC = "validation_bits_per_dim"


class Validations(Checkpoint):
    """What comes of a validation: a row of ``metrics.csv``, checkpoints, and perhaps the end.

    ``patience`` validations in a row, each worse beyond doubt than the best, end the training.
    Noise does not: a few samples of large terms raise the error as much as the mean.  A plateau
    does not either, as the learning rate is still to fall.

    The state travels in the checkpoints, so that a resumed run's files are an uninterrupted run's.

    Args:
        folder: the run.
        patience: 0: never end early.
    """

    def __init__(self, folder: Path, patience: int):
        self.folder, self.patience = folder, patience
        self.rows: list[dict[str, float]] = []
        self.best: Tensor | None = None
        self.worse = 0

    @property
    def exhausted(self) -> bool:
        """Whether training is to end."""
        return 0 < self.patience <= self.worse

    def judge(self, losses: Tensor) -> dict[str, float]:
        """Compare a validation's losses, (N,), with the best before: the gain and its error."""
        if self.best is None:
            gain = error = math.nan
        else:
            gain, error = _mean(self.best - losses)
        self.worse = self.worse + 1 if gain < -2 * error else 0
        if bool(losses.isfinite().all()) and not gain <= 0:
            self.best = losses
        return {"gain_over_best": gain, "gain_std_error": error}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.should_stop = self.exhausted  # where it had ended before it was resumed

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        losses = module.validation_losses()
        gain = self.judge(losses)
        mean, error = _mean(losses)
        self.rows.append(
            {
                "step": trainer.global_step,
                module.loss_name: module.running_loss,
                METRIC: mean,
                "validation_std_error": error,
                **gain,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )
        self._write()
        checkpoints = self.folder / "checkpoints"
        if self.best is losses:  # before the last: a run that goes on from there has its best
            trainer.save_checkpoint(checkpoints / BEST)
        make_room(checkpoints)
        trainer.save_checkpoint(checkpoints / LAST)
        trainer.should_stop = trainer.should_stop or self.exhausted

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.folder / "metrics.csv", text.getvalue().encode())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best, "worse": self.worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        if best is not None and not (isinstance(best, Tensor) and best.dim() == 1):
            raise TypeError(f"Expected the best losses as a tensor (N,); got {best!r}.")
        self.best, self.worse = best, int(state_dict["worse"])
        self.rows = [dict(row) for row in state_dict["rows"]]


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean of values, (N,), and its standard error, unknown of one value."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


class Progress(Callback):
    """A bar over the whole training: steps, time left, the running loss and the last validation."""

    def __init__(self, total: int):
        self.total = total

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.bar = progress_bar()
        self.task = self.bar.add_task(
            "training", total=self.total, completed=trainer.global_step, figures=""
        )
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        unit = "bits/dim" if module.loss_name == "training_bits_per_dim" else "loss/dim"
        figures = f"{unit} {module.running_loss:.3f}"
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


def averaging(decay: float) -> WeightAveraging:
    """An exponential moving average whose decay grows as (1 + k)/(10 + k) up to ``decay``."""

    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        floats = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [c for _, c in floats], 1 - rate)
        for a, c in zip(averaged, current, strict=True):
            if not a.is_floating_point():
                a.copy_(c)

    return WeightAveraging(multi_avg_fn=torch.no_grad()(average), use_buffers=False)
