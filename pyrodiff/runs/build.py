"""From settings (plain values) and folders to the objects that they describe."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from pyrodiff.chains import ForwardChain, ReverseChain
from pyrodiff.likelihood import Estimator, Pilot
from pyrodiff.likelihood.particles.twists import MarginalTwist
from pyrodiff.networks import ResidualConvNet, ResidualMLP, UNet
from pyrodiff.objectives import MinSNR, Objective, WeightedLoss
from pyrodiff.runs.choices import CHOICES, make
from pyrodiff.runs.settings import EvaluationSettings, FitSettings
from pyrodiff.timesteps import Timesteps

__all__ = [
    "Layout",
    "load_model",
    "make_estimator",
    "make_model",
    "make_network",
    "make_objective",
    "min_snr_loss",
    "residual_conv_net",
    "residual_mlp",
    "unet",
]

_READABLE_LEVELS = 32  # up to which a network may predict the probability of each level


class Layout(NamedTuple):
    """What a network has to suit.

    Args:
        event_shape: of the data.
        levels: of discrete data; None for continuous data.
        context_size: numbers that the model is conditioned on.
        learned_variance: whether the variance is predicted, too.
    """

    event_shape: tuple[int, ...]
    levels: int | None
    context_size: int
    learned_variance: bool


def residual_mlp(settings: FitSettings, layout: Layout) -> nn.Module:
    """A residual MLP, with Fourier features of few coordinates."""
    assert settings.width and settings.blocks
    shape = layout.event_shape
    return ResidualMLP(
        shape,
        width=settings.width,
        blocks=settings.blocks,
        context_size=layout.context_size,
        learned_variance=layout.learned_variance,
        fourier=(1.0, 2.0, 4.0) if len(shape) == 1 and shape[0] <= 8 else (),
        dropout=settings.dropout or 0.0,
    )


def residual_conv_net(settings: FitSettings, layout: Layout) -> nn.Module:
    """A residual convolutional network; for few levels it predicts their probabilities."""
    _check_images(settings, layout)
    assert settings.width and settings.blocks
    levels = layout.levels or 0
    reads_levels = settings.denoiser == "data" and 0 < levels <= _READABLE_LEVELS
    return ResidualConvNet(
        layout.event_shape,
        channels=settings.width,
        blocks=settings.blocks,
        levels=levels if reads_levels else 0,
        context_size=layout.context_size,
        learned_variance=layout.learned_variance,
        fourier=() if reads_levels else (2.0, 4.0, 8.0),
        dropout=settings.dropout or 0.0,
    )


def unet(settings: FitSettings, layout: Layout) -> nn.Module:
    """The U-Net of diffusers, with two resolutions."""
    _check_images(settings, layout)
    assert settings.width and settings.blocks
    return UNet(
        layout.event_shape,
        channels=(settings.width, 2 * settings.width),
        layers=settings.blocks,
        context_size=layout.context_size,
        learned_variance=layout.learned_variance,
        dropout=settings.dropout or 0.0,
    )


def _check_images(settings: FitSettings, layout: Layout) -> None:
    if len(layout.event_shape) != 3:
        raise ValueError(
            f"Expected images (channels, height, width) for network {settings.network!r}; "
            f"got events of shape {layout.event_shape}. Use network 'mlp'."
        )


def min_snr_loss(timesteps: Timesteps) -> Objective:
    """The weighted loss of Hang et al. (2023)."""
    return WeightedLoss(MinSNR(), timesteps)


def make_network(
    settings: FitSettings, event_shape: tuple[int, ...], levels: int | None, context_size: int
) -> nn.Module:
    """The network of complete settings (see ``settings.recipe``).

    Raises:
        ValueError: a network that does not suit the data.
    """
    learned = CHOICES["variance"][settings.variance or ""].resolve().learned
    layout = Layout(event_shape, levels, context_size, learned)
    return make("network", settings.network, settings, layout)


def make_model(
    settings: FitSettings, event_shape: tuple[int, ...], levels: int | None, context_size: int = 0
) -> ReverseChain:
    """The reverse chain of complete settings, with fresh weights (from torch's global generator).

    Raises:
        ValueError: a network that does not suit the data.
    """
    network = make_network(settings, event_shape, levels, context_size)
    schedule = make("schedule", settings.schedule, **settings.to_dict())
    bin_width = None if levels is None else 2 / (levels - 1)
    return ReverseChain(
        make("denoiser", settings.denoiser, network),
        ForwardChain(schedule, settings.num_steps),
        event_shape,
        variance=make("variance", settings.variance),
        decoder=make("decoder", settings.decoder, levels=levels, bin_width=bin_width),
    )


def make_objective(settings: FitSettings) -> Objective:
    """The objective of the settings."""
    timesteps = make("timesteps", settings.timesteps, **settings.to_dict())
    return make("objective", settings.objective, timesteps=timesteps)


def make_estimator(
    settings: EvaluationSettings, learned: Pilot | MarginalTwist | None = None
) -> Estimator:
    """The estimator of the settings.

    Args:
        settings: ``particles`` of None is the estimator's own default.
        learned: from other data: the termwise bound's pilot, the particle bound's twist, or None.
    """
    return make("estimator", settings.estimator, learned=learned, **settings.to_dict())


def load_model(folder: Path) -> ReverseChain:
    """The model of a run, in evaluation mode."""
    return ReverseChain.load(folder).eval()
