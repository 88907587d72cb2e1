"""A bar over a whole training."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from pyrodiff.training.module import DiffusionModule
from pyrodiff.training.output import progress_bar
from pyrodiff.training.validations import METRIC, METRIC_ERROR

__all__ = ["Progress"]


class Progress(Callback):
    """A bar: steps, time left, the running loss and the last validation.

    Args:
        total: training steps.
    """

    def __init__(self, total: int):
        self.total, self.bar = total, progress_bar()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.task = self.bar.add_task(
            "training", total=self.total, completed=trainer.global_step, figures=""
        )
        self.bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any
    ) -> None:
        assert isinstance(module, DiffusionModule)
        unit = "bits/dim" if module.is_bound else "loss/dim"
        figures = f"{unit} {module.running_loss:.3f}"
        metrics = trainer.callback_metrics
        if METRIC in metrics:
            value, error = float(metrics[METRIC]), float(metrics[METRIC_ERROR])
            figures += f" · validation {value:.3f} ± {error:.3f} bits/dim"
        self.bar.update(self.task, completed=trainer.global_step, figures=figures)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.bar.stop()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self.bar.stop()
