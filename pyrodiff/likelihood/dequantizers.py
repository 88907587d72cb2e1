r"""Laws of x within the bin of a discrete value: q(x|v) = r(u|v) h^{−d}, x = v + h (u − ½).

r is

    UniformDequantizer      1                            (Theis, van den Oord and Bethge, 2016)
    VariationalDequantizer  that of u = sigmoid(μ(v) + s(v) logit w), w uniform, learned
                                                         (Ho et al., 2019, section 3.1)

The latter includes the former (μ = 0, s = 1), and with s > ½ the weights have a variance: near an
end of the bin r ∝ u^{1/s − 1}, and ∫ du/r is finite.  (A normal in place of logit w has tails too
light for that at any s.)
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
from pyrodiff.checks import check_positive
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.objectives import VariationalBound
from pyrodiff.precision import call_network

__all__ = ["Dequantizer", "Draw", "UniformDequantizer", "VariationalDequantizer", "check_density"]


def check_density(reverse: ReverseChain) -> None:
    """Raise ValueError for a model of discrete data, whose values have probabilities already."""
    if reverse.decoder.discrete:
        raise ValueError(
            "Expected a decoder with a density, whose bins are to be integrated; got "
            f"{reverse.decoder!r}, which gives probabilities already."
        )


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
        check_positive("bin_width", self.bin_width)

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
        check_positive("bin_width", bin_width)
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
        check_density(reverse)
        reverse.check_data(x_0, context)
        generator = torch.Generator().manual_seed(seed)
        bound = VariationalBound(seed=generator) if objective is None else objective
        parameters = list(self.parameters())
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with evaluation_mode(reverse):
            try:
                for step in range(steps):
                    rows = torch.randint(len(x_0), (batch_size,), generator=generator)
                    labels = None if context is None else context[rows.to(context.device)]
                    v = x_0[rows.to(x_0.device)]
                    noise = torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v)
                    loss = self._loss(reverse, bound, v, noise, labels)
                    _set_gradients(loss, parameters)
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


def _set_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """As backward() does for these parameters, and not for those of the model."""
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _perceptron(event_shape: torch.Size, width: int) -> nn.Module:
    """(N, *event_shape) to twice as many values, zero before training."""
    size, doubled = event_shape.numel(), (2 * event_shape[0], *event_shape[1:])
    last = nn.Linear(width, 2 * size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    hidden = [nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(nn.Flatten(), *hidden, last, nn.Unflatten(1, doubled))
