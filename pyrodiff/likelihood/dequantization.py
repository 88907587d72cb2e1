r"""Probabilities of discrete data under a model with a density, by dequantization.

The probability of a value v is the density's integral over the bin of width h around it,

    P(v) = ∫_{v + h [−½, ½]^d} p_θ(x) dx = E_{q(x|v)} p_θ(x)/q(x|v),
    x = v + h (u − ½),   q(x|v) = r(u|v) h^{−d},   u ~ r(u|v) on [0, 1]^d

so that with R draws, in nats,

    (1/R) Σ_r (log p_θ(x_r) − log q(x_r|v))     a lower bound                (Jensen)
    log (1/R) Σ_r p̂_θ(x_r)/q(x_r|v)             a tighter one: importance weights
                                                (Hoogeboom et al., 2020)

The second needs an unbiased estimate p̂ of the density itself.  r is

    UniformDequantizer      1                            (Theis, van den Oord and Bethge, 2016)
    VariationalDequantizer  that of u = sigmoid(μ(v) + s(v) logit w), w uniform, learned
                                                         (Ho et al., 2019, section 3.1)

The latter holds the former (μ = 0, s = 1), and with s > ½ the weights have a variance: near an end
of the bin r ∝ u^{1/s − 1}, and ∫ du/r is finite.  (A normal in place of logit w has tails too
light for that at any s.)

Bins are closed: mass beyond the outermost ones belongs to no value, and Σ_v P(v) < 1 by as much.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from typing_extensions import Self

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.result import Kind, LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_of_weights, mean_of_draws
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.objectives import VariationalBound
from pyrodiff.precision import call_network
from pyrodiff.streams import NoiseStreams, derived_seed

__all__ = ["Dequantized", "Dequantizer", "UniformDequantizer", "VariationalDequantizer"]

_PLACES, _INNER = 2, 3  # words of derived seeds: of u, and of the estimator inside


class Draw(NamedTuple):
    """A draw from q(x|v), shape (N, *event_shape), and its log density, nats, (N,), float64."""

    x: Tensor
    log_density: Tensor


class Dequantizer(ABC):
    """q(x|v), a density over the bin of width ``bin_width`` around each value v of the data."""

    bin_width: float

    @abstractmethod
    def place(self, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u in [0, 1]^d for standard normal noise, both (N, *event_shape), and log r(u|v), (N,)."""

    def draw(self, v: Tensor, noise: Tensor) -> Draw:
        """x in the bin of v, all of shape (N, *event_shape), and log q(x|v)."""
        u, log_r = self.place(v, noise)
        log_volume = v[0].numel() * math.log(self.bin_width)
        return Draw(v + self.bin_width * (u - 0.5), log_r.double() - log_volume)


def _log_logistic(y: Tensor) -> Tensor:
    """log of the logistic density, which is also log du/dy for u = sigmoid(y)."""
    return logsigmoid(y) + logsigmoid(-y)


def _check_width(bin_width: float) -> None:
    if not (bin_width > 0 and math.isfinite(bin_width)):
        raise ValueError(f"Expected bin_width to be positive and finite; got {bin_width!r}.")


