"""Per-sample log-likelihood with its standard error: one file per estimator, one result type.

TermwiseBound     a budget of network calls, or a standard error to reach      lower bound
PathBound         whole paths                                                  lower bound
ImportanceBound   the mean weight of K paths                                   lower bound
ParticleBound     K particles that are resampled on their way                  lower bound
SandwichBound     samples of the model itself, from both sides                 both bounds
ProbabilityFlow   the density of the ordinary differential equation            estimate
Dequantized       a density's probability of discrete data, by any of them     as that one
"""

from pyrodiff.likelihood.dequantization import Dequantized
from pyrodiff.likelihood.dequantizers import UniformDequantizer, VariationalDequantizer
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.flow.density import ProbabilityFlow
from pyrodiff.likelihood.particles.bound import ParticleBound
from pyrodiff.likelihood.particles.twists import DenoisedTwist, MarginalTwist, NoTwist
from pyrodiff.likelihood.paths.elbo import PathBound
from pyrodiff.likelihood.paths.importance import ImportanceBound
from pyrodiff.likelihood.paths.sandwich import Sandwich, SandwichBound
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.termwise.bound import TermwiseBound
from pyrodiff.likelihood.termwise.pilot import Pilot

__all__ = [
    "Batch",
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
