r"""How samples, training seeds and noise belong together, and the level of each interval.

M models have several differences, whose intervals cover all of them together: the level of each is
1 − (1 − level)/m (Bonferroni), with m = M − 1 for a reference that was named beforehand, and
M(M − 1)/2 for the best of them, because which one that is depends on all pairs.
"""

from typing import NamedTuple

from torch import Tensor

from pyrodiff.comparison.errors import Error, standard_error
from pyrodiff.comparison.model_results import ModelResults

__all__ = ["Design"]


class Design(NamedTuple):
    """Clusters, pairing and noise of a comparison, and its level.

    Args:
        clusters: 0 … G − 1 of each sample, shape (N,).
        paired_seeds: whether training seed s of one model corresponds to seed s of another.
        common_noise: whether the models were given the same noise; None: unknown.
        level: of all intervals together.
        pairs: m, the number of differences that are looked at.
    """

    clusters: Tensor
    paired_seeds: bool
    common_noise: bool | None
    level: float
    pairs: int = 1

    @property
    def interval_level(self) -> float:
        """Of each interval by itself."""
        return 1 - (1 - self.level) / self.pairs

    @property
    def verdict_level(self) -> float:
        """Of the two-sided interval on which a verdict rests.

        Both its ends may give a verdict, and both would be wrong for identical models: over m
        pairs and both directions that has a probability of at most (1 − level)/2.
        """
        return 1 - (1 - self.level) / (2 * self.pairs)

    def error(self, d: Tensor, a: ModelResults, b: ModelResults) -> Error:
        """The error of the mean of d, shape (N,), made of the values of A and B."""
        models = [a.values - b.values] if self.paired_seeds else [a.values, b.values]
        return standard_error(d, models, self.clusters)
