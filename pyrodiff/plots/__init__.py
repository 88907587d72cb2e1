"""Figures: each function draws on the axes passed to it, or on new ones, and returns them.

samples_grid, samples_scatter           samples
trajectory_strip, trajectory_points     their trajectories through the chain
schedule, terms                         a chain: its noise, and the bound step by step
bound_ladder, pareto_k                  how tight a bound is, and whether to trust its weights
forest                                  models side by side, with errors
density_map                             densities in two dimensions, side by side

Functions with several panels take and return a list of axes.  No global state changes: the figure
of new axes is ``axes.figure``, and ``axes.figure.savefig(…)`` writes it.
"""

from pyrodiff.plots.chain import schedule, terms
from pyrodiff.plots.density import density_map, map_points
from pyrodiff.plots.forests import forest
from pyrodiff.plots.ladders import bound_ladder, ladder
from pyrodiff.plots.particles import particles
from pyrodiff.plots.samples import (
    samples_grid,
    samples_scatter,
    trajectory_points,
    trajectory_strip,
)
from pyrodiff.plots.weights import pareto_k

__all__ = [
    "bound_ladder",
    "density_map",
    "forest",
    "ladder",
    "map_points",
    "pareto_k",
    "particles",
    "samples_grid",
    "samples_scatter",
    "schedule",
    "terms",
    "trajectory_points",
    "trajectory_strip",
]