@dataclass(frozen=True)
class UniformDequantizer(Dequantizer):
    """u uniform: the bound is tight where the density is constant over each bin.

    Args:
        bin_width: h, in the model's units: 2/255 for 256 levels on [−1, 1].

    Raises:
        ValueError: a width that is not positive.
    """

    bin_width: float

    def __post_init__(self) -> None:
        _check_width(self.bin_width)

    def place(self, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return torch.special.ndtr(noise.double()).to(v), v.new_zeros(len(v))


class VariationalDequantizer(Dequantizer, nn.Module):
    """u = sigmoid(μ(v) + s(v) logit w), w uniform, each dimension on its own; trained by ``fit``.

    Args:
        event_shape: the shape of one sample.
        bin_width: h, in the model's units.
        network: called as ``network(v)``; returns μ and a, of s = ½ (1 + eᵃ), along the first
            event axis, which is doubled: zeros make u uniform.  Default: a perceptron with two
            hidden layers, zero at first.
        width: hidden features of the default network.

    Raises:
        ValueError: a width that is not positive; on use, an output of another shape.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        bin_width: float,
        network: nn.Module | None = None,
        width: int = 64,
    ):
        super().__init__()
        _check_width(bin_width)
        self.event_shape, self.bin_width = torch.Size(event_shape), bin_width
        self.network = _perceptron(self.event_shape, width) if network is None else network

    def place(self, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        output = call_network(self.network, v)
        expected = (len(v), 2 * v.shape[1], *v.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"Expected network output of shape {expected} (mean and scale); "
                f"got {tuple(output.shape)}."
            )
        mean, raw_scale = output.chunk(2, 1)
        scale = 0.5 * (1 + raw_scale.exp())
        logit = torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)
        y = mean + scale * logit
        log_r = _log_logistic(logit) - scale.log() - _log_logistic(y)
        return torch.sigmoid(y), log_r.flatten(1).sum(1)

    def fit(
        self,
        reverse: ReverseChain,
        x_0: Tensor,
        steps: int = 1000,
        *,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        objective: VariationalBound | None = None,
        seed: int = 0,
        context: Tensor | None = None,
        progress: Callable[[int, float], object] | None = None,
    ) -> Self:
        """Maximise E[variational bound at x − log q(x|v)] over data; the model stays as it is.

        Args:
            reverse: a model with a density.
            x_0: discrete data, shape (N, *event_shape), in the model's units.
            steps: of Adam, its learning rate falling to zero as a cosine.
            batch_size: samples per step.
            learning_rate: the first.
            objective: the bound; default ``VariationalBound`` with a generator of ``seed``.
            seed: of batches, of u and of the bound's noise.
            context: shape (N, …) or None.
            progress: called after each step with its number and the loss, nats per sample.

        Raises:
            ValueError: data that the model cannot explain, a discrete decoder.
        """
        _check_decoder(reverse)
        reverse.check_data(x_0, context)
        generator = torch.Generator().manual_seed(seed)
        bound = VariationalBound(seed=generator) if objective is None else objective
        parameters = list(self.parameters())
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with evaluation_mode(reverse):
            try:
                for step in range(steps):
                    some = torch.randint(len(x_0), (batch_size,), generator=generator)
                    part = None if context is None else context[some.to(context.device)]
                    v = x_0[some.to(x_0.device)]
                    noise = torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v)
                    loss = self._loss(reverse, bound, v, noise, part)
                    # not backward(): the model's own gradients are none of this
                    gradients = torch.autograd.grad(loss, parameters)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    decay.step()
                    if progress is not None:
                        progress(step + 1, float(loss.detach()))
            finally:
                optimizer.zero_grad()
        return self

    def _loss(
        self,
        reverse: ReverseChain,
        bound: VariationalBound,
        v: Tensor,
        noise: Tensor,
        context: Tensor | None,
    ) -> Tensor:
        """The bound on −log P(v), nats per sample."""
        x, log_density = self.draw(v, noise)
        loss = bound.differentiable_loss(reverse, reverse.forward_chain, x, context)
        return (loss + log_density.sum()) / len(v)

    def __repr__(self) -> str:
        return f"VariationalDequantizer({tuple(self.event_shape)}, bin_width={self.bin_width!r})"


def _perceptron(event_shape: torch.Size, width: int) -> nn.Module:
    """(N, *event_shape) to twice as many values, zero before training."""
    size, doubled = event_shape.numel(), (2 * event_shape[0], *event_shape[1:])
    last = nn.Linear(width, 2 * size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    hidden = [nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(nn.Flatten(), *hidden, last, nn.Unflatten(1, doubled))


def _check_decoder(reverse: ReverseChain) -> None:
    if reverse.decoder.discrete:
        raise ValueError(
            "Expected a decoder with a density, whose bins are to be integrated; got "
            f"{reverse.decoder!r}, which gives probabilities already."
        )


@dataclass(frozen=True)
class Dequantized(Estimator):
    """log P of discrete data under a model with a density, from ``draws`` inner estimates.

    Args:
        estimator: of log p_θ(x) at each draw.
        dequantizer: q(x|v).
        draws: R; the standard error, which holds the inner one, is NaN for one draw.
        importance: the log of the draws' mean weight, not the mean of their logs: tighter, and
            unbiased for P(v) in its exponential; the standard error is NaN for fewer than 8
            draws, or weights too heavy for it.

    Raises:
        ValueError: ``draws`` < 1; importance weights from an estimator whose exponential is not
            unbiased for the density; on ``estimate``, a discrete decoder.
    """

    estimator: Estimator
    dequantizer: Dequantizer
    draws: int = 8
    importance: bool = False

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        if self.importance and not self.estimator.unbiased_weights:
            raise ValueError(
                "Expected an estimator whose exponential is unbiased for the density, as that of "
                "ImportanceBound or of PathBound(paths=1), for importance weights; got "
                f"{self.estimator!r}."
            )

    @property
    def unbiased_weights(self) -> bool:
        return self.importance

    def _check(self, reverse: ReverseChain) -> None:
        _check_decoder(reverse)

    def samples_per_batch(self, batch_size: int) -> int:
        return self.estimator.samples_per_batch(batch_size)

    def _batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        parts, log_w = [], []
        for draw in range(self.draws):
            inner, log_density = self._one(reverse, batch, draw)
            parts.append(inner)
            log_w.append(inner.value - log_density)
        weights = torch.stack(log_w, 1)
        average = log_mean_of_weights if self.importance else mean_of_draws
        value, std_error, freedom, remarks = average(weights)
        return LogLikelihood(
            value,
            std_error,
            self._kind(parts[0].kind),
            torch.stack([part.calls for part in parts]).sum(0),
            reverse.event_shape.numel(),
            repr(self),
            degrees_of_freedom=freedom,
            log_weights=weights if self.importance else None,
            shared_calls=parts[0].shared_calls,
            remarks=remarks,
        )

    def _one(self, reverse: ReverseChain, batch: Batch, draw: int) -> tuple[LogLikelihood, Tensor]:
        """The inner result at x ~ q(x|v), and log q(x|v) on the CPU."""
        seed = derived_seed(batch.seed, _PLACES)
        paths = [draw] * len(batch)
        streams = NoiseStreams(seed, batch.indices, reverse.event_shape, paths)
        x, log_density = self.dequantizer.draw(batch.x_0, streams.normal(batch.x_0))
        inner = self.estimator.estimate(
            reverse,
            x,
            seed=derived_seed(batch.seed, _INNER, draw),
            batch_size=batch.rows,
            context=batch.context,
            indices=batch.indices,
        )
        return inner, log_density.cpu()

    def _kind(self, inner: Kind) -> Kind:
        # averaged logs lie below the log of the average: what was above may now be anywhere
        return "estimate" if inner == "upper bound" else inner
