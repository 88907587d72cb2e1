"""A data set: three splits in model units, and the map back to the data's own units.

Models see z = (x − a)/s, elementwise, where x is the data as given.  For a density

    log p_x(x) = log p_z(z) + log|dz/dx| = log p_z(z) − Σ_i log s_i,

so log-likelihoods of differently scaled versions of one data set differ by a constant, which
``DataSet.log_density_offset`` gives.  Probabilities of discrete data need no such term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Affine", "DataSet"]


@dataclass(frozen=True, eq=False)
class Affine:
    """The elementwise map z = (x − shift)/scale from the data as given (x) to model units (z).

    Args:
        shift: float64, broadcastable to the event shape, in units of x.
        scale: float64, positive, broadcastable to the event shape, in units of x.

    Raises:
        ValueError: if either is not float64, or a scale is not positive and finite.
    """

    shift: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        """Check types and signs."""
        if self.shift.dtype != torch.float64 or self.scale.dtype != torch.float64:
            raise ValueError(
                "Expected shift and scale in float64; "
                f"got {self.shift.dtype} and {self.scale.dtype}."
            )
        if not torch.isfinite(self.shift).all():
            raise ValueError("Expected a finite shift; got a value that is NaN or infinite.")
        if not (torch.isfinite(self.scale) & (self.scale > 0)).all():
            raise ValueError(f"Expected a positive, finite scale; got {self.scale.min():g}.")

    def forward(self, x: Tensor) -> Tensor:
        """z = (x − shift)/scale for x of shape (…, *event_shape), in float64 on the device of x."""
        return (x.to(torch.float64) - self.shift.to(x.device)) / self.scale.to(x.device)

    def inverse(self, z: Tensor) -> Tensor:
        """x = shift + scale · z for z of shape (…, *event_shape), in float64 on the device of z."""
        return self.shift.to(z.device) + self.scale.to(z.device) * z.to(torch.float64)

    def log_abs_det(self, event_shape: Sequence[int]) -> float:
        """log|dz/dx| = −Σ_i log s_i over one event, in nats.

        Raises:
            ValueError: if scale does not broadcast to ``event_shape``.
        """
        shape = tuple(event_shape)
        try:
            scale = self.scale.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"Expected an event shape that {tuple(self.scale.shape)} broadcasts to; got "
                f"{shape}."
            ) from error
        return -float(scale.log().sum())


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """Three splits of one data set, in model units.

    Args:
        name: in figures and tables.
        train: (N, *event_shape), float32, model units; the only split that ``transform`` is
            fitted on.
        validation: likewise, for stopping and choosing.
        test: likewise, for the figures that are reported.
        transform: the map from the data as given to model units.
        levels: None for continuous data, whose likelihood is a density. Otherwise the data are
            discrete, on the grid ``linspace(-1, 1, levels)`` in model units, and their likelihood
            is a probability.
        train_context: (N, *context_shape), float32, or None.
        validation_context: likewise.
        test_context: likewise.
        log_prob: exact log p in nats, in the units of the data as given, where it is known; maps
            (…, *event_shape) to (…).

    Raises:
        ValueError: if the splits differ in event shape, are not float32, a context has another
            number of rows than its split, or a value is NaN or infinite.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    transform: Affine
    levels: int | None = None
    train_context: Tensor | None = None
    validation_context: Tensor | None = None
    test_context: Tensor | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check that the splits agree."""
        contexts = (self.train_context, self.validation_context, self.test_context)
        for split, context in zip((self.train, self.validation, self.test), contexts, strict=True):
            if split.dtype != torch.float32 or tuple(split.shape[1:]) != self.event_shape:
                raise ValueError(
                    f"Expected float32 splits of event shape {self.event_shape}; "
                    f"got {split.dtype} of event shape {tuple(split.shape[1:])}."
                )
            if context is not None and len(context) != len(split):
                raise ValueError(f"Expected {len(split)} rows of context; got {len(context)}.")
            for name, values in (("values", split), ("context", context)):
                if values is not None and not bool(torch.isfinite(values).all()):
                    row = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
                    raise ValueError(f"Expected finite {name}; got NaN or infinity in row {row}.")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one data point."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether events are (channels, height, width)."""
        return len(self.event_shape) == 3

    @property
    def dimensions(self) -> int:
        """The number of values in one data point."""
        return math.prod(self.event_shape)

    def log_density_offset(self) -> float:
        """Nats to add to a log-likelihood in model units for the data as given.

        log|dz/dx| for continuous data; 0 for discrete data, whose probabilities have no units.
        """
        return 0.0 if self.levels is not None else self.transform.log_abs_det(self.event_shape)

    def __repr__(self) -> str:
        """Sizes and shapes, never the data."""
        sizes = f"{len(self.train)}/{len(self.validation)}/{len(self.test)}"
        kind = "continuous" if self.levels is None else f"{self.levels} levels"
        return f"DataSet({self.name!r}, {sizes} of {self.event_shape}, {kind})"
