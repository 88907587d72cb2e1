"""Denoisers: one x̂_0 whatever the network predicts, clipping, time, learned variance, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import (
    DataDenoiser,
    Denoiser,
    MeanDenoiser,
    NoiseDenoiser,
    VelocityDenoiser,
)
from pyrodiff.schedules import CosineSchedule, LogSNRSchedule
from pyrodiff.variances import LearnedRange

F64 = torch.float64
FORWARD = ForwardChain(CosineSchedule(), 10)
KINDS = [NoiseDenoiser, DataDenoiser, VelocityDenoiser, MeanDenoiser]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Network(nn.Module):
    """Calls ``function`` and keeps what it was called with."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls.append((x, time, context))
        return self.function(x, time, context)


def same(x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    return x


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# -- parametrisations ----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 5, 10])
def test_consistent_outputs_give_one_x0_hat(t: int) -> None:
    """From x_t and a guess x̂_0 follow ε̂, v̂ and μ̂; each denoiser must find the guess again."""
    x_t, guess = draws(4, 2, 3), draws(4, 2, 3, seed=1)
    alpha_bar = torch.sigmoid(FORWARD.log_snr[t - 1])
    alpha, sigma = alpha_bar.sqrt(), torch.sigmoid(-FORWARD.log_snr[t - 1]).sqrt()
    noise = (x_t - alpha * guess) / sigma
    mean = guess
    if t > 1:  # Ho et al. (2020), equation 7
        previous = torch.sigmoid(FORWARD.log_snr[t - 2])
        beta = 1 - alpha_bar / previous
        mean = previous.sqrt() * beta / sigma**2 * guess
        mean = mean + (1 - beta).sqrt() * (1 - previous) / sigma**2 * x_t
    outputs = {
        NoiseDenoiser: noise,
        DataDenoiser: guess,
        VelocityDenoiser: alpha * noise - sigma * guess,
        MeanDenoiser: mean,
    }
    step = FORWARD.step(t, x_t, 2)
    for kind, output in outputs.items():
        denoiser = kind(Network(lambda x, time, context, output=output: output))
        x0_hat, raw, _ = denoiser(x_t, step)
        # at T = 10, α = 2e-3: dividing by it costs three digits
        torch.testing.assert_close(x0_hat, guess, rtol=0.0, atol=1e-11, msg=kind.__name__)
        assert raw is None


@pytest.mark.parametrize("t", [2, 7])
def test_mean_denoiser_is_the_mean_of_the_transition(t: int) -> None:
    network = Network(lambda x, time, context: torch.sin(3 * x))
    reverse = ReverseChain(MeanDenoiser(network), FORWARD, (3,))
    x_t = draws(4, 3)
    mean = reverse.transition(x_t, t).base_dist.loc
    torch.testing.assert_close(mean, torch.sin(3 * x_t), rtol=0.0, atol=1e-12)


@every_kind
def test_true_output_recovers_the_data(kind: type[Denoiser]) -> None:
    """One t per sample: each sample's coefficients are its own."""
    x_0, noise, t = draws(4, 3), draws(4, 3, seed=1), torch.tensor([1, 3, 3, 9])
    x_t = FORWARD.sample(x_0, t, noise)
    step = FORWARD.step(t, x_0, 1)
    output = {
        NoiseDenoiser: noise,
        DataDenoiser: x_0,
        VelocityDenoiser: step.alpha * noise - step.sigma * x_0,
        MeanDenoiser: step.c_0 * x_0 + step.c_t * x_t,
    }[kind]
    x0_hat, _, _ = kind(Network(lambda *_: output))(x_t, step)
    torch.testing.assert_close(x0_hat, x_0, rtol=0.0, atol=1e-12)


@every_kind
def test_a_level_between_two_steps_is_as_good_as_one_of_the_chain(kind: type[Denoiser]) -> None:
    """At λ_t a level and the step are the same to the denoiser; between them it is defined too."""
    reverse = ReverseChain(kind(Network(lambda x, time, _: x * time[:, None])), FORWARD, (3,))
    x_t, t = draws(4, 3), torch.tensor([1, 3, 3, 9])
    if kind is MeanDenoiser:
        with pytest.raises(ValueError, match=r"step of the chain for a MeanDenoiser.*t = 2\.5"):
            reverse.predict(x_t, reverse.level(FORWARD.log_snr[1:3].mean(), x_t))
        return
    at_steps = reverse.predict(x_t, reverse.level(FORWARD.log_snr[t - 1], x_t)).x0_hat
    expected = reverse.predict(x_t, reverse.step(t, x_t)).x0_hat
    torch.testing.assert_close(at_steps, expected, rtol=1e-13, atol=0)
    # several levels in one batch are the same as each on its own
    log_snr = torch.tensor([5.0, 1.0, 0.3, -2.0], dtype=F64)
    together = reverse.predict(x_t, reverse.level(log_snr, x_t)).x0_hat
    for row in range(4):
        alone = reverse.predict(x_t[[row]], reverse.level(log_snr[row], x_t[[row]])).x0_hat
        torch.testing.assert_close(alone[0], together[row], rtol=1e-13, atol=0)


# -- clipping ------------------------------------------------------------------------------------


@every_kind
def test_clip_is_of_x0_hat_and_of_nothing_else(kind: type[Denoiser]) -> None:
    x_t, step = 3 * draws(50, 3), FORWARD.step(4, draws(1, 3), 1)
    free, _, _ = kind(Network(same))(x_t, step)
    clipped, _, _ = kind(Network(same), clip=(-1, 0.5))(x_t, step)
    assert float(free.min()) < -1 and float(free.max()) > 0.5  # there is something to clip
    assert torch.equal(clipped, free.clamp(-1, 0.5))


def test_clip_is_the_same_in_transition_and_decoder() -> None:
    reverse = ReverseChain(DataDenoiser(Network(same), clip=(-1, 1)), FORWARD, (3,))
    x_t = 5 * draws(6, 3)
    step = FORWARD.step(4, x_t, 1)
    expected = step.c_0 * x_t.clamp(-1, 1) + step.c_t * x_t
    assert torch.equal(reverse.transition(x_t, 4).base_dist.loc, expected)
    assert torch.equal(reverse.decode(x_t).base_dist.loc, x_t.clamp(-1, 1))


# -- time ----------------------------------------------------------------------------------------


def times(time: str, t: Tensor, x: Tensor, forward: ForwardChain = FORWARD) -> Tensor:
    network = Network(same)
    DataDenoiser(network, time=time)(x, forward.step(t, x, x.dim() - 1))
    return network.calls[0][1]


def test_time_is_log_snr_or_the_timestep_from_zero() -> None:
    x, t = draws(3, 2), torch.tensor([1, 4, 10])
    assert times("timestep", t, x).tolist() == [0.0, 3.0, 9.0]
    assert torch.equal(times("log_snr", t, x), FORWARD.log_snr[t - 1])
    one = torch.tensor(4)  # one t for the batch is spread over it
    assert times("timestep", one, x).tolist() == [3.0, 3.0, 3.0]
    assert times("log_snr", one, x).tolist() == [float(FORWARD.log_snr[3])] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("time", ["log_snr", "timestep"])
def test_time_survives_half_precision(dtype: torch.dtype, time: str) -> None:
    """bf16 holds 507 of the numbers 0 … 999: every step of a thousand must stay itself."""
    forward = ForwardChain(LogSNRSchedule(), 1000)
    t = torch.arange(1, 1001)
    seen = times(time, t, torch.zeros(1000, 2, dtype=dtype), forward)
    assert seen.dtype == torch.float32
    exact = forward.log_snr if time == "log_snr" else torch.arange(1000)
    assert torch.equal(seen, exact.float())


def test_time_is_as_wide_as_the_data() -> None:
    t = torch.tensor([2])
    assert times("timestep", t, torch.zeros(1, 2)).dtype == torch.float32
    assert times("timestep", t, torch.zeros(1, 2, dtype=F64)).dtype == F64


def test_context_goes_to_the_network_only_where_there_is_one() -> None:
    x, step, context = draws(3, 2), FORWARD.step(2, draws(3, 2), 1), draws(3, 5)
    network = Network(same)
    DataDenoiser(network)(x, step)
    DataDenoiser(network)(x, step, context)
    assert network.calls[0][2] is None and network.calls[1][2] is context


# -- learned variance ----------------------------------------------------------------------------


@every_kind
def test_learned_variance_is_the_second_half_of_the_first_event_axis(kind: type[Denoiser]) -> None:
    x_t, raw = draws(4, 3, 2), draws(4, 3, 2, seed=1)
    step = FORWARD.step(3, x_t, 2)
    plain, _, _ = kind(Network(lambda x, *_: x.sin()))(x_t, step)
    network = Network(lambda x, *_: torch.cat([x.sin(), raw], dim=1))
    x0_hat, second, _ = kind(network)(x_t, step, learned_variance=True)
    assert torch.equal(x0_hat, plain)
    assert second is not None and torch.equal(second, raw)


# -- errors --------------------------------------------------------------------------------------


def test_wrong_output_shapes_are_refused() -> None:
    x_t = draws(4, 3)
    step = FORWARD.step(3, x_t, 1)
    doubled = Network(lambda x, *_: torch.cat([x, x], dim=1))
    with pytest.raises(ValueError, match=r"output of shape \(4, 3\); got \(4, 6\)"):
        NoiseDenoiser(doubled)(x_t, step)
    with pytest.raises(ValueError, match=r"\(4, 6\) \(doubled .*learned variance\); got \(4, 3\)"):
        NoiseDenoiser(Network(same))(x_t, step, learned_variance=True)
    with pytest.raises(ValueError, match=r"\(4, 3\); got \(3,\)"):  # would broadcast silently
        NoiseDenoiser(Network(lambda x, *_: x[0]))(x_t, step)
    reverse = ReverseChain(NoiseDenoiser(Network(same)), FORWARD, (3,), variance=LearnedRange())
    with pytest.raises(ValueError, match="doubled along the first event axis"):
        reverse.transition(x_t, 3)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="time to be one of .*got 'steps'"):
        NoiseDenoiser(Network(same), time="steps")
    for clip in ((1.0, -1.0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="low < high"):
            NoiseDenoiser(Network(same), clip=clip)
