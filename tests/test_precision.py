"""The precision of networks and chains: half-precision networks, large log-SNRs, mixed dtypes.

A network that computes in another precision than the chain is compared with one that does the same
rounding itself within a float64 chain: the two are one function, so nothing is left to tolerate
but the rounding of float64.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import Decoder, DiscretizedGaussianDecoder, GaussianDecoder, check_data
from pyrodiff.denoisers import DataDenoiser, Denoiser, NoiseDenoiser, VelocityDenoiser
from pyrodiff.likelihood import (
    Dequantized,
    ImportanceBound,
    ParticleBound,
    PathBound,
    ProbabilityFlow,
    SandwichBound,
    TermwiseBound,
    VariationalDequantizer,
)
from pyrodiff.likelihood.estimator import Estimator
from pyrodiff.likelihood.particles.twists import DenoisedTwist
from pyrodiff.likelihood.termwise.pilot import Pilot
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import HybridLoss, NoiseLoss, Objective, VariationalBound, variational_term
from pyrodiff.oracles import Gaussian, GaussianMixture, GridOracle, linear_bound
from pyrodiff.precision import chain_dtype, largest_log_snr, network_dtype
from pyrodiff.schedules import BetaSchedule, LogSNRSchedule
from pyrodiff.vae import VAE
from pyrodiff.variances import FixedSmall, LearnedRange

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHAIN = ForwardChain(LogSNRSchedule(9.0, -6.0), 30)
FINE = ForwardChain(LogSNRSchedule(60.0, -6.0), 60)  # float32 holds nothing of its first noise
narrow = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)

ESTIMATORS: dict[str, Callable[[ReverseChain, Tensor], Estimator]] = {
    "termwise": lambda reverse, x: TermwiseBound(20),
    "every t": lambda reverse, x: TermwiseBound(),
    "piloted": lambda reverse, x: TermwiseBound(20, pilot=Pilot.fit(reverse, x, calls=500)),
    "path": lambda reverse, x: PathBound(2),
    "importance": lambda reverse, x: ImportanceBound(4),
    "particle": lambda reverse, x: ParticleBound(4, threshold=1.0, compare=False),
    "fitted": lambda reverse, x: ParticleBound(4, DenoisedTwist.fit(reverse, x), compare=False),
    "flow": lambda reverse, x: ProbabilityFlow("scaled", rtol=1e-3, atol=1e-3),
}


class Rounding(nn.Module):
    """A network called in its own precision by a float64 chain: what the library has to do."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.__dict__["network"] = network  # not a part: this module has no dtype
        self.dtype, self.wide = dtype, torch.promote_types(dtype, F32)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        assert x.dtype == F64
        return self.network(x.to(self.dtype), time.to(self.wide)).double()


