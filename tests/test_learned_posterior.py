"""A learned posterior variance: exact laws, the mean untouched, files, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, PathBound, ReverseChain, data
from pyrodiff.cli import main
from pyrodiff.decoders import CategoricalDecoder
from pyrodiff.denoisers import DataDenoiser, MeanDenoiser, NoiseDenoiser
from pyrodiff.kernels import Step, jump
from pyrodiff.networks import ResidualConvNet, ResidualMLP, UNet, VarianceHead
from pyrodiff.objectives import VarianceMatching, VariationalBound, variational_term
from pyrodiff.oracles import Gaussian, GaussianMixture
from pyrodiff.runs.variance_settings import VarianceSettings
from pyrodiff.schedules import LinearSchedule, LogSNRSchedule
from pyrodiff.timesteps import AllTimesteps
from pyrodiff.training import TrainingSettings, fit_variance, with_variance_head
from pyrodiff.variances import (
    AnalyticVariance,
    FixedSmall,
    LearnedDiagonal,
    LearnedPosterior,
    PosteriorCovariance,
)

F64 = torch.float64
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.3]], dtype=F64)
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor(0.3)
)
LAWS = {"Gaussian": Gaussian(torch.zeros(2), COVARIANCE), "mixture": MIXTURE}


def unet(**options: object) -> nn.Module:
    pytest.importorskip("diffusers")
    sizes: dict[str, object] = {"channels": (8, 16), "layers": 1, "head_size": 8, "norm_groups": 4}
    return UNet((2, 4, 4), **(sizes | options))  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda **o: ResidualMLP((2, 3), width=16, blocks=2, dropout=0.3, **o),
    "mlp of images": lambda **o: ResidualMLP((1, 3, 3), width=16, blocks=2, **o),
    "conv": lambda **o: ResidualConvNet((2, 4, 4), channels=8, blocks=2, dropout=0.3, **o),
    "levels": lambda **o: ResidualConvNet((2, 4, 4), channels=8, blocks=2, levels=5, **o),
    "unet": unet,
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


def shaken(network: nn.Module, scale: float = 0.2) -> nn.Module:
    """Move every parameter off its initial value: output layers start at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return network.eval()


def inputs(shape: tuple[int, ...], count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator), torch.linspace(-6.0, 6.0, count)


def exact_chain(name: str, num_steps: int = 50) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(6.0, -6.0), num_steps)
    denoiser = NoiseDenoiser(LAWS[name].network())
    return ReverseChain(denoiser, forward, (2,), variance=FixedSmall()).eval()


def small_chain(**options: object) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(6.0, -6.0), 20)
    network = shaken(ResidualMLP((2,), width=16, blocks=1, **options))  # type: ignore[arg-type]
    return ReverseChain(NoiseDenoiser(network), forward, (2,), variance=FixedSmall()).eval()


