"""What a run is told: plain values with defaults that depend on the data; no torch is imported.

``None`` means "chosen for this data"; ``recipe`` fills it in, and a run's ``config.yaml`` holds
the outcome.
"""

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

__all__ = ["CHOICES", "FitSettings", "choose", "recipe"]

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("vlb", "simple", "mean", "hybrid", "min-snr"),
    "timesteps": ("low-discrepancy", "uniform", "loss-aware", "all"),
    "denoiser": ("noise", "data", "velocity", "mean"),
    "variance": ("fixed-small", "fixed-large", "learned-range", "learned-diagonal"),
    "schedule": ("log-snr", "cosine", "linear"),
    "decoder": ("categorical", "discretized", "gaussian"),
    "network": ("mlp", "conv", "unet"),
}


def choose(kind: str, name: str) -> str:
    """``name`` if it is one of the choices of ``kind``; else a ValueError with the near match."""
    if name in CHOICES[kind]:
        return name
    near = get_close_matches(name, CHOICES[kind], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"Expected {kind} to be one of {CHOICES[kind]}; got {name!r}{hint}")


@dataclass(frozen=True)
class FitSettings:
    """The model and its training.

    Args:
        objective: vlb, simple, mean, hybrid or min-snr.
        timesteps: how t is drawn: low-discrepancy, uniform, loss-aware or all.
        denoiser: what the network predicts: noise, data, velocity or mean.
        variance: fixed-small, fixed-large, learned-range or learned-diagonal.
        schedule: log-snr, cosine or linear.
        decoder: categorical or discretized (discrete data), gaussian (continuous data).
        network: mlp, conv or unet.
        width: hidden units of the MLP, or channels of the convolutional networks.
        blocks: residual blocks.
        dropout: share of hidden units dropped in training.
        num_steps: T, steps of the chain.
        log_snr_max: λ of x_1 for the log-snr schedule.
        log_snr_min: λ of x_T for the log-snr schedule.
        steps: training steps, rounded up to equal stretches between validations.
        batch_size: samples per training step.
        learning_rate: peak of AdamW's rate: linear warm-up over a tenth, then a cosine to zero.
        weight_decay: of AdamW, on weights of two or more axes.
        ema_decay: of the moving average of the weights, which is what is kept.
        gradient_clip: norm of the gradient of the loss per dimension, in bits.
        validate_every: most training steps between validations (and checkpoints).
        validation_evaluations: network calls per validation sample.
        patience: validations without a better bound after which training stops; 0: never.
        evaluations: network calls per test sample in the final evaluation.
        samples: samples drawn at the end.
        seed: of everything.
    """

    objective: str = "vlb"
    timesteps: str = "low-discrepancy"
    denoiser: str | None = None
    variance: str | None = None
    schedule: str = "log-snr"
    decoder: str | None = None
    network: str | None = None
    width: int | None = None
    blocks: int = 4
    dropout: float | None = None
    num_steps: int = 1000
    log_snr_max: float | None = None
    log_snr_min: float = -6.0
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    validate_every: int = 250
    validation_evaluations: int = 16
    patience: int = 8
    evaluations: int = 128
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in CHOICES:
            if (name := getattr(self, kind)) is not None:
                choose(kind, name)
        positive = ("blocks", "num_steps", "validate_every", "validation_evaluations", "samples")
        optional = ("width", "steps", "batch_size", "learning_rate", "gradient_clip", "evaluations")
        for name in positive + optional:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} > 0; got {value}.")
        for name in ("validation_evaluations", "evaluations"):
            if getattr(self, name) % 2 or getattr(self, name) > 2 * self.num_steps:
                raise ValueError(
                    f"Expected {name} to be even and at most 2 · num_steps = {2 * self.num_steps}; "
                    f"got {getattr(self, name)}."
                )
        if not 0 <= self.ema_decay < 1 or self.patience < 0 or self.seed < 0:
            raise ValueError(
                "Expected 0 <= ema_decay < 1, patience >= 0 and seed >= 0; "
                f"got {self.ema_decay}, {self.patience}, {self.seed}."
            )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"Expected 0 <= dropout < 1; got {self.dropout}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# Found by the validation bound: images on scikit-learn's digits (48 channels, dropout 0.3 and 4500
# steps are 0.03 bits/dim better there and take twice as long), the rest on plane densities.
_IMAGES: dict[str, Any] = {
    "variance": "fixed-small",
    "network": "conv",
    "width": 32,
    "dropout": 0.2,
    "steps": 4000,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "weight_decay": 1.0,
}
_POINTS: dict[str, Any] = {
    # β̃_2 would be the Gaussian decoder's variance under fixed-small: far below the noise in x_1.
    "variance": "fixed-large",
    "network": "mlp",
    "width": 256,
    "dropout": 0.0,
    "steps": 4000,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
}


def recipe(settings: FitSettings, *, image: bool, levels: int | None) -> FitSettings:
    """The settings with every ``None`` filled in for data of this kind.

    Args:
        settings: as given.
        image: whether events are (channels, height, width).
        levels: of discrete data, on [−1, 1]; None for continuous data.

    Raises:
        ValueError: a decoder of densities for discrete data, or the other way round.
    """
    defaults = dict(_IMAGES if image else _POINTS)
    defaults["decoder"] = "gaussian" if levels is None else "categorical"
    if settings.objective == "hybrid":
        defaults["variance"] = "learned-range"
    network = settings.network or defaults["network"]
    few = levels is not None and levels <= 32 and network == "conv"
    defaults["denoiser"] = "data" if few else "noise"
    defaults["log_snr_max"] = 10.0
    if levels is not None:
        # x_1 must tell neighbouring levels apart: σ_1 is 0.38 of the way to the mid-point between.
        defaults["log_snr_max"] = round(2 * math.log((levels - 1) / 0.376), 2)
    missing = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    settings = replace(settings, **missing)
    if (settings.decoder == "gaussian") != (levels is None):
        kind = "continuous" if levels is None else f"discrete ({levels} levels)"
        allowed = "gaussian" if levels is None else "categorical or discretized"
        raise ValueError(f"Expected decoder {allowed} for {kind} data; got {settings.decoder!r}.")
    return settings