class Rounded(nn.Module):
    """An exact network as if it computed in ``dtype``, with a parameter of that dtype."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=dtype))
        self.network = network

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        assert x.dtype == self.one.dtype and time.dtype == torch.promote_types(x.dtype, F32)
        return self.one * self.network(x, time)


def mlp(dtype: torch.dtype, size: int = 3, **options: Any) -> ResidualMLP:
    torch.manual_seed(0)
    network = ResidualMLP((size,), width=16, blocks=1, **options)
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.to(dtype)


def data(size: int = 3, n: int = 12) -> Tensor:
    return 0.7 * torch.randn(n, size, generator=torch.Generator().manual_seed(1))


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]])
    return GaussianMixture(torch.full((3,), 1 / 3), means, 0.2)


# -- the rule ------------------------------------------------------------------------------------


def test_largest_log_snrs() -> None:
    """σ = 2⁸ eps, typed again: eps is 2⁻²³ and 2⁻⁵²."""
    assert largest_log_snr(F32) == pytest.approx(30 * math.log(2), rel=1e-15)
    assert largest_log_snr(F64) == pytest.approx(88 * math.log(2), rel=1e-15)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_what_a_chain_computes_in(dtype: torch.dtype) -> None:
    cpu, at_least_single = torch.device("cpu"), F64 if dtype == F64 else F32
    assert chain_dtype(dtype, cpu, 20.7) == at_least_single
    assert chain_dtype(dtype, cpu, 20.9) == F64
    assert chain_dtype(dtype, cpu, 0.0, exact=True) == F64
    chain = ForwardChain(LogSNRSchedule(20.9, 0.0), 3)
    assert chain.carry(torch.zeros(2, 3, dtype=dtype)).dtype == F64


def test_a_device_without_float64_has_a_limit() -> None:
    device = torch.device("mps")
    assert chain_dtype(F16, device, 20.7, exact=True) == F32
    with pytest.raises(ValueError, match=r"at most 20\.8, what float32 .*\(mps\); got 21"):
        chain_dtype(F32, device, 21.0)


def test_a_chain_that_float64_does_not_carry_is_refused() -> None:
    assert float(ForwardChain(LogSNRSchedule(60.99, 0.0), 5).log_snr[0]) == 60.99
    with pytest.raises(
        ValueError, match=r"at most 61\.0, what float64 carries; got 61\.5 at t = 1"
    ):
        ForwardChain(LogSNRSchedule(61.5, 0.0), 5)
    with pytest.raises(ValueError, match="at most 61.0"):
        ForwardChain(BetaSchedule([1e-30, 0.5]), 2)


def test_the_dtype_of_a_network_is_that_of_its_numbers() -> None:
    assert network_dtype(mlp(BF16), F64) == BF16
    assert network_dtype(Rounding(mlp(BF16), BF16), F32) == F32
    counter = nn.Module()
    counter.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
    assert network_dtype(counter, F16) == F16
    counter.register_buffer("mean", torch.zeros(1, dtype=F64))
    assert network_dtype(counter, F16) == F64


# -- estimators ----------------------------------------------------------------------------------


@narrow
@pytest.mark.parametrize("chain", [CHAIN, FINE], ids=["to 9", "to 60"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_network_rounds_and_the_chain_does_not(
    name: str, chain: ForwardChain, dtype: torch.dtype
) -> None:
    values = []
    for network in (mlp(dtype), Rounding(mlp(dtype), dtype)):
        reverse = ReverseChain(NoiseDenoiser(network), chain, (3,))
        bound = ESTIMATORS[name](reverse, data(n=40))
        values.append(bound.estimate(reverse, data(), seed=2).value)
    assert values[0].dtype == F64 and bool(values[0].isfinite().all())
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


@narrow
@pytest.mark.parametrize("kind", [NoiseDenoiser, DataDenoiser, VelocityDenoiser])
@pytest.mark.parametrize("decoder", [GaussianDecoder(), DiscretizedGaussianDecoder(0.25)], ids=repr)
def test_models_of_every_kind(dtype: torch.dtype, kind: type[Denoiser], decoder: Decoder) -> None:
    x_0, values = (4 * data()).round().clamp(-4, 4) / 4, []
    for wrap in (lambda network: network, lambda network: Rounding(network, dtype)):
        network = wrap(mlp(dtype, learned_variance=True))
        reverse = ReverseChain(kind(network), CHAIN, (3,), LearnedRange(), decoder)
        values.append(PathBound(2).estimate(reverse, x_0).value)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", [F16, BF16, F32, F64], ids=str)
def test_data_of_any_precision_are_what_they_are(given: torch.dtype) -> None:
    """A value is that of the same numbers in float64, for a network of any precision."""
    x_0 = data().to(given)
    for dtype in (BF16, F32, F64):
        reverse = ReverseChain(NoiseDenoiser(mlp(dtype)), CHAIN, (3,))
        one, other = (TermwiseBound(16).estimate(reverse, x) for x in (x_0, x_0.double()))
        assert torch.equal(one.value, other.value)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", ["termwise", "path"])
def test_half_precision_costs_far_less_than_the_standard_error(
    name: str, dtype: torch.dtype
) -> None:
    """An exact denoiser, rounded, beside itself in float64, with equal noise; and Gibbs' law.

    E (bound − log p) ≤ 0 for data of law p whatever the model: 4 standard errors, 3e-5 a seed.
    Sums in half precision are 0.3 (termwise) and 10 nats (path) off here, or NaN.
    """
    law, chain = mixture(), ForwardChain(LogSNRSchedule(12.0, -6.0), 60)
    x_0 = law.sample(2000, seed=3).to(dtype)
    bound = {"termwise": TermwiseBound(60), "path": PathBound(2)}[name]
    values = []
    for precision in (dtype, F64):
        network = Rounded(law.network(), precision)
        reverse = ReverseChain(NoiseDenoiser(network), chain, (2,))
        values.append(bound.estimate(reverse, x_0, batch_size=2000).value)
    lack = values[0] - law.log_prob(x_0)
    error = float(lack.std()) / math.sqrt(len(lack))
    assert error < 0.04 and float(lack.mean()) < 4 * error
    assert abs(float((values[0] - values[1]).mean())) < 0.1 * error


@pytest.mark.parametrize("log_snr", [13.0, 25.0, 60.0])
@pytest.mark.parametrize("name", ["every t", "path"])
def test_single_precision_data_on_a_fine_chain_have_the_exact_bound(
    name: str, log_snr: float
) -> None:
    """Against the closed form, at 4.5 standard errors: 7e-6 a seed."""
    law = Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    chain = ForwardChain(LogSNRSchedule(log_snr, -6.0), 80)
    reverse = ReverseChain(NoiseDenoiser(law.network()), chain, (2,), FixedSmall())
    x_0 = law.sample(1, seed=0).float()
    exact = float(linear_bound(reverse, x_0.double()).elbo)
    bound = {"every t": TermwiseBound(), "path": PathBound(1)}[name]
    value = bound.estimate(reverse, x_0.expand(2000, 2), batch_size=2000).value
    error = float(value.std()) / math.sqrt(len(value))
    assert abs(float(value.mean()) - exact) < 4.5 * error


# -- objectives and programs ---------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 7, 60])
def test_a_term_on_a_fine_chain_is_that_of_float64(t: int) -> None:
    reverse = ReverseChain(NoiseDenoiser(mlp(F32)), FINE, (3,))
    x_0, noise = data(), torch.randn(12, 3)
    term = variational_term(reverse, x_0, t, noise)
    assert term.dtype == F64
    exact = variational_term(reverse, x_0.double(), t, noise.double())
    assert torch.equal(term, exact)


def test_a_term_on_a_plain_chain_stays_in_single_precision() -> None:
    for dtype in (F16, BF16, F32):
        reverse = ReverseChain(NoiseDenoiser(mlp(dtype)), CHAIN, (3,))
        x_0, noise = data().to(dtype), torch.randn(12, 3).to(dtype)
        term = variational_term(reverse, x_0, 3, noise)
        exact = variational_term(reverse, x_0.double(), 3, noise.double())
        assert term.dtype == F32
        torch.testing.assert_close(term.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("network", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("given", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("build", [VariationalBound, NoiseLoss, HybridLoss])
def test_objectives_train_networks_on_data_of_other_precision(
    build: type[Objective], given: torch.dtype, network: torch.dtype
) -> None:
    module = mlp(network, learned_variance=True)
    reverse = ReverseChain(NoiseDenoiser(module), CHAIN, (3,), LearnedRange())
    loss = build()(reverse, CHAIN)(data().to(given))
    loss.backward()
    assert loss.dtype == (F64 if given == F64 else F32)
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(g is not None and g.dtype == network and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_programs_on_a_fine_chain_compute_in_float64(elbo: type) -> None:
    reverse = ReverseChain(NoiseDenoiser(mlp(F32)), FINE, (3,))
    losses = []
    for x_0 in (data(), data().double()):
        pyro.set_rng_seed(0)
        losses.append(elbo().loss(reverse, FINE, x_0))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("given", "chain", "expected"), [(BF16, CHAIN, F32), (F32, CHAIN, F32), (F32, FINE, F64)]
)
def test_sites_have_the_precision_of_the_chain(
    given: torch.dtype, chain: ForwardChain, expected: torch.dtype
) -> None:
    reverse = ReverseChain(NoiseDenoiser(mlp(given)), chain, (3,))
    for trace in (
        poutine.trace(chain).get_trace(data().to(given)),
        poutine.trace(reverse).get_trace(data().to(given)),
        poutine.trace(reverse).get_trace(num_samples=2),
    ):
        values = [trace.nodes[f"x_{t}"]["value"] for t in range(1, chain.num_steps + 1)]
        assert {value.dtype for value in values} == {expected}
    assert reverse.sample(2).dtype == expected


# -- what networks are handed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "given", "seen"),
    [
        (F32, F64, F32),
        (F64, F32, F64),
        (BF16, F64, F32),
        (BF16, BF16, BF16),
        (BF16, torch.int64, torch.int64),
    ],
    ids=str,
)
def test_contexts_fit_the_network(
    network: torch.dtype, given: torch.dtype, seen: torch.dtype
) -> None:
    seen_by: list[Tensor] = []

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=network))

        def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
            assert x.dtype == network and time.dtype == torch.promote_types(network, F32)
            seen_by.append(context)
            return self.weight * x

    reverse = ReverseChain(NoiseDenoiser(Network()), CHAIN, (3,))
    context = torch.arange(12).to(given)
    PathBound(1).estimate(reverse, data(), context=context)
    assert {value.dtype for value in seen_by} == {seen}


def test_a_bound_on_samples_of_a_half_precision_model() -> None:
    """On the model's own samples lower ≤ upper, on average: 4 standard errors, 3e-5 a seed."""
    for chain in (CHAIN, FINE):
        reverse = ReverseChain(DataDenoiser(mlp(BF16)), chain, (3,))
        sandwich = SandwichBound(4).estimate(reverse, 300)
        assert sandwich.x_0.dtype == reverse.sample(1).dtype
        gap, error, _ = sandwich.gap()
        assert gap > -4 * error
        again = reverse.sample(300, seed=0)
        torch.testing.assert_close(sandwich.x_0, again, rtol=1e-3, atol=1e-3)


