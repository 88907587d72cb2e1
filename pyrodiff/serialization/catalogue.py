"""The classes that a file may name: pyrodiff's own, by kind."""

from torch import nn

from pyrodiff import decoders, denoisers, networks, schedules, variances
from pyrodiff.serialization.descriptions import own_classes

__all__ = ["BASES", "OWN"]

BASES: dict[str, type] = {
    "schedule": schedules.Schedule,
    "variance": variances.Variance,
    "decoder": decoders.Decoder,
    "denoiser": denoisers.Denoiser,
    "network": nn.Module,
}
"""What every object of a kind is an instance of."""

_MODULES = {
    "schedule": schedules,
    "denoiser": denoisers,
    "variance": variances,
    "decoder": decoders,
    "network": networks,
}
OWN = {kind: own_classes(module, BASES[kind]) for kind, module in _MODULES.items()}
"""The classes of each kind by name."""
