r"""A second output for a trained network: the raw variance of x_0 given x_t.

With y the network's output, h what its last layer reads and λ the noise level,

    raw = W (r', h'),   r' = silu(r + B r),   r = silu((1 + a(λ)) A h' + b(λ)),   h' = (x_t, y, h)

by 3×3 convolutions for images and linear maps for anything else; W starts at zero.  A network with
a notion of the variance of x_0 given x_t (``Features.log_variance``) is taken at its word, and the
head learns what to add: with g the logarithm of that variance in units of σ_t², h' = (x_t, y, h, g)
and raw = g + W (r', h').

The network is frozen, and the output is (y, raw) with y as it was, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pyrodiff.networks.layers import (
    Conditioning,
    Features,
    check_sizes,
    checked_event_shape,
    zeroed,
)

__all__ = ["VarianceHead", "WithFeatures"]

_EMBEDDING = 32


@runtime_checkable
class WithFeatures(Protocol):
    """A network that says what its last layer reads."""

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Of the features of one sample: (C, height, width) for images, else (C,)."""

    @property
    def has_variance(self) -> bool:
        """Whether the features hold a log-variance; the network's time is the log-SNR then."""

    def with_features(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Features:
        """The output and what the last layer reads."""


class VarianceHead(nn.Module):
    """A network with a learned variance beside its output, which stays what it is.

    Args:
        network: without a learned variance.  Of the networks of this package, and of others with
            ``feature_shape``, ``has_variance`` and ``with_features`` (``WithFeatures``), the head
            reads what the last layer reads; of any other x_t and the output alone.  Its parameters
            are frozen (``requires_grad``), and it stays in evaluation mode.
        event_shape: shape of one sample, without the batch axis.
        width: hidden features of the head.
        time_scale: factor applied to ``time`` first; see the package's docstring.

    Shape: ``(N, *event_shape)`` to the same with the first event axis doubled.

    Raises:
        ValueError: a network that predicts a variance already.
    """

    def __init__(
        self,
        network: nn.Module,
        event_shape: Sequence[int],
        width: int = 32,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_network(network)
        check_sizes(width=width)
        self.network = network.requires_grad_(False).eval()
        self.event_shape = checked_event_shape(event_shape)
        self.width, self.time_scale = width, time_scale
        known = network if isinstance(network, WithFeatures) else None
        hidden = known.feature_shape if known else (0, *self.event_shape[1:])
        self.is_image = len(self.event_shape) == 3 and hidden[1:] == self.event_shape[1:]
        axis = slice(0, 1) if self.is_image else slice(None)  # which axes are channels
        outputs = math.prod(self.event_shape[axis])
        inputs = (2 + bool(known and known.has_variance)) * outputs
        inputs += math.prod(hidden[axis])
        self.conditioning = Conditioning(_EMBEDDING, 0, time_scale)
        self.film = nn.Linear(_EMBEDDING, 2 * width)
        self.enter = self._layer(inputs, width)
        self.middle = self._layer(width, width)
        self.last = zeroed(self._layer(width + inputs, outputs))

    def _layer(self, inputs: int, outputs: int) -> nn.Conv2d | nn.Linear:
        if self.is_image:
            return nn.Conv2d(inputs, outputs, 3, padding=1)
        return nn.Linear(inputs, outputs)

    def train(self, mode: bool = True) -> Self:
        """The mode of the head; the network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        features = self._features(x, time, context)
        inputs = [x, features.output]
        if features.hidden is not None:
            inputs.append(features.hidden)
        if features.log_variance is None:
            raw = self._read(inputs, time).reshape(x.shape)
        else:
            given = features.log_variance - _log_noise(time, x)
            raw = given + self._read([*inputs, given], time).reshape(x.shape)
        return torch.cat([features.output, raw], dim=1)

    def _features(self, x: Tensor, time: Tensor, context: Tensor | None) -> Features:
        if isinstance(self.network, WithFeatures):
            return self.network.with_features(x, time, context)
        arguments = (x, time) if context is None else (x, time, context)
        return Features(self.network(*arguments))

    def _read(self, inputs: list[Tensor], time: Tensor) -> Tensor:
        """W (r', h') for h' in parts."""
        if not self.is_image:
            inputs = [value.flatten(1) for value in inputs]
        joint = torch.cat(inputs, dim=1)
        scale, shift = self.film(self.conditioning(time, None)).chunk(2, dim=1)
        if self.is_image:
            scale, shift = scale[..., None, None], shift[..., None, None]
        hidden = F.silu(torch.addcmul(shift, self.enter(joint), 1 + scale))
        hidden = F.silu(hidden + self.middle(hidden))
        return self.last(torch.cat([hidden, joint], dim=1))


def _log_noise(log_snr: Tensor, x: Tensor) -> Tensor:
    """log σ² at λ of shape (N,), broadcastable to x."""
    return F.logsigmoid(-log_snr).reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)


def _check_network(network: nn.Module) -> None:
    if isinstance(network, VarianceHead) or getattr(network, "learned_variance", False):
        raise ValueError(
            "Expected a network without a learned variance for a variance head; "
            f"got a {type(network).__name__} that predicts one."
        )
