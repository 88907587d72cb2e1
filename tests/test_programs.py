"""Chains inside programs: names, plates, a latent x_0, and Pyro's handlers on them.

Exact answers come from chains whose denoiser is affine, so that every site is Gaussian.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import DataDenoiser
from pyrodiff.oracles import linear_bound
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import FixedLarge, PosteriorCovariance, Variance

F64 = torch.float64
T = 4
SCHEDULE = LogSNRSchedule(4.0, -4.0)


class Linear(nn.Module):
    """x̂_0 = k x_t + b at every t: with it the whole model is Gaussian."""

    def __init__(self, gain: float = 0.6, offset: float = 0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=F64))
        self.offset = offset

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.gain * x + self.offset


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def linear_chain(name: str | None = None, event: tuple[int, ...] = (2,), **options: Any) -> Any:
    gain, offset = options.pop("gain", 0.6), options.pop("offset", 0.0)
    forward = ForwardChain(SCHEDULE, T, order=options.pop("order", "denoising"))
    return ReverseChain(DataDenoiser(Linear(gain, offset)), forward, event, name=name, **options)


def sites(trace: Any) -> list[str]:
    return [name for name, site in trace.nodes.items() if site["type"] == "sample"]


def names(prefix: str) -> list[str]:
    return [f"{prefix}data", *(f"{prefix}x_{t}" for t in range(T, -1, -1))]


# -- names -----------------------------------------------------------------------------------------


def test_a_chain_alone_has_short_names() -> None:
    reverse = linear_chain()
    assert [reverse.site(t) for t in range(T, -1, -1)] == names("")[1:]
    assert reverse.plate_name == "data" and reverse.name == ""
    assert sites(poutine.trace(reverse).get_trace()) == names("")


def test_two_named_chains_in_one_program() -> None:
    one, other = linear_chain("one"), linear_chain("other")

    def program() -> Tensor:
        return torch.cat([one(num_samples=3), other(num_samples=2)])

    trace = poutine.trace(program).get_trace()
    assert sites(trace) == names("one.") + names("other.")
    assert one.site(2) == "one.x_2" and other.plate_name == "other.data"
    for chain, count in ((one, 3), (other, 2)):
        frames = trace.nodes[chain.site(1)]["cond_indep_stack"]
        assert [(f.name, f.dim, f.size) for f in frames] == [(chain.plate_name, -1, count)]


@pytest.mark.parametrize("order", ["denoising", "noising"])
def test_the_guide_of_a_named_chain_has_its_names(order: str) -> None:
    reverse, x_0 = linear_chain("prior", order=order), draws(3, 2)
    guide = poutine.trace(reverse.forward_chain).get_trace(x_0)
    assert set(sites(guide)) == {*names("prior.")} - {"prior.x_0"}
    model = poutine.trace(poutine.replay(reverse, trace=guide)).get_trace(x_0)
    for t in range(1, T + 1):
        assert model.nodes[reverse.site(t)]["value"] is guide.nodes[reverse.site(t)]["value"]


def test_a_chain_takes_the_name_of_its_forward_chain() -> None:
    forward = ForwardChain(SCHEDULE, T).named("prior")
    reverse = ReverseChain(DataDenoiser(Linear()), forward, (2,))
    assert sites(poutine.trace(reverse).get_trace()) == names("prior.")
    assert ReverseChain(DataDenoiser(Linear()), forward, (2,), name="a").site(0) == "a.x_0"
    assert forward.site(3) == "prior.x_3"  # and keeps its own


def test_one_chain_twice_under_two_names_shares_its_parameters() -> None:
    reverse = linear_chain("prior")
    left, right = reverse.named("left"), reverse.named("right")

    def program() -> Tensor:
        return left(num_samples=1) + right(num_samples=1)

    trace = poutine.trace(program).get_trace()
    assert sites(trace) == names("left.") + names("right.")
    assert [n for n, s in trace.nodes.items() if s["type"] == "param"] == [
        "prior.denoiser$$$network.gain"
    ]
    assert left.forward_chain.site(1) == "left.x_1" and reverse.site(1) == "prior.x_1"
    assert left.named("").site(0) == "x_0"
    with torch.no_grad():
        reverse.denoiser.network.gain.fill_(0.3)
    torch.testing.assert_close(left.sample(3, seed=0), reverse.sample(3, seed=0))


def test_copies_and_other_grids_keep_the_names_of_sites() -> None:
    reverse = linear_chain("prior")
    twin = copy.deepcopy(reverse)
    assert twin.site(0) == twin.forward_chain.site(0) == "prior.x_0"
    assert twin._pyro_name != reverse._pyro_name  # its parameters are others
    few = reverse.respaced(2)
    assert few.site(2) == few.forward_chain.site(2) == "prior.x_2"


def test_pyros_scope_names_a_chain_and_its_guide() -> None:
    reverse, x_0 = linear_chain(), draws(2, 2)

    def program() -> None:
        for prefix in ("a", "b"):
            with scope(prefix=prefix):
                reverse(num_samples=2)

    def guide() -> None:
        for prefix in ("a", "b"):
            with scope(prefix=prefix):
                reverse.forward_chain(x_0)

    assert sites(poutine.trace(program).get_trace()) == names("a/") + names("b/")
    assert {*sites(poutine.trace(guide).get_trace())} < {*names("a/"), *names("b/")}


def test_a_second_call_under_the_same_name_is_refused() -> None:
    reverse, named = linear_chain(), linear_chain("prior")
    for chain, taken in ((reverse, "data"), (named, r"prior\.data")):
        for call in (lambda c: c(num_samples=1), lambda c: c.forward_chain(draws(1, 2))):
            with pytest.raises(RuntimeError, match=f"Expected another name .* '{taken}'.*named"):
                poutine.trace(lambda c=chain, f=call: (f(c), f(c))).get_trace()

    def in_one_plate() -> None:
        with pyro.plate("rows", 2):
            named()
            named()

    with pytest.raises(RuntimeError, match=r"Expected another name .* 'prior\.x_4'"):
        poutine.trace(in_one_plate).get_trace()


def test_a_site_that_is_not_there_is_refused() -> None:
    reverse = linear_chain()
    for t in (-1, T + 1):
        with pytest.raises(ValueError, match=f"t in 0 … {T}; got {t}"):
            reverse.site(t)


# -- plates ----------------------------------------------------------------------------------------


def test_a_chain_in_a_program_draws_one_x_0() -> None:
    reverse = linear_chain()
    assert reverse(num_samples=1).shape == (1, 2)
    with pyro.plate("particles", 7, dim=-2):
        assert reverse(num_samples=1).shape == (7, 1, 2)


@pytest.mark.parametrize("variance", [FixedLarge(), PosteriorCovariance("full")], ids=str)
def test_a_chain_inside_outer_plates(variance: Variance) -> None:
    """Independent along each of them, with the density that every index has alone."""
    reverse = linear_chain(variance=variance)
    with pyro.plate("a", 5, dim=-3), pyro.plate("b", 4, dim=-2):
        trace = poutine.trace(reverse).get_trace(num_samples=3)
    trace.compute_log_prob()
    values = [trace.nodes[reverse.site(t)]["value"] for t in range(T + 1)]
    for t, value in enumerate(values):
        assert value.shape == (5, 4, 3, 2) and len(value.flatten().unique()) == value.numel()
        assert trace.nodes[reverse.site(t)]["log_prob"].shape == (5, 4, 3)
    for t in range(1, T + 1):
        law = reverse.decode(values[1][2, 1]) if t == 1 else reverse.transition(values[t][2, 1], t)
        expected, log_prob = law.log_prob(values[t - 1][2, 1]), trace.nodes[reverse.site(t - 1)]
        torch.testing.assert_close(log_prob["log_prob"][2, 1], expected)


def test_a_chain_uses_the_plate_that_it_stands_in() -> None:
    reverse, x_0 = linear_chain(), draws(3, 2)

    def program(*arguments: Any, **options: Any) -> Tensor:
        with pyro.plate("rows", 3):
            return reverse(*arguments, **options)

    for call in (dict(), dict(num_samples=3), dict(x_0=x_0)):
        trace = poutine.trace(program).get_trace(**call)
        assert sites(trace) == ["rows", *names("")[1:]]
        for t in range(T + 1):
            site = trace.nodes[reverse.site(t)]
            assert site["value"].shape == (3, 2)
            assert [(f.name, f.dim) for f in site["cond_indep_stack"]] == [("rows", -1)]
    with pytest.raises(
        ValueError, match=r"Expected 3 samples, one for each index .*; got 2.*dim=-2"
    ):
        program(num_samples=2)
    with pytest.raises(ValueError, match="Expected 3 samples"):
        program(draws(4, 2))


def test_particles_are_no_plate_of_the_program() -> None:
    """As many particles as data, at dimension −1 by a wrong ``max_plate_nesting``."""
    reverse, x_0 = linear_chain(), draws(3, 2)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(ValueError, match="collide at dim=-1"):
        elbo.loss(reverse, reverse.forward_chain, x_0)


def test_a_subsampled_plate_scales_the_chain() -> None:
    reverse, data = linear_chain(), draws(20, 2)

    def program() -> None:
        with pyro.plate("rows", 20, subsample_size=4) as rows:
            reverse(data[rows])

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    for t in range(T + 1):
        site = trace.nodes[reverse.site(t)]
        assert site["log_prob"].shape == (4,) and float(site["scale"]) == 5


def test_the_plate_of_a_guide_is_the_chains() -> None:
    reverse = linear_chain("prior")
    with (plate := reverse.plate(3)):
        assert plate.name == "prior.data" and plate.dim == -1
        with reverse.plate(3):  # the one that is there
            assert [frame.name for frame in get_plates()] == ["prior.data"]
        with pytest.raises(ValueError, match="Expected 3 samples"):
            reverse.plate(2)


# -- a latent x_0 ----------------------------------------------------------------------------------

A = torch.tensor([[1.0, -0.5]], dtype=F64)
NOISE, Y = 0.7, torch.tensor([[0.4], [-1.0], [2.0]], dtype=F64)
MEAN, SCALE = draws(3, 2, seed=7), 0.3


class Inverse:
    """y = A x_0 + noise under a chain, with a guide that draws x_0 itself; rows are independent."""

    def __init__(self, reverse: ReverseChain, own_plate: bool):
        self.reverse, self.own_plate = reverse, own_plate
        self.mean = MEAN.clone().requires_grad_()

    def plate(self) -> Any:
        return self.reverse.plate(3) if self.own_plate else pyro.plate("rows", 3, dim=-1)

    def model(self, y: Tensor = Y) -> Tensor:
        with self.plate():
            x_0 = self.reverse()
            pyro.sample("y", dist.Normal(x_0 @ A.T, NOISE).to_event(1), obs=y)
            return x_0

    def guide(self, y: Tensor = Y) -> None:
        with self.plate():
            x_0 = pyro.sample(self.reverse.site(0), dist.Normal(self.mean, SCALE).to_event(1))
            self.reverse.forward_chain(x_0)

    def exact(self) -> Tensor:
        """The bound: a quadratic in x_0, whose mean under N(m, s²) is that over m ± s √d e_i."""
        units = SCALE * math.sqrt(2) * torch.cat([torch.eye(2), -torch.eye(2)]).to(F64)
        x_0 = self.mean + units[:, None]
        bound = quadratic_bound(self.reverse, x_0)
        log_p = dist.Normal(x_0 @ A.T, NOISE).to_event(1).log_prob(Y)
        return (bound + log_p).mean(0).sum() + dist.Normal(self.mean, SCALE).entropy().sum()


def quadratic_bound(reverse: ReverseChain, x_0: Tensor) -> Tensor:
    """E_q log p_θ(x_0:T)/q(x_1:T | x_0), with a gradient: fitted to the oracle's values."""

    def features(x: Tensor) -> Tensor:
        return torch.cat([x.square(), x, x[..., :1] * x[..., 1:], torch.ones_like(x[..., :1])], -1)

    points = draws(6, 2, seed=1)
    values = linear_bound(reverse, points).elbo
    return features(x_0) @ torch.linalg.solve(features(points), values)


