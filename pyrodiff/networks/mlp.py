"""A residual perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrodiff.networks.layers import (
    Conditioning,
    Features,
    FourierFeatures,
    check_dropout,
    check_input,
    check_sizes,
    checked_event_shape,
    output_shape,
    zeroed,
)

__all__ = ["ResidualMLP"]


class ResidualMLP(nn.Module):
    """Time-conditioned residual perceptron for events of any shape, flattened inside.

    Each block is h ← h + W_2 silu((1 + a) W_1 LN(h) + b), with a and b functions of time and
    context.

    Args:
        event_shape: shape of one sample, without the batch axis.
        width: hidden features.
        blocks: residual blocks.
        context_size: context features per sample, flattened; 0 for no context.
        learned_variance: double the first event axis of the output.
        fourier: multiples of π for ``FourierFeatures`` of the input; empty for none. ``(1, 2, 4)``
            sharpens densities with fine structure in two dimensions.
        time_scale: factor applied to ``time`` first; see the module's docstring.
        dropout: probability of dropping a hidden feature.

    Shape: ``(N, *event_shape)``, ``(N,)``, ``(N, *context_shape)`` to ``(N, *event_shape)``.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 256,
        blocks: int = 4,
        context_size: int = 0,
        learned_variance: bool = False,
        fourier: Sequence[float] = (),
        time_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.event_shape = checked_event_shape(event_shape)
        check_sizes(width=width, blocks=blocks)
        check_dropout(dropout)
        self.width, self.blocks, self.context_size = width, blocks, context_size
        self.learned_variance, self.fourier = learned_variance, tuple(fourier)
        self.time_scale, self.dropout = time_scale, dropout
        self.output_shape = output_shape(self.event_shape, learned_variance)

        embedding = min(width, 32 + context_size)  # one small linear map conditions all blocks
        self.features = FourierFeatures(fourier)
        self.conditioning = Conditioning(embedding, context_size, time_scale)
        self.film = nn.Linear(embedding, 2 * blocks * width)
        self.first = nn.Linear(math.prod(self.event_shape) * self.features.expansion, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.enter = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.leave = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in range(blocks))
        self.last = zeroed(nn.Linear(width, math.prod(self.output_shape)))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Of what ``with_features`` gives for one sample."""
        return (self.width,)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        return self.with_features(x, time, context).output

    @property
    def has_variance(self) -> bool:
        """Whether ``with_features`` gives a log-variance."""
        return False

    def with_features(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Features:
        """The output and what the last layer reads."""
        check_input(x, self.event_shape)
        film = self.film(self.conditioning(time, context)).chunk(2 * self.blocks, dim=1)
        h = self.first(self.features(x.flatten(1)))
        layers = zip(self.norms, self.enter, self.leave, film[::2], film[1::2], strict=True)
        for norm, enter, leave, scale, shift in layers:
            hidden = F.silu(torch.addcmul(shift, enter(norm(h)), 1 + scale))
            if self.dropout:
                hidden = F.dropout(hidden, self.dropout, self.training)
            h = h + leave(hidden)
        hidden = F.silu(h)
        return Features(self.last(hidden).unflatten(1, self.output_shape), hidden)
