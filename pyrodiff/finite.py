"""Data and numbers that are not finite: which sample they belong to, and where they arose.

A network that returns NaN or infinity, or numbers whose squares overflow, spoils the value of one
sample.  That value is NaN and a warning says so; the other samples keep theirs.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "Failures",
    "NOTHING_FAILED",
    "check_finite",
    "check_tensor",
    "failed_at",
    "finite_rows",
    "has_values",
]


NOTHING_FAILED = torch.tensor(0)  # no step, for rows of any number and device


def finite_rows(values: Tensor) -> Tensor:
    """Whether all numbers of a row are finite, (rows, …) to (rows,)."""
    return values.isfinite().flatten(1).all(1) if values.dim() > 1 else values.isfinite()


def failed_at(steps: Tensor, t: int, values: Tensor) -> Tensor:
    """``steps`` with t for rows whose values are not finite and that had not failed before.

    Nothing waits for the device here.
    """
    return torch.where((steps > 0) | finite_rows(values), steps, t)


class Failures:
    """The samples of a run whose values are not finite."""

    def __init__(self) -> None:
        self._steps: dict[int, int | None] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, index: int) -> bool:
        return index in self._steps

    def add(self, indices: Sequence[int], steps: Tensor) -> None:
        """Note samples by the step at which they failed, (n,); 0 is no failure."""
        for row in steps.nonzero().flatten().tolist():
            self._steps.setdefault(indices[row], int(steps[row]))

    def add_terms(self, indices: Sequence[int], t: Tensor, terms: Tensor) -> None:
        """Note samples with terms at steps t, (n, c) each, that are not finite."""
        for row, column in (~terms.isfinite()).nonzero().tolist():
            self._steps.setdefault(indices[row], int(t[row, column]))

    def add_values(self, indices: Sequence[int], values: Tensor) -> None:
        """Note samples with values, (n,), that are not finite, at a step that is not known."""
        for row in (~values.isfinite()).nonzero().flatten().tolist():
            self._steps.setdefault(indices[row], None)

    def warn(self, total: int, what: str, stacklevel: int = 3) -> None:
        """One UserWarning for all of them, which names the first few; none for none."""
        if not self._steps:
            return
        first = sorted(self._steps.items())[:5]
        names = [f"{index}" if t is None else f"{index} (t = {t})" for index, t in first]
        more = ", …" if len(self) > len(first) else ""
        warnings.warn(
            f"Expected finite numbers from the model; got NaN or infinity for {len(self)} of "
            f"{total} samples, with the index {', '.join(names)}{more}. {what}",
            UserWarning,
            stacklevel=stacklevel,
        )


def has_values(x: Tensor) -> bool:
    """Whether numbers can be looked at: not where ``torch.func`` has a tensor stand for many."""
    return len(x) > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_finite(x: Tensor, name: str = "data") -> None:
    """Raise ValueError unless all numbers are finite; names the first row that has others."""
    if not has_values(x) or not (x.is_floating_point() or x.is_complex()):
        return
    good = finite_rows(x.detach())
    if not bool(good.all()):
        bad = (~good).nonzero().flatten()
        raise ValueError(
            f"Expected finite {name}; got NaN or infinity in {len(bad)} of {len(x)} samples, "
            f"the first at index {int(bad[0])}."
        )


def check_tensor(x_0: object) -> None:
    """Raise TypeError unless ``x_0`` is a tensor."""
    if not isinstance(x_0, Tensor):
        raise TypeError(
            f"Expected data as a torch.Tensor; got {type(x_0).__name__}. "
            "torch.as_tensor(x_0, dtype=torch.float32) makes one of an array or a list."
        )
