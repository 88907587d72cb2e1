r"""The steps that a pilot looks at, its nodes, and what is known of the steps between them.

Nodes are spread over the chain as calls are without a pilot, with both sides of every step that
stands apart.  Coefficients are interpolated between them, linearly in λ.
"""

import torch
from torch import Tensor

__all__ = ["interpolation", "middles", "pilot_nodes", "sides"]

_COUNT = 20  # nodes, beside the ends and those at steps that stand apart


def pilot_nodes(density: Tensor, alone: Tensor) -> Tensor:
    """Steps from 1 to T, even in the density's mass, and both sides of those that stand apart."""
    mass = density.cumsum(0) / density.sum()
    shares = (torch.arange(_COUNT, dtype=torch.float64) + 0.5) / _COUNT
    even = torch.searchsorted(mass, shares) + 1
    special = alone.nonzero().flatten() + 1
    steps = torch.cat([even, special - 1, special, special + 1, torch.tensor([len(density)])])
    return steps.clamp(1, len(density)).unique()


def middles(nodes: Tensor, log_snr: Tensor) -> Tensor:
    """The steps half way between the nodes, in λ, where there are steps between them."""
    ends = log_snr[nodes - 1]
    between = torch.searchsorted(-log_snr, -0.5 * (ends[1:] + ends[:-1])) + 1
    between = between.clamp(max=len(log_snr))
    return between[~torch.isin(between, nodes)]


def sides(nodes: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """The numbers of the nodes on either side of each t = 1 … T; a node is on both of its own."""
    t = torch.arange(1, num_steps + 1)
    right = torch.searchsorted(nodes, t)
    return torch.where(nodes[right] == t, right, right - 1), right


def interpolation(nodes: Tensor, log_snr: Tensor) -> Tensor:
    """Weights over the nodes for each t = 1 … T, linear in λ, shape (T, J); nodes hold 1 and T."""
    left, right = sides(nodes, len(log_snr))
    ends = log_snr[nodes - 1]
    gap = ends[left] - ends[right]
    share = torch.where(gap > 0, (ends[left] - log_snr) / gap.clamp(min=1e-12), 0.0)
    weights = torch.zeros(len(log_snr), len(nodes), dtype=torch.float64)
    weights.scatter_(1, left[:, None], 1 - share[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])