# -- the variance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 10])
def test_it_is_the_analytic_variance_of_the_same_errors(t: int) -> None:
    x, forward = torch.zeros(3, 2, dtype=F64), ForwardChain(LogSNRSchedule(), 10)
    step = forward.step(t, x, 1)
    raw = torch.tensor(0.7, dtype=F64)
    error = float(step.sigma.square() * raw.exp())
    analytic = AnalyticVariance((float(step.log_snr),), ((error,),))
    actual = LearnedPosterior().log_variance(step, raw.expand(x.shape))
    expected = analytic.log_variance(step, None).expand(x.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_output_is_right_for_standard_normal_data() -> None:
    """Cov[x_0 | x_t] = σ_t² I: the bound of one step is exact, whatever its length."""
    forward = ForwardChain(LogSNRSchedule(5.0, -5.0), 4)
    head = VarianceHead(Gaussian(torch.zeros(2), torch.eye(2)).network(), (2,)).double()
    reverse = ReverseChain(NoiseDenoiser(head), forward, (2,), variance=LearnedPosterior()).eval()
    x = torch.randn(64, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    step = forward.step(3, x, 1)
    raw = reverse.predict(x, step).raw_variance
    # E‖x_{t−1}‖² given x_t: that of the Gaussian's own posterior, 1 − (α_t/α_{t−1} …)² exactly
    expected = 1 - (step.c_0 * step.alpha + step.c_t).square()
    torch.testing.assert_close(
        reverse.log_variance(step, reverse.predict(x, step)).exp(),
        expected.expand(x.shape),
        rtol=1e-12,
        atol=0.0,
    )
    assert raw is not None and not raw.any()


@pytest.mark.parametrize("raw", [-1e30, -50.0, 50.0, 1e30])
def test_any_output_gives_a_finite_positive_variance(raw: float) -> None:
    x, forward = torch.zeros(3, 2), ForwardChain(LogSNRSchedule(10.0, -10.0), 30)
    for t in (1, 2, 30):
        step = forward.step(t, x, 1)
        log_variance = LearnedPosterior().log_variance(step, torch.full_like(x, raw))
        assert log_variance.isfinite().all()
        least = 1e-2 * step.sigma.square() if t == 1 else step.log_small.exp()
        assert (log_variance.exp() >= 0.999 * least).all()


# -- what is matched -------------------------------------------------------------------------------


def _visit_terms(target: str, spread: float, raw: float) -> Tensor:
    """Terms of a chain whose network's raw variance is a constant, for one batch."""

    class Constant(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.cat([0 * x, torch.full_like(x, raw)], 1)

    forward = ForwardChain(LogSNRSchedule(6.0, -6.0), 30)
    reverse = ReverseChain(DataDenoiser(Constant()), forward, (2,), variance=LearnedPosterior())
    x_0 = spread * torch.ones(30, 2, dtype=F64)
    objective = VarianceMatching(target, jumps=(0.4,), timesteps=AllTimesteps(), seed=0)
    return objective.differentiable_loss(reverse, forward, x_0)


def test_terms_are_kls_of_steps_per_unit_of_log_snr() -> None:
    """For errors of a known size, against the formula in κ."""
    raw, error = 0.3, 0.25
    forward = ForwardChain(LogSNRSchedule(6.0, -6.0), 30)
    log_snr = forward.log_snr
    kappa = (log_snr + 0.4).exp() - log_snr.exp()
    product = kappa * torch.sigmoid(-log_snr) * torch.tensor(raw, dtype=F64).exp()
    kls = product.log1p() + (kappa * error - product) / (1 + product)  # two dimensions, halved
    expected = 30 * (kls / 0.4).mean()
    actual = _visit_terms("errors", error**0.5, raw)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0.0)


def test_the_chain_s_own_step_gives_the_bound_s_term() -> None:
    """A jump of the size of the chain's steps is its KL: what is trained is the bound."""
    reverse = with_variance_head(small_chain()).double()
    shaken(reverse)
    forward, x_0 = reverse.forward_chain, torch.ones(1, 2, dtype=F64)
    size = float(forward.log_snr[4] - forward.log_snr[5])

    class Sixth(AllTimesteps):
        def draw(self, batch, num_steps, seed):  # type: ignore[no-untyped-def]
            yield torch.tensor([6]), torch.tensor([float(num_steps)])

    objective = VarianceMatching(jumps=(size,), timesteps=Sixth(), seed=0)
    actual = objective.differentiable_loss(reverse, forward, x_0) * size
    noise = torch.randn(1, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = variational_term(reverse, x_0, 6, noise)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)


def test_no_gradient_reaches_the_mean() -> None:
    reverse = with_variance_head(small_chain())
    reverse.requires_grad_(True)
    for target in ("errors", "probes"):
        reverse.zero_grad()
        objective = VarianceMatching(target, seed=0)
        objective.differentiable_loss(reverse, reverse.forward_chain, torch.randn(8, 2)).backward()
        named = dict(reverse.named_parameters())
        assert any(p.grad is not None and p.grad.any() for p in named.values())
        last = [p for name, p in named.items() if name.startswith("denoiser.network.network.last")]
        assert last and all(p.grad is None or not p.grad.any() for p in last)


@pytest.mark.parametrize(("target", "share"), [("errors", 0.4), ("probes", 0.15)])
@pytest.mark.parametrize("name", LAWS.keys())
def test_the_head_finds_the_exact_diagonal(name: str, target: str, share: float) -> None:
    """diag Cov[x_0 | x_t] = (σ²/α) diag ∂x̂_0/∂x_t of the exact denoiser.

    Of the root mean square of log v − log v* at the start, 0.5 and 1, a share is left: after 300
    steps 0.15 and 0.29 by errors, 0.03 and 0.09 by probes, whose noise is that of the Jacobian off
    its diagonal alone.  Fixed seeds: one outcome.
    """
    reverse = with_variance_head(exact_chain(name), width=32, seed=0)
    x_0 = LAWS[name].sample(4000, seed=0).float()
    objective = VarianceMatching(target, seed=0)
    parameters = [p for p in reverse.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    steps = 300
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    before = _log_ratio(reverse, name)
    for _ in range(steps):
        rows = torch.randint(len(x_0), (256,), generator=generator)
        loss = objective.differentiable_loss(reverse, reverse.forward_chain, x_0[rows])
        optimizer.zero_grad()
        (loss / 256).backward()
        optimizer.step()
        schedule.step()
    after = _log_ratio(reverse, name)
    assert before > 0.5 and after < share * before


def _log_ratio(reverse: ReverseChain, name: str) -> float:
    """The root mean square of log v/v* over x_t of the model, at levels that are neither end."""
    x_0, total = LAWS[name].sample(500, seed=1).float(), []
    exact = PosteriorCovariance("diagonal")
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2))
    for log_snr in torch.linspace(-2.0, 5.0, 8, dtype=F64):
        level = reverse.level(log_snr, x_0)
        x_t = level.noised(x_0, noise)
        prediction = reverse.predict(x_t, level)
        own = exact.predict(lambda y, at=level: reverse.predict(y, at, mean_only=True), x_t, level)
        assert prediction.raw_variance is not None and own.spread is not None
        log_v = prediction.raw_variance + level.sigma.square().log()
        total.append((log_v - own.spread.diagonal.clamp(min=1e-6).log()).detach())
    return float(torch.stack(total).square().mean().sqrt())


# -- the mean, bit for bit -------------------------------------------------------------------------


@every_network
def test_the_network_s_output_is_the_first_half(build: Callable[..., nn.Module]) -> None:
    network = shaken(build(context_size=6))
    shape = network.event_shape
    x, time = inputs(shape)  # type: ignore[arg-type]
    context = torch.randn(7, 6)
    expected = network(x, time, context)
    head = shaken_head(VarianceHead(network, shape, width=8))  # type: ignore[arg-type]
    for mode in (True, False):
        first, raw = head.train(mode)(x, time, context).chunk(2, dim=1)
        assert torch.equal(first, expected)  # dropout is off in the network even while it trains
        assert raw.shape == x.shape and raw.any()


def shaken_head(head: VarianceHead) -> VarianceHead:
    """The head off its zero start; its network as it is."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if not name.startswith("network."):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return head


@every_network
def test_only_the_head_is_trained(build: Callable[..., nn.Module]) -> None:
    head = shaken_head(VarianceHead(shaken(build()), build().event_shape, width=8))  # type: ignore[arg-type]
    x, time = inputs(head.event_shape)
    (head(x, time) * torch.randn(7, 2 * x.shape[1], *x.shape[2:])).sum().backward()
    for name, parameter in head.named_parameters():
        trained = not name.startswith("network.")
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


@every_network
def test_a_value_does_not_depend_on_its_batch_mates(build: Callable[..., nn.Module]) -> None:
    head = shaken_head(VarianceHead(shaken(build()), build().event_shape, width=8)).double()  # type: ignore[arg-type]
    x, time = (value.double() for value in inputs(head.event_shape))
    alone = torch.cat([head(x[i : i + 1], time[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(head(x, time), alone, rtol=1e-9, atol=1e-9)


def test_levels_start_from_their_own_variance() -> None:
    """Each entry by itself: v = Σ_k p_k (l_k − x̂_0)² with p_k ∝ N(x_t; α l_k, σ²)."""
    network = ResidualConvNet((1, 2, 2), channels=8, blocks=1, levels=3, attention_every=0)
    head = VarianceHead(network, (1, 2, 2)).double()
    log_snr = torch.tensor([2.0], dtype=F64)
    alpha, variance = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr)
    x = torch.tensor([0.3, -0.9, 0.0, 1.2], dtype=F64).reshape(1, 1, 2, 2)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    p = (-0.5 * (x[..., None] - alpha * levels).square() / variance).softmax(-1)
    mean = (p * levels).sum(-1)
    expected = (p * (levels - mean[..., None]).square()).sum(-1)
    _, raw = head(x, log_snr).chunk(2, dim=1)
    torch.testing.assert_close(variance * raw.exp(), expected, rtol=1e-6, atol=1e-9)


def test_training_leaves_the_mean_and_improves_short_chains(tmp_path: Path) -> None:
    dataset = data.load("moons")
    reverse = small_chain()
    state = {name: value.clone() for name, value in reverse.state_dict().items()}
    settings = TrainingSettings(steps=60, batch_size=64, validate_every=30, validation_calls=8)
    learned = fit_variance(reverse, dataset, settings, tmp_path, num_steps=10, progress=False)
    for name, value in reverse.state_dict().items():
        assert torch.equal(value, state[name])  # the model that was given
        inner = name.replace("denoiser.network.", "denoiser.network.network.")
        assert torch.equal(value, learned.state_dict()[inner])
    x, step = dataset.test[:100], reverse.step(10, dataset.test[:100])
    assert torch.equal(reverse.predict(x, step).x0_hat, learned.predict(x, step).x0_hat)
    assert all(p.requires_grad for p in reverse.parameters())
    values = [
        PathBound(1).estimate(c.respaced(10), x, seed=0).mean().value for c in (reverse, learned)
    ]
    assert values[1] > values[0]
    assert learned.calls_per_path == learned.num_steps  # one network call a step


def test_a_head_is_a_function_of_its_seed() -> None:
    reverse = small_chain()
    one, same, other = (with_variance_head(reverse, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_chain_keeps_its_name() -> None:
    learned = with_variance_head(small_chain().named("prior"))
    assert learned.name == learned.respaced(5).name == "prior"
    assert with_variance_head(small_chain()).name == small_chain().name


def test_any_network_can_have_a_head() -> None:
    """Of one whose features are not known, x_t and the output are read."""

    class Twice(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return 2 * x

    for shape in ((3,), (1, 4, 4)):
        head = shaken_head(VarianceHead(Twice(), shape))
        output, raw = head(torch.ones(4, *shape), torch.zeros(4)).chunk(2, dim=1)
        assert torch.equal(output, torch.full((4, *shape), 2.0)) and raw.any()


def test_timesteps_are_scaled_to_the_range_of_log_snrs() -> None:
    forward = ForwardChain(LinearSchedule(), 1000)
    denoiser = NoiseDenoiser(ResidualMLP((2,), width=8, blocks=1, time_scale=0.03), time="timestep")
    reverse = with_variance_head(ReverseChain(denoiser, forward, (2,)))
    assert reverse.parts().denoiser.network.time_scale == pytest.approx(0.03)
    assert reverse.respaced(10).sample(2, seed=0).isfinite().all()


# -- files -----------------------------------------------------------------------------------------


@every_network
def test_saved_and_loaded(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    network = shaken(build())
    shape = network.event_shape
    forward = ForwardChain(LogSNRSchedule(6.0, -6.0), 12)
    denoiser = DataDenoiser(network)
    decoder = CategoricalDecoder(5) if getattr(network, "levels", 0) else None
    base = ReverseChain(denoiser, forward, shape, variance=FixedSmall(), decoder=decoder)  # type: ignore[arg-type]
    reverse = with_variance_head(base, width=8)
    shaken_head(reverse.parts().denoiser.network)  # type: ignore[arg-type]
    reverse.eval().save(tmp_path)
    again = ReverseChain.load(tmp_path).eval()
    assert again.config() == reverse.config() and again.variance == LearnedPosterior()
    for num_steps in (12, 5):
        samples = [chain.respaced(num_steps).sample(3, seed=0) for chain in (reverse, again)]
        assert torch.equal(*samples)
    frozen = dict(again.named_parameters())
    assert not any(p.requires_grad for n, p in frozen.items() if ".network.network." in n)


def test_a_network_of_the_user_s_own_is_handed_in(tmp_path: Path) -> None:
    reverse = with_variance_head(exact_chain("mixture"), width=8)
    reverse.save(tmp_path)
    with pytest.raises(ValueError, match=r"Expected the network VarianceHead\(BayesNetwork\)"):
        ReverseChain.load(tmp_path)
    network = VarianceHead(MIXTURE.network(), (2,), width=8)
    again = ReverseChain.load(tmp_path, network=network)
    assert torch.equal(again.sample(3, seed=0), reverse.sample(3, seed=0))


def test_a_head_within_a_head_is_refused(tmp_path: Path) -> None:
    reverse = with_variance_head(small_chain(), width=8)
    config = reverse.config()
    network = config["denoiser"]["network"]
    config["denoiser"]["network"] = {**network, "network": network}
    with pytest.raises(ValueError, match="Expected one of pyrodiff's networks"):
        ReverseChain.from_config(config)


# -- what is refused -------------------------------------------------------------------------------


def test_models_that_are_refused() -> None:
    forward = ForwardChain(LogSNRSchedule(), 5)
    network = ResidualMLP((2,), width=8, blocks=1, learned_variance=True)
    learned = ReverseChain(NoiseDenoiser(network), forward, (2,), variance=LearnedDiagonal())
    with pytest.raises(ValueError, match="without a learned variance to add one; got LearnedDiag"):
        with_variance_head(learned)
    with pytest.raises(ValueError, match="without a learned variance for a variance head; got a R"):
        VarianceHead(network, (2,))
    with pytest.raises(ValueError, match="for a variance head; got a VarianceHead that predicts"):
        VarianceHead(VarianceHead(ResidualMLP((2,), width=8, blocks=1), (2,)), (2,))
    mean = ReverseChain(MeanDenoiser(ResidualMLP((2,), width=8, blocks=1)), forward, (2,))
    with pytest.raises(ValueError, match="serves any step for a learned posterior variance; got a"):
        with_variance_head(mean)
    with pytest.raises(ValueError, match="Expected a LearnedPosterior for VarianceMatching; got L"):
        VarianceMatching().differentiable_loss(learned, forward, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="Expected target to be one of .*; got 'error'"):
        VarianceMatching("error")
    with pytest.raises(ValueError, match="Expected jumps to be positive and finite; got 0"):
        VarianceMatching(jumps=(0.0,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "error"}, "Expected target to be one of .* did you mean 'errors'"),
        ({"width": 0}, "Expected width to be an integer >= 1; got 0"),
        ({"num_steps": 1}, "Expected num_steps to be an integer >= 2; got 1"),
        ({"steps": 0}, "Expected steps to be an integer >= 1; got 0"),
    ],
)
def test_settings_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VarianceSettings(**values)  # type: ignore[arg-type]


# -- the command -----------------------------------------------------------------------------------

FIT = "--steps 30 --validate_every 10 --width 16 --num_steps 50 --calls 16 "
FIT += "--validation_calls 8 --batch_size 32 --samples 4 --quiet"
ADD = "--steps 20 --validate_every 10 --batch_size 32 --width 8 --num_steps 20 --quiet"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "moons"
    assert main(["fit", "moons", "--output", str(folder), *FIT.split()]) == 0
    return folder


@pytest.fixture(scope="module")
def added(run: Path) -> Path:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["add-variance", str(run), *ADD.split()]) == 0
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return run.with_name("moons-variance")


def test_the_new_run_serves_every_command(run: Path, added: Path, tmp_path: Path) -> None:
    few = "--steps 10 --grid optimal --quiet".split()
    assert main(["evaluate", str(added), *few]) == 0
    assert main(["sample", str(added), "-n", "4", "--steps", "10"]) == 0
    report = str(tmp_path / "both.html")
    both = [str(run), str(added), "--steps", "10", "--limit", "50", "--quiet"]
    assert main(["compare", *both, "--output", report]) == 0
    base, learned = (ReverseChain.load(folder).eval() for folder in (run, added))
    assert learned.variance == LearnedPosterior() and learned.num_steps == base.num_steps
    x = torch.randn(5, 2)
    step = base.step(7, x)
    assert torch.equal(base.predict(x, step).x0_hat, learned.predict(x, step).x0_hat)


def test_resuming_asks_for_the_same_settings(
    run: Path, added: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["add-variance", str(run), *ADD.split()]
    before = (added / "model.safetensors").read_bytes()
    assert main([*again, "--resume"]) == 0
    assert (added / "model.safetensors").read_bytes() == before
    assert main([*again, "--resume", "--target", "probes"]) == 2
    assert "target: 'probes' instead of 'errors'" in capsys.readouterr().err
    assert main(again) == 2
    assert "which holds a run" in capsys.readouterr().err


def test_what_the_command_refuses(
    run: Path, added: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, part in (
        ([str(tmp_path / "none")], "Expected a run's folder"),
        ([str(added)], "without a learned variance to add one; got LearnedPosterior"),
        ([str(run), "--output", str(run)], "Expected another --output than the run itself"),
        ([str(run), "--target", "error"], "did you mean 'errors'"),
    ):
        assert main(["add-variance", *arguments, "--quiet"]) == 2
        assert part in capsys.readouterr().err


def test_it_can_be_trained_from_the_start(tmp_path: Path) -> None:
    folder = str(tmp_path / "joint")
    assert (
        main(["fit", "moons", "--output", folder, "--variance", "learned-posterior", *FIT.split()])
        == 0
    )
    assert ReverseChain.load(folder).variance == LearnedPosterior()


def test_every_bound_works_on_it() -> None:
    reverse = shaken(with_variance_head(small_chain()))
    x_0 = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    loss = VariationalBound(seed=0)(reverse, reverse.forward_chain)  # type: ignore[attr-defined]
    assert loss(x_0).isfinite()


def test_steps_of_any_size_read_the_same_variance() -> None:
    """v is a function of the level: twice the way costs no other v."""
    log_snr = torch.tensor(1.0, dtype=F64)
    raw = torch.tensor([[0.2, -0.4]], dtype=F64)
    spreads = []
    for size in (0.1, 1.0):
        step: Step = jump(log_snr + size, log_snr, log_snr)
        variance = LearnedPosterior().log_variance(step, raw).exp()
        spreads.append((variance - step.log_small.exp()) / step.c_0.square())
    torch.testing.assert_close(*spreads, rtol=1e-9, atol=0.0)
