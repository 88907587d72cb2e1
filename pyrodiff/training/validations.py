"""Validations: which weights are the best, and when a training ends.

Every validation estimates the bound of the same samples with the same noise.  With ℓ_i the bound of
sample i in bits per dimension, and ℓ*_i that under the best weights before,

    gain = mean_i (ℓ*_i − ℓ_i),    standard error = sd_i (ℓ*_i − ℓ_i)/√N,

an error far below that of either mean.  Weights are the best yet where gain > 0, and clearly worse
where gain < −2 standard errors.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from pyrodiff.serialization.files import write_bytes
from pyrodiff.training.checkpoints import BEST, LAST, make_room
from pyrodiff.training.module import METRIC, METRIC_ERROR, DiffusionModule

__all__ = ["METRIC", "METRIC_ERROR", "Validations"]


class Validations(Checkpoint):
    """After each validation: a row of ``metrics.csv``, checkpoints, and perhaps the end.

    ``patience`` validations in a row, each clearly worse than the best, end the training.
    Noise does not: a few samples with large terms raise the standard error as much as the mean.  A
    plateau does not either, as the learning rate is still to fall.

    The state is kept in the checkpoints, so that a resumed run writes the files that an
    uninterrupted one does.

    Args:
        folder: of the run.
        patience: see ``TrainingSettings``.
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
        """Compare a validation's losses, (N,), with the best: the gain and its standard error."""
        if self.best is None:
            gain = error = math.nan
        else:
            gain, error = _mean(self.best - losses)
        self.worse = self.worse + 1 if gain < -2 * error else 0
        if bool(losses.isfinite().all()) and not gain <= 0:
            self.best = losses
        return {"gain_over_best": gain, "gain_std_error": error}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.should_stop = self.exhausted  # a run that had ended before it was resumed

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        assert isinstance(module, DiffusionModule)
        losses = module.validation_losses()
        gain = self.judge(losses)
        mean, error = _mean(losses)
        self.rows.append(
            {
                "step": trainer.global_step,
                module.loss_name: module.running_loss,
                METRIC: mean,
                METRIC_ERROR: error,
                **gain,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )
        self._write()
        checkpoints = self.folder / "checkpoints"
        if self.best is losses:  # written first: a run resumed from the last one needs its best
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
    """The mean of values, (N,), and its standard error, NaN for a single value."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
