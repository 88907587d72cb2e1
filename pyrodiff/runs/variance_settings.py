"""Settings of a learned variance that is added to a run: plain values; no torch is imported."""

from dataclasses import dataclass

from pyrodiff.checks import check_choice, check_count
from pyrodiff.training.settings import TrainingSettings

__all__ = ["VarianceSettings"]


@dataclass(frozen=True)
class VarianceSettings(TrainingSettings):
    """A learned variance for the network of a run, and its training.

    Args:
        target: what the variance is matched to: errors, of the network on the data, or probes, of
            its Jacobian (one product a sample).
        width: hidden features of the head that predicts it.
        num_steps: of the chain, even in log-SNR, whose levels are learned on and whose bound on the
            validation split decides; the result serves chains of any steps.
        steps: training steps, rounded up to equal stretches between validations.
        batch_size: samples per training step.
        learning_rate: peak of AdamW's rate: linear warm-up over a tenth, then a cosine to zero.
        weight_decay: of AdamW, on weights of two or more axes.
        ema_decay: of the moving average of the weights, which are the result.
        gradient_clip: norm of the gradient of the loss per dimension.
        validate_every: most training steps between validations (and checkpoints).
        validation_calls: network calls per validation sample.
        patience: validations in a row, each worse than the best by more than two standard errors
            of their difference, after which training stops; 0: never.
        seed: of the head's weights, and of the training.

    Raises:
        ValueError: an unknown target, a number out of range.
    """

    target: str = "errors"
    width: int = 32
    num_steps: int = 100
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    ema_decay: float = 0.99
    gradient_clip: float = 1.0
    validate_every: int = 250
    validation_calls: int = 32
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("target", self.target, ("errors", "probes"))
        check_count("width", self.width)
        check_count("num_steps", self.num_steps, 2)
