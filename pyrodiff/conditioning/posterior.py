"""What conditioning gives: weighted samples, the evidence with its error, and how it went."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrodiff.checks import check_count
from pyrodiff.conditioning.likelihoods import Likelihood
from pyrodiff.likelihood.arviz import assembled
from pyrodiff.likelihood.estimates import pareto_k
from pyrodiff.likelihood.particles.smc import Population

__all__ = ["History", "Posterior"]


@dataclass(eq=False)
class History:
    """How the particles fared: one entry for each t that was rated, from T down, and one for 0.

    Attributes:
        timesteps: t.
        effective_samples: of the weights times the twist, before resampling.
        ancestors: how many of the first particles have descendants.
        resampled: whether particles were resampled there.
        pareto_k: k̂ of the weights times the twist where they were resampled, and at the end.
    """

    timesteps: list[int] = field(default_factory=list)
    effective_samples: list[float] = field(default_factory=list)
    ancestors: list[int] = field(default_factory=list)
    resampled: list[bool] = field(default_factory=list)
    pareto_k: list[float] = field(default_factory=list)

    def add(self, t: int, population: Population, log_weights: Tensor, few: Tensor) -> None:
        """Take note of the particles of one sample."""
        self.timesteps.append(t)
        self.effective_samples.append(_effective(log_weights[0]))
        self.ancestors.append(len(population.eves[0].unique()))
        self.resampled.append(bool(few[0]))
        if t == 0 or few[0]:
            self.pareto_k.append(float(pareto_k(log_weights[:1].cpu())[0]))


def _effective(log_weights: Tensor) -> float:
    return float(1 / log_weights.softmax(-1).square().sum())


@dataclass(frozen=True, eq=False)
class Posterior:
    """Weighted samples of p_θ(x_0 | y) and an estimate of the evidence log p_θ(y).

    Args:
        samples: x_0 of each particle, shape (K, *event_shape).
        log_weights: nats, float64, shape (K,); the log of their mean is ``log_evidence``.
        log_evidence: log Ẑ, nats, with E Ẑ = p_θ(y).
        std_error: of ``log_evidence``, nats, read off the genealogy; NaN where that cannot tell it.
        degrees_of_freedom: of Student's t for its interval.
        calls: network calls, products with the Jacobian counted.
        likelihood: how p(y | x_0) was expanded for the twists.
        history: effective number and ancestors along t.
        remarks: why the error is NaN, where it is.
    """

    samples: Tensor
    log_weights: Tensor
    log_evidence: float
    std_error: float
    degrees_of_freedom: float
    calls: int
    likelihood: Likelihood
    history: History
    remarks: str = ""

    def __repr__(self) -> str:
        return (
            f"Posterior(log_evidence={self.log_evidence:.3f} ± {self.std_error:.3f} nats, "
            f"{len(self.samples)} particles, {self.effective_samples:.0f} effective, "
            f"{self.calls} network calls, {self.likelihood!r})"
        )

    @property
    def weights(self) -> Tensor:
        """Of sum 1, float64, shape (K,)."""
        return self.log_weights.softmax(0)

    @property
    def effective_samples(self) -> float:
        """(Σ w)²/Σ w² of the final weights (Kish, 1965); copies count as different."""
        return _effective(self.log_weights)

    @property
    def pareto_k(self) -> float:
        """The largest k̂ of weights that particles were resampled by, and of the final ones.

        Below 0.7 their means are to be trusted (Vehtari et al., 2024).  NaN where none can be told:
        for K < 30, and for weights all alike, which have no tail.
        """
        return max((k for k in self.history.pareto_k if not math.isnan(k)), default=math.nan)

    def mean(self) -> Tensor:
        """E[x_0 | y], float64, shape (*event_shape)."""
        return torch.einsum("k,k...->...", self.weights, self.samples.double())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Of log p_θ(y), nats, by Student's t; NaN where the error is."""
        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1; got {level!r}.")
        from scipy.stats import t

        half = float(t.ppf(0.5 + level / 2, max(self.degrees_of_freedom, 1e-3))) * self.std_error
        return self.log_evidence - half, self.log_evidence + half

    def resample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Samples of equal weight, shape (num_samples, *event_shape), drawn with replacement.

        They hold no more than ``effective_samples`` independent ones.
        """
        check_count("num_samples", num_samples)
        if not math.isfinite(self.log_evidence):
            raise ValueError(f"Expected finite weights; got log evidence {self.log_evidence}.")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        return self.samples[rows]

    def to_inference_data(self, num_samples: int | None = None, *, seed: int = 0) -> Any:
        """``arviz.InferenceData`` (0.23) or ``xarray.DataTree`` (1.x) of draws of equal weight.

        The group ``posterior`` has the variable ``x_0`` (chain, draw, …), resampled; its attributes
        are the evidence, its error and the effective number of particles.  ArviZ's own effective
        sample size does not know that draws are copies of each other.

        Args:
            num_samples: draws; default as many as particles.
            seed: of the resampling.
        """
        import xarray

        draws = self.resample(num_samples or len(self.samples), seed=seed)
        axes = ["chain", "draw", *(f"x_0_dim_{axis}" for axis in range(draws.dim() - 1))]
        attributes = {
            "log_evidence": self.log_evidence,
            "std_error": self.std_error,
            "effective_samples": self.effective_samples,
            "calls": self.calls,
        }
        group = xarray.Dataset({"x_0": (axes, draws[None].numpy())}, attrs=attributes)
        return assembled({"posterior": group})
