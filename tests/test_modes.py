"""Evaluation mode for a while: each part's own mode comes back, whatever happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import CategoricalDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.likelihood import (
    Estimator,
    PathBound,
    ProbabilityFlow,
    SandwichBound,
    TermwiseBound,
    VariationalDequantizer,
)
from pyrodiff.likelihood.particles.twists import DenoisedTwist
from pyrodiff.likelihood.termwise.pilot import Pilot
from pyrodiff.networks import ResidualMLP
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.objectives import VariationalBound
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import FixedSmall, PosteriorCovariance, Variance

F64 = torch.float64
X_0 = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
CALLS: dict[str, Callable[[ReverseChain], object]] = {
    "termwise": lambda reverse: TermwiseBound().estimate(reverse, X_0),
    "path": lambda reverse: PathBound(1).estimate(reverse, X_0),
    "flow": lambda reverse: ProbabilityFlow("scaled").estimate(reverse, X_0),
    "sandwich": lambda reverse: SandwichBound(2).estimate(reverse, 3),
    "pilot": lambda reverse: Pilot.fit(reverse, X_0, calls=500),
    "twist": lambda reverse: DenoisedTwist.fit(reverse, X_0),
    "dequantizer": lambda reverse: (
        VariationalDequantizer((2,), 0.1, width=4).double().fit(reverse, X_0, 2)
    ),
}


class Network(nn.Module):
    """Half frozen: a dropout in training, a BatchNorm in evaluation mode; it may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.fails = False
        self.modes: set[bool] = set()
        self.train()
        self.norm.eval()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.modes |= {part.training for part in self.modules()}
        if self.fails:
            raise RuntimeError("a network's own error")
        return self.dropout(self.norm(self.linear(x)))


def chain() -> ReverseChain:
    reverse = ReverseChain(
        DataDenoiser(Network().double()), ForwardChain(LogSNRSchedule(5.0, -5.0), 5), (2,)
    )
    reverse.denoiser.network.train()
    reverse.denoiser.network.norm.eval()
    return reverse


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fails", [False, True])
def test_every_part_has_its_own_mode_back(name: str, fails: bool) -> None:
    reverse = chain()
    network = reverse.denoiser.network
    network.fails, before = fails, modes(reverse)
    assert True in before and False in before
    if fails:
        with pytest.raises(RuntimeError, match="a network's own error"):
            CALLS[name](reverse)
    else:
        CALLS[name](reverse)
    assert network.modes == {False}  # while it was asked
    assert modes(reverse) == before


def test_evaluations_may_be_nested() -> None:
    network = Network()
    before = modes(network)
    with evaluation_mode(network), evaluation_mode(network.dropout):
        with evaluation_mode(network):
            pass
        assert not any(modes(network))
    assert modes(network) == before


@pytest.mark.parametrize("shared", [False, True], ids=["one module", "a shared part"])
def test_the_last_thread_to_leave_restores(shared: bool) -> None:
    """The first one in is the first one out; the second is still in evaluation mode then."""
    network = Network()
    before = modes(network)
    other = nn.Sequential(network, nn.Dropout()) if shared else network
    inside, leave = threading.Barrier(2), threading.Event()
    seen: list[list[bool]] = []

    def second() -> None:
        with evaluation_mode(other):
            inside.wait(10)
            leave.wait(10)
            seen.append(modes(other))

    thread = threading.Thread(target=second)
    with evaluation_mode(network):
        thread.start()
        inside.wait(10)
    leave.set()
    thread.join(10)
    assert seen == [[False] * len(list(other.modules()))]
    assert modes(network) == before


def test_a_part_that_does_more_than_switch_is_asked_to() -> None:
    """As adapters do that are merged into weights for evaluation."""

    class Adapter(nn.Module):
        merged = False

        def train(self, mode: bool = True) -> Adapter:
            self.merged = not mode
            return super().train(mode)

    module = nn.Sequential(Adapter())
    with evaluation_mode(module):
        assert module[0].merged
    assert not module[0].merged and module[0].training


# -- inference mode ------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, CategoricalDecoder(5)], ids=["density", "levels"])
def test_what_inference_mode_leaves_behind_can_be_trained_with(
    decoder: CategoricalDecoder | None,
) -> None:
    x_0 = (X_0 * 2).round().clamp(-2, 2) / 2
    with torch.inference_mode():
        forward = ForwardChain(LogSNRSchedule(5.0, -5.0), 5)
    scale = nn.Parameter(torch.ones((), dtype=F64))

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.scale * x

    reverse = ReverseChain(NoiseDenoiser(Scale()), forward, (2,), decoder=decoder)
    with torch.inference_mode():
        reverse.sample(3)
        PathBound(1).estimate(reverse, x_0)
        TermwiseBound(5).estimate(reverse, x_0)
        reverse(x_0)
    latent = x_0.clone().requires_grad_()
    (
        reverse.decode(latent).log_prob(x_0).sum() + VariationalBound()(reverse, forward)(x_0)
    ).backward()
    assert latent.grad is not None and scale.grad is not None and bool(scale.grad.isfinite())


@pytest.mark.parametrize(
    "estimator",
    [ProbabilityFlow(), ProbabilityFlow(exact_up_to=1), PathBound(2)],
    ids=["flow", "flow with probes", "path"],
)
@pytest.mark.parametrize("variance", [FixedSmall(), PosteriorCovariance("full")], ids=repr)
def test_estimates_are_the_same_in_inference_mode(estimator: Estimator, variance: Variance) -> None:
    """Those that differentiate the network, too."""
    torch.manual_seed(0)
    network = ResidualMLP((2,), width=8, blocks=1, context_size=1).double()
    forward = ForwardChain(LogSNRSchedule(4.0, -4.0), 5)
    reverse = ReverseChain(NoiseDenoiser(network), forward, (2,), variance=variance)
    context = torch.arange(8.0, dtype=F64)[:, None]
    expected = estimator.estimate(reverse, X_0, seed=1, context=context).value
    with torch.inference_mode():
        inside = estimator.estimate(reverse, X_0.clone(), seed=1, context=context.clone()).value
    assert torch.equal(inside, expected)