def test_dequantizers_and_autoencoders_have_a_precision_of_their_own() -> None:
    v = (4 * data()).round() / 4
    reverse = ReverseChain(NoiseDenoiser(mlp(BF16)), CHAIN, (3,))
    values = []
    for dtype in (F32, F64):
        torch.manual_seed(0)
        dequantizer = VariationalDequantizer((3,), 0.25).to(dtype)
        bound = Dequantized(PathBound(1), dequantizer, draws=2)
        values.append(bound.estimate(reverse, v).value)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-3)
    for dtype in (BF16, F64):
        vae = VAE((3,), latent_size=2, hidden=(8,)).to(dtype)
        assert bool(vae.bound(data()).value.isfinite().all())


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_exact_answers_on_a_grid_are_those_of_the_rounding_network(dtype: torch.dtype) -> None:
    values = []
    for network in (mlp(dtype, 1), Rounding(mlp(dtype, 1), dtype)):
        reverse = ReverseChain(DataDenoiser(network), ForwardChain(LogSNRSchedule(4, -6), 8), (1,))
        values.append(GridOracle(reverse, -8.0, 8.0, 2000).log_prob(data(1)))
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


# -- what is no tensor ---------------------------------------------------------------------------


@pytest.mark.parametrize("x_0", [[[0.0, 1.0, 2.0]], None, torch.zeros(2, 3).numpy()], ids=type)
def test_data_that_are_no_tensor_are_refused(x_0: object) -> None:
    with pytest.raises(TypeError, match=rf"a torch.Tensor; got {type(x_0).__name__}\. torch\.as_t"):
        check_data(x_0, torch.Size((3,)), GaussianDecoder())