def mean_loss(elbo: Any, inverse: Inverse, repeats: int) -> tuple[Tensor, Tensor]:
    """Loss and its gradient, mean and standard error over repeats."""
    values = []
    for _ in range(repeats):
        loss = elbo.differentiable_loss(inverse.model, inverse.guide)
        (gradient,) = torch.autograd.grad(loss, inverse.mean)
        values.append(torch.cat([loss.detach().reshape(1), gradient.flatten()]))
    stacked = torch.stack(values)
    return stacked.mean(0), stacked.std(0) / math.sqrt(repeats)


@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])
@pytest.mark.parametrize(
    ("name", "order", "own_plate"),
    [(None, "denoising", False), ("prior", "noising", False), ("prior", "denoising", True)],
)
def test_latent_x_0_has_the_exact_bound(
    name: str | None, order: str, own_plate: bool, vectorized: bool
) -> None:
    """The loss and its gradient, 7 numbers within 6 standard errors (99 degrees of freedom).

    At most 3e-7 failures a case if unseeded.
    """
    inverse = Inverse(linear_chain(name, order=order), own_plate)
    options = dict(num_particles=60, vectorize_particles=True) if vectorized else {}
    mean, error = mean_loss(Trace_ELBO(**options), inverse, 100)
    exact = -inverse.exact()
    (gradient,) = torch.autograd.grad(exact, inverse.mean)
    expected = torch.cat([exact.detach().reshape(1), gradient.flatten()])
    assert float(error[0]) < (0.25 if vectorized else 1.6)  # the comparison means something
    assert bool(((mean - expected).abs() < 6 * error).all())


