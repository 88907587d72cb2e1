"""Per-sample log-likelihood with its standard error: one file per estimator, one result type."""

from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.termwise import TermwiseBound

__all__ = ["LogLikelihood", "TermwiseBound"]
