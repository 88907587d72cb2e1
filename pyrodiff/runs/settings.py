"""What a run is told: plain values with defaults that depend on the data; no torch is imported.

``None`` means "chosen for this data"; ``recipe`` fills it in, and a run's ``config.yaml`` holds
the outcome.
"""

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from pyrodiff.checks import check_types, short

__all__ = [
    "CHOICES",
    "ESTIMATORS",
    "FLAGS",
    "ComparisonSettings",
    "EvaluationSettings",
    "FitSettings",
    "check_unchanged",
    "choose",
    "read_settings",
    "recipe",
]

Settings = TypeVar("Settings", "FitSettings", "EvaluationSettings", "ComparisonSettings")

# Estimators and the options that go with each.
ESTIMATORS: dict[str, tuple[str, ...]] = {
    "termwise": ("evaluations", "std_error"),
    "path": ("particles",),
    "importance": ("particles",),
    "particle": ("particles",),
    "flow": ("particles",),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("vlb", "simple", "mean", "hybrid", "min-snr"),
    "timesteps": ("low-discrepancy", "uniform", "loss-aware", "all"),
    "denoiser": ("noise", "data", "velocity", "mean"),
    "variance": ("fixed-small", "fixed-large", "learned-range", "learned-diagonal"),
    "schedule": ("log-snr", "cosine", "linear"),
    "decoder": ("categorical", "discretized", "gaussian"),
    "network": ("mlp", "conv", "unet"),
    "estimator": tuple(ESTIMATORS),
    "split": ("train", "validation", "test"),
}


def choose(kind: str, name: str) -> str:
    """``name`` if it is one of the choices of ``kind``; else a ValueError with the near match."""
    if name in CHOICES[kind]:
        return name
    near = get_close_matches(name, CHOICES[kind], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"Expected {kind} to be one of {CHOICES[kind]}; got {name!r}{hint}")


_POSITIVE = (
    *("width", "blocks", "num_steps", "steps", "batch_size", "learning_rate"),
    *("gradient_clip", "validate_every", "samples"),
)


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
        width: hidden units of the mlp, channels of the conv network, channels of the unet at full
            resolution (a multiple of 32; twice as many at half of it).
        blocks: residual blocks; of the unet, at each resolution.
        dropout: share of hidden units dropped in training.
        num_steps: T, steps of the chain.
        log_snr_max: λ of x_1, of the log-snr schedule alone.
        log_snr_min: λ of x_T, of the log-snr schedule alone.
        steps: training steps, rounded up to equal stretches between validations.
        batch_size: samples per training step.
        learning_rate: peak of AdamW's rate: linear warm-up over a tenth, then a cosine to zero.
        weight_decay: of AdamW, on weights of two or more axes.
        ema_decay: of the moving average of the weights, which is what is kept.
        gradient_clip: norm of the gradient of the loss per dimension (of a bound, in bits).
        validate_every: most training steps between validations (and checkpoints).
        validation_evaluations: network calls per validation sample.
        patience: validations in a row, each worse than the best by more than two standard errors
            of their difference, after which training stops; 0: never.
        evaluations: network calls per test sample in the final evaluation.
        samples: samples drawn at the end.
        seed: of everything.

    Raises:
        ValueError: an unknown name, a number out of range, an option without effect.
    """

    objective: str = "vlb"
    timesteps: str = "low-discrepancy"
    denoiser: str | None = None
    variance: str | None = None
    schedule: str = "log-snr"
    decoder: str | None = None
    network: str | None = None
    width: int | None = None
    blocks: int | None = None
    dropout: float | None = None
    num_steps: int = 1000
    log_snr_max: float | None = None
    log_snr_min: float | None = None
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
        for kind in CHOICES.keys() & self.to_dict().keys():
            if (name := getattr(self, kind)) is not None:
                choose(kind, name)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Expected {name} > 0; got {value}.")
        for name in ("validation_evaluations", "evaluations"):
            if getattr(self, name) < 2:
                raise ValueError(f"Expected {name} >= 2; got {getattr(self, name)}.")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Expected weight_decay >= 0; got {self.weight_decay}.")
        for name in ("log_snr_max", "log_snr_min"):
            if self.schedule != "log-snr" and getattr(self, name) is not None:
                raise ValueError(
                    f"Expected {name} with schedule 'log-snr' alone; got {getattr(self, name)} "
                    f"with {self.schedule!r}, whose ends are fixed."
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


@dataclass(frozen=True)
class EvaluationSettings:
    """What the values of an evaluation depend on, beside the model and the data.

    Args:
        estimator: termwise, path, importance, particle or flow.
        evaluations: network calls per sample (termwise); default the run's own setting.
        std_error: instead of a number of calls, the standard error in nats that each sample is to
            reach (termwise).
        particles: paths, particles or solves per sample (all others).
        split: train, validation or test.
        seed: of the noise.
        batch_size: rows per network call.
        limit: evaluate the first ``limit`` samples alone.

    Raises:
        ValueError: an unknown name, a number out of range, an option of another estimator.
    """

    estimator: str = "termwise"
    evaluations: int | None = None
    std_error: float | None = None
    particles: int | None = None
    split: str = "test"
    seed: int = 0
    batch_size: int = 256
    limit: int | None = None

    def __post_init__(self) -> None:
        choose("estimator", self.estimator)
        choose("split", self.split)
        for name in ("evaluations", "std_error", "particles"):
            allowed = ", ".join(ESTIMATORS[self.estimator])
            if getattr(self, name) is not None and name not in ESTIMATORS[self.estimator]:
                raise ValueError(
                    f"Expected options that go with estimator {self.estimator!r} ({allowed}); "
                    f"got {name} = {getattr(self, name)}."
                )
        if self.evaluations is not None and self.std_error is not None:
            raise ValueError(
                "Expected evaluations or std_error, which decides on the number of evaluations; "
                f"got both, {self.evaluations} and {self.std_error}."
            )
        if self.std_error is not None and not 0 < self.std_error < math.inf:
            raise ValueError(f"Expected std_error > 0; got {self.std_error}.")
        least = {"evaluations": 2, "particles": 1, "batch_size": 1, "limit": 1, "seed": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"Expected {name} >= {low}; got {value}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


FLAGS = ("saved", "paired_seeds")  # options of a comparison that take no value


@dataclass(frozen=True)
class ComparisonSettings:
    """How runs are compared, beside what each one's evaluation depends on.

    Args:
        repeats: evaluations of every run with noise of their own, whose mean is taken; their
            spread tells the Monte Carlo error of a difference where the estimator keeps no
            weights.  Default 1 where it keeps several, else 2.
        processes: workers that batches are shared out to.
        saved: compare the evaluations that the runs hold, and make none.
        paired_seeds: training seeds mean the same to all models, and what these owe to a seed alike
            is no error of their difference.

    Raises:
        ValueError: a number out of range, an option of evaluations where none are made.
    """

    repeats: int | None = None
    processes: int = 1
    saved: bool = False
    paired_seeds: bool = False

    def __post_init__(self) -> None:
        for name in ("repeats", "processes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"Expected {name} >= 1; got {value}.")

    def check(self, runs: int, evaluation: EvaluationSettings) -> None:
        """Raise ValueError for fewer than two runs, or for options without effect."""
        if runs < 2:
            raise ValueError(f"Expected at least two runs; got {runs}.")
        given = self.to_dict() | evaluation.to_dict()
        flags = {name: getattr(self, name) for name in FLAGS}
        usual = ComparisonSettings(**flags).to_dict() | EvaluationSettings().to_dict()
        changed = sorted(name for name in given if given[name] != usual[name])
        if self.saved and changed:
            raise ValueError(
                f"Expected no options of evaluations with saved ones; got {', '.join(changed)}."
            )

    def count(self, evaluation: EvaluationSettings) -> int:
        """Evaluations of every run."""
        if self.repeats is not None:
            return self.repeats
        keeps = evaluation.estimator in ("path", "importance") and evaluation.particles != 1
        return 1 if keeps else 2

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def read_settings(kind: type[Settings], values: Any) -> Settings:
    """Settings of a kind from a file's plain values.

    Raises:
        ValueError: unknown names, values of another type, and what the settings themselves refuse.
    """
    if not isinstance(values, dict):
        raise ValueError(f"Expected settings by name; got {short(values)}.")
    check_types(kind, values)
    return kind(**values)


def check_unchanged(where: object, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless ``new`` may resume what ``old`` began."""
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if changed:
        differences = "; ".join(
            f"{k}: {short(new.get(k))}, it has {short(old.get(k))}" for k in changed
        )
        raise ValueError(
            f"Expected the settings of {where} in order to resume it; got another {differences}."
        )


