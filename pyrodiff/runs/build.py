"""From settings (plain values) to the objects that they name."""

from collections.abc import Callable

from torch import nn

from pyrodiff import decoders, denoisers, networks, objectives, schedules, timesteps, variances
from pyrodiff.chains import ForwardChain, ReverseChain
from pyrodiff.runs.settings import FitSettings

__all__ = ["make_model", "make_network", "make_objective"]

_DENOISERS: dict[str, Callable[..., denoisers.Denoiser]] = {
    "noise": denoisers.NoiseDenoiser,
    "data": denoisers.DataDenoiser,
    "velocity": denoisers.VelocityDenoiser,
    "mean": denoisers.MeanDenoiser,
}
_VARIANCES: dict[str, type[variances.Variance]] = {
    "fixed-small": variances.FixedSmall,
    "fixed-large": variances.FixedLarge,
    "learned-range": variances.LearnedRange,
    "learned-diagonal": variances.LearnedDiagonal,
}
_TIMESTEPS: dict[str, Callable[[], timesteps.Timesteps]] = {
    "low-discrepancy": timesteps.LowDiscrepancyTimesteps,
    "uniform": timesteps.UniformTimesteps,
    "all": timesteps.AllTimesteps,
}


def make_network(
    settings: FitSettings, event_shape: tuple[int, ...], levels: int | None, context_size: int
) -> nn.Module:
    """The network of complete settings (see ``settings.recipe``)."""
    learned = _VARIANCES[settings.variance or ""].learned
    assert settings.width and settings.blocks
    width = settings.width
    if settings.network == "mlp":
        return networks.ResidualMLP(
            event_shape,
            width=width,
            blocks=settings.blocks,
            context_size=context_size,
            learned_variance=learned,
            fourier=(1.0, 2.0, 4.0) if len(event_shape) == 1 and event_shape[0] <= 8 else (),
            dropout=settings.dropout or 0.0,
        )
    if len(event_shape) != 3:
        raise ValueError(
            f"Expected images (channels, height, width) for network {settings.network!r}; "
            f"got events of shape {event_shape}. Use network 'mlp'."
        )
    if settings.network == "unet":
        return networks.UNet(
            event_shape,
            channels=(width, 2 * width),
            layers=settings.blocks,
            context_size=context_size,
            learned_variance=learned,
            dropout=settings.dropout or 0.0,
        )
    reads_levels = settings.denoiser == "data" and levels is not None and levels <= 32
    return networks.ResidualConvNet(
        event_shape,
        channels=width,
        blocks=settings.blocks,
        levels=(levels or 0) if reads_levels else 0,
        context_size=context_size,
        learned_variance=learned,
        fourier=() if reads_levels else (2.0, 4.0, 8.0),
        dropout=settings.dropout or 0.0,
    )


def _make_schedule(settings: FitSettings) -> schedules.Schedule:
    if settings.schedule == "linear":
        return schedules.LinearSchedule()
    if settings.schedule == "cosine":
        return schedules.CosineSchedule()
    assert settings.log_snr_max is not None and settings.log_snr_min is not None
    return schedules.LogSNRSchedule(settings.log_snr_max, settings.log_snr_min)


def _make_decoder(settings: FitSettings, levels: int | None) -> decoders.Decoder:
    if levels is None:
        return decoders.GaussianDecoder()
    if settings.decoder == "categorical":
        return decoders.CategoricalDecoder(levels)
    return decoders.DiscretizedGaussianDecoder(2 / (levels - 1))


def make_model(
    settings: FitSettings, event_shape: tuple[int, ...], levels: int | None, context_size: int = 0
) -> ReverseChain:
    """The reverse chain of complete settings, with fresh weights (from torch's global generator).

    Raises:
        ValueError: a network that does not suit the data.
    """
    network = make_network(settings, event_shape, levels, context_size)
    return ReverseChain(
        _DENOISERS[settings.denoiser or ""](network),
        ForwardChain(_make_schedule(settings), settings.num_steps),
        event_shape,
        variance=_VARIANCES[settings.variance or ""](),
        decoder=_make_decoder(settings, levels),
    )


def make_objective(settings: FitSettings) -> objectives.Objective:
    """The objective of the settings."""
    if settings.timesteps == "loss-aware":
        rule: timesteps.Timesteps = timesteps.LossAwareTimesteps(settings.num_steps)
    else:
        rule = _TIMESTEPS[settings.timesteps]()
    if settings.objective == "min-snr":
        return objectives.WeightedLoss(objectives.MinSNR(), rule)
    kinds: dict[str, type[objectives.Objective]] = {
        "vlb": objectives.VariationalBound,
        "simple": objectives.NoiseLoss,
        "mean": objectives.MeanLoss,
        "hybrid": objectives.HybridLoss,
    }
    return kinds[settings.objective](timesteps=rule)