@pytest.mark.filterwarnings("ignore:Failed to verify mean field:UserWarning")  # all that Pyro says
@pytest.mark.parametrize("variance", [FixedLarge(), PosteriorCovariance("full")], ids=str)
def test_mean_field_with_a_latent_x_0_is_refused(variance: Variance) -> None:
    """Its term KL(q(x_0) ‖ p(x_0 | x_1)) takes x_0 and x_1 for independent."""
    inverse = Inverse(linear_chain(variance=variance), own_plate=True)
    for vectorized in (False, True):
        elbo = TraceMeanField_ELBO(
            num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1
        )
        with pytest.raises(ValueError, match="Expected an observed x_0 .*Use Trace_ELBO"):
            elbo.loss(inverse.model, inverse.guide)
    with torch.no_grad():  # observed, and conditioned, it is as it was
        x_0, guide = draws(3, 2), inverse.reverse.forward_chain
        conditioned = pyro.condition(inverse.reverse, {"x_0": x_0})
        for model, arguments in ((inverse.reverse, (x_0,)), (conditioned, (None, None, 3))):
            torch.manual_seed(0)
            trace = poutine.trace(guide).get_trace(x_0)
            nodes = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*arguments).nodes
            expected = inverse.reverse.decode(nodes["x_1"]["value"]).log_prob(x_0)
            torch.testing.assert_close(nodes["x_0"]["fn"].log_prob(x_0), expected)


