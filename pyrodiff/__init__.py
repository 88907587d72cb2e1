"""pyrodiff: variational diffusion models as Pyro programs.

The forward chain q(x_1:T | x_0) is a Pyro guide, the reverse chain p_θ(x_0:T) a Pyro model;
objectives, likelihood bounds and samplers are inference on that pair.  Names are imported
when they are first used, so that ``import pyrodiff`` itself costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyrodiff._version import __version__

if TYPE_CHECKING:
    from pyrodiff.chains import ForwardChain as ForwardChain
    from pyrodiff.chains import ReverseChain as ReverseChain

__all__ = ["ForwardChain", "ReverseChain", "__version__"]

_CHAINS = ("ForwardChain", "ReverseChain")
_SUBMODULES = (
    "chains",
    "comparison",
    "data",
    "decoders",
    "denoisers",
    "kernels",
    "likelihood",
    "networks",
    "objectives",
    "oracles",
    "plots",
    "schedules",
    "timesteps",
    "training",
    "vae",
    "variances",
)


def __getattr__(name: str) -> Any:
    if name in _CHAINS:
        return getattr(importlib.import_module("pyrodiff.chains"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"pyrodiff.{name}")
    raise AttributeError(f"module 'pyrodiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
