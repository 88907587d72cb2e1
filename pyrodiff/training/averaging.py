"""The moving average of the weights.

With w_k the weights after step k, the average is

    a_1 = w_1,    a_{k+1} = r_k a_k + (1 − r_k) w_{k+1},    r_k = min(decay, (1 + k)/(10 + k)),

so that early weights are soon forgotten.
"""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

__all__ = ["averaging"]


def averaging(decay: float) -> WeightAveraging:
    """A callback that keeps the average with a rate of at most ``decay``."""

    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        floats = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [c for _, c in floats], 1 - rate)
        for a, c in zip(averaged, current, strict=True):
            if not a.is_floating_point():
                a.copy_(c)

    return WeightAveraging(multi_avg_fn=torch.no_grad()(average), use_buffers=False)
