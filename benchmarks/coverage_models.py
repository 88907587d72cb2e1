"""The models on which intervals are counted: schedules × T × dimensions × denoisers.

The data are a mixture of five Gaussians, whose optimal denoiser is known.  A denoiser is

    exact     the optimal one
    zero      x̂_0 = 0, whatever x_t
    biased    the optimal one with 0.1 added to every value
    trained   a small perceptron that predicts the noise, after 400 steps on L_simple

The linear schedule allows no T ≤ 20 and has 25 for 10.  All is float32 and of one thread.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import DataDenoiser, Denoiser, NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import NoiseLoss
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule, Schedule
from pyrodiff.variances import FixedLarge, FixedSmall, Variance

SCHEDULES: dict[str, Schedule] = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "log-snr": LogSNRSchedule(),
}
STEPS = (10, 50, 1000)
SIZES = (1, 3, 16, 64)
DENOISERS = ("exact", "zero", "biased", "trained")
VARIANCES: dict[str, Variance] = {"large": FixedLarge(), "small": FixedSmall()}

COMPONENTS, SCALE, BIAS = 5, 0.3, 0.1
TRAINING_STEPS, BATCH = 400, 128


@dataclass(frozen=True)
class Case:
    """A model, a sample on which estimates are repeated, and other data for pilots and twists.

    Args:
        labels: schedule, num_steps, size, denoiser and variance.
        x_0: one sample, shape (1, d).
        other: shape (512, d).
    """

    labels: dict[str, str | int]
    reverse: ReverseChain
    x_0: Tensor
    other: Tensor


class _Zero(nn.Module):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _Shifted(nn.Module):
    """The output of another network, and ``BIAS``."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = self.network(x, time)
        return output + BIAS


@cache
def mixture(size: int) -> GaussianMixture:
    """Equal weights, means ~ N(0, I), isotropic components, in ``size`` dimensions."""
    generator = torch.Generator().manual_seed(size)
    means = torch.randn(COMPONENTS, size, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.full((COMPONENTS,), 1 / COMPONENTS), means, SCALE)


def _denoiser(name: str, size: int) -> Denoiser:
    """One of ``DENOISERS``; the trained one before training."""
    if name == "trained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return NoiseDenoiser(ResidualMLP((size,), width=64, blocks=2))
    optimal = mixture(size).network("data")
    networks = {"exact": optimal, "zero": _Zero(), "biased": _Shifted(optimal)}
    return DataDenoiser(networks[name])


def _train(reverse: ReverseChain, data: Tensor) -> None:
    """``TRAINING_STEPS`` steps of Adam on L_simple, the learning rate falling as a cosine."""
    generator = torch.Generator().manual_seed(0)
    loss = NoiseLoss(generator=generator)
    optimizer = torch.optim.Adam(reverse.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        (loss.differentiable_loss(reverse, reverse.forward_chain, batch) / BATCH).backward()
        optimizer.step()
        decay.step()


@cache
def build(schedule: str, num_steps: int, size: int, denoiser: str, variance: str = "large") -> Case:
    """The model of these labels; a trained one takes about a second.

    Args:
        schedule, denoiser, variance: keys of ``SCHEDULES``, ``DENOISERS`` and ``VARIANCES``.
        num_steps: T.
        size: d.
    """
    forward = ForwardChain(SCHEDULES[schedule], num_steps)
    reverse = ReverseChain(
        _denoiser(denoiser, size), forward, (size,), variance=VARIANCES[variance]
    )
    law = mixture(size)
    if denoiser == "trained":
        _train(reverse, law.sample(4096, seed=3).float())
    reverse.eval().requires_grad_(False)
    labels: dict[str, str | int] = {
        "schedule": schedule,
        "num_steps": num_steps,
        "size": size,
        "denoiser": denoiser,
        "variance": variance,
    }
    return Case(labels, reverse, law.sample(1, seed=1).float(), law.sample(512, seed=2).float())


def models(
    schedules: Sequence[str] = tuple(SCHEDULES),
    steps: Sequence[int] = STEPS,
    sizes: Sequence[int] = SIZES,
    denoisers: Sequence[str] = DENOISERS,
    variances: Sequence[str] = ("large",),
) -> Iterator[Case]:
    """Every combination of the labels, one after another."""
    for labels in itertools.product(schedules, steps, sizes, denoisers, variances):
        schedule, num_steps, *rest = labels
        if schedule == "linear" and num_steps <= 20:
            num_steps = 25
        yield build(schedule, num_steps, *rest)
