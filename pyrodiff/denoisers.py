r"""Denoisers: what a network's output means, as the clean data x̂_0(x_t) that it implies.

    NoiseDenoiser     output ε̂    x̂_0 = (x_t − σ_t ε̂) / α_t    (Ho et al., 2020, equation 15)
    DataDenoiser      output x̂_0   x̂_0
    VelocityDenoiser  output v̂    x̂_0 = α_t x_t − σ_t v̂       (Salimans and Ho, 2022, appendix D)
    MeanDenoiser      output μ̂    x̂_0 = (μ̂ − c_t x_t) / c_0   (Ho et al., 2020, equation 8)

The rest of the library works with x̂_0 alone.  The mean of p_θ(x_{t−1} | x_t) is c_0 x̂_0 + c_t x_t
whatever the network predicts, so that for a ``MeanDenoiser`` it is the network's output itself
(at t = 1, where c_0 = 1 and c_t = 0, the mean of x_0).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrodiff.covariances import Spread
from pyrodiff.kernels import Level, Step
from pyrodiff.precision import network_dtype

__all__ = [
    "DataDenoiser",
    "Denoiser",
    "MeanDenoiser",
    "NoiseDenoiser",
    "Prediction",
    "VelocityDenoiser",
]

_TIMES = ("log_snr", "timestep")


class Prediction(NamedTuple):
    """A denoiser's output at x_t: x̂_0, what a learned variance reads, and the spread of x_0."""

    x0_hat: Tensor
    raw_variance: Tensor | None
    spread: Spread | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["Prediction"]) -> "Prediction":
        """One prediction for the rows of several, of the same kind."""
        tensors = [part.tensors() for part in parts]
        rows = iter(torch.cat(column) for column in zip(*tensors, strict=True))
        return parts[0].map(lambda _: next(rows))

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of ``map``."""
        tensors: list[Tensor] = []
        self.map(lambda value: tensors.append(value) or value)  # type: ignore[func-returns-value]
        return tensors

    def map(self, change: Callable[[Tensor], Tensor]) -> "Prediction":
        """The prediction with every tensor changed alike: rows of it, or another shape."""
        raw = None if self.raw_variance is None else change(self.raw_variance)
        return Prediction(
            change(self.x0_hat), raw, None if self.spread is None else self.spread.map(change)
        )


class Denoiser(nn.Module, ABC):
    """A network and the meaning of its output.

    Args:
        network: called as ``network(x, time)`` or ``network(x, time, context)`` with x of shape
            (N, *event_shape) and time of shape (N,); returns (N, *event_shape), or the first
            event axis doubled for a learned variance (the second half is the variance's).  Input
            and output have the dtype of its parameters, whatever the chain computes in.
        time: what the network receives as time: ``"log_snr"``, λ_t, or ``"timestep"``, t − 1,
            counted from 0 as published DDPM weights expect.  At least float32 in either case.
        clip: bounds (low, high) for x̂_0, the same in the bound and in the sampler; None, the
            default, for no clipping.

    Raises:
        ValueError: an unknown ``time``, or bounds that are not low < high.
    """

    def __init__(
        self,
        network: nn.Module,
        time: str = "log_snr",
        clip: tuple[float, float] | None = None,
    ):
        super().__init__()
        if time not in _TIMES:
            raise ValueError(f"Expected time to be one of {_TIMES}; got {time!r}.")
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"Expected clip = (low, high) with low < high; got {clip!r}.")
        self.network = network
        self.time = time
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))

    @abstractmethod
    def x0_hat(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """x̂_0 from the network's output: what a denoiser of one's own defines.

        Args:
            output: the network's, without the half for a learned variance; like ``x_t``.
            x_t: shape (N, *event_shape).
            level: of x_t, broadcastable to it; a ``Step`` where the chain is asked for one.
        """

    def forward(
        self,
        x_t: Float[Tensor, "n *event"],
        level: Level,
        context: Tensor | None = None,
        learned_variance: bool = False,
    ) -> Prediction:
        """x̂_0 of a flat batch.

        Args:
            x_t: shape (N, *event_shape).
            level: of x_t, for all samples or one per sample.
            context: shape (N, …) or None; floating-point ones come in the network's dtype or, where
                they are not in it already, at least in float32.
            learned_variance: whether the output carries a second half for the variance.

        Raises:
            ValueError: the network's output has another shape than the one expected.
        """
        dtype = network_dtype(self.network, x_t.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        time = level.log_snr if self.time == "log_snr" else level.t - 1
        arguments = [x_t.to(dtype), time.reshape(-1).to(x_t.device, wide).expand(len(x_t))]
        if context is not None:
            foreign = context.is_floating_point() and context.dtype != dtype
            arguments.append(context.to(wide) if foreign else context)
        output = self.network(*arguments).to(x_t.dtype)
        expected = list(x_t.shape)
        expected[1] *= 2 if learned_variance else 1
        if list(output.shape) != expected:
            hint = " (doubled along the first event axis for the learned variance)"
            raise ValueError(
                f"Expected network output of shape {tuple(expected)}"
                f"{hint if learned_variance else ''}; got {tuple(output.shape)}."
            )
        raw = None
        if learned_variance:
            output, raw = output.chunk(2, dim=1)
        x0_hat = self.x0_hat(output, x_t, level)
        if self.clip is not None:
            x0_hat = x0_hat.clamp(*self.clip)
        return Prediction(x0_hat, raw)


class NoiseDenoiser(Denoiser):
    """The network predicts the noise ε in x_t = α_t x_0 + σ_t ε."""

    def x0_hat(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        # not (x_t − σ ε̂)/α: two operations of the event's size, not three, in the gradient
        return x_t / level.alpha - (level.sigma / level.alpha) * output


class DataDenoiser(Denoiser):
    """The network predicts the clean data x_0."""

    def x0_hat(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        return output


class VelocityDenoiser(Denoiser):
    """The network predicts the velocity v = α_t ε − σ_t x_0."""

    def x0_hat(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        return level.alpha * x_t - level.sigma * output


class MeanDenoiser(Denoiser):
    """The network predicts the mean μ of p_θ(x_{t−1} | x_t)."""

    def x0_hat(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        if not isinstance(level, Step):
            raise ValueError(
                "Expected a step of the chain for a MeanDenoiser, whose output is the mean of that "
                f"step; got a level between two steps, t = {level.t.flatten()[0].item():g}."
            )
        return (output - level.c_t * x_t) / level.c_0
