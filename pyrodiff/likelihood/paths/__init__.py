"""Bounds from the weights of whole paths."""

from pyrodiff.likelihood.paths.elbo import PathBound
from pyrodiff.likelihood.paths.importance import ImportanceBound
from pyrodiff.likelihood.paths.sandwich import Sandwich, SandwichBound

__all__ = ["ImportanceBound", "PathBound", "Sandwich", "SandwichBound"]
