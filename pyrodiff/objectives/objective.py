"""What all objectives share: checks, draws of (t, ε), and Pyro's interface."""

import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrodiff.chains import ForwardChain, ReverseChain
from pyrodiff.checks import check_count, renamed
from pyrodiff.objectives.visit import Visit
from pyrodiff.timesteps import LowDiscrepancyTimesteps, Timesteps

__all__ = ["Objective"]


def make_generator(seed: int | torch.Generator | None) -> torch.Generator | None:
    """The generator of a seed; a generator as it is, None for torch's global one."""
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed


@renamed(generator="seed")
class Objective(ELBO):
    """A Pyro ELBO that visits steps t of the chain instead of running the two programs.

    A new objective defines ``terms`` and, where needed, ``constant``, ``default_timesteps`` and
    ``check_model``.

    Args:
        timesteps: which t.
        num_particles: draws of (t, ε) per sample, averaged (Pyro's name).
        seed: of t and ε, or a generator on the CPU; torch's global one where None.

    Raises:
        TypeError: the model is not a ``ReverseChain`` or the guide not a ``ForwardChain``.
        ValueError: the guide is not the chain that the model inverts; ``num_particles`` < 1.
    """

    def __init__(
        self,
        timesteps: Timesteps | None = None,
        num_particles: int = 1,
        seed: int | torch.Generator | None = None,
    ):
        check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles)
        self.timesteps = self.default_timesteps() if timesteps is None else timesteps
        if not isinstance(self.timesteps, Timesteps):
            raise TypeError(f"Expected timesteps to be a Timesteps; got {timesteps!r}.")
        self.seed = make_generator(seed)

    def default_timesteps(self) -> Timesteps:
        """The rule for t where none is given."""
        return LowDiscrepancyTimesteps()

    @abstractmethod
    def terms(self, visit: Visit, weight: Tensor) -> Tensor:
        """What a visit adds to the loss, shape (N,).

        Args:
            visit: the batch at its steps.
            weight: 1/p(t), shape (N,): with it the loss is a sum over t without bias; with
                1/(T p(t)) a mean.
        """

    def constant(self, reverse: ReverseChain, x_0: Tensor) -> Tensor | None:
        """What the loss holds beside the terms, shape (N,), or None for nothing."""
        return None

    def _summands(
        self, model: ReverseChain, guide: ForwardChain, x_0: Tensor, context: Tensor | None
    ) -> Iterator[Tensor]:
        """Scalars that add up to the loss."""
        if not (isinstance(model, ReverseChain) and guide is model.forward_chain):
            _check_pair(model, guide)
        # On an accelerator a look at the values would wait for the device at every step.
        on_cpu = not isinstance(x_0, Tensor) or x_0.device.type == "cpu"
        model.check_data(x_0, context, values=on_cpu)
        x_0 = guide.carry(x_0)
        self.check_model(model)
        particles = self.num_particles
        if particles > 1:
            x_0 = x_0.repeat(particles, *(1,) * model.event_dim)
            if context is not None:
                context = context.repeat(particles, *(1,) * (context.dim() - 1))
        constant = self.constant(model, x_0)
        for t, weight in self.timesteps.draw(len(x_0), model.num_steps, self.seed):
            noise = torch.randn(x_0.shape, dtype=x_0.dtype, generator=self.seed).to(x_0.device)
            weight = weight.to(x_0)
            terms = self.terms(Visit.of(model, x_0, t, noise, context), weight)
            if self.timesteps.learns:
                self.timesteps.update(t, terms.detach() / weight)
            if constant is not None:
                terms, constant = terms + constant, None
            yield terms.sum() / particles if particles > 1 else terms.sum()

    def check_model(self, model: ReverseChain) -> None:  # noqa: B027  (most suit every model)
        """Raise ValueError where this objective cannot train this model."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(
            f"Expected no request for traces of {type(self).__name__}, which runs no programs; "
            "got one."
        )

    def differentiable_loss(  # type: ignore[override]
        self,
        model: ReverseChain,
        guide: ForwardChain,
        x_0: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """The loss, summed over the batch, as a differentiable scalar."""
        return functools.reduce(torch.add, self._summands(model, guide, x_0, context))

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
        total = 0.0
        for summand in self._summands(model, guide, x_0, context):
            if summand.requires_grad:
                summand.backward()  # type: ignore[no-untyped-call]
            total += float(summand.detach())
        model.register()
        return total


def _check_pair(model: Any, guide: Any) -> None:
    if not isinstance(model, ReverseChain) or not isinstance(guide, ForwardChain):
        raise TypeError(
            "Expected a ReverseChain as the model and a ForwardChain as the guide; "
            f"got {type(model).__name__} and {type(guide).__name__}."
        )
    chain = model.forward_chain
    if guide.steps is not chain.steps and not torch.equal(guide.log_snr, chain.log_snr):
        raise ValueError(
            "Expected as the guide the forward chain that the reverse chain was built with "
            f"({chain.num_steps} steps of {chain.schedule!r}); got another "
            f"({guide.num_steps} steps of {guide.schedule!r})."
        )
