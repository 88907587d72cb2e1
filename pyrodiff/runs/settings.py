"""Settings of the commands: plain values, with defaults that depend on the data; no torch.

``None`` means "chosen for the data": ``recipe`` fills it in, and a run's ``config.yaml`` holds the
complete settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from pyrodiff.checks import check_choice, check_count, check_positive, check_types, renamed, short
from pyrodiff.runs.chain_settings import ChainSettings
from pyrodiff.runs.choices import (
    CHOICES,
    ESTIMATORS,
    FORMER_NAMES,
    NETWORK_DEFAULTS,
    SPLITS,
    present_names,
)
from pyrodiff.training.settings import Settings, TrainingSettings, check_training

__all__ = [
    "FLAGS",
    "ComparisonSettings",
    "EvaluationSettings",
    "FitSettings",
    "check_unchanged",
    "read_settings",
    "recipe",
]

Kind = TypeVar("Kind", "FitSettings", "EvaluationSettings", "ComparisonSettings")


@renamed(**FORMER_NAMES)
@dataclass(frozen=True)
class FitSettings(Settings):
    """The model and its training.

    Args:
        objective: vlb, simple, mean, hybrid or min-snr.
        timesteps: how t is drawn: low-discrepancy, uniform, loss-aware or all.
        denoiser: what the network predicts: noise, data, velocity or mean.
        variance: fixed-small, fixed-large, learned-range, learned-diagonal or learned-posterior.
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
        ema_decay: of the moving average of the weights, which is the trained model.
        gradient_clip: norm of the gradient of the loss per dimension (of a bound, in bits).
        validate_every: most training steps between validations (and checkpoints).
        validation_calls: network calls per validation sample.
        patience: validations in a row, each worse than the best by more than two standard errors
            of their difference, after which training stops; 0: never.
        calls: network calls per test sample in the final evaluation.
        samples: samples drawn at the end.
        seed: of the weights, of the training and of what follows it.

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
    validation_calls: int = 16
    patience: int = 8
    calls: int = 128
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        values = {name: value for name, value in self.to_dict().items() if value is not None}
        for kind in CHOICES.keys() & values.keys():
            check_choice(kind, values[kind], CHOICES[kind])
        check_training(values)
        counts = {"width": 1, "blocks": 1, "num_steps": 1, "samples": 1, "calls": 2}
        for name in counts.keys() & values.keys():
            check_count(name, values[name], counts[name])
        for name in ("log_snr_max", "log_snr_min"):
            if self.schedule != "log-snr" and name in values:
                raise ValueError(
                    f"Expected {name} with schedule 'log-snr' alone; got {values[name]} "
                    f"with {self.schedule!r}, whose ends are fixed."
                )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"Expected 0 <= dropout < 1; got {self.dropout}.")

    def training(self) -> TrainingSettings:
        """Those of the training.

        Raises:
            ValueError: where one of them is still to be chosen for the data.
        """
        values = {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}
        if missing := [name for name, value in values.items() if value is None]:
            raise ValueError(
                f"Expected settings with {', '.join(missing)} (settings.recipe gives them); "
                "got None."
            )
        return TrainingSettings(**values)


