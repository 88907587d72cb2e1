"""Chains inside programs: names, plates, a latent x_0, and Pyro's handlers on them.

Exact answers come from chains whose denoiser is affine, so that every site is Gaussian.
"""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import DataDenoiser
from pyrodiff.schedules import LogSNRSchedule

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
