"""A reverse chain and an objective as a ``LightningModule``, for any ``Trainer``.

Timesteps, noise and dropout of a step are functions of (seed, step, micro-batch, rank).  A run that
was killed therefore goes on as if nothing had happened, and the micro-batches of one gradient are
independent.
"""

import math
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood import TermwiseBound
from pyrodiff.objectives import Objective, VariationalBound
from pyrodiff.streams import derived_seed
from pyrodiff.training.settings import HoldsTraining, TrainingSettings, training_settings

__all__ = ["METRIC", "METRIC_ERROR", "DiffusionModule"]

METRIC, METRIC_ERROR = "validation_bits_per_dim", "validation_std_error"

_STEP = 0  # the streams of the batches have 1 (``batches``)
_RANKS = 2**32  # indices of validation samples per rank, at most


class DiffusionModule(lightning.LightningModule):
    """A reverse chain and an objective as a ``LightningModule``.

    Batches are lists [x_0] or [x_0, context].  The loss of a bound is in bits per dimension, for
    the units of the data as given; that of any other objective is its value per dimension.

    Args:
        reverse: the model.
        objective: what to minimise.
        settings: steps, learning rate, weight decay, validation calls and seed are read.
        offset: nats to add to a log-likelihood for the units of the data as given.

    Attributes:
        is_bound: whether the objective is a bound on log p.
        loss_name: ``training_bits_per_dim`` for a bound, else ``training_loss_per_dim``.
        running_loss: an exponential moving average of the loss over some hundred batches.
        validated: the bound of each sample of this validation so far, nats, in units of the model.
        steps_done: training steps that this process has done.

    Raises:
        ValueError: settings that are not complete.
    """

    def __init__(
        self,
        reverse: ReverseChain,
        objective: Objective,
        settings: TrainingSettings | HoldsTraining,
        offset: float = 0.0,
    ):
        super().__init__()
        self.reverse = reverse
        self.objective = objective
        if isinstance(objective.timesteps, nn.Module):
            self.rule = objective.timesteps  # its history belongs in checkpoints
        self.settings = training_settings(settings)
        self.offset = offset
        self.is_bound = isinstance(objective, VariationalBound)
        self.loss_name = "training_bits_per_dim" if self.is_bound else "training_loss_per_dim"
        self._unit = math.log(2) if self.is_bound else 1.0
        self._shift = offset / reverse.event_shape.numel() if self.is_bound else 0.0
        self._loss = self.running_loss = math.nan
        self.validated: list[Tensor] = []
        self.steps_done = 0

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
        bound = TermwiseBound(self.settings.validation_calls).estimate(
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
        values = {METRIC: mean, METRIC_ERROR: between}
        self.log_dict(values, batch_size=len(x_0))

    def validation_losses(self) -> Tensor:
        """The bound of each sample in the last validation, bits per dimension, shape (N,)."""
        nats = torch.cat(self.validated) + self.offset
        return -nats / (self.reverse.event_shape.numel() * math.log(2))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["running_loss"] = self.running_loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.running_loss = float(checkpoint["running_loss"])

    def configure_optimizers(self) -> Any:
        settings, parameters = self.settings, list(self.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(settings.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _rate(steps: int) -> Callable[[int], float]:
    """The learning rate of each step, as a share of its peak."""
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return 0.001 + 0.4995 * (1 + math.cos(math.pi * done))

    return factor


def _unpack(batch: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return batch[0], (batch[1] if len(batch) > 1 else None)
