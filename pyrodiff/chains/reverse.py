r"""The model p_θ(x_0:T), the reverse chain."""

import itertools
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrodiff import samplers
from pyrodiff.chains.calls import run_chain
from pyrodiff.chains.forward import ForwardChain
from pyrodiff.chains.names import enclosing_size
from pyrodiff.chains.transitions import Transitions, join_contexts
from pyrodiff.checks import check_choice, check_count
from pyrodiff.decoders import Decoder, GaussianDecoder, check_data
from pyrodiff.denoisers import Denoiser, MeanDenoiser
from pyrodiff.distributions import latent
from pyrodiff.finite import check_finite
from pyrodiff.grids import GRIDS, Grid
from pyrodiff.schedules import TabulatedSchedule
from pyrodiff.serialization.models import Parts, SavedModel
from pyrodiff.variances import FixedLarge, Variance

__all__ = ["ReverseChain"]


class ReverseChain(SavedModel, Transitions):
    """The model p_θ(x_0:T), whose transitions are neural.

    Args:
        denoiser: x̂_0(x_t) from a network.
        forward: the forward chain that it inverts.
        event_shape: the shape of one sample.
        variance: Σ_θ of the transitions; default ``FixedLarge()``.
        decoder: p_θ(x_0 | x_1); default ``GaussianDecoder()``.
        name: the prefix of its sites, ``name.x_0``, and of its parameters in Pyro's parameter
            store.  By default the sites are those of the forward chain, ``x_0`` …, and the
            parameters have a name of their own.

    Attributes:
        forward_chain: the forward chain, with the names of this chain's sites and its event shape;
            not a submodule, as several models may share one.
        num_steps: T.
        event_dim: how many axes one sample has.

    Raises:
        TypeError: a part that is not of the kind expected.
        ValueError: an empty event shape.

    Examples:
        >>> from pyrodiff.denoisers import NoiseDenoiser
        >>> from pyrodiff.networks import ResidualMLP
        >>> from pyrodiff.schedules import LogSNRSchedule
        >>> forward = ForwardChain(LogSNRSchedule(), num_steps=10)
        >>> reverse = ReverseChain(NoiseDenoiser(ResidualMLP((2,))), forward, event_shape=(2,))
        >>> reverse.sample(5, seed=0).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        forward: ForwardChain,
        event_shape: tuple[int, ...],
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        name: str | None = None,
    ):
        super().__init__("reverse_chain", name)
        variance = FixedLarge() if variance is None else variance
        decoder = GaussianDecoder() if decoder is None else decoder
        for label, part, kind in (
            ("denoiser", denoiser, Denoiser),
            ("forward", forward, ForwardChain),
            ("variance", variance, Variance),
            ("decoder", decoder, Decoder),
        ):
            if not isinstance(part, kind):
                raise TypeError(f"Expected {label} to be a {kind.__name__}; got {part!r}.")
        self.event_shape = torch.Size(event_shape)
        if len(self.event_shape) == 0 or self.event_shape.numel() == 0:
            raise ValueError(f"Expected a non-empty event_shape; got {tuple(event_shape)}.")
        self.denoiser = denoiser
        self.variance = variance
        self.decoder = decoder
        self.event_dim, self.num_steps = len(self.event_shape), forward.num_steps
        self.name = name or forward.name
        chain = forward.of_events(self.event_dim).named(self.name)
        self.__dict__["forward_chain"] = chain  # not a submodule: several models may share one

    def named(self, name: str) -> Self:
        chain = super().named(name)
        chain.__dict__["forward_chain"] = self.forward_chain.named(name)
        return chain

    # -- the Pyro program ----------------------------------------------------------------------

    def forward(
        self,
        x_0: Tensor | None = None,
        context: Tensor | None = None,
        num_samples: int | None = None,
        context_dim: int | None = None,
    ) -> Tensor:
        """The Pyro program: sites ``x_T`` … ``x_1`` and ``x_0``, observed where data is given.

        Pyro's handlers have an argument named ``context`` themselves: with ``SVI``, an ELBO or
        ``Predictive`` pass it by position, ``svi.step(x_0, context)``.

        Args:
            x_0: data of shape (N, *event_shape), or None to run the program generatively.
            context: shape (N, …), handed to the network at every step; with ``context_dim`` shape
                (*batch, N or 1, …).
            num_samples: N when there is no data (default: as many as the enclosing plate at
                dimension −1 has indices, or as there are contexts, or 1).
            context_dim: how many axes the context of one sample has, for contexts that are latent
                themselves: drawn under vectorized particles, or enumerated.

        Returns:
            x_0 of shape (N, *event_shape); inside further plates (*batch, N, *event_shape).

        Raises:
            ValueError: data of another event shape, not finite, or not for this decoder; another N
                than the enclosing plate has; contexts whose batch does not go with the samples'.
            RuntimeError: a second call in one program under the same name.
        """
        return run_chain(self, x_0, context, num_samples, context_dim)

    def visit_sites(
        self,
        x_0: Tensor | None,
        context: Tensor | None,
        num_samples: int | None,
        context_dim: int | None,
    ) -> Tensor:
        """What ``forward`` does where no handler answers for the chain."""
        rows = context if context_dim is None else None
        if x_0 is not None:
            self.check_data(x_0, rows)
            x_0, num_samples = self.forward_chain.carry(x_0), len(x_0)
        else:
            num_samples = enclosing_size() if num_samples is None else num_samples
            if num_samples is None and context is not None and context_dim is not None:
                num_samples = context.shape[-context_dim - 1]
            num_samples = samplers.count_samples(num_samples, rows)
        like = self.prototype() if x_0 is None else x_0
        denoiser = self.denoiser  # the access registers the network with Pyro, once
        assert isinstance(denoiser, nn.Module)
        with self.program(num_samples):
            x_t = pyro.sample(self.site(self.num_steps), self.prior(like))
            for t in range(self.num_steps, 1, -1):
                x_t, rows = join_contexts(x_t, self.event_dim, context, context_dim)
                x_t = pyro.sample(self.site(t - 1), self.transition(x_t, t, rows))
            law = self.decode(*join_contexts(x_t, self.event_dim, context, context_dim))
            return pyro.sample(self.site(0), latent(law) if x_0 is None else law, obs=x_0)

    def prior(self, like: Tensor) -> dist.Independent:
        """p(x_T) = N(0, I) over one event, with the dtype and device of ``like``."""
        normal = dist.Normal(like.new_zeros(()), like.new_ones(()), validate_args=False)
        return normal.expand(self.event_shape).to_event(self.event_dim)

    def register(self) -> None:
        """Register the parameters with Pyro, as calling the program does, without running it."""
        with self._pyro_context:
            self.denoiser  # noqa: B018  (the access is what registers)

    def check_data(self, x_0: Tensor, context: Tensor | None = None, values: bool = True) -> None:
        """Raise ValueError unless ``x_0`` is finite data (N, *event_shape) for this decoder.

        Contexts must be one per sample, and finite.  With ``values=False`` the shapes and the
        dtype alone are looked at.  Anything but a tensor is a TypeError.
        """
        check_data(x_0, self.event_shape, self.decoder, values)
        if context is None:
            return
        if len(context) != len(x_0):
            raise ValueError(f"Expected {len(x_0)} contexts, one per sample; got {len(context)}.")
        if values:
            check_finite(context, "contexts")

    def prototype(self) -> Tensor:
        """An empty tensor with the dtype and on the device that samples are drawn in."""
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            if tensor.dtype.is_floating_point:
                return self.forward_chain.carry(tensor.detach().new_empty(()))
        return self.forward_chain.carry(torch.empty(()))

    # -- sampling ------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        num_samples: int | None = None,
        *,
        context: Tensor | None = None,
        seed: int | None = None,
        batch_size: int = 256,
        trajectory: bool = False,
    ) -> Tensor:
        """Ancestral samples of x_0 (Ho et al., 2020, algorithm 2), drawn from p_θ(x_0 | x_1) last.

        Sample i is a function of (seed, i) and its context alone: neither the number of samples
        nor the batch size changes it (but for the rounding of the network's arithmetic).

        Args:
            num_samples: N; default one per context, or 1.
            context: shape (N, …) or None.
            seed: of the noise streams; drawn from torch's global generator where None.
            batch_size: samples per network call.
            trajectory: return x_0, x_1, …, x_T stacked, shape (T + 1, N, *event_shape).

        Returns:
            x_0 of shape (N, *event_shape), or the trajectory, float32 at least.

        Warns:
            UserWarning: a network that returned NaN or infinity: such samples are NaN.
        """
        num_samples = samplers.count_samples(num_samples, context)
        check_count("batch_size", batch_size)
        if context is not None:
            check_finite(context, "contexts")
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        states = samplers.sample(
            self,
            num_samples,
            context=context,
            seed=seed,
            batch_size=batch_size,
            trajectory=trajectory,
        )
        return states if trajectory else states[0]

    # -- other chains of the same network ------------------------------------------------------

    def respaced(
        self,
        num_steps: int,
        *,
        variance: Variance | None = None,
        grid: Grid | str = "log-snr",
        decoder: Decoder | None = None,
    ) -> Self:
        """The same network on a chain of other steps, between the same ends; nothing is copied.

        Args:
            num_steps: n.
            variance: of the new steps; default this chain's.
            grid: which levels: ``"uniform"``, ``"quadratic"``, ``"log-snr"`` or a ``Grid``
                (``pyrodiff.grids.OptimalGrid``).
            decoder: default this chain's.

        Raises:
            ValueError: an unknown grid, fewer than one step, more than the grid has levels; other
                steps for a ``MeanDenoiser``, whose output is the mean of a step of its own chain.
        """
        if isinstance(grid, str):
            check_choice("grid", grid, GRIDS)
            grid = GRIDS[grid]
        log_snrs = grid.log_snrs(self.log_snrs, num_steps)
        denoiser = cast(Denoiser, self._modules["denoiser"])
        if isinstance(denoiser, MeanDenoiser) and not torch.equal(log_snrs, self.log_snrs):
            raise ValueError(
                "Expected a denoiser that serves any step for another grid; got a MeanDenoiser, "
                "whose output is the mean of a step of its own chain."
            )
        schedule = TabulatedSchedule(log_snrs, self.forward_chain.times(log_snrs))
        forward = ForwardChain(schedule, num_steps, order=self.forward_chain.order)
        forward = forward.named(self.name)
        variance = self.variance if variance is None else variance
        decoder = self.decoder if decoder is None else decoder
        return type(self)(denoiser, forward, self.event_shape, variance, decoder)

    # -- files ---------------------------------------------------------------------------------

    def parts(self) -> Parts:
        """What the chain is made of."""
        chain = self.forward_chain
        return Parts(
            schedule=chain.schedule,
            num_steps=chain.num_steps,
            order=chain.order,
            denoiser=cast(Denoiser, self._modules["denoiser"]),
            event_shape=tuple(self.event_shape),
            variance=self.variance,
            decoder=self.decoder,
        )

    @classmethod
    def assemble(cls, parts: Parts) -> Self:
        """The chain of these parts."""
        forward = ForwardChain(parts.schedule, parts.num_steps, order=parts.order)
        return cls(parts.denoiser, forward, parts.event_shape, parts.variance, parts.decoder)
