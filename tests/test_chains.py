"""The two Pyro programs: sites, orders, exact bounds of a linear model, training, sampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.schedules import CosineSchedule, LogSNRSchedule
from pyrodiff.variances import LearnedRange

F64 = torch.float64
T = 5
SCHEDULE = LogSNRSchedule(4.0, -4.0)
ORDERS = ["denoising", "noising"]
every_order = pytest.mark.parametrize("order", ORDERS)


class Linear(nn.Module):
    """x̂_0 = k x_t at every t: with it the whole model is Gaussian and every bound is exact."""

    def __init__(self, gain: float = 0.6):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=F64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.gain * x


class Recorder(nn.Module):
    """x̂_0 is the context; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        self.calls.append((time, context))
        return context


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def linear_pair(
    order: str = "denoising", event: tuple[int, ...] = (2,)
) -> tuple[ForwardChain, ReverseChain]:
    forward = ForwardChain(SCHEDULE, T, order=order)
    return forward, ReverseChain(DataDenoiser(Linear()), forward, event)


def mlp_chain(event: tuple[int, ...] = (2,), seed: int = 0, **options: Any) -> ReverseChain:
    torch.manual_seed(seed)
    network = ResidualMLP(event, width=16, blocks=1, context_size=options.pop("context_size", 0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return ReverseChain(NoiseDenoiser(network), ForwardChain(SCHEDULE, T), event, **options)


# -- exact answers of the linear model, from Ho et al.'s formulas alone ----------------------------


class Exact:
    """The linear chain's coefficients in plain floats: λ is 4, 2, 0, −2, −4."""

    gain = 0.6
    alpha_bar = [1.0] + [1 / (1 + math.exp(-v)) for v in (4.0, 2.0, 0.0, -2.0, -4.0)]

    def step(self, t: int) -> tuple[float, float, float, float]:
        """β_t, β̃_t and the posterior mean's coefficients of x_0 and x_t (equation 7)."""
        bar, before = self.alpha_bar[t], self.alpha_bar[t - 1]
        beta = 1 - bar / before
        c_0 = math.sqrt(before) * beta / (1 - bar)
        c_t = math.sqrt(bar / before) * (1 - before) / (1 - bar)
        return beta, beta * (1 - before) / (1 - bar), c_0, c_t

    def negative_bound(self, x: float) -> float:
        """−ELBO of one dimension, every expectation in closed form; fixed-large variance."""
        bar = self.alpha_bar[T]
        total = 0.5 * (bar * x * x + (1 - bar) - 1 - math.log(1 - bar))
        for t in range(1, T + 1):
            bar, (beta, small, c_0, _) = self.alpha_bar[t], self.step(t)
            square = (1 - self.gain * math.sqrt(bar)) ** 2 * x * x + self.gain**2 * (1 - bar)
            if t == 1:
                total += 0.5 * (math.log(2 * math.pi * beta) + square / beta)
            else:
                total += 0.5 * (small / beta - 1 - math.log(small / beta) + c_0**2 * square / beta)
        return total

    def variance(self, last: int = 0) -> float:
        """Var x_last under the model, whose transitions are linear."""
        variance = 1.0
        for t in range(T, last, -1):
            beta, _, c_0, c_t = self.step(t)
            variance = (c_0 * self.gain + c_t) ** 2 * variance + beta
        return variance

    def negative_log_prob(self, x: float) -> float:
        variance = self.variance()
        return 0.5 * (math.log(2 * math.pi * variance) + x * x / variance)


DATA = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.6, 0.9]], dtype=F64)
BOUND = sum(Exact().negative_bound(x) for x in DATA.flatten().tolist())
LOG_PROB = -sum(Exact().negative_log_prob(x) for x in DATA.flatten().tolist())


def losses(elbo: Any, model: Any, guide: Any, repeats: int) -> tuple[float, float]:
    """Mean and standard error of independent estimates of the loss."""
    torch.manual_seed(0)
    with torch.no_grad():
        values = torch.tensor([elbo.loss(model, guide, DATA) for _ in range(repeats)])
    return float(values.mean()), float(values.std()) / math.sqrt(repeats)


# -- sites ---------------------------------------------------------------------------------------


def sample_sites(trace: Any) -> list[str]:
    return [n for n, s in trace.nodes.items() if s["type"] == "sample" and n.startswith("x_")]


