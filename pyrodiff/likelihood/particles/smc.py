r"""Sequential Monte Carlo in reverse time: K weighted particles carried from x_T to x_0.

A potential ψ_t(x_t) > 0 rates how well x_t will explain what is conditioned on, and a proposal q
draws x_{t−1} from x_t.  With π(x_t:T) the model's density over q's, the particles at t are weighted
for the extended target p_θ(x_t:T) ψ_t(x_t) (Del Moral et al., 2006; Naesseth et al., 2019):

    w_T ∝ π(x_T) ψ_T(x_T),   w_{t−1} = w_t · π(x_{t−1} | x_t) · ψ_{t−1}(x_{t−1}) / ψ_t(x_t)

and at the last step ψ_0 = 1.  The weight is stored without its ψ_t, as that of the path so far: ψ
only decides which particles survive.  Where the effective number of particles (Σ w)²/Σ w² falls
below a share of K, ancestors a_k are drawn in proportion to w ψ and

    x_t^k ← x_t^{a_k},   w^k ← mean(w ψ) / ψ_t(x_t^{a_k}),

so that a constant factor in ψ_t has no effect, and the mean of the final weights is unbiased for
the normalising constant whatever ψ, K and the threshold.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.denoisers import Prediction
from pyrodiff.finite import NOTHING_FAILED
from pyrodiff.likelihood.paths.weights import Move, predict
from pyrodiff.likelihood.statistics import WIDEST, Summary, log_mean_exp, log_mean_of_weights
from pyrodiff.streams import NoiseStreams

__all__ = [
    "ParticleFilter",
    "Population",
    "Potential",
    "Proposal",
    "Record",
    "eve_weights",
    "evidence",
    "systematic",
]

EXTINCT = (
    "Some standard errors are NaN: half of the first particles or more have no descendants, and "
    "the rest do not tell the error."
)

Potential = Callable[[Tensor, int, Prediction], Tensor]  # log ψ_t of (x_t, t, prediction), (rows,)
# of t, the particles, log w ψ, (n, K), and which samples are resampled, (n,)
Record = Callable[[int, "Population", Tensor, Tensor], None]


class Proposal(ABC):
    """Where particles are drawn from, one row each, and their log π; rows in order of samples.

    ``last_draw`` is the smallest t from which something is drawn: 1, or 2 where x_0 is data.  Below
    it no particles are resampled, as that would lose some for nothing.
    """

    last_draw: int = 1

    @abstractmethod
    def first(self, streams: NoiseStreams) -> Move:
        """x_T and log π(x_T), shapes (rows, *event_shape) and (rows,)."""

    @abstractmethod
    def move(self, x_t: Tensor, t: int, prediction: Prediction, streams: NoiseStreams) -> Move:
        """x_{t−1} and log π(x_{t−1} | x_t) for t = T … 1; at t = 1 the rest of the target.

        Args:
            x_t: shape (rows, *event_shape).
            prediction: of the denoiser at (x_t, t).
            streams: one per row; any number of draws is taken from them.
        """


class Population(NamedTuple):
    """The particles of n samples.

    ``log_weights`` (n, K), nats, float64: of the paths so far; at the end, the log of the mean
    weight is log Ẑ.  ``eves`` (n, K): which of the K first particles each descends from.
    ``resamplings`` (n,): how often.  ``x`` (n · K, *event_shape).  ``failed`` (n,): the step at
    which a weight became NaN or +∞, or 0; all weights of such a sample are NaN in the end.
    """

    x: Tensor
    log_weights: Float[Tensor, "n K"]
    eves: Int[Tensor, "n K"]
    resamplings: Int[Tensor, " n"]
    failed: Tensor = NOTHING_FAILED

    def cpu(self) -> "Population":
        """The same on the CPU."""
        return Population(*(tensor.cpu() for tensor in self))


def systematic(
    log_weights: Float[Tensor, "n K"], uniform: Float[Tensor, "n 1"]
) -> Int[Tensor, "n K"]:
    """Ancestors in ascending order, each taken ⌊K W⌋ or ⌈K W⌉ times (Kitagawa, 1996)."""
    count = log_weights.shape[1]
    edges = log_weights.softmax(1).cumsum(1)
    points = (torch.arange(count, device=uniform.device) + uniform) / count
    ancestors = torch.searchsorted(edges, points * edges[:, -1:], right=True)
    return ancestors.clamp(max=count - 1)


def eve_weights(population: Population) -> Float[Tensor, "n K"]:
    """log of the sum of the weights that descend from each first particle; −∞ where none do."""
    log_w, eves = population.log_weights, population.eves
    first = torch.arange(log_w.shape[1], device=eves.device).unsqueeze(1)
    others = eves.unsqueeze(1) != first  # (n, K, K)
    return log_w.unsqueeze(1).masked_fill(others, -torch.inf).logsumexp(2)


def evidence(log_w: Float[Tensor, "n K"], widest: float = WIDEST) -> Summary:
    """log Ẑ of each sample and its error, from the ``eve_weights``.

    The error is NaN where half of the first particles or more have no descendants, and where the
    weights spread by more than ``widest`` nats below their median.
    """
    summary = log_mean_of_weights(log_w, widest=widest)
    extinct = log_w.isneginf().sum(1) >= 0.5 * log_w.shape[1]
    if not bool(extinct.any()):
        return summary
    remarks = "\n".join(filter(None, (summary.remarks, EXTINCT)))
    std_error = summary.std_error.masked_fill(extinct, torch.nan)
    return summary._replace(std_error=std_error, remarks=remarks)


@dataclass(frozen=True)
class ParticleFilter:
    """Propagation, weighting and resampling of the particles of several samples.

    Args:
        particles: K for each sample.
        threshold: resample a sample's particles where their effective number is below this share
            of K; 0 for never.
        rows: how many rows a network call may have.
    """

    particles: int
    threshold: float
    rows: int

    def run(
        self,
        reverse: ReverseChain,
        proposal: Proposal,
        potential: Potential,
        seed: int,
        indices: Sequence[int],
        context: Tensor | None = None,
        record: Record | None = None,
    ) -> Population:
        """n samples' particles from x_T to x_0, in K · T network calls per sample.

        Particle k of sample i moves by the stream (seed, i, k), and its resampling by (seed, i, K):
        no sample depends on another.

        Args:
            proposal, potential: of n · K rows, the particles of one sample side by side.
            seed, indices: of the noise streams; one index per sample.
            context: shape (n, …) or None.
            record: called before resampling at each t, and with t = 0 and log w at the end.
        """
        n, count = len(indices), self.particles
        streams = NoiseStreams(
            seed,
            [index for index in indices for _ in range(count)],
            reverse.event_shape,
            [*range(count)] * n,
        )
        uniforms = NoiseStreams(seed, indices, torch.Size([1]), [count] * n)
        context = None if context is None else context.repeat_interleave(count, 0)
        x, log_ratio = proposal.first(streams)
        eves = torch.arange(count, device=x.device).repeat(n, 1)
        now = Population(x, log_ratio.reshape(n, count), eves, torch.zeros_like(eves[:, 0]))
        for t in range(reverse.num_steps, 0, -1):
            prediction = self._predict(reverse, now.x, t, context)
            if self.threshold > 0 and t >= proposal.last_draw:
                log_psi = potential(now.x, t, prediction).reshape(n, count)
                few = self._few(now.log_weights + log_psi)
                if record is not None:
                    record(t, now, now.log_weights + log_psi, few[:, 0])
                uniform = torch.special.ndtr(uniforms.normal(log_psi))
                if bool(few.any()):
                    now, prediction = self._resample(now, prediction, log_psi, uniform, few=few)
            x, log_ratio = proposal.move(now.x, t, prediction, streams)
            log_w = now.log_weights + log_ratio.reshape(n, count)
            lost = (log_w.isnan() | log_w.isposinf()).any(1)  # −∞ is a weight of 0
            failed = torch.where(lost & (now.failed == 0), t, now.failed)
            now = now._replace(x=x, log_weights=log_w, failed=failed)
        if record is not None:
            record(0, now, now.log_weights, torch.zeros_like(now.resamplings, dtype=torch.bool))
        lost = (now.failed > 0).unsqueeze(1)
        return now._replace(log_weights=now.log_weights.masked_fill(lost, torch.nan))

    def _resample(
        self,
        now: Population,
        prediction: Prediction,
        log_psi: Tensor,
        uniform: Tensor,
        *,
        few: Tensor,
    ) -> tuple[Population, Prediction]:
        """The particles and their predictions after resampling in the ``few`` samples."""
        log_w = now.log_weights + log_psi
        stay = torch.arange(self.particles, device=log_w.device)
        ancestors = torch.where(few, systematic(log_w, uniform), stay)
        level = log_mean_exp(log_w).unsqueeze(1) - log_psi.gather(1, ancestors)
        x, prediction = _take(now.x, prediction, ancestors)
        moved = Population(
            x,
            torch.where(few, level, now.log_weights),
            now.eves.gather(1, ancestors),
            now.resamplings + few[:, 0],
            now.failed,
        )
        return moved, prediction

    def _few(self, log_weights: Tensor) -> Tensor:
        """Whether the effective number of particles is below the threshold, shape (n, 1)."""
        inverse = log_weights.softmax(1).square().sum(1, keepdim=True)
        return inverse * self.threshold * self.particles > 1

    def _predict(
        self, reverse: ReverseChain, x: Tensor, t: int, context: Tensor | None
    ) -> Prediction:
        """The prediction at (x, t), in network calls of at most ``rows`` rows."""
        if len(x) <= self.rows:
            return predict(reverse, x, t, context)
        blocks = x.split(self.rows)
        contexts = [None] * len(blocks) if context is None else context.split(self.rows)
        pairs = zip(blocks, contexts, strict=True)
        return Prediction.concatenate([predict(reverse, block, t, c) for block, c in pairs])


def _take(x: Tensor, prediction: Prediction, ancestors: Tensor) -> tuple[Tensor, Prediction]:
    """The rows of the ancestors; the network is not asked again."""
    n, count = ancestors.shape
    first = torch.arange(0, n * count, count, device=ancestors.device).unsqueeze(1)
    rows = (first + ancestors).flatten()
    return x[rows], prediction.map(lambda value: value[rows])
