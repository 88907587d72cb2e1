r"""A learned variance by matching: the KL of a step as a function of v alone.

For the mean c_0 x̂_0 + c_t x_t as it is, and Σ = β̃_t + c_0² v,

    KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) = ½ Σ_i log(1 + κ v_i) + κ (e_i − v_i)/(1 + κ v_i)

with κ = e^{λ_s} − e^{λ_t} is linear in the target e, so that on average it is least at
v = E[e | x_t], whatever the step.  Two targets:

    errors   e = (x_0 − x̂_0)²                  (Bao, Li, Sun, Zhu and Zhang, 2022, section 3.2)
    probes   e = z ⊙ (σ_t²/α_t) Jᵀ z            (Bekas, Kokiopoulou and Saad, 2007)

with J = ∂x̂_0/∂x_t and signs z = ±1.  For the exact denoiser both have the mean diag Cov[x_0 | x_t].
For a trained one that of the errors minimises the bound, the network's own error included; probes
need no x_0 but cost a product with the Jacobian, and their mean may be negative.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_choice, check_positive
from pyrodiff.kernels import Step, gaussian_kl, jump
from pyrodiff.objectives.objective import Objective
from pyrodiff.objectives.visit import Visit
from pyrodiff.timesteps import Timesteps
from pyrodiff.variances import LearnedPosterior

__all__ = ["VarianceMatching"]

_JUMPS = (0.1, 0.3, 1.0)
"""Steps in λ: those of about 130, 45 and 13 over a range of 13."""


class VarianceMatching(Objective):
    """The mean KL of steps of several sizes in λ, per unit of λ; trains the variance alone.

    It does not depend on the steps of the chain, whose levels are visited.

    Args:
        target: ``"errors"`` or ``"probes"``.
        jumps: sizes of steps in λ.
        timesteps, num_particles, seed: see ``Objective``.

    Raises:
        ValueError: an unknown target; another variance than ``LearnedPosterior``.
    """

    def __init__(
        self,
        target: str = "errors",
        jumps: Sequence[float] = _JUMPS,
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        seed: int | torch.Generator | None = None,
    ):
        super().__init__(timesteps, num_particles, seed)
        check_choice("target", target, ("errors", "probes"))
        for size in jumps:
            check_positive("jumps", size)
        self.target, self.jumps = target, tuple(jumps)

    def check_model(self, model: ReverseChain) -> None:
        if not isinstance(model.variance, LearnedPosterior):
            raise ValueError(
                f"Expected a LearnedPosterior for VarianceMatching; got {model.variance!r}."
            )

    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        target = _errors(visit) if self.target == "errors" else _probes(visit)
        rates = [_kl(visit, target, size) / size for size in self.jumps]
        return weight / visit.reverse.num_steps * torch.stack(rates).mean(0)


def _kl(visit: Visit, target: Tensor, size: float) -> Tensor:
    """The KL of the step from λ_t to λ_t + ``size`` for errors whose squares are ``target``."""
    step, event_dim = _step(visit.step, size, visit.x_0), visit.reverse.event_dim
    log_variance = visit.reverse.log_variance(step, visit.prediction)
    spread = gaussian_kl(torch.zeros_like(target), step.log_small, log_variance, event_dim)
    weighted = step.c_0.square() * target * (-log_variance).exp()
    return spread + 0.5 * weighted.flatten(1).sum(1)


def _step(step: Step, size: float, like: Tensor) -> Step:
    """The step of another size from the same level, in the dtype of ``like``."""
    log_snr = step.log_snr.double()
    return jump(log_snr + size, log_snr, step.t).map(lambda value: value.to(like))


def _errors(visit: Visit) -> Tensor:
    return (visit.x_0 - visit.prediction.x0_hat.detach()).square()


def _probes(visit: Visit) -> Tensor:
    """z ⊙ (σ²/α) Jᵀ z for random signs z."""
    with torch.enable_grad():
        x_t = visit.x_t.detach().requires_grad_()
        x0_hat = visit.reverse.predict(x_t, visit.step, visit.context, mean_only=True).x0_hat
        signs = torch.randint(2, x_t.shape).to(x_t) * 2 - 1
        (product,) = torch.autograd.grad(x0_hat, x_t, signs)
    return visit.step.sigma.square() / visit.step.alpha * signs * product