def test_two_latent_chains_have_the_exact_bound() -> None:
    """y = A (x_0 + x'_0) + noise, under vectorized particles; 6 standard errors: 3e-8 failures."""
    one, other = linear_chain("one"), linear_chain("other", gain=0.3, offset=0.2)
    units = SCALE * 2 * torch.cat([torch.eye(4), -torch.eye(4)]).to(F64)

    def model() -> None:
        total = one(num_samples=1) + other(num_samples=1)
        pyro.sample("y", dist.Normal(total @ A.T, NOISE).to_event(1), obs=Y[:1])

    def guide() -> None:
        for chain, mean in ((one, MEAN[:1]), (other, MEAN[1:2])):
            with chain.plate(1):
                x_0 = pyro.sample(chain.site(0), dist.Normal(mean, SCALE).to_event(1))
                chain.forward_chain(x_0)

    x_0 = MEAN[:2].flatten() + units
    first, second = x_0[:, None, :2], x_0[:, None, 2:]
    log_p = dist.Normal((first + second) @ A.T, NOISE).to_event(1).log_prob(Y[:1])
    bound = quadratic_bound(one, first) + quadratic_bound(other, second) + log_p
    exact = float((bound.mean() + dist.Normal(MEAN[:2], SCALE).entropy().sum()).detach())
    elbo = Trace_ELBO(num_particles=60, vectorize_particles=True)
    values = torch.tensor([elbo.loss(model, guide) for _ in range(100)])
    error = float(values.std()) / math.sqrt(100)
    assert error < 0.2 and abs(float(values.mean()) + exact) < 6 * error