def test_every_entrance_refuses_what_is_no_tensor() -> None:
    """In a process of its own, where no annotation is checked before the code runs."""
    code = """
import numpy, torch
from pyro.infer import Trace_ELBO
from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import TermwiseBound
from pyrodiff.likelihood.particles.twists import DenoisedTwist
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import VariationalBound, variational_term
from pyrodiff.schedules import LogSNRSchedule
chain = ForwardChain(LogSNRSchedule(), 4)
reverse = ReverseChain(NoiseDenoiser(ResidualMLP((2,), 8, 1)), chain, (2,))
for x in ([[0.0, 1.0]], numpy.zeros((1, 2))):
    for call in (
        lambda: TermwiseBound(4).estimate(reverse, x),
        lambda: DenoisedTwist.fit(reverse, x),
        lambda: VariationalBound()(reverse, chain)(x),
        lambda: Trace_ELBO().loss(reverse, chain, x),
        lambda: variational_term(reverse, x, 1, torch.zeros(1, 2)),
        lambda: reverse(x),
    ):
        try:
            call()
        except TypeError as error:
            assert "Expected data as a torch.Tensor; got " in str(error), error
        else:
            raise AssertionError("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("index", [-1, 2**64])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    reverse = ReverseChain(NoiseDenoiser(mlp(F32)), CHAIN, (3,))
    with pytest.raises(ValueError, match=rf"Expected indices in \[0, 2\*\*64\); got .*{index}"):
        PathBound(1).estimate(reverse, data(n=1), indices=[index])