# What suits a network: conv by the validation bound on scikit-learn's digits (48 channels, dropout
# 0.3 and 4500 steps are 0.03 bits/dim better there and take twice as long), mlp on plane densities.
_NETWORKS: dict[str, dict[str, Any]] = {
    "conv": {
        "width": 32,
        "blocks": 4,
        "dropout": 0.2,
        "steps": 4000,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "weight_decay": 1.0,
    },
    "mlp": {
        "width": 256,
        "blocks": 4,
        "dropout": 0.0,
        "steps": 4000,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
    },
    "unet": {
        "width": 64,
        "blocks": 2,
        "dropout": 0.1,
        "steps": 4000,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
    },
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
    network = settings.network or ("conv" if image else "mlp")
    few = levels is not None and levels <= 32 and network == "conv"
    defaults = _NETWORKS[network] | {
        "network": network,
        # β̃_2 would be the Gaussian decoder's variance under fixed-small: far below the noise in x_1
        "variance": "fixed-small" if image else "fixed-large",
        "decoder": "gaussian" if levels is None else "categorical",
        "denoiser": "data" if few else "noise",
    }
    if settings.objective == "hybrid":
        defaults["variance"] = "learned-range"
    if settings.schedule == "log-snr":
        # x_1 must tell neighbouring levels apart: σ_1 is 0.38 of the way to the mid-point between.
        last = 10.0 if levels is None else round(2 * math.log((levels - 1) / 0.376), 2)
        defaults |= {"log_snr_max": last, "log_snr_min": -6.0}
    missing = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    settings = replace(settings, **missing)
    if (settings.decoder == "gaussian") != (levels is None):
        kind = "continuous" if levels is None else f"discrete ({levels} levels)"
        allowed = "gaussian" if levels is None else "categorical or discretized"
        raise ValueError(f"Expected decoder {allowed} for {kind} data; got {settings.decoder!r}.")
    return settings