def test_x_0_without_a_batch_axis_is_refused() -> None:
    reverse = linear_chain()
    with pytest.raises(ValueError, match=r"shape \(…, N, \*event_shape\); got \(2,\)"):
        reverse.forward_chain(draws(2))


@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])
def test_enumerated_neighbour(vectorized: bool) -> None:
    """A discrete latent beside the chain, summed over by Pyro, is the mixture written out."""
    reverse = linear_chain()
    weights, operators = torch.tensor([0.3, 0.7], dtype=F64), torch.stack([A, A.flip(1)])

    def draw() -> Tensor:
        return reverse()

    def enumerated(y: Tensor) -> None:
        with pyro.plate("rows", 3):
            x_0 = draw()
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            mean = (operators[k] * x_0[..., None, :]).sum(-1)
            pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)

    def written_out(y: Tensor) -> None:
        with pyro.plate("rows", 3):
            x_0 = draw()
            means = torch.stack([x_0 @ operator.T for operator in operators], -2)
            kinds = dist.Categorical(weights.expand(means.shape[:-1]))
            parts = dist.Normal(means, NOISE).to_event(1)
            pyro.sample("y", dist.MixtureSameFamily(kinds, parts), obs=y)

    options = dict(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
    losses = []
    for elbo, model in ((TraceEnum_ELBO, enumerated), (Trace_ELBO, written_out)):
        torch.manual_seed(3)
        guide = Inverse(reverse, own_plate=False).guide
        losses.append(elbo(**options).loss(model, guide, Y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


# -- latent contexts -------------------------------------------------------------------------------


class Shifted(nn.Module):
    """x̂_0 = 0.6 x_t + M c."""

    def __init__(self) -> None:
        super().__init__()
        shifts = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.5, 0.5]], dtype=F64)
        self.register_buffer("shifts", shifts)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        assert len(context) == len(x) == len(time)
        return 0.6 * x + context @ self.shifts


def shifted_chain(variance: Variance) -> ReverseChain:
    forward = ForwardChain(SCHEDULE, T)
    return ReverseChain(DataDenoiser(Shifted()), forward, (2,), variance=variance)


every_variance = pytest.mark.parametrize(
    "variance", [FixedLarge(), PosteriorCovariance("full")], ids=str
)


