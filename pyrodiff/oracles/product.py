r"""Independent blocks of dimensions: log p(x) = Σ_i log p_i(x_i), x = (x_1, …, x_B) concatenated.

A chain over d dimensions with a ``ProductNetwork`` factorises, as its noise, its variances and
its decoder are diagonal: its log-likelihood is the sum of those of the blocks' own chains, which
a ``GridOracle`` gives for any network over one dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Product", "ProductNetwork"]


class ProductNetwork(nn.Module):
    """A network per block of dimensions, on events of shape (d,), d = Σ sizes.

    Args:
        networks: one per block, each called with (N, size), (N,) and the context; the same module
            may stand for several blocks.  A network may double its output for a learned
            variance; then all must.
        sizes: dimensions of each block; default 1 each.

    Shape: ``(N, d)``, ``(N,)``, any context to ``(N, d)``, or ``(N, 2d)`` (means first).

    Raises:
        ValueError: no network, sizes that are not one per network, x of another size.
    """

    def __init__(self, networks: Sequence[nn.Module], sizes: Sequence[int] | None = None):
        super().__init__()
        self.sizes = [1] * len(networks) if sizes is None else [int(size) for size in sizes]
        if len(networks) == 0 or len(self.sizes) != len(networks) or min(self.sizes) < 1:
            raise ValueError(
                "Expected at least one network and one size >= 1 for each; "
                f"got {len(networks)} networks and sizes {self.sizes}."
            )
        distinct = list(dict.fromkeys(networks))
        self.networks = nn.ModuleList(distinct)
        self.index = [distinct.index(network) for network in networks]

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        if x.dim() != 2 or x.shape[1] != sum(self.sizes):
            raise ValueError(f"Expected x of shape (N, {sum(self.sizes)}); got {tuple(x.shape)}.")
        rest = (time,) if context is None else (time, context)
        blocks = zip(self.index, x.split(self.sizes, dim=1), strict=True)
        outputs = [self.networks[i](block, *rest) for i, block in blocks]
        pairs = zip(outputs, self.sizes, strict=True)
        doubled = [output.shape[1] // size for output, size in pairs]
        if any(d != doubled[0] for d in doubled):
            raise ValueError(
                "Expected all networks to double their output, or none; got outputs of "
                f"{doubled} times their block's size."
            )
        halves = zip(*(output.chunk(doubled[0], dim=1) for output in outputs), strict=True)
        return torch.cat([block for half in halves for block in half], dim=1)


class Product:
    """The product of independent laws: ``Gaussian``, ``GaussianMixture``, ``GridOracle``, …

    Args:
        oracles: each with ``event_shape`` (d_i,) and ``log_prob``; and with ``sample`` and
            ``network`` where those are asked for.

    Raises:
        ValueError: no oracle, x of another size.
        TypeError: a network asked for where an oracle has none.
    """

    def __init__(self, *oracles: Any):
        if not oracles:
            raise ValueError("Expected at least one oracle; got none.")
        self.oracles = oracles
        self.sizes = [int(oracle.event_shape.numel()) for oracle in oracles]
        self.event_shape = torch.Size([sum(self.sizes)])

    def log_prob(self, x: Tensor) -> Tensor:
        """Σ_i log p_i(x_i) in nats, (N, d) to (N,)."""
        if x.dim() != 2 or x.shape[1] != sum(self.sizes):
            raise ValueError(f"Expected x of shape (N, {sum(self.sizes)}); got {tuple(x.shape)}.")
        blocks = zip(self.oracles, x.split(self.sizes, dim=1), strict=True)
        return torch.stack([oracle.log_prob(block) for oracle, block in blocks]).sum(0)

    def sample(self, n: int, seed: int) -> Tensor:
        """n samples, shape (N, d); each block has a seed of its own, drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**31, (len(self.oracles),), generator=generator).tolist()
        pairs = zip(self.oracles, seeds, strict=True)
        return torch.cat([oracle.sample(n, seed=s) for oracle, s in pairs], dim=1)

    def network(self, prediction: str = "noise") -> ProductNetwork:
        """The blocks' optimal networks side by side, which is the optimal one of the product."""
        for oracle in self.oracles:
            if not hasattr(oracle, "network"):
                raise TypeError(f"Expected oracles that have a network; got {oracle!r}.")
        return ProductNetwork([oracle.network(prediction) for oracle in self.oracles], self.sizes)
