r"""An adaptive Runge-Kutta solver in which every row of a batch takes steps of its own.

    k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j),   y' = y + h Σ_i b_i k_i,   e = h Σ_i e_i k_i

with the coefficients of Dormand and Prince (1980, the pair 5(4)) as SciPy's ``RK45`` keeps them.
The last slope is the next step's first.  A step is taken where

    max_i |e_i| / (atol + rtol max(|y_i|, |y'_i|)) = r ≤ 1,   h ← h · clamp(0.9 r^{−1/5}, 0.2, 10)

(Hairer, Nørsett and Wanner, 1993, section II.4, with the maximum for the norm, so that no entry of
the state hides behind the others).  t, h and r are a row's own: its steps are those that it takes
alone, and rows that have arrived leave the batch.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Solution", "solve", "step"]

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
_FIRST = 1 / 64  # of the way, the first step tried
_LEAST = 1e-12  # of the way: steps get as small only where f is not finite ahead


class Solution(NamedTuple):
    """States at the end, shape (n, m), and the calls of f that each row took, (n,), int64.

    ``lost_at`` (n,) is the t beyond which f is not finite for a row, whose state is NaN then; it
    is NaN for rows that arrived.
    """

    y: Tensor
    calls: Tensor
    lost_at: Tensor


class _Tableau(NamedTuple):
    a: list[Tensor]
    b: Tensor
    c: list[float]
    e: Tensor


@cache
def _tableau(dtype: torch.dtype, device: torch.device) -> _Tableau:
    from scipy.integrate import RK45

    def cast(values: object) -> Tensor:
        return torch.as_tensor(values).to(device, dtype)

    a = [cast(row[:i]) for i, row in enumerate(RK45.A)]
    return _Tableau(a, cast(RK45.B), RK45.C.tolist(), cast(RK45.E))


def step(
    slope: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, first: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the pair: y' at t + h, f there, and the estimate of y''s error.

    Args:
        slope: f(t, y), called six times.
        t, h: shape (n,).
        y, first: the state and f(t, y), shape (n, m).
    """
    tableau, h_y = _tableau(y.dtype, y.device), h.unsqueeze(1)
    slopes = y.new_empty(7, *y.shape)
    slopes[0] = first
    for i in range(1, 6):
        moved = torch.addcmul(y, h_y, torch.tensordot(tableau.a[i], slopes[:i], 1))
        slopes[i] = slope(t + tableau.c[i] * h, moved)
    y = torch.addcmul(y, h_y, torch.tensordot(tableau.b, slopes[:6], 1))
    slopes[6] = slope(t + h, y)
    return y, slopes[6], h_y * torch.tensordot(tableau.e, slopes, 1)


def solve(
    slope: Slope,
    y: Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
    max_steps: int,
) -> Solution:
    """y at ``end`` of dy/dt = f(t, y), from y at ``start``.

    Args:
        slope: f(t, y, rows) of the rows that have not arrived: t of shape (k,), y of shape
            (k, m), and their numbers in the batch, (k,); it returns (k, m).
        y: shape (n, m), float64 for tolerances below 1e-6.
        rtol, atol: the error allowed in a step.
        max_steps: of one row, the refused ones included.

    Raises:
        ValueError: a row that needs more steps.
    """
    end_y, calls = y.clone(), torch.zeros(len(y), dtype=torch.int64)
    lost_at = y.new_full((len(y),), torch.nan)
    if start == end:
        return Solution(end_y, calls, lost_at)
    rows, t = torch.arange(len(y), device=y.device), y.new_full((len(y),), start)
    h, first = y.new_full((len(y),), (end - start) * _FIRST), slope(t, y, rows)
    calls += 1
    for _ in range(max_steps):
        final = h.abs() >= (end - t).abs()
        h = torch.where(final, end - t, h)
        new, last, error = step(lambda t, y: slope(t, y, rows), t, y, first, h)  # noqa: B023
        calls[rows.cpu()] += 6
        ratio = (error / (atol + rtol * torch.maximum(y.abs(), new.abs()))).abs().amax(1)
        taken = ratio <= 1
        t = torch.where(taken, torch.where(final, end, t + h), t)
        y, first = (torch.where(taken[:, None], *pair) for pair in ((new, y), (last, first)))
        h = h * (0.9 * ratio.nan_to_num(nan=torch.inf) ** -0.2).clamp(0.2, 10)
        arrived = taken & final
        lost = ~arrived & (~first.isfinite().all(1) | (h.abs() < _LEAST * abs(end - start)))
        gone = arrived | lost
        if bool(gone.any()):
            end_y[rows[gone]] = torch.where(lost[gone, None], torch.nan, y[gone])
            lost_at[rows[lost]] = t[lost]
            rows, t, h, y, first = (value[~gone] for value in (rows, t, h, y, first))
            if len(rows) == 0:
                return Solution(end_y, calls, lost_at)
    raise ValueError(
        f"Expected every sample to arrive at {end:g} within max_steps={max_steps}; got "
        f"{len(rows)} on their way, the first at {float(t[0]):g} with steps of {float(h[0]):.2g}."
    )
