"""Figures; each function draws on given axes, or new ones, and returns them.

samples_grid, samples_scatter           samples
trajectory_strip, trajectory_points     samples on their way through the chain
schedule, terms                         a chain: its noise, and the bound step by step
bound_ladder, pareto_k                  how tight a bound is, and whether its weights are good
forest                                  models side by side, with errors
density_map                             a density in two dimensions beside the truth

Functions of several panels take and return a list of axes.  Nothing global is touched: the figure
of new axes is ``axes.figure``, and ``axes.figure.savefig(…)`` writes it.
"""

from pyrodiff.plots.bounds import bound_ladder, ladder, pareto_k
from pyrodiff.plots.chain import schedule, terms
from pyrodiff.plots.density import density_map, map_points
from pyrodiff.plots.models import forest
from pyrodiff.plots.samples import (
    samples_grid,
    samples_scatter,
    trajectory_points,
    trajectory_strip,
)

__all__ = [
    "bound_ladder",
    "density_map",
    "forest",
    "ladder",
    "map_points",
    "pareto_k",
    "samples_grid",
    "samples_scatter",
    "schedule",
    "terms",
    "trajectory_points",
    "trajectory_strip",
]
