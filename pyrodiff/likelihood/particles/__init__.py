"""Bounds from particles that are resampled on their way."""

from pyrodiff.likelihood.particles.bound import ParticleBound
from pyrodiff.likelihood.particles.twists import DenoisedTwist, MarginalTwist, NoTwist

__all__ = ["DenoisedTwist", "MarginalTwist", "NoTwist", "ParticleBound"]
