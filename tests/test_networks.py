"""Laws of the networks: shapes, gradients, independence of batch-mates, sensitivity, errors."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from pyrodiff.networks import FourierFeatures, ResidualConvNet, ResidualMLP, UNet, expected_level

CONTEXT_SHAPE = (2, 3)


def unet(**options: object) -> nn.Module:
    pytest.importorskip("diffusers")
    sizes: dict[str, object] = {"channels": (8, 16), "layers": 1, "head_size": 8, "norm_groups": 4}
    return UNet((2, 4, 4), **(sizes | options))  # type: ignore[arg-type]


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda **o: ResidualMLP((5,), width=16, blocks=2, **o),
    "mlp-matrix-fourier": lambda **o: ResidualMLP((2, 3), width=16, blocks=2, fourier=(1, 2), **o),
    "mlp-scalar": lambda **o: ResidualMLP((1,), width=8, blocks=1, **o),
    "conv": lambda **o: ResidualConvNet((2, 4, 4), channels=8, blocks=2, heads=2, **o),
    "conv-levels": lambda **o: ResidualConvNet((2, 4, 4), channels=8, blocks=2, levels=5, **o),
    "conv-no-attention": lambda **o: ResidualConvNet((2, 3, 5), channels=6, attention_every=0, **o),
    "unet": unet,
}
every_network = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def shaken(network: nn.Module) -> nn.Module:
    """Move every parameter off its initial value: output layers start at zero, which hides laws."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def inputs(network: nn.Module, n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, *network.event_shape)  # type: ignore[misc]
    return x, torch.linspace(-6.0, 6.0, n), torch.randn(n, *CONTEXT_SHAPE)


@every_network
@pytest.mark.parametrize("learned_variance", [False, True])
def test_output_has_the_event_shape_or_its_first_axis_doubled(build, learned_variance):
    network = build(learned_variance=learned_variance)
    x, time, _ = inputs(network)
    first, *others = network.event_shape
    assert network(x, time).shape == (7, first * (1 + learned_variance), *others)


@every_network
def test_untrained_network_predicts_zero(build):
    network = build()
    x, time, _ = inputs(network)
    if not getattr(network, "levels", 0):  # those start from each entry alone, see below
        torch.testing.assert_close(network(x, time), torch.zeros_like(x))


@every_network
@pytest.mark.parametrize("learned_variance", [False, True])
def test_every_parameter_gets_a_gradient(build, learned_variance):
    network = shaken(build(context_size=6, learned_variance=learned_variance))
    output = network(*inputs(network))
    (output * torch.randn_like(output)).sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(p.grad.isfinite().all() for p in network.parameters())


