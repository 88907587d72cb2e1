"""The bound term by term: strata of t, control variates, and a pilot."""

from pyrodiff.likelihood.termwise.bound import TermwiseBound
from pyrodiff.likelihood.termwise.pilot import Pilot

__all__ = ["Pilot", "TermwiseBound"]
