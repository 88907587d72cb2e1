r"""The guide q(x_1:T | x_0), the forward chain."""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from pyrodiff import kernels
from pyrodiff.chains.names import NamedSites
from pyrodiff.checks import check_choice, check_count
from pyrodiff.finite import check_tensor
from pyrodiff.kernels import Level, Step
from pyrodiff.precision import chain_dtype, largest_log_snr
from pyrodiff.schedules import Schedule

__all__ = ["ForwardChain"]

ORDERS = ("denoising", "noising")


class ForwardChain(NamedSites):
    """The guide q(x_1:T | x_0), fixed and Gaussian.

    Args:
        schedule: the log-SNR as a function of time.
        num_steps: T.
        order: ``"denoising"`` (default) or ``"noising"``, the order in which sites are visited;
            ``TraceMeanField_ELBO`` needs the former.

    ``ReverseChain.forward_chain`` is the same chain with the names of the model's sites (``named``)
    and its event shape (``of_events``).

    Raises:
        ValueError: ``num_steps`` < 1, an unknown order, or a schedule whose λ_1 … λ_T is not
            finite and strictly decreasing, or larger than float64 carries.

    Examples:
        >>> from pyro import poutine
        >>> from pyrodiff.schedules import LogSNRSchedule
        >>> forward = ForwardChain(LogSNRSchedule(), num_steps=3)
        >>> [site for site in poutine.trace(forward).get_trace(torch.zeros(2, 5)) if "x_" in site]
        ['x_3', 'x_2', 'x_1']
    """

    def __init__(self, schedule: Schedule, num_steps: int, order: str = "denoising"):
        super().__init__("forward_chain")
        check_choice("order", order, ORDERS)
        check_count("num_steps", num_steps)
        self.schedule = schedule
        self.num_steps = num_steps
        self.order = order
        self.event_dim: int | None = None
        with torch.inference_mode(False):  # a chain made in inference mode must serve training, too
            self._tabulate(schedule.table(num_steps), schedule.times(num_steps))

    def _tabulate(self, log_snr: Tensor, times: Tensor) -> None:
        """Check λ_1 … λ_T and keep what is computed from them."""
        if not bool(log_snr.isfinite().all()) or not bool((log_snr.diff() < 0).all()):
            raise ValueError(
                "Expected a schedule whose log-SNR is finite and strictly decreasing over its "
                f"{self.num_steps} steps; got {log_snr.tolist()[:4]}…{log_snr.tolist()[-2:]}."
            )
        if float(log_snr[0]) > largest_log_snr(torch.float64):
            raise ValueError(
                f"Expected log-SNRs of at most {largest_log_snr(torch.float64):.1f}, what float64 "
                f"carries; got {float(log_snr[0]):g} at t = 1."
            )
        # Plain attributes, not buffers: `module.half()` must not touch float64 log-SNRs.
        self.log_snr: Float[Tensor, " T"] = log_snr
        self.steps = kernels.StepTable(log_snr, times)
        self._dtypes: dict[tuple[torch.dtype, torch.device, bool], torch.dtype] = {}
        alpha, sigma = kernels.marginal_coefficients(log_snr[-1:])
        zero = torch.zeros_like(sigma)
        self._prior_kl = (
            float(kernels.gaussian_kl(alpha, zero, zero, 1)),  # of the mean, for ‖x_0‖ = 1
            float(kernels.gaussian_kl(zero, 2 * sigma.log(), zero, 1)),  # of the variance
        )
        self._knots = torch.cat([log_snr.new_full((1,), torch.inf), log_snr]).unbind()

    def of_events(self, event_dim: int) -> Self:
        """The same chain for events of so many axes, whatever batch axes stand on their left.

        Without it all axes of x_0 but the first are an event's.
        """
        chain = self.named(self.name)
        chain.event_dim = event_dim
        return chain

    def step(self, t: Tensor | int, x: Tensor, event_dim: int) -> Step:
        """The steps ``t`` (1 … T), an integer or shape (N,), cast and shaped like ``x``."""
        return self.steps.at(t, x, event_dim)

    def exact_step(self, t: int) -> Step:
        """Step t as float64 on the CPU, whose numbers wait for no device."""
        return self.step(t, self.log_snr, 0)

    def level(self, log_snr: Tensor, x: Tensor, event_dim: int) -> Level:
        """The level of any log-SNR, shape () or (N,), float64, cast and shaped like ``x``.

        Its t is linear in λ between the steps of the chain.
        """
        return self.steps.between(log_snr, x, event_dim)

    def times(self, log_snr: Tensor) -> Tensor:
        """t of any log-SNR, linear in λ between the steps, of the shape of ``log_snr``."""
        return self.steps.times(log_snr)

    def carry(self, x_0: Tensor, exact: bool = False) -> Tensor:
        """x_0 in the dtype that the chain computes in (see ``pyrodiff.precision``).

        That is the dtype of x_0, float32 at least; float64 where λ_1 exceeds what float32 carries,
        or where ``exact`` is set and the device has float64.
        """
        check_tensor(x_0)
        key = (x_0.dtype, x_0.device, exact)
        if key not in self._dtypes:
            largest = float(self.log_snr[0])
            self._dtypes[key] = chain_dtype(x_0.dtype, x_0.device, largest, exact)
        return x_0.to(self._dtypes[key])

    def marginal(self, x_0: Tensor, t: int) -> dist.Independent:
        """q(x_t | x_0), x_0 of shape (N, *event_shape)."""
        return kernels.marginal(x_0, self._knots[t], x_0.dim() - 1)

    def sample(self, x_0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε for given noise ε; t of shape () or (N,)."""
        return self.step(t, x_0, x_0.dim() - 1).noised(x_0, noise)

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ N(0, I)) in nats, shape (N,)."""
        half_alpha_squared, per_dimension = self._prior_kl
        squares = x_0.square().sum(tuple(range(1, x_0.dim())))
        return half_alpha_squared * squares + per_dimension * x_0.shape[1:].numel()

    def forward(self, x_0: Tensor, context: Tensor | None = None) -> Tensor:
        """The Pyro program: sites ``x_1`` … ``x_T`` given x_0.

        Args:
            x_0: data of shape (N, *event_shape); or a value drawn in the guide, shape
                (*batch, N, *event_shape), where the chain knows how many axes an event has: that of
                ``ReverseChain.forward_chain`` does.
            context: accepted because Pyro passes model and guide the same arguments, and not used:
                q depends on x_0 alone.

        Returns:
            the last site visited.

        Raises:
            ValueError: x_0 without a batch axis.
            RuntimeError: a second call in one program under the same name.
        """
        x_0 = self.carry(x_0)
        event_dim = x_0.dim() - 1 if self.event_dim is None else self.event_dim
        if x_0.dim() <= event_dim or event_dim < 0:
            raise ValueError(
                f"Expected x_0 of shape (…, N, *event_shape); got {tuple(x_0.shape)} for events of "
                f"{max(event_dim, 0)} axes."
            )
        with self.program(x_0.shape[-event_dim - 1]):
            sites = self._noising_sites if self.order == "noising" else self._denoising_sites
            return sites(x_0, event_dim)

    def _denoising_sites(self, x_0: Tensor, event_dim: int) -> Tensor:
        knots, last = self._knots, self.num_steps
        x_t = pyro.sample(self.site(last), kernels.marginal(x_0, knots[last], event_dim))
        for t in range(last, 1, -1):
            posterior = kernels.posterior(x_t, x_0, knots[t - 1], knots[t], event_dim)
            x_t = pyro.sample(self.site(t - 1), posterior)
        return x_t

    def _noising_sites(self, x_0: Tensor, event_dim: int) -> Tensor:
        knots, kind = self._knots, kernels.NoisingNormal
        x_t = x_0
        for t in range(1, self.num_steps + 1):
            transition = kernels.transition(x_t, knots[t - 1], knots[t], event_dim, kind)
            x_t = pyro.sample(self.site(t), transition)
        return x_t