@every_variance
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])
def test_enumerated_context(vectorized: bool, variance: Variance) -> None:
    """The class of x_0 summed over by Pyro: log Σ_c π_c p(x_0:T | c) − log q of each datum."""
    reverse, x_0 = shifted_chain(variance), draws(3, 2)
    weights, classes = torch.tensor([0.2, 0.5, 0.3], dtype=F64), torch.eye(3, dtype=F64)

    def program(x_0: Tensor) -> None:
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            reverse(x_0, context=classes[c], context_dim=1)

    options = dict(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    torch.manual_seed(0)
    loss = TraceEnum_ELBO(**options).loss(program, reverse.forward_chain, x_0)
    torch.manual_seed(0)
    total = 0.0
    for _ in range(1 if vectorized else 4):
        with pyro.plate("particles", 4 if vectorized else 1, dim=-2):
            guide = poutine.trace(reverse.forward_chain).get_trace(x_0)
            guide.compute_log_prob()
            log_p = []
            for c in range(3):
                replayed = poutine.replay(reverse, trace=guide)
                trace = poutine.trace(replayed).get_trace(x_0, classes[c].expand(3, 3))
                trace.compute_log_prob()
                sites = [trace.nodes[f"x_{t}"]["log_prob"] for t in range(T + 1)]
                log_p.append(torch.stack(sites).sum(0) + weights[c].log())
        log_q = sum(guide.nodes[f"x_{t}"]["log_prob"] for t in range(1, T + 1))
        total += float((torch.stack(log_p).logsumexp(0) - log_q).detach().sum()) / 4
    assert loss == pytest.approx(-total, rel=1e-9)


@every_variance
def test_context_of_each_particle(variance: Variance) -> None:
    """A latent context under an outer plate: the density of each particle is that of its own."""
    reverse = shifted_chain(variance)
    with pyro.plate("particles", 5, dim=-2):
        context = pyro.sample("c", dist.Normal(torch.zeros(3, 3, dtype=F64), 1.0).to_event(1))
        assert context.shape == (5, 3, 3)
        trace = poutine.trace(reverse).get_trace(context=context, context_dim=1)
        one = poutine.trace(reverse).get_trace(context=context[:, :1], context_dim=1, num_samples=3)
    trace.compute_log_prob()
    one.compute_log_prob()
    for t in range(T):
        for run, own in ((trace, context[2]), (one, context[2, :1].expand(3, 3))):
            before = run.nodes[f"x_{t + 1}"]["value"][2]
            law = reverse.decode(before, own) if t == 0 else reverse.transition(before, t + 1, own)
            site = run.nodes[f"x_{t}"]
            assert site["value"].shape == (5, 3, 2)
            torch.testing.assert_close(site["log_prob"][2], law.log_prob(site["value"][2]))


def test_contexts_that_do_not_go_with_the_samples_are_refused() -> None:
    reverse = shifted_chain(FixedLarge())
    with pytest.raises(ValueError, match=r"go with \(4,\), those of the samples; got \(2,\)"):
        reverse(context=draws(2, 3), context_dim=1, num_samples=4)


# -- Pyro's handlers -------------------------------------------------------------------------------


def test_conditioned_x_0_is_observed_data() -> None:
    """``pyro.condition`` on the site and the argument ``x_0`` are one model."""
    reverse, x_0 = linear_chain("prior"), draws(3, 2)
    conditioned = pyro.condition(reverse, data={"prior.x_0": x_0})
    losses = []
    for model, arguments in ((reverse, (x_0,)), (conditioned, (None, None, 3))):
        torch.manual_seed(0)
        guide = poutine.trace(reverse.forward_chain).get_trace(x_0)
        trace = poutine.trace(poutine.replay(model, trace=guide)).get_trace(*arguments)
        assert trace.nodes["prior.x_0"]["is_observed"]
        losses.append(float((trace.log_prob_sum() - guide.log_prob_sum()).detach()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("variance", [FixedLarge(), PosteriorCovariance("full")], ids=str)
def test_intervention_on_a_state(variance: Variance) -> None:
    """``pyro.do`` sets x_2 for what follows from it, whatever led there."""
    reverse, value = linear_chain(variance=variance), draws(2, seed=5)
    trace = poutine.trace(pyro.do(reverse, {"x_2": value})).get_trace(num_samples=3)
    law = reverse.transition(value.expand(3, 2), 2)
    x_1 = trace.nodes["x_1"]
    torch.testing.assert_close(x_1["fn"].log_prob(x_1["value"]), law.log_prob(x_1["value"]))


def test_infer_config_reaches_every_site() -> None:
    reverse = linear_chain()
    configured = poutine.infer_config(reverse, lambda site: {"mark": site["name"]})
    trace = poutine.trace(configured).get_trace(num_samples=2)
    for t in range(T + 1):
        assert trace.nodes[reverse.site(t)]["infer"]["mark"] == f"x_{t}"


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_of_a_program(parallel: bool) -> None:
    """Moments of y and x_0 within 5 standard errors, 7 of them: 4e-6 failures if unseeded."""
    count = 400 if parallel else 60
    inverse = Inverse(linear_chain("prior"), own_plate=True)
    x_0 = draws(count, 3, 2, seed=2)
    predictive = Predictive(inverse.model, {"prior.x_0": x_0}, parallel=parallel)
    y = predictive(None)["y"]
    assert y.shape == (count, 3, 1)
    residual = (y - x_0 @ A.T) / NOISE
    assert abs(float(residual.mean())) < 5 / math.sqrt(3 * count)
    guided = Predictive(inverse.model, guide=inverse.guide, num_samples=count, parallel=parallel)
    samples = guided(None)
    assert samples["prior.x_0"].shape == (count, 3, 2)
    error = (samples["prior.x_0"] - MEAN).mean(0) / (SCALE / math.sqrt(count))
    assert float(error.detach().abs().max()) < 5
