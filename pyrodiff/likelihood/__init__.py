"""Per-sample log-likelihood with its standard error: one file per estimator, one result type."""

from pyrodiff.likelihood.estimator import Estimator
from pyrodiff.likelihood.importance import ImportanceBound
from pyrodiff.likelihood.path import PathBound
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.termwise import TermwiseBound

__all__ = ["Estimator", "ImportanceBound", "LogLikelihood", "PathBound", "TermwiseBound"]
