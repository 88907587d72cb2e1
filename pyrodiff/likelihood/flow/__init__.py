"""The density that the probability-flow ODE gives."""

from pyrodiff.likelihood.flow.density import ProbabilityFlow

__all__ = ["ProbabilityFlow"]
