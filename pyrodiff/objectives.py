r"""Objectives: Pyro ELBOs over the pair (reverse chain, forward chain).

Every one of them is a weighted sum over t of the same squared errors,

    ‖ε − ε̂‖² = (α_t²/σ_t²) ‖x_0 − x̂_0‖²,    x_t = α_t x_0 + σ_t ε,

    VariationalBound   a bound: −ELBO = KL_T + Σ_{t≥2} KL_t + reconstruction, where with a fixed
                       variance KL_t = c_0² σ_t² / (2 α_t² σ_θ²) ‖ε − ε̂‖² + const
    NoiseLoss          not a bound: weight 1 at every t                     (L_simple)
    MeanLoss           not a bound: weight c_0² σ_t²/α_t², ‖μ̃ − μ_θ‖²
    WeightedLoss       not a bound (unless the weights are the bound's): weight w(step)
    HybridLoss         not a bound: NoiseLoss + a small share of the bound, for the variance

(Ho et al., 2020, equations 5, 8, 12 and 14; Nichol and Dhariwal, 2021, equation 16).  Losses are
summed over the batch as in Pyro, in nats for the bounds.  The subsampled objectives call the
network once, on the whole batch, and leave Pyro's handlers out of it; they work through ``SVI``,
through ``ELBOModule`` (``objective(reverse, forward)``) and so in Lightning.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyrodiff.chains import ForwardChain, ReverseChain
from pyrodiff.decoders import has_values
from pyrodiff.denoisers import Prediction
from pyrodiff.kernels import Step, gaussian_kl
from pyrodiff.timesteps import LowDiscrepancyTimesteps, Timesteps, UniformTimesteps

__all__ = [
    "HybridLoss",
    "MeanLoss",
    "MinSNR",
    "NoiseLoss",
    "Objective",
    "SigmoidWeighting",
    "VariationalBound",
    "WeightedLoss",
    "variational_term",
]


@dataclass(frozen=True)
class _Visit:
    """A batch taken to its steps: what every objective is a function of."""

    reverse: ReverseChain
    x_0: Tensor
    t: Tensor
    step: Step
    x_t: Tensor
    prediction: Prediction

    @property
    def event_dim(self) -> int:
        return len(self.reverse.event_shape)

    def squared_error(self) -> Tensor:
        """‖x_0 − x̂_0‖², shape (N,)."""
        axes = tuple(range(-self.event_dim, 0))
        return (self.x_0 - self.prediction.x0_hat).square().sum(axes)

    def per_sample(self, value: Tensor) -> Tensor:
        """A coefficient of the step as shape (N,)."""
        return value.reshape(-1).expand(len(self.x_0))

    def noise_error(self) -> Tensor:
        """‖ε − ε̂‖², shape (N,)."""
        return self.per_sample((self.step.alpha / self.step.sigma) ** 2) * self.squared_error()


def _visit(
    reverse: ReverseChain, x_0: Tensor, t: Tensor, noise: Tensor, context: Tensor | None
) -> _Visit:
    step = reverse.forward_chain.step(t, x_0, len(reverse.event_shape))
    x_t = step.alpha * x_0 + step.sigma * noise
    return _Visit(reverse, x_0, t, step, x_t, reverse.predict(x_t, t, step, context))


def _variational_term(visit: _Visit, stop_mean: bool = False) -> Tensor:
    """KL_t for t ≥ 2, −log p(x_0 | x_1) for t = 1; shape (N,), nats."""
    reverse, step = visit.reverse, visit.step
    x0_hat, raw = visit.prediction
    x0_hat = x0_hat.detach() if stop_mean else x0_hat
    log_variance = reverse.variance.log_variance(step, raw)
    difference = visit.x_0 - x0_hat
    terms = gaussian_kl(difference, step.log_small, log_variance, visit.event_dim, step.c_0)
    log_variance = log_variance.expand(len(x0_hat), *log_variance.shape[1:])

    def reconstruction(rows: Tensor | slice) -> Tensor:
        at_one, spread = Step(*(value[rows] for value in step)), log_variance[rows]
        law = reverse.decoder.distribution(visit.x_t[rows], x0_hat[rows], spread, at_one)
        return -law.to_event(visit.event_dim).log_prob(visit.x_0[rows])

    if not has_values(visit.t):  # under torch.func.vmap no rows can be chosen
        return torch.where(visit.t.to(terms.device) == 1, reconstruction(slice(None)), terms)
    first = (visit.t == 1).nonzero().flatten()
    if len(first):
        first = first.to(terms.device)
        terms = terms.index_put((first,), reconstruction(first))
    return terms


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

    ``torch.func.vmap`` maps it over samples, so that ``vmap(grad(…))`` gives each one's gradient;
    what can only be checked by a look at numbers is not checked there.

    Raises:
        TypeError: data that are no tensor.
        ValueError: data that the model cannot explain, noise of another shape, t out of range or
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
    return _variational_term(_visit(reverse, x_0, t, noise, context))


class Objective(ELBO):
    """A Pyro ELBO that visits steps t of the chain instead of running the two programs.

    Args:
        timesteps: which t.
        num_particles: draws of (t, ε) per sample, averaged.
        generator: the random source, on the CPU; torch's global one where None.

    Raises:
        TypeError: the model is not a ``ReverseChain`` or the guide not a ``ForwardChain``.
        ValueError: the guide is not the chain that the model inverts; ``num_particles`` < 1.
    """

    def __init__(
        self,
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        generator: torch.Generator | None = None,
    ):
        if num_particles < 1:
            raise ValueError(f"Expected num_particles >= 1; got {num_particles}.")
        super().__init__(num_particles=num_particles)
        self.timesteps = self._default_timesteps() if timesteps is None else timesteps
        if not isinstance(self.timesteps, Timesteps):
            raise TypeError(f"Expected timesteps to be a Timesteps; got {timesteps!r}.")
        self.generator = generator

    def _default_timesteps(self) -> Timesteps:
        return LowDiscrepancyTimesteps()

    @abstractmethod
    def _terms(self, visit: _Visit, weight: Tensor) -> Tensor:
        """What a visit adds to the loss, shape (N,); ``weight`` is 1/p(t), shape (N,)."""

    def _constant(self, reverse: ReverseChain, x_0: Tensor) -> Tensor | None:
        """What the loss holds beside the visits, shape (N,)."""
        return None

    def _parts(
        self, model: ReverseChain, guide: ForwardChain, x_0: Tensor, context: Tensor | None
    ) -> Iterator[Tensor]:
        """Scalars that add up to the loss."""
        _check_pair(model, guide)
        # On an accelerator a look at the values would wait for the device at every step.
        on_cpu = not isinstance(x_0, Tensor) or x_0.device.type == "cpu"
        model.check_data(x_0, context, values=on_cpu)
        x_0 = guide.carry(x_0)
        self.check_model(model)
        particles = self.num_particles
        if particles > 1:
            x_0 = x_0.repeat(particles, *(1,) * len(model.event_shape))
            if context is not None:
                context = context.repeat(particles, *(1,) * (context.dim() - 1))
        constant = self._constant(model, x_0)
        for t, weight in self.timesteps.draw(len(x_0), model.num_steps, self.generator):
            noise = torch.randn(x_0.shape, dtype=x_0.dtype, generator=self.generator).to(x_0.device)
            visit = _visit(model, x_0, t, noise, context)
            weight = weight.to(x_0)
            terms = self._terms(visit, weight)
            if self.timesteps.learns:
                self.timesteps.update(t, terms.detach() / weight)
            if constant is not None:
                terms, constant = terms + constant, None
            yield terms.sum() / particles if particles > 1 else terms.sum()

    def check_model(self, model: ReverseChain) -> None:  # noqa: B027  (most suit every model)
        """Raise ValueError where this objective cannot train this model."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"Expected no traces to be asked of {type(self).__name__}: it runs none.")

    def differentiable_loss(  # type: ignore[override]
        self,
        model: ReverseChain,
        guide: ForwardChain,
        x_0: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """The loss, summed over the batch, as a differentiable scalar."""
        parts = self._parts(model, guide, x_0, context)
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(  # type: ignore[override]
        self,
        model: ReverseChain,
        guide: ForwardChain,
        x_0: Tensor,
        context: Tensor | None = None,
    ) -> float:
        """The loss as a number; gradients are added to the parameters, which Pyro learns of."""
        _check_pair(model, guide)
        model.register()
        total = 0.0
        for part in self._parts(model, guide, x_0, context):
            if part.requires_grad:
                part.backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
        return total


def _check_pair(model: Any, guide: Any) -> None:
    if not isinstance(model, ReverseChain) or not isinstance(guide, ForwardChain):
        raise TypeError(
            "Expected a ReverseChain as the model and a ForwardChain as the guide; "
            f"got {type(model).__name__} and {type(guide).__name__}."
        )
    chain: ForwardChain = model.forward_chain
    if guide is not chain and not torch.equal(guide.log_snr, chain.log_snr):
        raise ValueError(
            "Expected as the guide the forward chain that the reverse chain was built with "
            f"({chain.num_steps} steps of {chain.schedule!r}); got another "
            f"({guide.num_steps} steps of {guide.schedule!r})."
        )


class VariationalBound(Objective):
    r"""The negative evidence lower bound, in nats (Ho et al., 2020, equation 5): a bound.

        KL(q(x_T|x_0) ‖ p(x_T)) + Σ_{t=2}^T KL(q(x_{t−1}|x_t,x_0) ‖ p_θ(x_{t−1}|x_t))
                                − log p_θ(x_0|x_1)

    in expectation over the noise.  With subsampled t it is unbiased for that sum: a draw is an
    estimate of the bound, its mean the bound.

    Args:
        timesteps: ``LowDiscrepancyTimesteps()`` by default; ``AllTimesteps()`` for all terms.
        num_particles, generator: see ``Objective``.
    """

    def _constant(self, reverse: ReverseChain, x_0: Tensor) -> Tensor | None:
        chain: ForwardChain = reverse.forward_chain
        return chain.prior_kl(x_0)

    def _terms(self, visit: _Visit, weight: Tensor) -> Tensor:
        return weight * _variational_term(visit)


class WeightedLoss(Objective):
    r"""E_t[w(step) ‖ε − ε̂‖²], t uniform: not a bound.

    Args:
        weighting: called with the ``Step`` of the drawn t, whose entries have shape (N, 1, …);
            returns w in the same shape.
        timesteps: other rules than uniform are reweighted to the same expectation.
        num_particles, generator: see ``Objective``.
    """

    def __init__(
        self,
        weighting: Callable[[Step], Tensor],
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(timesteps, num_particles, generator)
        self.weighting = weighting

    def _terms(self, visit: _Visit, weight: Tensor) -> Tensor:
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

    def _default_timesteps(self) -> Timesteps:
        return UniformTimesteps()

    def _terms(self, visit: _Visit, weight: Tensor) -> Tensor:
        return weight / visit.reverse.num_steps * visit.noise_error()


class MeanLoss(Objective):
    r"""E_t ‖μ̃(x_t, x_0) − μ_θ(x_t)‖² = E_t c_0² ‖x_0 − x̂_0‖² (Ho et al., 2020, equation 8).

    Not a bound: the bound divides the same square by 2σ_θ².  At t = 1, μ̃ is x_0 itself.
    """

    def _default_timesteps(self) -> Timesteps:
        return UniformTimesteps()

    def _terms(self, visit: _Visit, weight: Tensor) -> Tensor:
        scale = visit.per_sample(visit.step.c_0**2)
        return weight / visit.reverse.num_steps * scale * visit.squared_error()


class HybridLoss(Objective):
    r"""L_simple + ω L_vlb, the mean's gradient stopped in L_vlb: not a bound.

    (Nichol and Dhariwal, 2021, equation 16.)  L_simple trains the mean, the bound's part the
    learned variance alone.  Both parts are sums over dimensions, the second in nats; the published
    code averages over dimensions and counts bits, so its 0.001 is ω = 0.001/ln 2 here (its factor
    T/1000 is the mean over t turned into the sum, times that 0.001).

    Args:
        vlb_weight: ω.
        timesteps, num_particles, generator: see ``Objective``.

    Raises:
        ValueError: a model whose variance is not learned, which would learn nothing more than
            from ``NoiseLoss``.
    """

    def __init__(
        self,
        vlb_weight: float = 0.001,
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(timesteps, num_particles, generator)
        if not vlb_weight > 0:
            raise ValueError(f"Expected vlb_weight > 0; got {vlb_weight}.")
        self.vlb_weight = vlb_weight

    def _default_timesteps(self) -> Timesteps:
        return UniformTimesteps()

    def check_model(self, model: ReverseChain) -> None:
        if not model.variance.learned:
            raise ValueError(
                "Expected a learned variance (LearnedRange or LearnedDiagonal) for HybridLoss; "
                f"got {model.variance!r}. NoiseLoss trains a model with a fixed variance."
            )

    def _constant(self, reverse: ReverseChain, x_0: Tensor) -> Tensor | None:
        chain: ForwardChain = reverse.forward_chain
        return self.vlb_weight * chain.prior_kl(x_0)

    def _terms(self, visit: _Visit, weight: Tensor) -> Tensor:
        simple = visit.noise_error() / visit.reverse.num_steps
        return weight * (simple + self.vlb_weight * _variational_term(visit, stop_mean=True))
