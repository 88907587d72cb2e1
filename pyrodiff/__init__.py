"""pyrodiff: variational diffusion models as Pyro programs.

The forward chain q(x_1:T | x_0) is a Pyro guide, the reverse chain p_θ(x_0:T) a Pyro model;
objectives, likelihood bounds and samplers are inference on that pair.

>>> from pyrodiff import ForwardChain, ReverseChain, LogSNRSchedule, NoiseDenoiser, ResidualMLP
>>> forward = ForwardChain(LogSNRSchedule(), num_steps=100)
>>> reverse = ReverseChain(NoiseDenoiser(ResidualMLP((2,))), forward, event_shape=(2,))

Names are imported when they are first used, so that ``import pyrodiff`` itself costs next to
nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyrodiff._version import __version__

if TYPE_CHECKING:
    from pyrodiff.chains import ForwardChain as ForwardChain
    from pyrodiff.chains import NonCentered as NonCentered
    from pyrodiff.chains import ReverseChain as ReverseChain
    from pyrodiff.conditioning import TwistedSMC as TwistedSMC
    from pyrodiff.decoders import CategoricalDecoder as CategoricalDecoder
    from pyrodiff.decoders import Decoder as Decoder
    from pyrodiff.decoders import DiscretizedGaussianDecoder as DiscretizedGaussianDecoder
    from pyrodiff.decoders import GaussianDecoder as GaussianDecoder
    from pyrodiff.denoisers import DataDenoiser as DataDenoiser
    from pyrodiff.denoisers import Denoiser as Denoiser
    from pyrodiff.denoisers import MeanDenoiser as MeanDenoiser
    from pyrodiff.denoisers import NoiseDenoiser as NoiseDenoiser
    from pyrodiff.denoisers import VelocityDenoiser as VelocityDenoiser
    from pyrodiff.grids import Grid as Grid
    from pyrodiff.grids import LogSNRGrid as LogSNRGrid
    from pyrodiff.grids import OptimalGrid as OptimalGrid
    from pyrodiff.grids import QuadraticGrid as QuadraticGrid
    from pyrodiff.grids import UniformGrid as UniformGrid
    from pyrodiff.kernels import Level as Level
    from pyrodiff.kernels import Step as Step
    from pyrodiff.likelihood import Dequantized as Dequantized
    from pyrodiff.likelihood import Estimator as Estimator
    from pyrodiff.likelihood import ImportanceBound as ImportanceBound
    from pyrodiff.likelihood import LogLikelihood as LogLikelihood
    from pyrodiff.likelihood import ParticleBound as ParticleBound
    from pyrodiff.likelihood import PathBound as PathBound
    from pyrodiff.likelihood import Pilot as Pilot
    from pyrodiff.likelihood import ProbabilityFlow as ProbabilityFlow
    from pyrodiff.likelihood import SandwichBound as SandwichBound
    from pyrodiff.likelihood import TermwiseBound as TermwiseBound
    from pyrodiff.networks import ResidualConvNet as ResidualConvNet
    from pyrodiff.networks import ResidualMLP as ResidualMLP
    from pyrodiff.networks import UNet as UNet
    from pyrodiff.networks import VarianceHead as VarianceHead
    from pyrodiff.objectives import HybridLoss as HybridLoss
    from pyrodiff.objectives import MeanLoss as MeanLoss
    from pyrodiff.objectives import NoiseLoss as NoiseLoss
    from pyrodiff.objectives import Objective as Objective
    from pyrodiff.objectives import RenyiBound as RenyiBound
    from pyrodiff.objectives import VarianceMatching as VarianceMatching
    from pyrodiff.objectives import VariationalBound as VariationalBound
    from pyrodiff.objectives import WeightedLoss as WeightedLoss
    from pyrodiff.objectives import variational_term as variational_term
    from pyrodiff.samplers import DDIM as DDIM
    from pyrodiff.samplers import ProbabilityFlowSampler as ProbabilityFlowSampler
    from pyrodiff.samplers import Sampler as Sampler
    from pyrodiff.schedules import BetaSchedule as BetaSchedule
    from pyrodiff.schedules import CosineSchedule as CosineSchedule
    from pyrodiff.schedules import LinearSchedule as LinearSchedule
    from pyrodiff.schedules import LogSNRSchedule as LogSNRSchedule
    from pyrodiff.schedules import Schedule as Schedule
    from pyrodiff.schedules import TabulatedSchedule as TabulatedSchedule
    from pyrodiff.timesteps import AllTimesteps as AllTimesteps
    from pyrodiff.timesteps import LossAwareTimesteps as LossAwareTimesteps
    from pyrodiff.timesteps import LowDiscrepancyTimesteps as LowDiscrepancyTimesteps
    from pyrodiff.timesteps import Timesteps as Timesteps
    from pyrodiff.timesteps import UniformTimesteps as UniformTimesteps
    from pyrodiff.vae import VAE as VAE
    from pyrodiff.variances import AnalyticVariance as AnalyticVariance
    from pyrodiff.variances import FixedLarge as FixedLarge
    from pyrodiff.variances import FixedSmall as FixedSmall
    from pyrodiff.variances import LearnedDiagonal as LearnedDiagonal
    from pyrodiff.variances import LearnedPosterior as LearnedPosterior
    from pyrodiff.variances import LearnedRange as LearnedRange
    from pyrodiff.variances import PosteriorCovariance as PosteriorCovariance
    from pyrodiff.variances import Variance as Variance

# The five concepts with their kinds, by the module that holds them.
_MODULES = {
    "schedules": "Schedule LinearSchedule CosineSchedule LogSNRSchedule BetaSchedule "
    "TabulatedSchedule",
    "kernels": "Level Step",
    "chains": "ForwardChain ReverseChain NonCentered",
    "denoisers": "Denoiser NoiseDenoiser DataDenoiser VelocityDenoiser MeanDenoiser",
    "variances": "Variance FixedSmall FixedLarge LearnedRange LearnedDiagonal LearnedPosterior "
    "AnalyticVariance PosteriorCovariance",
    "grids": "Grid UniformGrid QuadraticGrid LogSNRGrid OptimalGrid",
    "samplers": "Sampler DDIM ProbabilityFlowSampler",
    "decoders": "Decoder GaussianDecoder DiscretizedGaussianDecoder CategoricalDecoder",
    "networks": "ResidualMLP ResidualConvNet UNet VarianceHead",
    "timesteps": "Timesteps LowDiscrepancyTimesteps UniformTimesteps LossAwareTimesteps "
    "AllTimesteps",
    "objectives": "Objective VariationalBound NoiseLoss MeanLoss HybridLoss WeightedLoss "
    "RenyiBound VarianceMatching variational_term",
    "likelihood": "Estimator LogLikelihood TermwiseBound Pilot PathBound ImportanceBound "
    "ParticleBound SandwichBound ProbabilityFlow Dequantized",
    "conditioning": "TwistedSMC",
    "vae": "VAE",
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names.split()}
_ROOMS = ("comparison", "data", "oracles", "plots", "training", "runs")
__all__ = ["__version__", *_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"pyrodiff.{_NAMES[name]}"), name)
    elif name in _MODULES or name in _ROOMS:
        value = importlib.import_module(f"pyrodiff.{name}")
    else:
        raise AttributeError(f"module 'pyrodiff' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, *_ROOMS])
