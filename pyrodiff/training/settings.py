"""Settings of a training: plain values, checked; no torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from pyrodiff.checks import check_count, check_positive, renamed, short

__all__ = ["HoldsTraining", "Settings", "TrainingSettings", "check_training", "training_settings"]


@dataclass(frozen=True)
class Settings:
    """Plain values with names."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@renamed(validation_evaluations="validation_calls")
@dataclass(frozen=True)
class TrainingSettings(Settings):
    """What a training does, whatever the model and the objective.

    Args:
        steps: training steps, rounded up to equal stretches between validations.
        batch_size: samples per training step.
        learning_rate: peak of AdamW's rate: linear warm-up over a tenth, then a cosine to zero.
        weight_decay: of AdamW, on weights of two or more axes.
        ema_decay: of the moving average of the weights, which is the trained model.
        gradient_clip: norm of the gradient of the loss per dimension (of a bound, in bits).
        validate_every: most training steps between validations (and checkpoints).
        validation_calls: network calls per validation sample.
        patience: validations in a row, each worse than the best by more than two standard errors
            of their difference, after which training stops; 0: never.
        seed: of the order of the samples, the noise and dropout.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    validate_every: int = 250
    validation_calls: int = 16
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_training(self.to_dict())


@runtime_checkable
class HoldsTraining(Protocol):
    """Settings of more than a training, which hold its settings among others."""

    def training(self) -> TrainingSettings:
        """Those of the training.

        Raises:
            ValueError: where they are not complete.
        """


def training_settings(settings: TrainingSettings | HoldsTraining) -> TrainingSettings:
    """The settings of the training, by themselves."""
    return settings if isinstance(settings, TrainingSettings) else settings.training()


_COUNTS = {"steps": 1, "batch_size": 1, "validate_every": 1, "validation_calls": 2}
_COUNTS |= {"patience": 0, "seed": 0}


def check_training(values: Mapping[str, Any]) -> None:
    """Check settings by name; those that are None, or absent, are not.

    Raises:
        ValueError: a number out of range.
    """
    for name, least in _COUNTS.items():
        if (value := values.get(name)) is not None:
            check_count(name, value, least)
    for name in ("learning_rate", "gradient_clip"):
        if (value := values.get(name)) is not None:
            check_positive(name, value)
    decay, average = values.get("weight_decay"), values.get("ema_decay")
    if decay is not None and not 0 <= decay < float("inf"):
        raise ValueError(f"Expected weight_decay >= 0; got {short(decay)}.")
    if average is not None and not 0 <= average < 1:
        raise ValueError(f"Expected 0 <= ema_decay < 1; got {short(average)}.")