@every_network
def test_a_sample_does_not_depend_on_its_batch_mates(build):
    network = shaken(build(context_size=6)).double()
    x, time, context = (a.double() for a in inputs(network))
    together = network(x, time, context)
    alone = torch.cat(
        [network(x[i : i + 1], time[i : i + 1], context[i : i + 1]) for i in range(7)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@every_network
def test_output_depends_on_time_and_context(build):
    network = shaken(build(context_size=6))
    x, time, context = inputs(network)
    base = network(x, time, context)
    for other in (network(x, time + 1.0, context), network(x, time, context + 1.0)):
        assert ((other - base).abs().flatten(1).amax(1) > 1e-5).all()


@every_network
def test_time_keeps_its_precision_under_autocast(build):
    # 998 and 999 are one number in bfloat16: cast before the embedding, they would agree exactly.
    network = shaken(build(time_scale=1.0))
    with torch.no_grad():
        network_input = torch.randn(2, *network.event_shape)[:1].expand(2, *network.event_shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = network(network_input, torch.tensor([998, 999]))
    assert not torch.equal(a, b)


@every_network
def test_constructor_arguments_rebuild_the_network(build):
    network = shaken(build(context_size=6, learned_variance=True, dropout=0.1))
    arguments = {p: getattr(network, p) for p in inspect.signature(type(network)).parameters}
    assert all(isinstance(v, int | float | bool | tuple | None) for v in arguments.values())
    twin = type(network)(**arguments).eval()
    twin.load_state_dict(network.state_dict())
    x, time, context = inputs(network)
    torch.testing.assert_close(twin(x, time, context), network(x, time, context), rtol=0, atol=0)


@every_network
def test_dropout_acts_in_training_only(build):
    network = shaken(build(dropout=0.5))
    x, time, _ = inputs(network)
    torch.testing.assert_close(network(x, time), network(x, time))
    network.train()
    assert not torch.allclose(network(x, time), network(x, time))


@every_network
def test_wrong_shapes_are_refused(build):
    network = build(context_size=6)
    x, time, context = inputs(network)
    with pytest.raises(ValueError, match=r"Expected x of shape \(N, .*; got \(7, .*1\)"):
        network(x[..., None], time, context)
    with pytest.raises(
        ValueError, match="Expected a context of 6 features for each of 7 samples; got None"
    ):
        network(x, time)
    with pytest.raises(ValueError, match=r"Expected a context of 6 features .*; got \(7, 2, 2\)"):
        network(x, time, context[..., :2])
    with pytest.raises(ValueError, match=r"Expected a context of 0 features .*; got \(7, 2, 3\)"):
        build()(x, time, context)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ResidualMLP(()),
            r"Expected an event_shape of one positive size or more; got \(\)",
        ),
        (lambda: ResidualMLP((2,), width=0), "Expected width to be an integer >= 1; got 0"),
        (
            lambda: ResidualConvNet((8, 8)),
            r"Expected an event_shape of \(channels, height, width\); got \(8, 8\)",
        ),
        (
            lambda: ResidualConvNet((1, 8, 8), channels=10, heads=4),
            "Expected channels to be a positive multiple of 4; got 10",
        ),
        (
            lambda: ResidualConvNet((1, 8, 8), levels=1),
            "Expected levels to be 0 or at least 2; got 1",
        ),
        (
            lambda: UNet((1, 9, 8)),
            "Expected height and width to be a positive multiple of 2; got 9",
        ),
        (
            lambda: UNet((1, 8, 8), channels=()),
            "Expected channels for one resolution or more; got none",
        ),
        (
            lambda: UNet((1, 8, 8), channels=(48, 64)),
            "Expected channels to be a positive multiple of 32; got 48",
        ),
        (
            lambda: UNet((1, 8, 8), channels=(32, 64), head_size=24),
            "Expected channels to be a positive multiple of 24; got 64",
        ),
        (lambda: UNet((1, 8, 8), attention=(True,)), "Expected attention for 2 resolutions; got 1"),
    ],
)
def test_wrong_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_fourier_features_are_sines_and_cosines_beside_the_input():
    features = FourierFeatures((2.0, 4.0))
    x = torch.tensor([[0.125, -0.25]], dtype=torch.float64)
    expected = torch.cat(
        [x, *(f(k * math.pi * x) for f in (torch.sin, torch.cos) for k in (2, 4))], dim=1
    )
    torch.testing.assert_close(features(x), expected)
    assert features(x).shape[1] == features.expansion * 2


@pytest.mark.parametrize("log_snr", [-15.0, -2.0, 0.0, 3.0, 15.0])
def test_expected_level_is_bayes_rule(log_snr):
    lam = torch.tensor(log_snr, dtype=torch.float64)
    alpha, sigma = lam.sigmoid().sqrt(), (-lam).sigmoid().sqrt()
    levels, prior = (
        torch.linspace(-1, 1, 5, dtype=torch.float64),
        torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25]),
    )
    x = alpha * levels[3] + sigma * torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    likelihood = torch.distributions.Normal(alpha * levels, sigma).log_prob(x[:, None])
    posterior = (prior.double().log() + likelihood).softmax(-1)
    actual = expected_level(prior.double().log().expand(9, 5), x, lam.expand(9))
    torch.testing.assert_close(actual, posterior @ levels, rtol=1e-9, atol=1e-9)


def test_expected_level_keeps_its_precision_under_autocast():
    x, log_snr, logits = torch.rand(9, 3), torch.linspace(-5.0, 8.0, 9), torch.randn(9, 3, 17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = expected_level(logits, x, log_snr)
    exact = expected_level(logits.double(), x.double(), log_snr.double())
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-4)


def test_levels_network_starts_from_each_entry_alone():
    network = ResidualConvNet((2, 4, 4), channels=8, blocks=2, levels=5)
    x, time, _ = inputs(network)
    torch.testing.assert_close(network(x, time), expected_level(torch.zeros(5), x, time))


def test_importing_the_module_does_not_import_diffusers():
    code = "import sys, pyrodiff.networks; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
