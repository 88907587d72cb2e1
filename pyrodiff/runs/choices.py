"""The names that settings may have, and what each stands for: one table.

A row names the class or function that is called, as "module:name" within pyrodiff, and the values
that it takes beside those that all of its kind take.  It is imported when it is first needed, so
that the names are known without torch.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyrodiff.checks import check_choice

__all__ = [
    "CHOICES",
    "ESTIMATORS",
    "FORMER_NAMES",
    "NETWORK_DEFAULTS",
    "SPLITS",
    "Choice",
    "make",
    "present_names",
]


@dataclass(frozen=True)
class Choice:
    """What a name stands for.

    Args:
        target: "module:name" within pyrodiff.
        takes: its parameters, and the name of the value that each is given.
    """

    target: str
    takes: Mapping[str, str] = field(default_factory=dict)

    def resolve(self) -> Any:
        """The class or function itself."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(f"pyrodiff.{module}"), name)


def _takes(*names: str, **others: str) -> dict[str, str]:
    return {name: name for name in names} | others


CHOICES: dict[str, dict[str, Choice]] = {
    "objective": {
        "vlb": Choice("objectives:VariationalBound", _takes("timesteps")),
        "simple": Choice("objectives:NoiseLoss", _takes("timesteps")),
        "mean": Choice("objectives:MeanLoss", _takes("timesteps")),
        "hybrid": Choice("objectives:HybridLoss", _takes("timesteps")),
        "min-snr": Choice("runs.build:min_snr_loss", _takes("timesteps")),
    },
    "timesteps": {
        "low-discrepancy": Choice("timesteps:LowDiscrepancyTimesteps"),
        "uniform": Choice("timesteps:UniformTimesteps"),
        "loss-aware": Choice("timesteps:LossAwareTimesteps", _takes("num_steps")),
        "all": Choice("timesteps:AllTimesteps"),
    },
    "denoiser": {
        "noise": Choice("denoisers:NoiseDenoiser"),
        "data": Choice("denoisers:DataDenoiser"),
        "velocity": Choice("denoisers:VelocityDenoiser"),
        "mean": Choice("denoisers:MeanDenoiser"),
    },
    "variance": {
        "fixed-small": Choice("variances:FixedSmall"),
        "fixed-large": Choice("variances:FixedLarge"),
        "learned-range": Choice("variances:LearnedRange"),
        "learned-diagonal": Choice("variances:LearnedDiagonal"),
        "learned-posterior": Choice("variances:LearnedPosterior"),
    },
    "covariance": {  # fitted to a model, or of its Jacobian
        "analytic": Choice("runs.respacing:analytic"),
        "isotropic": Choice("runs.respacing:isotropic", _takes("probes")),
        "diagonal": Choice("runs.respacing:diagonal", _takes("probes", "rank")),
        "full": Choice("runs.respacing:full"),
    },
    "grid": {
        "uniform": Choice("grids:UniformGrid"),
        "quadratic": Choice("grids:QuadraticGrid"),
        "log-snr": Choice("grids:LogSNRGrid"),
        "optimal": Choice("grids:OptimalGrid"),
    },
    "schedule": {
        "log-snr": Choice(
            "schedules:LogSNRSchedule", _takes(maximum="log_snr_max", minimum="log_snr_min")
        ),
        "cosine": Choice("schedules:CosineSchedule"),
        "linear": Choice("schedules:LinearSchedule"),
    },
    "decoder": {
        "categorical": Choice("decoders:CategoricalDecoder", _takes("levels")),
        "discretized": Choice("decoders:DiscretizedGaussianDecoder", _takes("bin_width")),
        "gaussian": Choice("decoders:GaussianDecoder"),
    },
    "network": {
        "mlp": Choice("runs.build:residual_mlp"),
        "conv": Choice("runs.build:residual_conv_net"),
        "unet": Choice("runs.build:unet"),
    },
    "estimator": {
        "termwise": Choice(
            "likelihood:TermwiseBound", _takes("std_error", "calls", pilot="learned")
        ),
        "path": Choice("likelihood:PathBound", _takes("particles")),
        "importance": Choice("likelihood:ImportanceBound", _takes("particles")),
        "particle": Choice("likelihood:ParticleBound", _takes("particles", twist="learned")),
        "flow": Choice("likelihood:ProbabilityFlow", _takes("particles")),
    },
}
"""Of each kind of choice, what its names stand for."""

SPLITS = ("train", "validation", "test")

ESTIMATORS: dict[str, tuple[str, ...]] = {
    name: tuple(value for value in ("calls", "std_error", "particles") if value in takes)
    for name, choice in CHOICES["estimator"].items()
    for takes in [choice.takes.values()]
}
"""Of each estimator, the settings that go with it."""


def make(kind: str, name: str | None, *arguments: Any, **values: Any) -> Any:
    """What a name stands for, made.

    Args:
        kind: a key of ``CHOICES``.
        name: one of its names.
        arguments: what all of the kind take.
        values: of which the choice takes its own; None is left to its default.

    Raises:
        ValueError: an unknown name.
    """
    check_choice(kind, name, CHOICES[kind])
    choice = CHOICES[kind][name or ""]
    options = {key: values.get(value) for key, value in choice.takes.items()}
    options = {key: value for key, value in options.items() if value is not None}
    return choice.resolve()(*arguments, **options)


# What suits each network: conv by the validation bound on scikit-learn's digits (48 channels,
# dropout 0.3 and 4500 steps gain 0.03 bits/dim there in twice the time), mlp on plane densities.
NETWORK_DEFAULTS: dict[str, dict[str, Any]] = {
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


FORMER_NAMES = {"evaluations": "calls", "validation_evaluations": "validation_calls"}
"""Settings by their former names, and their present ones."""


def present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their present names.

    Raises:
        ValueError: a setting by both of its names.
    """
    for former in FORMER_NAMES.keys() & values.keys():
        if FORMER_NAMES[former] in values:
            raise ValueError(
                f"Expected {FORMER_NAMES[former]} once; got it as {former}, its former name, too."
            )
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}
