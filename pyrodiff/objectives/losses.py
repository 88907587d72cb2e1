"""The objectives: the bound, and weighted squared errors that are no bound."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_positive, renamed
from pyrodiff.kernels import Step
from pyrodiff.objectives.objective import Objective
from pyrodiff.objectives.visit import Visit
from pyrodiff.timesteps import Timesteps, UniformTimesteps

__all__ = [
    "HybridLoss",
    "MeanLoss",
    "MinSNR",
    "NoiseLoss",
    "SigmoidWeighting",
    "VariationalBound",
    "WeightedLoss",
]


class VariationalBound(Objective):
    r"""The negative evidence lower bound, in nats (Ho et al., 2020, equation 5): a bound.

        KL(q(x_T|x_0) ‖ p(x_T)) + Σ_{t=2}^T KL(q(x_{t−1}|x_t,x_0) ‖ p_θ(x_{t−1}|x_t))
                                − log p_θ(x_0|x_1)

    in expectation over the noise.  With subsampled t it is unbiased for that sum: a draw is an
    estimate of the bound, its mean the bound.

    Args:
        timesteps: ``LowDiscrepancyTimesteps()`` by default; ``AllTimesteps()`` for all terms.
        num_particles, seed: see ``Objective``.
    """

    def constant(self, reverse: ReverseChain, x_0: Tensor) -> Tensor | None:
        return reverse.forward_chain.prior_kl(x_0)

    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        return weight * visit.variational_term()


@renamed(generator="seed")
class WeightedLoss(Objective):
    r"""E_t[w(step) ‖ε − ε̂‖²], t uniform: not a bound.

    Args:
        weighting: called with the ``Step`` of the drawn t, whose entries have shape (N, 1, …);
            returns w in the same shape.
        timesteps: other rules than uniform are reweighted to the same expectation.
        num_particles, seed: see ``Objective``.
    """

    def __init__(
        self,
        weighting: Callable[[Step], Tensor],
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        seed: int | torch.Generator | None = None,
    ):
        super().__init__(timesteps, num_particles, seed)
        self.weighting = weighting

    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        importance = weight / visit.reverse.num_steps
        return importance * visit.per_sample(self.weighting(visit.step)) * visit.noise_error()


@dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, γ)/SNR on the noise error (Hang et al., 2023, section 3.4)."""

    gamma: float = 5.0

    def __call__(self, step: Step) -> Tensor:
        return (self.gamma * (-step.log_snr).exp()).clamp(max=1.0)


@dataclass(frozen=True)
class SigmoidWeighting:
    """w = sigmoid(b − λ) on the noise error (Kingma and Gao, 2023).

    Their integral is over λ, the sum here over t: the two agree (up to a factor) where λ is linear
    in t, as in ``LogSNRSchedule``.
    """

    bias: float = 2.0

    def __call__(self, step: Step) -> Tensor:
        return torch.sigmoid(self.bias - step.log_snr)


class NoiseLoss(Objective):
    r"""L_simple = E_t ‖ε − ε̂‖², t uniform (Ho et al., 2020, equation 14): not a bound.

    Against the bound it weights the errors of noisy steps up and those of the last steps down;
    it says nothing of a learned variance (see ``HybridLoss``).
    """

    def default_timesteps(self) -> Timesteps:
        return UniformTimesteps()

    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        return weight / visit.reverse.num_steps * visit.noise_error()


class MeanLoss(Objective):
    r"""E_t ‖μ̃(x_t, x_0) − μ_θ(x_t)‖² = E_t c_0² ‖x_0 − x̂_0‖² (Ho et al., 2020, equation 8).

    Not a bound: the bound divides the same square by 2σ_θ².  At t = 1, μ̃ is x_0 itself.
    """

    def default_timesteps(self) -> Timesteps:
        return UniformTimesteps()

    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        scale = visit.per_sample(visit.step.c_0**2)
        return weight / visit.reverse.num_steps * scale * visit.squared_error()


@renamed(generator="seed")
class HybridLoss(Objective):
    r"""L_simple + ω L_vlb, the mean's gradient stopped in L_vlb: not a bound.

    (Nichol and Dhariwal, 2021, equation 16.)  L_simple trains the mean, the bound's part the
    learned variance alone.  Both parts are sums over dimensions, the second in nats; the published
    code averages over dimensions and counts bits, so its 0.001 is ω = 0.001/ln 2 here (its factor
    T/1000 is the mean over t turned into the sum, times that 0.001).

    Args:
        vlb_weight: ω.
        timesteps, num_particles, seed: see ``Objective``.

    Raises:
        ValueError: a model whose variance is not learned, which would learn nothing more than
            from ``NoiseLoss``.
    """

    def __init__(
        self,
        vlb_weight: float = 0.001,
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        seed: int | torch.Generator | None = None,
    ):
        super().__init__(timesteps, num_particles, seed)
        check_positive("vlb_weight", vlb_weight)
        self.vlb_weight = vlb_weight

    def default_timesteps(self) -> Timesteps:
        return UniformTimesteps()

    def check_model(self, model: ReverseChain) -> None:
        if not model.variance.learned:
            raise ValueError(
                "Expected a learned variance (LearnedRange or LearnedDiagonal) for HybridLoss; "
                f"got {model.variance!r}. NoiseLoss trains a model with a fixed variance."
            )

    def constant(self, reverse: ReverseChain, x_0: Tensor) -> Tensor | None:
        return self.vlb_weight * reverse.forward_chain.prior_kl(x_0)

    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        simple = visit.noise_error() / visit.reverse.num_steps
        return weight * (simple + self.vlb_weight * visit.variational_term(stop_mean=True))
