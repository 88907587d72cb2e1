r"""The two Pyro programs: the forward chain (guide) and the reverse chain (model).

    guide   q(x_1:T | x_0) = q(x_T | x_0) ∏_{t=2}^T q(x_{t−1} | x_t, x_0)     order="denoising"
                           = ∏_{t=1}^T q(x_t | x_{t−1})                       order="noising"
    model   p_θ(x_0:T)     = N(x_T; 0, I) ∏_{t=2}^T N(x_{t−1}; μ_θ, Σ_θ) p_θ(x_0 | x_1)
                             μ_θ = c_0 x̂_0(x_t) + c_t x_t

Sites are named ``x_1`` … ``x_T`` and ``x_0``, inside one plate ``"data"`` at dimension −1; batch
axes stand on the left, event axes on the right, so that plates added outside (vectorized
particles, ``Predictive(parallel=True)``) broadcast.  The two orders of the guide are the same
joint; the denoising order visits the sites as the model does, so each KL of Pyro's
``TraceMeanField_ELBO`` is a term of the bound of Ho et al. (2020, equation 5).
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn
from typing_extensions import Self

from pyrodiff import kernels, serialization
from pyrodiff.checks import short
from pyrodiff.decoders import Decoder, GaussianDecoder, check_data, check_finite, check_tensor
from pyrodiff.denoisers import Denoiser, Prediction
from pyrodiff.finite import NOTHING_FAILED, Failures, failed_at
from pyrodiff.kernels import Step
from pyrodiff.precision import chain_dtype, largest_log_snr
from pyrodiff.schedules import Schedule
from pyrodiff.serialization.descriptions import build_parts
from pyrodiff.streams import NoiseStreams
from pyrodiff.variances import FixedLarge, Variance

__all__ = ["ForwardChain", "ReverseChain"]

_ORDERS = ("denoising", "noising")
_MAX_STEPS, _MAX_EVENT = 10**6, 2**24  # of a model from a file
_counter = itertools.count()


def _unique_name(kind: str) -> str:
    # Pyro's parameter store is one per process: chains of equal names would share parameters.
    return f"{kind}_{next(_counter)}"


def _read_sizes(config: Any) -> tuple[int, tuple[int, ...]]:
    """T and the event shape of a configuration from a file."""
    num_steps, shape = (serialization.entry(config, key) for key in ("num_steps", "event_shape"))
    if type(num_steps) is not int or not 1 <= num_steps <= _MAX_STEPS:
        raise ValueError(
            f"Expected num_steps to be an integer >= 1 and at most {_MAX_STEPS} in a file; "
            f"got {short(num_steps)}."
        )
    if not isinstance(shape, list) or not all(type(v) is int and v > 0 for v in shape):
        raise ValueError(
            f"Expected event_shape to be a list of positive integers; got {short(shape)}."
        )
    if math.prod(shape) > _MAX_EVENT:
        raise ValueError(
            f"Expected events of at most {_MAX_EVENT} values in a file; got {short(shape)}."
        )
    return num_steps, tuple(shape)


def _count_samples(num_samples: int | None, context: Tensor | None) -> int:
    """How many samples are asked for: one per context, or one."""
    if num_samples is None:
        num_samples = 1 if context is None else len(context)
    if num_samples < 1:
        raise ValueError(f"Expected num_samples >= 1; got {num_samples}.")
    if context is not None and len(context) != num_samples:
        raise ValueError(f"Expected {num_samples} contexts; got {len(context)}.")
    return num_samples


class ForwardChain(PyroModule):
    """The guide q(x_1:T | x_0), fixed and Gaussian.

    Args:
        schedule: the log-SNR as a function of time.
        num_steps: T.
        order: ``"denoising"`` (default) or ``"noising"``, the order in which sites are visited;
            ``TraceMeanField_ELBO`` needs the former.

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
        super().__init__(name=_unique_name("forward_chain"))
        if order not in _ORDERS:
            raise ValueError(f"Expected order to be one of {_ORDERS}; got {order!r}.")
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"Expected num_steps to be an integer >= 1; got {num_steps!r}.")
        self.schedule = schedule
        self.num_steps = num_steps
        self.order = order
        with torch.inference_mode(False):  # a chain made in inference mode must serve training, too
            self._tabulate(schedule.table(num_steps))

    def _tabulate(self, log_snr: Tensor) -> None:
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
        self._steps = kernels.steps(log_snr)
        self._cast_steps: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        self._scalar_steps: dict[tuple[torch.dtype, torch.device, int], Step] = {}
        self._indices = torch.arange(self.num_steps + 1).unbind()
        alpha, sigma = kernels.marginal_coefficients(log_snr[-1:])
        zero = torch.zeros_like(sigma)
        self._prior = (
            float(kernels.gaussian_kl(alpha, zero, zero, 1)),  # of the mean, for ‖x_0‖ = 1
            float(kernels.gaussian_kl(zero, 2 * sigma.log(), zero, 1)),  # of the variance
        )
        self._knots = torch.cat([log_snr.new_full((1,), torch.inf), log_snr]).unbind()

    def step(self, t: Tensor | int, x: Tensor, event_dim: int) -> Step:
        """The coefficients at steps ``t`` (1 … T), shape () or (N,), cast and shaped like ``x``."""
        if isinstance(t, int):
            key = (x.dtype, x.device, t)
            if key not in self._scalar_steps:
                with torch.inference_mode(False):  # what is kept must serve training, too
                    self._scalar_steps[key] = self._step(self._indices[t], x, event_dim)
            return self._scalar_steps[key]
        return self._step(t, x, event_dim)

    def exact_step(self, t: int) -> Step:
        """The coefficients at step t as float64 on the CPU, whose numbers wait for no device."""
        return self.step(t, self.log_snr, 0)

    def _step(self, t: Tensor, x: Tensor, event_dim: int) -> Step:
        key = (x.dtype, x.device)
        if key not in self._cast_steps:
            # The network reads λ as its time, which half precision would round.
            wide = torch.promote_types(x.dtype, torch.float32)
            with torch.inference_mode(False):
                self._cast_steps[key] = (
                    self.log_snr.to(wide).to(x.device),
                    self._steps.to(x.dtype).to(x.device),
                )
        log_snr, steps = self._cast_steps[key]
        index = (t - 1).to(x.device)
        time, values = log_snr[index], steps[:, index]
        if values.dim() > 1:
            axes = (..., *(None,) * event_dim)
            time, values = time[axes], values[axes]
        return Step(time, *values.unbind()[1:])

    def carry(self, x_0: Tensor, exact: bool = False) -> Tensor:
        """x_0 in the dtype that the chain computes in (see ``pyrodiff.precision``).

        Its own, float32 at least, and float64 where λ_1 is more than float32 carries, or where
        ``exact`` and the device has float64.
        """
        check_tensor(x_0)
        first = float(self.log_snr[0])
        return x_0.to(chain_dtype(x_0.dtype, x_0.device, first, exact))

    def marginal(self, x_0: Tensor, t: int) -> dist.Independent:
        """q(x_t | x_0), x_0 of shape (N, *event_shape)."""
        return kernels.marginal(x_0, self._knots[t], x_0.dim() - 1)

    def sample(self, x_0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε for given noise ε; t of shape () or (N,)."""
        step = self.step(t, x_0, x_0.dim() - 1)
        return step.alpha * x_0 + step.sigma * noise

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ N(0, I)) in nats, shape (N,)."""
        half_alpha_squared, per_dimension = self._prior
        squares = x_0.square().sum(tuple(range(1, x_0.dim())))
        return half_alpha_squared * squares + per_dimension * x_0.shape[1:].numel()

    def forward(self, x_0: Tensor, context: Tensor | None = None) -> Tensor:
        """The Pyro program: sites ``x_1`` … ``x_T`` given data of shape (N, *event_shape).

        ``context`` is taken, as Pyro hands model and guide the same arguments, and not used:
        q knows nothing but x_0.  Returns the last site visited.
        """
        x_0 = self.carry(x_0)
        with pyro.plate("data", len(x_0), dim=-1):
            if self.order == "noising":
                return self._noising_sites(x_0)
            return self._denoising_sites(x_0)

    def _denoising_sites(self, x_0: Tensor) -> Tensor:
        event_dim, knots, last = x_0.dim() - 1, self._knots, self.num_steps
        x_t = pyro.sample(f"x_{last}", kernels.marginal(x_0, knots[last], event_dim))
        for t in range(last, 1, -1):
            posterior = kernels.posterior(x_t, x_0, knots[t - 1], knots[t], event_dim)
            x_t = pyro.sample(f"x_{t - 1}", posterior)
        return x_t

    def _noising_sites(self, x_0: Tensor) -> Tensor:
        event_dim, knots, kind = x_0.dim() - 1, self._knots, kernels.NoisingNormal
        x_t = x_0
        for t in range(1, self.num_steps + 1):
            transition = kernels.transition(x_t, knots[t - 1], knots[t], event_dim, kind)
            x_t = pyro.sample(f"x_{t}", transition)
        return x_t

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pyro_name = _unique_name("forward_chain")


class ReverseChain(PyroModule):
    """The model p_θ(x_0:T), whose transitions are neural.

    Args:
        denoiser: x̂_0(x_t) from a network.
        forward: the forward chain that it inverts.
        event_shape: the shape of one sample.
        variance: Σ_θ of the transitions; default ``FixedLarge()``.
        decoder: p_θ(x_0 | x_1); default ``GaussianDecoder()``.
        name: the prefix of its parameters in Pyro's parameter store; unique by default.

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
        super().__init__(name=name or _unique_name("reverse_chain"))
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
        # Not a submodule: several reverse chains may share one forward chain.
        self.__dict__["forward_chain"] = forward

    @property
    def num_steps(self) -> int:
        """T."""
        chain: ForwardChain = self.forward_chain
        return chain.num_steps

    # -- the densities of the chain ------------------------------------------------------------

    def predict(
        self, x_t: Float[Tensor, "..."], t: Tensor | int, step: Step, context: Tensor | None = None
    ) -> Prediction:
        """x̂_0 and the raw variance at x_t of shape (*batch, *event_shape); one network call.

        ``t`` and ``context`` belong to the rightmost batch axis; further batch axes on the left
        (particles) share them.
        """
        batch = x_t.shape[: x_t.dim() - len(self.event_shape)]
        flat = x_t.reshape(-1, *self.event_shape)
        if not isinstance(t, Tensor):
            index: Tensor = self.forward_chain._indices[t]
            t = index
        if len(batch) > 1:
            context, t, step = self._repeat(batch, context, t, step)
        # Not `self.denoiser`: inside a Pyro program that access registers every parameter anew.
        denoiser = cast(Denoiser, self._modules["denoiser"])
        x0_hat, raw = denoiser(flat, t, step, context, self.variance.learned)
        if len(batch) == 1:
            return Prediction(x0_hat, raw)
        return Prediction(x0_hat.reshape(x_t.shape), raw if raw is None else raw.reshape(x_t.shape))

    def _repeat(
        self, batch: torch.Size, context: Tensor | None, t: Tensor, step: Step
    ) -> tuple[Tensor | None, Tensor, Step]:
        def flatten(value: Tensor) -> Tensor:
            return value.expand(*batch, *value.shape[1:]).reshape(-1, *value.shape[1:])

        context = None if context is None else flatten(context)
        if t.dim():
            t, step = flatten(t), Step(*(flatten(v) for v in step))
        return context, t, step

    def mean(self, x_t: Tensor, x0_hat: Tensor, step: Step) -> Tensor:
        """The mean of p_θ(x_{t−1} | x_t): c_0 x̂_0 + c_t x_t, of the shape of x_t."""
        return step.c_0 * x0_hat + step.c_t * x_t

    def transition(self, x_t: Tensor, t: int, context: Tensor | None = None) -> dist.Independent:
        """p_θ(x_{t−1} | x_t) for t = 2 … T, x_t of shape (*batch, *event_shape)."""
        step = self.forward_chain.step(t, x_t, len(self.event_shape))
        prediction = self.predict(x_t, t, step, context)
        scale = (0.5 * self.variance.log_variance(step, prediction.raw_variance)).exp()
        mean = self.mean(x_t, prediction.x0_hat, step)
        normal = dist.Normal(mean, scale.expand(mean.shape), validate_args=False)
        return normal.to_event(len(self.event_shape))

    def decode(self, x_1: Tensor, context: Tensor | None = None) -> dist.Independent:
        """p_θ(x_0 | x_1), x_1 of shape (*batch, *event_shape)."""
        step = self.forward_chain.step(1, x_1, len(self.event_shape))
        prediction = self.predict(x_1, 1, step, context)
        log_variance = self.variance.log_variance(step, prediction.raw_variance)
        law = self.decoder.distribution(x_1, prediction.x0_hat, log_variance, step)
        return law.to_event(len(self.event_shape))

    # -- the Pyro program ----------------------------------------------------------------------

    def forward(
        self,
        x_0: Tensor | None = None,
        context: Tensor | None = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """The Pyro program: sites ``x_T`` … ``x_1`` and ``x_0``, observed where data is given.

        Pyro's handlers have an argument of their own named ``context``: through ``SVI``, an ELBO
        or ``Predictive`` hand it in by position, ``svi.step(x_0, context)``.

        Args:
            x_0: data of shape (N, *event_shape), or None to run the program generatively.
            context: shape (N, …), handed to the network at every step.
            num_samples: how many samples in the plate ``"data"`` when there is no data (default:
                as many as there are contexts, or 1).

        Raises:
            ValueError: data of another event shape, not finite, or not for this decoder.
        """
        if x_0 is not None:
            self.check_data(x_0, context)
            x_0, num_samples = self.forward_chain.carry(x_0), len(x_0)
        else:
            num_samples = _count_samples(num_samples, context)
        like = self._reference() if x_0 is None else x_0
        denoiser = self.denoiser  # the access registers the network with Pyro, once
        assert isinstance(denoiser, nn.Module)
        with pyro.plate("data", num_samples, dim=-1):
            x_t = pyro.sample(f"x_{self.num_steps}", self.prior(like))
            for t in range(self.num_steps, 1, -1):
                x_t = pyro.sample(f"x_{t - 1}", self.transition(x_t, t, context))
            return pyro.sample("x_0", self.decode(x_t, context), obs=x_0)

    def prior(self, like: Tensor) -> dist.Independent:
        """p(x_T) = N(0, I) over one event, with the dtype and device of ``like``."""
        normal = dist.Normal(like.new_zeros(()), like.new_ones(()), validate_args=False)
        return normal.expand(self.event_shape).to_event(len(self.event_shape))

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

    def _reference(self) -> Tensor:
        """A tensor with the dtype and device that samples are drawn in."""
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
        num_samples = _count_samples(num_samples, context)
        if context is not None:
            check_finite(context, "contexts")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1; got {batch_size}.")
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        parts, failures = [], Failures()
        for start in range(0, num_samples, batch_size):
            indices = range(start, min(start + batch_size, num_samples))
            part = context if context is None else context[indices.start : indices.stop]
            streams = NoiseStreams(seed, indices, self.event_shape)
            states, failed = self._sample(streams, part, trajectory)
            parts.append(states)
            failures.add(indices, failed)
        failures.warn(num_samples, "They are NaN.")
        samples = torch.cat(parts, dim=1)
        return samples if trajectory else samples[0]

    def _sample(
        self, streams: NoiseStreams, context: Tensor | None, trajectory: bool
    ) -> tuple[Tensor, Tensor]:
        """x_0, or x_0 … x_T, stacked, NaN from the step on at which a sample failed, and that."""
        states: deque[Tensor] = deque(maxlen=None if trajectory else 1)
        failed, steps = NOTHING_FAILED, range(self.num_steps + 1, 0, -1)
        for t, x in zip(steps, self._ancestral(streams, context), strict=True):
            failed = failed_at(failed, t, x)  # x_{t−1}
            lost = (failed > 0).reshape(-1, *(1 for _ in self.event_shape))
            states.appendleft(x.masked_fill(lost, torch.nan))
        return torch.stack(list(states)), failed

    def _ancestral(self, streams: NoiseStreams, context: Tensor | None) -> Iterator[Tensor]:
        """x_T, …, x_1, x_0 in turn."""
        x_t = streams.normal(self._reference())
        yield x_t
        for t in range(self.num_steps, 1, -1):
            law = self.transition(x_t, t, context).base_dist
            x_t = law.loc + law.scale * streams.normal(x_t)
            yield x_t
        yield self.decode(x_t, context).base_dist.from_noise(streams.normal(x_t))

    # -- files ---------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The model as plain values: everything but the weights."""
        chain: ForwardChain = self.forward_chain
        return {
            "event_shape": list(self.event_shape),
            "num_steps": chain.num_steps,
            "order": chain.order,
            "schedule": serialization.describe(chain.schedule),
            "denoiser": serialization.describe(self._modules["denoiser"]),
            "variance": serialization.describe(self.variance),
            "decoder": serialization.describe(self.decoder),
        }

    @classmethod
    def from_config(
        cls,
        config: Any,
        network: nn.Module | None = None,
        *,
        schedule: Schedule | None = None,
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        denoiser: Denoiser | None = None,
    ) -> Self:
        """The chain that ``config()`` describes, with fresh weights.

        Args:
            config: plain values, as ``config()`` gives them.
            network, schedule, variance, decoder, denoiser: the part, where it is not one of
                pyrodiff's own; a denoiser with its network.

        Raises:
            ValueError: a description that names anything but pyrodiff's own classes, or a part of
                the user's own that was not handed in or is another than the one described.
            TypeError: a part of another kind.
        """
        handed_in = {"network": network, "schedule": schedule, "variance": variance}
        parts = build_parts(config, handed_in | {"decoder": decoder, "denoiser": denoiser})
        order = config.get("order", "denoising")
        if not isinstance(order, str):
            raise ValueError(f"Expected order to be one of {_ORDERS}; got {short(order)}.")
        num_steps, event_shape = _read_sizes(config)
        chain = ForwardChain(parts.pop("schedule"), num_steps, order=order)
        return cls(parts.pop("denoiser"), chain, event_shape, **parts)

    def save(self, path: str | Path) -> None:
        """Write ``config.yaml`` and ``model.safetensors`` into the folder ``path``, atomically."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        serialization.write_weights(folder / "model.safetensors", self.state_dict())
        serialization.write_config(folder / "config.yaml", {"model": self.config()})

    @classmethod
    def load(
        cls,
        path: str | Path,
        network: nn.Module | None = None,
        *,
        schedule: Schedule | None = None,
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        denoiser: Denoiser | None = None,
    ) -> Self:
        """Read what ``save`` wrote; nothing in the files is executed or imported.

        Args:
            path: the folder.
            network, schedule, variance, decoder, denoiser: see ``from_config``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is unreadable, truncated, or not pyrodiff's; weights that do not
                fit the model; what ``from_config`` raises.
            TypeError: what ``from_config`` raises.
        """
        folder = Path(path)
        config = serialization.entry(serialization.read_config(folder / "config.yaml"), "model")
        weights = serialization.read_weights(folder / "model.safetensors")
        if network is None and denoiser is None:
            serialization.check_network(config, weights, folder / "model.safetensors")
        chain = cls.from_config(
            config,
            network,
            schedule=schedule,
            variance=variance,
            decoder=decoder,
            denoiser=denoiser,
        )
        for weight in weights.values():
            if weight.is_floating_point():
                chain.to(weight.dtype)
                break
        serialization.load_weights(chain, weights, folder / "model.safetensors")
        return chain

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy (a moving average, say) must not share Pyro parameters with its original.
        super().__setstate__(state)
        self._pyro_name = _unique_name("reverse_chain")