@renamed(evaluations="calls")
@dataclass(frozen=True)
class EvaluationSettings(ChainSettings):
    """What the values of an evaluation depend on, besides the model and the data.

    Args:
        steps, variance, grid, probes, rank: the chain; see ``ChainSettings``.
        estimator: termwise, path, importance, particle or flow.
        calls: network calls per sample (termwise); default: the run's own, or 32 steps'.
        std_error: instead of a number of calls, the standard error in nats that each sample is to
            reach (termwise).
        particles: draws of the latents per sample: paths, particles or solves (all others).
        split: train, validation or test.
        seed: of the noise.
        batch_size: rows per network call.
        limit: evaluate only the first ``limit`` samples.

    Raises:
        ValueError: an unknown name, a number out of range, an option of another estimator.
    """

    estimator: str = "termwise"
    calls: int | None = None
    std_error: float | None = None
    particles: int | None = None
    split: str = "test"
    seed: int = 0
    batch_size: int = 256
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("estimator", self.estimator, CHOICES["estimator"])
        if self.estimator == "flow" and self.changes:
            raise ValueError(
                "Expected no other chain with estimator 'flow', which has no steps; "
                f"got {self.chain()}."
            )
        check_choice("split", self.split, SPLITS)
        allowed = ESTIMATORS[self.estimator]
        for name in ("calls", "std_error", "particles"):
            if getattr(self, name) is not None and name not in allowed:
                raise ValueError(
                    f"Expected options that go with estimator {self.estimator!r} "
                    f"({', '.join(allowed)}); got {name} = {getattr(self, name)}."
                )
        if self.calls is not None and self.std_error is not None:
            raise ValueError(
                "Expected calls or std_error, which decides on the number of calls; "
                f"got both, {self.calls} and {self.std_error}."
            )
        if self.std_error is not None:
            check_positive("std_error", self.std_error)
        least = {"calls": 2, "particles": 1, "batch_size": 1, "limit": 1, "seed": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None:
                check_count(name, value, low)


FLAGS = ("saved", "paired_seeds")  # options of a comparison that take no value


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """How runs are compared, besides what each one's evaluation depends on.

    Args:
        repeats: independent evaluations of every run, of which the mean is taken; their spread
            gives the Monte Carlo error of a difference where the estimator keeps no weights.
            Default: 1 for estimators that keep several weights per sample, else 2.
        processes: worker processes among which batches are shared.
        saved: compare the evaluations saved in the runs, and make none.
        paired_seeds: pair runs of the same training seed: what a seed does to all models alike
            cancels in their difference and is not part of its error.

    Raises:
        ValueError: a number out of range, an option of evaluations where none are made.
    """

    repeats: int | None = None
    processes: int = 1
    saved: bool = False
    paired_seeds: bool = False

    def __post_init__(self) -> None:
        for name in ("repeats", "processes"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)

    def check(self, runs: int, evaluation: EvaluationSettings) -> None:
        """Raise ValueError for fewer than two runs, or for options without effect."""
        if runs < 2:
            raise ValueError(f"Expected at least two runs; got {runs}.")
        values = self.to_dict() | evaluation.to_dict()
        flags = {name: getattr(self, name) for name in FLAGS}
        defaults = ComparisonSettings(**flags).to_dict() | EvaluationSettings().to_dict()
        changed = sorted(name for name in values if values[name] != defaults[name])
        if self.saved and changed:
            raise ValueError(
                f"Expected no options of evaluations with saved ones; got {', '.join(changed)}."
            )

    def count(self, evaluation: EvaluationSettings) -> int:
        """The number of evaluations of every run."""
        if self.repeats is not None:
            return self.repeats
        keeps_weights = evaluation.estimator in ("path", "importance")
        return 1 if keeps_weights and evaluation.particles != 1 else 2


def read_settings(kind: type[Kind], values: object) -> Kind:
    """Settings of a kind from a file's plain values, by their present or former names.

    Raises:
        ValueError: unknown names, values of another type, and what the settings themselves refuse.
    """
    if not isinstance(values, dict):
        raise ValueError(f"Expected settings by name; got {short(values)}.")
    values = present_names(values)
    check_types(kind, values)
    return kind(**values)


def check_unchanged(where: object, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless ``new`` may resume what ``old`` began."""
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if changed:
        differences = "; ".join(
            f"{k}: {short(new.get(k))} instead of {short(old.get(k))}" for k in changed
        )
        raise ValueError(
            f"Expected the settings of {where} in order to resume it; got {differences}."
        )


def recipe(settings: FitSettings, *, image: bool, levels: int | None) -> FitSettings:
    """The settings with every ``None`` filled in for data of this kind.

    Args:
        settings: complete or not.
        image: whether events are (channels, height, width).
        levels: of discrete data, on [−1, 1]; None for continuous data.

    Raises:
        ValueError: a decoder of densities for discrete data, or one of discrete data for densities.
    """
    network = settings.network or ("conv" if image else "mlp")
    few = levels is not None and levels <= 32 and network == "conv"
    defaults = NETWORK_DEFAULTS[network] | {
        "network": network,
        # β̃_2 would be the Gaussian decoder's variance under fixed-small: far below the noise in x_1
        "variance": "fixed-small" if image else "fixed-large",
        "decoder": "gaussian" if levels is None else "categorical",
        "denoiser": "data" if few else "noise",
    }
    if settings.objective == "hybrid":
        defaults["variance"] = "learned-range"
    if settings.schedule == "log-snr":
        # x_1 must tell neighbouring levels apart: σ_1 is 0.38 of half their distance.
        largest = 10.0 if levels is None else round(2 * math.log((levels - 1) / 0.376), 2)
        defaults |= {"log_snr_max": largest, "log_snr_min": -6.0}
    missing = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    settings = replace(settings, **missing)
    if (settings.decoder == "gaussian") != (levels is None):
        kind = "continuous" if levels is None else f"discrete ({levels} levels)"
        allowed = "gaussian" if levels is None else "categorical or discretized"
        raise ValueError(f"Expected decoder {allowed} for {kind} data; got {settings.decoder!r}.")
    return settings
