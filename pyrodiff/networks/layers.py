"""What the networks share: embeddings of time, context and values, and checks of their sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrodiff.checks import check_count

__all__ = [
    "Conditioning",
    "Features",
    "FourierFeatures",
    "check_dropout",
    "check_input",
    "check_multiple",
    "check_sizes",
    "checked_event_shape",
    "flat_context",
    "output_shape",
    "zeroed",
]

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


class Features(NamedTuple):
    """A network's output, and what it was made of.

    Args:
        output: ``(N, *event_shape)``.
        hidden: what the last layer reads, ``(N, *feature_shape)``, or None where it is not known.
        log_variance: of x_0 given x_t where the network has a notion of it,
            ``(N, *event_shape)``, or None.
    """

    output: Tensor
    hidden: Tensor | None = None
    log_variance: Tensor | None = None


class FourierFeatures(nn.Module):
    """Append sines and cosines of the input, so that a network sees its least significant bits.

    x ↦ (x, sin(π f_1 x), cos(π f_1 x), …) for the frequencies f_i (Kingma et al., 2021,
    "Variational Diffusion Models", appendix C).

    Args:
        frequencies: multiples of π; ``(2, 4, 8)`` stands for 2π, 4π and 8π. Empty: the identity.

    Shape: ``(N, C, *)`` to ``(N, C * expansion, *)``, with expansion ``1 + 2 * len(frequencies)``.
    """

    def __init__(self, frequencies: Sequence[float] = (2.0, 4.0, 8.0)) -> None:
        super().__init__()
        self.frequencies = tuple(frequencies)
        self.expansion = 1 + 2 * len(self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        if not self.frequencies:
            return x
        angles = [math.pi * frequency * x for frequency in self.frequencies]
        return torch.cat([x, *map(torch.sin, angles), *map(torch.cos, angles)], dim=1)


class Conditioning(nn.Module):
    """Embed time ``(N,)`` and context ``(N, *context_shape)`` as one ``(N, width)`` tensor."""

    frequencies: Tensor

    def __init__(self, width: int, context_size: int, time_scale: float) -> None:
        super().__init__()
        self.context_size, self.time_scale = context_size, time_scale
        # Periods from four times the range of log-SNRs down to about three units of it.
        frequencies = torch.logspace(math.log10(0.05), math.log10(2.0), width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.hidden = nn.Linear(2 * (width // 2), width)
        self.context = nn.Linear(context_size, width, bias=False) if context_size else None

    def forward(self, time: Tensor, context: Tensor | None) -> Tensor:
        wide = torch.promote_types(time.dtype, torch.float32)
        angles = (self.time_scale * time.to(wide))[:, None] * self.frequencies.to(wide)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedding = self.hidden(waves.to(self.hidden.weight.dtype))
        features = flat_context(context, len(time), self.context_size)
        if features is not None and self.context is not None:
            embedding = embedding + self.context(features.to(self.hidden.weight.dtype))
        return F.silu(embedding)


def checked_event_shape(event_shape: Sequence[int], axes: int | None = None) -> tuple[int, ...]:
    """The event shape as a tuple; ValueError unless its sizes are positive and its axes as many."""
    shape = tuple(int(size) for size in event_shape)
    if not shape or min(shape) < 1 or (axes is not None and len(shape) != axes):
        expected = "(channels, height, width)" if axes == 3 else "one positive size or more"
        raise ValueError(f"Expected an event_shape of {expected}; got {shape}.")
    return shape


def output_shape(event_shape: tuple[int, ...], learned_variance: bool) -> tuple[int, ...]:
    """The shape of one output: the event's, its first axis doubled for a learned variance."""
    return (event_shape[0] * (1 + learned_variance), *event_shape[1:])


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        check_count(name, size)


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless 0 <= dropout < 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected 0 <= dropout < 1; got {dropout}.")


def check_multiple(name: str, value: int, factor: int) -> None:
    """Raise ValueError unless ``value`` is a positive multiple of ``factor``."""
    if value < 1 or value % factor:
        raise ValueError(f"Expected {name} to be a positive multiple of {factor}; got {value}.")


def check_input(x: Tensor, event_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` has the shape ``(N, *event_shape)``."""
    if x.shape[1:] != event_shape:
        raise ValueError(f"Expected x of shape (N, *{event_shape}); got {tuple(x.shape)}.")


def flat_context(context: Tensor | None, batch: int, size: int) -> Tensor | None:
    """Return the context as ``(batch, size)``, or None where the network takes none."""
    if context is None and not size:
        return None
    got = None if context is None else tuple(context.shape)
    if context is None or not size or len(context) != batch or context.numel() != batch * size:
        expected = f"a context of {size} features for each of {batch} samples"
        raise ValueError(f"Expected {expected}; got {got}.")
    return context.reshape(batch, size)


def zeroed(layer: Layer) -> Layer:
    """The layer, its weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
