r"""A batch at its steps of the chain, and the term of the bound there."""

import operator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.denoisers import Prediction
from pyrodiff.finite import has_values
from pyrodiff.kernels import Step

__all__ = ["Visit", "unchecked_term", "variational_term"]


@dataclass(frozen=True, eq=False)
class Visit:
    """A batch taken to its steps by one network call: what every objective is a function of.

    Args:
        reverse: the model.
        x_0: data, shape (N, *event_shape).
        t: of each sample, 1 … T, shape (N,), int64, on the CPU.
        step: the chain's coefficients there, of shape (N, 1, …).
        x_t: α_t x_0 + σ_t ε.
        prediction: the denoiser's at (x_t, t).
        context: shape (N, …) or None.
    """

    reverse: ReverseChain
    x_0: Tensor
    t: Tensor
    step: Step
    x_t: Tensor
    prediction: Prediction
    context: Tensor | None = None

    @classmethod
    def of(
        cls,
        reverse: ReverseChain,
        x_0: Tensor,
        t: Tensor,
        noise: Tensor,
        context: Tensor | None = None,
    ) -> "Visit":
        """The visit of steps ``t`` with given noise."""
        step = reverse.step(t, x_0)
        x_t = step.noised(x_0, noise)
        prediction = reverse.predict(x_t, step, context)
        return cls(reverse, x_0, t, step=step, x_t=x_t, prediction=prediction, context=context)

    def squared_error(self) -> Tensor:
        """‖x_0 − x̂_0‖², shape (N,)."""
        axes = tuple(range(-self.reverse.event_dim, 0))
        return (self.x_0 - self.prediction.x0_hat).square().sum(axes)

    def per_sample(self, value: Tensor) -> Tensor:
        """A coefficient of the step as shape (N,)."""
        return value.reshape(-1).expand(len(self.x_0))

    def noise_error(self) -> Tensor:
        """‖ε − ε̂‖², shape (N,)."""
        return self.per_sample((self.step.alpha / self.step.sigma) ** 2) * self.squared_error()

    def variational_term(self, stop_mean: bool = False) -> Tensor:
        """KL_t for t ≥ 2, −log p(x_0 | x_1) for t = 1; shape (N,), nats.

        Args:
            stop_mean: let no gradient into x̂_0, so that the variance alone is trained.
        """
        reverse, step, prediction = self.reverse, self.step, self.prediction
        if stop_mean:
            prediction = prediction._replace(x0_hat=prediction.x0_hat.detach())
        error = self.x_0 - prediction.x0_hat
        terms = reverse.variance.kl(step, error, prediction, reverse.event_dim)
        # under torch.func.vmap no rows can be chosen
        first = (self.t == 1).nonzero().flatten() if has_values(self.t) else None
        if first is not None and len(first) == 0:
            return terms
        rows = slice(None) if first is None else first.to(terms.device)
        chosen = operator.itemgetter(rows)
        law = reverse.reconstruction(self.x_t[rows], step.map(chosen), prediction.map(chosen))
        reconstruction = -law.log_prob(self.x_0[rows])
        if isinstance(rows, slice):
            return torch.where(self.t.to(terms.device) == 1, reconstruction, terms)
        return terms.index_put((rows,), reconstruction)


def variational_term(
    reverse: ReverseChain,
    x_0: Float[Tensor, "n *event"],
    t: Tensor | int,
    noise: Float[Tensor, "n *event"],
    context: Tensor | None = None,
) -> Float[Tensor, " n"]:
    r"""One term of the bound for given noise (Ho et al., 2020, equation 5).

        KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t))   for t ≥ 2
        −log p_θ(x_0 | x_1)                              for t = 1

    Args:
        reverse: the model.
        x_0: data, shape (N, *event_shape).
        t: 1 … T, an integer or shape (N,).
        noise: ε in x_t = α_t x_0 + σ_t ε, of the shape of the data.
        context: shape (N, …) or None.

    Returns:
        nats, shape (N,), in the data's dtype, float32 at least.

    ``torch.func.vmap`` maps it over samples, so that ``vmap(grad(…))`` gives the gradient of each;
    checks that need the numbers themselves are skipped there.

    Raises:
        TypeError: data that are no tensor.
        ValueError: data outside the model's support, noise of another shape, t out of range or
            not integers.
    """
    reverse.check_data(x_0, context)
    if noise.shape != x_0.shape:
        raise ValueError(f"Expected noise of shape {tuple(x_0.shape)}; got {tuple(noise.shape)}.")
    x_0 = reverse.forward_chain.carry(x_0)
    steps = torch.as_tensor(t).cpu().reshape(-1)
    if steps.is_floating_point() or len(steps) not in (1, len(x_0)):
        raise ValueError(
            f"Expected t to be an integer or integers of shape ({len(x_0)},); got {t}."
        )
    steps = steps.expand(len(x_0))
    if has_values(steps) and not (steps.min() >= 1 and steps.max() <= reverse.num_steps):
        raise ValueError(
            f"Expected t in 1 … {reverse.num_steps}; got {int(steps.min())} to {int(steps.max())}."
        )
    return unchecked_term(reverse, x_0, steps, noise.to(x_0.dtype), context)


def unchecked_term(
    reverse: ReverseChain, x_0: Tensor, t: Tensor, noise: Tensor, context: Tensor | None
) -> Tensor:
    """``variational_term`` of arguments that were checked before; t of shape (N,) on the CPU."""
    return Visit.of(reverse, x_0, t, noise, context).variational_term()