@every_order
@pytest.mark.parametrize("event", [(2,), (3, 4, 2)], ids=str)
def test_guide_sites(order: str, event: tuple[int, ...]) -> None:
    x_0 = draws(7, *event)
    trace = poutine.trace(ForwardChain(SCHEDULE, T, order=order)).get_trace(x_0)
    up = [f"x_{t}" for t in range(1, T + 1)]
    assert sample_sites(trace) == (up if order == "noising" else up[::-1])
    trace.compute_log_prob()
    for name in up:
        site = trace.nodes[name]
        assert site["value"].shape == (7, *event) and site["value"].dtype == F64
        assert site["fn"].event_shape == event and site["log_prob"].shape == (7,)
        assert [(f.name, f.dim, f.size) for f in site["cond_indep_stack"]] == [("data", -1, 7)]


@pytest.mark.parametrize("event", [(2,), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("observed", [True, False])
def test_model_sites(event: tuple[int, ...], observed: bool) -> None:
    _, reverse = linear_pair(event=event)
    arguments = {"x_0": draws(7, *event)} if observed else {"num_samples": 7}
    trace = poutine.trace(reverse).get_trace(**arguments)
    assert sample_sites(trace) == [f"x_{t}" for t in range(T, -1, -1)]
    trace.compute_log_prob()
    for t in range(T + 1):
        site = trace.nodes[f"x_{t}"]
        assert site["value"].shape == (7, *event) and site["log_prob"].shape == (7,)
        assert [(f.name, f.dim, f.size) for f in site["cond_indep_stack"]] == [("data", -1, 7)]
        assert site["is_observed"] == (observed and t == 0)


def test_generative_run_has_as_many_samples_as_contexts() -> None:
    reverse = ReverseChain(DataDenoiser(Recorder()), ForwardChain(SCHEDULE, T), (3,))
    assert reverse(context=draws(4, 3).float()).shape == (4, 3)
    assert linear_pair()[1]().shape == (1, 2)


def test_chain_of_one_step() -> None:
    forward = ForwardChain(SCHEDULE, 1)
    reverse = ReverseChain(DataDenoiser(Linear()), forward, (2,))
    assert sample_sites(poutine.trace(reverse).get_trace(DATA)) == ["x_1", "x_0"]
    assert math.isfinite(Trace_ELBO().loss(reverse, forward, DATA))
    assert reverse.sample(3, seed=0, trajectory=True).shape == (2, 3, 2)


# -- the joint -----------------------------------------------------------------------------------


def test_both_orders_are_one_joint() -> None:
    """log q(x_1:T | x_0) at the same values, whichever way it is factorized."""
    values = poutine.trace(ForwardChain(SCHEDULE, T)).get_trace(DATA)
    joint = {}
    for order in ORDERS:
        replayed = poutine.replay(ForwardChain(SCHEDULE, T, order=order), trace=values)
        trace = poutine.trace(replayed).get_trace(DATA)
        assert all(
            torch.equal(trace.nodes[f"x_{t}"]["value"], values.nodes[f"x_{t}"]["value"])
            for t in range(1, T + 1)
        )
        trace.compute_log_prob()
        joint[order] = sum(trace.nodes[f"x_{t}"]["log_prob"] for t in range(1, T + 1))
    assert joint["denoising"].shape == (3,)
    torch.testing.assert_close(joint["noising"], joint["denoising"], rtol=0.0, atol=1e-8)


def test_conditioning_on_an_intermediate_latent() -> None:
    """Pyro's own handler: the latent is observed and the next site's mean follows from it."""
    _, reverse = linear_pair()
    value = draws(4, 2)
    conditioned = pyro.condition(reverse, data={"x_3": value})
    trace = poutine.trace(conditioned).get_trace(num_samples=4)
    assert trace.nodes["x_3"]["is_observed"] and torch.equal(trace.nodes["x_3"]["value"], value)
    _, _, c_0, c_t = Exact().step(3)
    mean = (c_0 * Exact.gain + c_t) * value
    torch.testing.assert_close(trace.nodes["x_2"]["fn"].base_dist.loc, mean, rtol=1e-12, atol=0.0)
    trace.compute_log_prob()
    torch.testing.assert_close(
        trace.nodes["x_3"]["log_prob"],
        reverse.transition(trace.nodes["x_4"]["value"], 4).log_prob(value),
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    """Variances of x_2 and x_0 under the model, 4.5 standard errors: 3e-5 failures if unseeded."""
    torch.manual_seed(1)
    _, reverse = linear_pair()
    count, rows = (300, 4) if not parallel else (4000, 4)
    predictive = Predictive(
        reverse, num_samples=count, parallel=parallel, return_sites=("x_2", "x_0")
    )
    samples = predictive(num_samples=rows)
    for t in (2, 0):
        values = samples[f"x_{t}"]
        assert values.shape == (count, rows, 2)
        expected = Exact().variance(last=t)
        error = expected * math.sqrt(2 / values.numel())
        assert float(values.square().mean()) == pytest.approx(expected, abs=4.5 * error)


# -- Pyro's objectives ---------------------------------------------------------------------------

ESTIMATES: dict[str, Callable[[], tuple[Any, str]]] = {
    "trace-denoising": lambda: (partial(Trace_ELBO), "denoising"),
    "trace-noising": lambda: (partial(Trace_ELBO), "noising"),
    "mean-field-denoising": lambda: (partial(TraceMeanField_ELBO), "denoising"),
}


@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])
@pytest.mark.parametrize("build", ESTIMATES.values(), ids=ESTIMATES.keys())
def test_pyro_objectives_are_the_exact_bound(build: Callable[[], Any], vectorized: bool) -> None:
    """Within 4 standard errors (6e-5 failures each if unseeded) of the bound in closed form."""
    kind, order = build()
    forward, reverse = linear_pair(order)
    elbo = kind(
        num_particles=200 if vectorized else 1, vectorize_particles=vectorized, max_plate_nesting=1
    )
    mean, error = losses(elbo, reverse, forward, 30 if vectorized else 100)
    assert 0 < error < (0.2 if vectorized else 1.0)  # the comparison means something
    assert mean == pytest.approx(BOUND, abs=4 * error)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field:UserWarning")  # all that Pyro says
def test_mean_field_with_the_noising_order_is_refused() -> None:
    forward, reverse = linear_pair("noising")
    for vectorized in (False, True):
        elbo = TraceMeanField_ELBO(
            num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1
        )
        with pytest.raises(ValueError, match="order='denoising'"):
            elbo.loss(reverse, forward, DATA)
        with pytest.raises(ValueError, match="order='denoising'"):
            elbo.differentiable_loss(reverse, forward, DATA)


@every_order
def test_renyi_lies_between_the_bound_and_the_likelihood(order: str) -> None:
    """α = 0: −log p(x) ≤ E loss ≤ −ELBO, and the gap closes with particles (4 standard errors)."""
    forward, reverse = linear_pair(order)
    previous = BOUND
    for particles in (10, 1000):
        elbo = RenyiELBO(
            alpha=0.0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1
        )
        mean, error = losses(elbo, reverse, forward, 30)
        assert -LOG_PROB - 4 * error <= mean < previous - 4 * error
        previous = mean
    # measured: 1000 particles, weighted by all six dimensions together, leave 0.37 of the gap
    assert previous + LOG_PROB < 0.5 * (BOUND + LOG_PROB)


def test_vectorized_particles_do_not_mix() -> None:
    """Each particle's log-probability is what it has alone."""
    forward, reverse = linear_pair()
    with pyro.plate("particles", 6, dim=-2):
        guide = poutine.trace(forward).get_trace(DATA)
        model = poutine.trace(poutine.replay(reverse, trace=guide)).get_trace(DATA)
    guide.compute_log_prob()
    model.compute_log_prob()
    for t in range(1, T + 1):
        assert guide.nodes[f"x_{t}"]["value"].shape == (6, 3, 2)
    for name in ("x_0", "x_1", "x_4"):
        assert model.nodes[name]["log_prob"].shape == (6, 3)
    alone = reverse.transition(guide.nodes["x_3"]["value"][4], 3)
    expected = alone.log_prob(guide.nodes["x_2"]["value"][4])
    torch.testing.assert_close(model.nodes["x_2"]["log_prob"][4], expected, rtol=1e-12, atol=0.0)


# -- context -------------------------------------------------------------------------------------


def check_context(particles: int | None, bound: bool) -> None:
    network, context = Recorder(), draws(3, 2, seed=5)
    forward = ForwardChain(SCHEDULE, T)
    reverse = ReverseChain(DataDenoiser(network), forward, (2,))
    elbo = Trace_ELBO(
        num_particles=particles or 1, vectorize_particles=particles is not None, max_plate_nesting=1
    )
    if bound:
        elbo.loss(partial(reverse, context=context), partial(forward, context=context), DATA)
    else:
        elbo.loss(reverse, forward, DATA, context)
    assert [float(time[0]) for time, _ in network.calls] == [-4.0, -2.0, 0.0, 2.0, 4.0]
    for time, seen in network.calls:
        assert torch.equal(seen, context.repeat(particles or 1, 1))
        assert time.shape == (len(seen),)


every_count = pytest.mark.parametrize("particles", [None, 4])


@every_count
def test_context_reaches_the_network_at_every_step(particles: int | None) -> None:
    check_context(particles, bound=True)


@every_count
def test_context_is_an_argument_of_svi(particles: int | None) -> None:
    """Pyro hands model and guide the same positional arguments."""
    check_context(particles, bound=False)


def test_context_stays_with_its_sample() -> None:
    """x̂_0 is the context itself, so samples of a nearly noiseless chain are the contexts."""
    context = draws(5, 2, seed=3)
    forward = ForwardChain(LogSNRSchedule(25.0, -4.0), 40)
    reverse = ReverseChain(DataDenoiser(Recorder()), forward, (2,))
    samples = reverse.sample(context=context, seed=0, batch_size=2)
    torch.testing.assert_close(samples.double(), context, rtol=0.0, atol=1e-3)


def test_number_of_contexts_must_fit() -> None:
    reverse = ReverseChain(DataDenoiser(Recorder()), ForwardChain(SCHEDULE, T), (2,))
    with pytest.raises(ValueError, match="Expected 3 contexts, one per sample; got 2"):
        reverse(DATA, context=draws(2, 2))
    with pytest.raises(ValueError, match="Expected 3 contexts; got 2"):
        reverse.sample(3, context=draws(2, 2))


# -- training ------------------------------------------------------------------------------------


def test_two_models_in_one_process_both_learn_and_share_nothing() -> None:
    """Plain modules are silently left untrained by SVI, or share one entry of its store."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    chains = [mlp_chain(seed=s) for s in (0, 1)]
    data = [torch.full((32, 2), v) + 0.1 * torch.randn(32, 2) for v in (0.8, -0.5)]
    start = [copy.deepcopy(c.state_dict()) for c in chains]
    steps = [
        SVI(c, c.forward_chain, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO()) for c in chains
    ]
    history = [[svi.step(x) / 32 for _ in range(60)] for svi, x in zip(steps, data, strict=True)]
    for chain, before, values in zip(chains, start, history, strict=True):
        assert sum(values[-10:]) / 10 < sum(values[:10]) / 10 - 2  # nats; measured: tens
        moved = [not torch.equal(v, before[k]) for k, v in chain.state_dict().items()]
        assert all(moved)
    names = list(pyro.get_param_store().keys())
    counts = [sum(1 for _ in c.parameters()) for c in chains]
    assert len(names) == sum(counts)
    held = {id(p) for p in chains[0].parameters()} & {id(p) for p in chains[1].parameters()}
    assert not held
    store = pyro.get_param_store()
    for chain in chains:
        mine = [n for n in names if n.startswith(chain._pyro_name)]
        own = {p.data_ptr() for p in chain.parameters()}
        assert {store[n].data_ptr() for n in mine} == own


def test_training_one_leaves_the_other_alone() -> None:
    pyro.clear_param_store()
    one, two = mlp_chain(seed=0), mlp_chain(seed=1)
    before = copy.deepcopy(two.state_dict())
    SVI(two, two.forward_chain, pyro.optim.Adam({"lr": 0.0}), loss=Trace_ELBO()).step(DATA.float())
    svi = SVI(one, one.forward_chain, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    first = copy.deepcopy(one.state_dict())
    svi.step(DATA.float())
    assert all(torch.equal(v, before[k]) for k, v in two.state_dict().items())
    assert any(not torch.equal(v, first[k]) for k, v in one.state_dict().items())


def test_register_names_every_parameter_without_a_run() -> None:
    pyro.clear_param_store()
    reverse = mlp_chain()
    assert len(pyro.get_param_store()) == 0
    reverse.register()
    assert len(pyro.get_param_store()) == sum(1 for _ in reverse.parameters())


def test_given_name_is_the_prefix() -> None:
    pyro.clear_param_store()
    mlp_chain(name="prior").register()
    assert all(n.startswith("prior.") for n in pyro.get_param_store().keys())


def test_copies_have_names_and_weights_of_their_own() -> None:
    reverse = mlp_chain()
    twin = copy.deepcopy(reverse)
    names = {c._pyro_name for c in (reverse, twin, reverse.forward_chain, twin.forward_chain)}
    assert len(names) == 4
    assert torch.equal(reverse.sample(2, seed=0), twin.sample(2, seed=0))
    before = reverse.sample(2, seed=0)
    SVI(twin, twin.forward_chain, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA.float())
    assert torch.equal(reverse.sample(2, seed=0), before)
    assert not torch.equal(twin.sample(2, seed=0), before)


def test_chains_of_one_kind_have_names_of_their_own() -> None:
    chains = [linear_pair() for _ in range(3)]
    assert len({c._pyro_name for pair in chains for c in pair}) == 6


# -- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)],
    ids=["half", "double", "to-bfloat16"],
)
def test_log_snr_stays_float64_whatever_the_module_is_cast_to(
    cast: Callable[[nn.Module], nn.Module],
) -> None:
    reverse = mlp_chain()
    forward = reverse.forward_chain
    exact, x = SCHEDULE.table(T), draws(2, 2)
    step = forward.step(3, x, 1)
    cast(reverse)
    cast(forward)
    assert forward.log_snr.dtype == F64 and torch.equal(forward.log_snr, exact)
    again = forward.step(3, x, 1)
    for name in ("t", "log_snr", "alpha", "sigma", "c_0", "c_t", "log_small", "log_large"):
        a, b = getattr(step, name), getattr(again, name)
        assert torch.equal(a, b) and b.dtype == F64


def test_coefficients_are_rounded_only_at_the_end() -> None:
    """1 − ᾱ_1 of a thousand cosine steps: formed in float32 it is off by 1e-4 and more."""
    forward = ForwardChain(CosineSchedule(), 1000)
    wide = forward.step(1, torch.zeros(1, 1, dtype=F64), 1)
    narrow = forward.step(1, torch.zeros(1, 1), 1)
    assert torch.equal(narrow.sigma, wide.sigma.float())
    assert torch.equal(narrow.log_large, wide.log_large.float())


# -- other methods -------------------------------------------------------------------------------


def test_prior_kl_is_the_kl_of_the_last_marginal() -> None:
    forward, reverse = linear_pair()
    marginal = forward.marginal(DATA, T).base_dist
    normal = torch.distributions.Normal(torch.zeros_like(DATA), torch.ones_like(DATA))
    mine = torch.distributions.Normal(marginal.loc, marginal.scale)
    expected = torch.distributions.kl_divergence(mine, normal).sum(-1)
    torch.testing.assert_close(forward.prior_kl(DATA), expected, rtol=1e-10, atol=0.0)


def test_prior_is_standard_normal() -> None:
    x_T = draws(5, 2)
    expected = -0.5 * (x_T.square() + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(linear_pair()[1].prior(x_T).log_prob(x_T), expected)


def test_sample_of_the_forward_chain_is_its_marginal() -> None:
    forward, t, noise = ForwardChain(SCHEDULE, T), torch.tensor([1, 5, 2]), draws(3, 2)
    x_t = forward.sample(DATA, t, noise)
    for i in range(3):
        law = forward.marginal(DATA[i : i + 1], int(t[i])).base_dist
        torch.testing.assert_close(x_t[i : i + 1], law.loc + law.scale * noise[i : i + 1])


# -- sampling ------------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[], ReverseChain]] = {
    "gaussian": lambda: mlp_chain(),
    "matrix": lambda: mlp_chain((2, 3)),
    "discretized": lambda: mlp_chain(decoder=DiscretizedGaussianDecoder(0.25, scale=0.3)),
    "categorical": lambda: mlp_chain(decoder=CategoricalDecoder(5)),
}
every_variant = pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
def test_samples_do_not_depend_on_their_batch(build: Callable[[], ReverseChain]) -> None:
    """In float64, where rounding cannot carry a sample to another level."""
    reverse = build().double()
    whole = reverse.sample(70, seed=3, batch_size=64)
    assert whole.dtype == F64 and whole.shape == (70, *reverse.event_shape)
    for count, batch_size in ((9, 1), (70, 3), (70, 1000)):
        other = reverse.sample(count, seed=3, batch_size=batch_size)
        torch.testing.assert_close(other, whole[:count], rtol=0.0, atol=1e-10)
    for count in (1, 5, 64):
        torch.testing.assert_close(
            reverse.sample(count, seed=3), whole[:count], rtol=0.0, atol=1e-10
        )


def test_samples_depend_on_the_seed_and_on_nothing_global() -> None:
    reverse = mlp_chain()
    first = reverse.sample(4, seed=0)
    state = torch.get_rng_state()
    assert torch.equal(reverse.sample(4, seed=0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not bool((reverse.sample(4, seed=1) == first).any())
    torch.manual_seed(5)
    drawn = reverse.sample(4), reverse.sample(4)
    assert not torch.equal(*drawn)  # no seed: from the global generator, which moves on
    torch.manual_seed(5)
    assert torch.equal(reverse.sample(4), drawn[0])


@every_variant
def test_trajectory_runs_from_data_to_noise(build: Callable[[], ReverseChain]) -> None:
    reverse = build()
    trajectory = reverse.sample(7, seed=0, batch_size=3, trajectory=True)
    assert trajectory.shape == (T + 1, 7, *reverse.event_shape)
    assert torch.equal(trajectory[0], reverse.sample(7, seed=0, batch_size=3))
    other = mlp_chain(tuple(reverse.event_shape), seed=9)  # x_T is noise, whatever the network
    last = other.sample(7, seed=0, batch_size=3, trajectory=True)[-1]
    assert torch.equal(trajectory[-1], last)


def test_samples_have_the_variance_of_the_model() -> None:
    """40,000 values, 4.5 standard errors: 7e-6 failures if unseeded."""
    _, reverse = linear_pair()
    samples = reverse.sample(20_000, seed=0, batch_size=5000)
    expected = Exact().variance()
    error = expected * math.sqrt(2 / samples.numel())
    assert float(samples.square().mean()) == pytest.approx(expected, abs=4.5 * error)
    assert abs(float(samples.mean())) < 4.5 * math.sqrt(expected / samples.numel())


def test_discrete_samples_are_data() -> None:
    for name in ("discretized", "categorical"):
        reverse = VARIANTS[name]()
        samples = reverse.sample(50, seed=0)
        reverse.check_data(samples)
        assert len(samples.unique()) > 3


# -- errors --------------------------------------------------------------------------------------


def refused(reverse: ReverseChain, x_0: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reverse(x_0)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(reverse, reverse.forward_chain, x_0)


def test_bad_data_is_refused() -> None:
    _, reverse = linear_pair()
    for bad in (math.nan, math.inf, -math.inf):
        x_0 = DATA.clone()
        x_0[1, 0] = bad
        refused(
            reverse, x_0, "finite data; got NaN or infinity in 1 of 3 samples, the first at index 1"
        )
    refused(reverse, draws(4, 3), r"shape \(N, 2\); got \(4, 3\)")
    refused(reverse, draws(4, 1, 2), r"shape \(N, 2\); got \(4, 1, 2\)")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_data_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    _, reverse = linear_pair()
    with pytest.raises(ValueError, match="floating-point data; got torch"):
        reverse(torch.ones(4, 2, dtype=dtype))


def test_data_outside_the_decoder_is_refused() -> None:
    refused(
        VARIANTS["categorical"](), torch.tensor([[0.5, 0.3]]), "5 levels from -1 to 1; got 1 values"
    )
    refused(VARIANTS["discretized"](), torch.tensor([[0.5, 1.3]]), r"within \[-1, 1\]")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="order to be one of .*got 'forward'"):
        ForwardChain(SCHEDULE, T, order="forward")
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"num_steps to be an integer >= 1; got {steps}"):
            ForwardChain(SCHEDULE, steps)
    forward = ForwardChain(SCHEDULE, T)
    for event in ((), (0,), (3, 0)):
        with pytest.raises(ValueError, match="non-empty event_shape"):
            ReverseChain(DataDenoiser(Linear()), forward, event)
    with pytest.raises(TypeError, match="denoiser"):
        ReverseChain(Linear(), forward, (2,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="variance"):
        ReverseChain(DataDenoiser(Linear()), forward, (2,), variance=LearnedRange)  # type: ignore[arg-type]
    reverse = linear_pair()[1]
    for arguments in ((0, 1), (-2, 1), (3, 0)):
        with pytest.raises(ValueError, match="(num_samples|batch_size) to be an integer >= 1"):
            reverse.sample(arguments[0], batch_size=arguments[1])
    with pytest.raises(ValueError, match=r"seed in \[0, 2\*\*64\)"):
        reverse.sample(2, seed=-1)
