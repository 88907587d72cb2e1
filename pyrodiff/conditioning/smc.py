r"""Posterior samples and the evidence of a Pyro program whose prior is a reverse chain.

The target is p_θ(x_0:T) p(y | x_0).  Particles go from x_T to x_0 by the chain's steps given y
(``proposals``), are rated by twists ψ_t(x_t) ≈ p(y | x_t), and resampled where few carry the weight
(``pyrodiff.likelihood.particles.smc``).  The mean of the final weights is unbiased for the evidence
p_θ(y), whatever the twist, the number of particles and the threshold (Del Moral, 2004; Wu et al.,
2023, for diffusion), and the weighted particles are consistent for p_θ(x_0 | y).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.conditioning.likelihoods import Likelihood, found
from pyrodiff.conditioning.posterior import History, Posterior
from pyrodiff.conditioning.programs import Program
from pyrodiff.conditioning.proposals import TwistedProposal
from pyrodiff.likelihood.particles.smc import ParticleFilter, Population, eve_weights, evidence
from pyrodiff.networks.modes import evaluation_mode

__all__ = ["TwistedSMC"]

_HEAVIEST = 0.7  # k̂ from which a mean of weights is not to be trusted (Vehtari et al., 2024)
HEAVY = (
    f"The standard error is NaN: k̂ of the weights is {_HEAVIEST} or more; try more particles, a "
    "wider twist or a better covariance."
)


@dataclass(frozen=True, eq=False)
class TwistedSMC:
    """Sequential Monte Carlo for a Pyro program that calls a chain and observes something of x_0.

    The program calls ``reverse()`` once, for one sample, and observes one or more sites downstream;
    it is written for x_0 of shape (1, *event_shape).  Any chain will do; the better its covariance,
    the fewer particles and steps are needed:

        reverse.respaced(100, variance=PosteriorCovariance("full"))

    Args:
        program: the Pyro program.
        reverse: the chain that it calls.
        particles: K.
        likelihood: how p(y | x_0) is expanded for the twists (``LinearGaussian``, ``Moments``,
            ``Gradient``, ``Blind``); default the sharpest that the program allows.
        threshold: resample where the effective number of particles is below this share of K.
        widening: w ≥ 1, by which the twists widen the covariance of x_0, for a trained denoiser
            whose Jacobian is overconfident.
        batch_size: rows of a network call.

    Raises:
        TypeError: a program that cannot be called, or no chain.
        ValueError: a number out of range.
    """

    program: Callable[..., Any]
    reverse: ReverseChain
    particles: int = 1024
    likelihood: Likelihood | None = None
    threshold: float = 0.5
    widening: float = 1.0
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if not callable(self.program):
            raise TypeError(f"Expected program to be a Pyro program; got {self.program!r}.")
        if not isinstance(self.reverse, ReverseChain):
            raise TypeError(f"Expected reverse to be a ReverseChain; got {self.reverse!r}.")
        check_count("particles", self.particles)
        check_count("batch_size", self.batch_size)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Expected threshold to be in [0, 1]; got {self.threshold!r}.")
        if not self.widening >= 1:
            raise ValueError(f"Expected widening to be at least 1; got {self.widening!r}.")

    @torch.no_grad()
    def run(self, *args: Any, seed: int = 0, **kwargs: Any) -> Posterior:
        """The posterior given the program's arguments, and its evidence.

        Args:
            args, kwargs: what the program is called with.
            seed: of all draws: the result is a function of it.

        Raises:
            ValueError: a program that does not call the chain once, for one sample, without data;
                one that observes nothing, or has latent sites beside the chain's.
        """
        program = Program(self.program, self.reverse, args, kwargs)
        likelihood = found(program, self.reverse) if self.likelihood is None else self.likelihood
        proposal = TwistedProposal(self.reverse, program, likelihood, self.widening)
        engine, history = ParticleFilter(self.particles, self.threshold, self.batch_size), History()
        with evaluation_mode(self.reverse):
            population = engine.run(
                self.reverse,
                proposal,
                proposal.potential,
                seed=seed,
                indices=[0],
                context=program.context,
                record=history.add,
            ).cpu()
        return self._posterior(population, likelihood, history)

    def _posterior(
        self, population: Population, likelihood: Likelihood, history: History
    ) -> Posterior:
        log_w = eve_weights(population)
        summary = evidence(log_w, widest=math.inf)  # particles of a wrong mode weigh nothing
        heavy = any(k >= _HEAVIEST for k in history.pareto_k)
        remarks = "\n".join(filter(None, (summary.remarks, HEAVY if heavy else "")))
        return Posterior(
            samples=population.x,
            log_weights=population.log_weights[0],
            log_evidence=float(summary.value),
            std_error=math.nan if heavy else float(summary.std_error),
            degrees_of_freedom=float(summary.degrees_of_freedom),
            calls=self.particles * self.reverse.calls_per_path + self.reverse.calls_per_step,
            likelihood=likelihood,
            history=history,
            remarks=remarks,
        )
