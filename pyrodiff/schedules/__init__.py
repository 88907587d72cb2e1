r"""Noise schedules: the log signal-to-noise ratio λ of x as a function of time.

A schedule is one strictly decreasing function, stored and evaluated in float64,

    λ(u) = log(α_u² / σ_u²),    u ∈ [0, 1],    α² = sigmoid(λ),  σ² = sigmoid(−λ),

from data (u = 0) to noise (u = 1).  A chain of T steps needs it at T points, ``table(T)``:
λ_1 > λ_2 > … > λ_T.  Where a paper defines its chain by T betas, the table is that paper's
(ᾱ_t = ∏_{s≤t} (1 − β_s), λ_t = logit ᾱ_t) and λ(u) its limit as T → ∞ with u = t/T.
"""

from pyrodiff.schedules.beta import BetaSchedule, CosineSchedule, LinearSchedule
from pyrodiff.schedules.log_snr import LogSNRSchedule, TabulatedSchedule
from pyrodiff.schedules.schedule import Schedule

__all__ = [
    "BetaSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "LogSNRSchedule",
    "Schedule",
    "TabulatedSchedule",
]
