"""Per-sample log-likelihood with its standard error: one file per estimator, one result type.

TermwiseBound     a budget of network calls, or a standard error to reach      lower bound
PathBound         whole paths                                                  lower bound
ImportanceBound   the mean weight of K paths                                   lower bound
ParticleBound     K particles that are resampled on their way                  lower bound
SandwichBound     samples of the model itself, from both sides                 both bounds
ProbabilityFlow   the density of the ordinary differential equation            estimate
Dequantized       a density's probability of discrete data, by any of them     as that one
"""

from pyrodiff.likelihood.dequantization import (
    Dequantized,
    UniformDequantizer,
    VariationalDequantizer,
)
from pyrodiff.likelihood.estimator import Estimator
from pyrodiff.likelihood.importance import ImportanceBound
from pyrodiff.likelihood.particle import ParticleBound
from pyrodiff.likelihood.path import PathBound
from pyrodiff.likelihood.pilot import Pilot
from pyrodiff.likelihood.probability_flow import ProbabilityFlow
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.sandwich import Sandwich, SandwichBound
from pyrodiff.likelihood.termwise import TermwiseBound
from pyrodiff.likelihood.twists import DenoisedTwist, MarginalTwist, NoTwist

__all__ = [
    "DenoisedTwist",
    "Dequantized",
    "Estimator",
    "ImportanceBound",
    "LogLikelihood",
    "MarginalTwist",
    "NoTwist",
    "ParticleBound",
    "PathBound",
    "Pilot",
    "ProbabilityFlow",
    "Sandwich",
    "SandwichBound",
    "TermwiseBound",
    "UniformDequantizer",
    "VariationalDequantizer",
]
