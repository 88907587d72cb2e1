"""Paired comparisons: their errors, their verdicts, and the effect of common noise.

Stochastic tests allow 4 standard errors of what they measure (one failure in 16,000 seeds each,
were the law normal) unless they say otherwise; all seeds are fixed.
"""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.comparison import (
    Comparison,
    compare,
    compare_models,
    repeat_seeds,
    stacking_weights,
)
from pyrodiff.comparison.model_results import ModelResults
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import (
    ImportanceBound,
    LogLikelihood,
    PathBound,
    SandwichBound,
    TermwiseBound,
)
from pyrodiff.likelihood.densities import as_densities, excess
from pyrodiff.likelihood.samples import sample_checksums
from pyrodiff.likelihood.statistics import log_mean_exp, weights_std_error
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, GaussianMixture, linear_bound
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
MEANS = torch.tensor([[1.0, 1.0], [-1.0, -0.5], [0.0, 1.5]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
TRUE = GaussianMixture(WEIGHTS, MEANS, 0.4)
WIDE = GaussianMixture(WEIGHTS, 1.05 * MEANS, 0.42)


def chain(law: Gaussian | GaussianMixture, steps: int = 8) -> ReverseChain:
    size = law.event_shape[0]
    forward = ForwardChain(LogSNRSchedule(4.0, -6.0), steps)
    return ReverseChain(NoiseDenoiser(law.network()), forward, (size,))


def result(value: Tensor, std_error: float = 0.0, kind: str = "estimate") -> LogLikelihood:
    """Values with known Monte Carlo errors, of samples with two dimensions."""
    value = value.to(F64)
    calls = torch.ones(len(value), dtype=torch.int64)
    return LogLikelihood(value, torch.full_like(value, std_error), kind, calls, 2, "by hand")


def weighted(log_w: Tensor) -> LogLikelihood:
    """The importance bound of these weights."""
    bound = result(log_mean_exp(log_w), kind="lower bound")
    return replace(bound, std_error=weights_std_error(log_w), log_weights=log_w)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -- the error -------------------------------------------------------------------------------------


def test_the_paired_t_test_by_hand() -> None:
    a, b = normal(20, seed=1) - 3, normal(20, seed=2) - 3.5
    difference = compare({"a": result(a), "b": result(b)}, reference="b")["a"]
    test = stats.ttest_rel(a.numpy(), b.numpy())
    low, high = test.confidence_interval()
    assert difference.value == pytest.approx(float((a - b).mean()))
    assert difference.std_error == pytest.approx(float((a - b).std()) / math.sqrt(20))
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert difference.degrees_of_freedom == pytest.approx(19)
    assert 2 * min(difference.probability, 1 - difference.probability) == pytest.approx(test.pvalue)
    assert difference.monte_carlo == 0 and math.isnan(difference.between_seeds)
    torch.testing.assert_close(difference.per_sample, a - b)


def coverage(repeats: int, once: Callable[[int], Comparison], truth: float) -> float:
    """Share of the intervals of the first difference that contain the truth."""
    differences = [once(repeat).differences[0] for repeat in range(repeats)]
    return sum(each.low <= truth <= each.high for each in differences) / repeats


def test_the_interval_covers_the_difference_of_log_p_and_pairing_divides_the_error_by_five() -> (
    None
):
    """500 repeats: 0.95 ± 0.01; 3 standard errors allowed (one in 370, were the law t)."""
    x = TRUE.sample(500_000, seed=1)
    truth = float((WIDE.log_prob(x) - TRUE.log_prob(x)).mean())
    x = TRUE.sample(500 * 100, seed=2)
    pairs = zip(TRUE.log_prob(x).split(100), WIDE.log_prob(x).split(100), strict=True)
    comparisons = [compare({"true": result(a), "b": result(b)}, reference="true") for a, b in pairs]
    hits = [each["b"].low <= truth <= each["b"].high for each in comparisons]
    assert abs(sum(hits) / 500 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 500)
    for each in comparisons[:20]:
        unpaired = math.hypot(*(model.std_error for model in each.models.values()))
        assert unpaired > 5 * each["b"].std_error


def test_the_interval_covers_the_exact_difference_of_the_bounds_of_two_gaussians() -> None:
    """200 repeats of 50 samples: 0.95 ± 0.015; 3 standard errors allowed."""
    cov = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=F64)
    law = Gaussian(torch.zeros(2, dtype=F64), cov)
    models = {"a": chain(law), "b": chain(Gaussian(law.mean + 0.1, 1.1 * cov))}
    far = law.sample(100_000, seed=3)
    exact = {name: linear_bound(model, far).elbo.mean() for name, model in models.items()}
    truth = float(exact["b"] - exact["a"])
    x = law.sample(200 * 50, seed=4)
    bound = PathBound(2)
    results = {k: bound.estimate(m, x, seed=1, batch_size=20_000) for k, m in models.items()}

    def once(repeat: int) -> Comparison:
        block = slice(50 * repeat, 50 * repeat + 50)
        blocks = {name: rows(whole, block) for name, whole in results.items()}
        return compare(blocks, reference="a")

    assert abs(coverage(200, once, truth) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 200)


def rows(whole: LogLikelihood, block: slice) -> LogLikelihood:
    assert whole.log_weights is not None and whole.degrees_of_freedom is not None
    return replace(
        whole,
        value=whole.value[block],
        std_error=whole.std_error[block],
        calls=whole.calls[block],
        log_weights=whole.log_weights[block],
        degrees_of_freedom=whole.degrees_of_freedom[block],
    )


@pytest.mark.parametrize("seeds, between", [(2, 0.3), (3, 0.1), (4, 0.0)])
def test_the_interval_covers_over_training_seeds(seeds: int, between: float) -> None:
    """300 repeats: 0.95 ± 0.0126; below by 3 standard errors is refused, above by 4."""

    def once(repeat: int) -> Comparison:
        noise = normal(2, seeds, 41, seed=repeat)
        common = 3 * normal(40, seed=10_000 + repeat)
        values = common + between * noise[..., :1] + 0.5 * noise[..., 1:]
        values = values + 0.7 * normal(2, 1, 40, seed=20_000 + repeat)
        return compare({name: [*map(result, v)] for name, v in zip("ab", values, strict=True)})

    share = coverage(300, once, 0.0)
    error = math.sqrt(0.95 * 0.05 / 300)
    assert 0.95 - 3 * error < share < 0.95 + 4 * error


def test_the_interval_covers_over_paired_seeds() -> None:
    """Effects that a seed has on both models cancel; 300 repeats, refused as above."""
    whole = []

    def once(repeat: int) -> Comparison:
        noise = normal(2, 4, 41, seed=repeat)
        values = 0.2 * noise[..., :1] + 0.5 * noise[..., 1:]
        values = values + 2 * normal(1, 4, 1, seed=30_000 + repeat)
        results = {name: [*map(result, v)] for name, v in zip("ab", values, strict=True)}
        whole.append(compare(results).differences[0].std_error)
        return compare(results, paired_seeds=True)

    comparisons = list(map(once, range(300)))
    share = coverage(300, lambda repeat: comparisons[repeat], 0.0)
    error = math.sqrt(0.95 * 0.05 / 300)
    assert 0.95 - 3 * error < share < 0.95 + 4 * error
    paired = torch.tensor([each.differences[0].std_error for each in comparisons])
    assert float((torch.tensor(whole) / paired).median()) > 4  # 2 against 0.2 nats, less the rest


def test_paired_seeds_need_equal_numbers_of_seeds() -> None:
    three, one = [result(normal(5, seed=s)) for s in range(3)], [result(normal(5, seed=4))]
    with pytest.raises(ValueError, match=r"the same number .* at least 2; got {'a': 3, 'b': 2}"):
        compare({"a": three, "b": three[:2]}, paired_seeds=True)
    with pytest.raises(ValueError, match=r"at least 2; got {'a': 1, 'b': 1}"):
        compare({"a": one, "b": one}, paired_seeds=True)


def test_two_way_errors_agree_with_the_analysis_of_variance() -> None:
    values = normal(3, 30, seed=5) + normal(3, 1, seed=6)
    comparison = compare({"a": [*map(result, values)], "b": result(torch.zeros(30))}, reference="b")
    rest = values - values.mean(0) - values.mean(1, keepdim=True) + values.mean()
    cells = float(rest.square().sum()) / (2 * 29)
    seeds = float(values.mean(1).var()) / 3 - cells / 90
    assert comparison["a"].between_seeds == pytest.approx(math.sqrt(seeds))
    assert comparison["a"].between_samples == pytest.approx(
        float(values.mean(0).std()) / math.sqrt(30)
    )
    parts = comparison["a"].between_seeds, comparison["a"].between_samples
    assert comparison["a"].std_error == pytest.approx(math.hypot(*parts))
    assert comparison["a"].degrees_of_freedom >= 2
    assert "One training run of b" in comparison.notes[0]


def test_dominant_seeds_set_the_degrees_of_freedom() -> None:
    spread = torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 10)
    comparison = compare({"a": [*map(result, spread)], "b": result(torch.full((10,), -9.0))})
    assert comparison["b"].degrees_of_freedom == pytest.approx(2)
    assert comparison["b"].std_error == pytest.approx(1 / math.sqrt(3))


def test_copies_of_a_sample_in_one_cluster_count_once() -> None:
    a, b = normal(15, seed=7), normal(15, seed=8)
    once = compare({"a": result(a), "b": result(b)}, reference="a")["b"]
    copies = {name: result(v.repeat_interleave(4)) for name, v in (("a", a), ("b", b))}
    labels = [f"patient {i}" for i in range(15) for _ in range(4)]
    difference = compare(copies, reference="a", clusters=labels)["b"]
    assert difference.std_error == pytest.approx(once.std_error)
    assert (difference.low, difference.high) == pytest.approx((once.low, once.high))
    assert compare(copies, reference="a")["b"].std_error < 0.6 * once.std_error


# -- the Monte Carlo part --------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [PathBound(4), ImportanceBound(16)], ids=["path", "importance"])
@pytest.mark.parametrize("seed", [0, 1], ids=["common noise", "independent noise"])
def test_the_monte_carlo_error_of_a_difference_is_its_spread_over_noise(
    bound: PathBound | ImportanceBound, seed: int
) -> None:
    """1500 copies of a sample, so that only the noise differs.

    A variance of them is known to √(κ/1500), the kurtosis κ of differences of bounds being below
    25: 13 %.  4 standard errors on the spread, a quarter, and the delta method's own error.
    """
    x = TRUE.sample(1, seed=1).expand(1500, 2)
    a = bound.estimate(chain(TRUE), x, seed=0, batch_size=24_000)
    b = bound.estimate(chain(WIDE), x, seed=seed, batch_size=24_000)
    difference = compare({"a": a, "b": b}, reference="a")["b"]
    assert difference.monte_carlo == pytest.approx(difference.std_error, rel=0.25)
    if seed == 0:
        assert difference.variance_reduction > 10
    else:
        assert difference.variance_reduction == pytest.approx(1, rel=0.25)


def test_repeats_measure_the_monte_carlo_error_of_an_estimator_without_draws() -> None:
    """As above: 1500 copies, two evaluations each."""
    x = TRUE.sample(1, seed=1).expand(1500, 2)
    models, bound = {"a": chain(TRUE), "b": chain(WIDE)}, TermwiseBound(16)
    comparison = compare_models(models, x, bound, repeats=2, reference="a", batch_size=24_000)
    assert comparison["b"].monte_carlo == pytest.approx(comparison["b"].std_error, rel=0.25)
    assert comparison["b"].variance_reduction > 10
    assert comparison.models["a"].calls == 32
    once = compare_models(models, x[:9], bound, reference="a")
    assert math.isnan(once["b"].monte_carlo) and "repeats=2" in once.notes[-1]


def test_repeats_have_the_error_of_their_mean() -> None:
    """Of independent results: √(Σ se²)/R."""
    values = normal(3, 5)
    repeats = [result(value, error) for value, error in zip(values, (0.3, 0.4, 1.2), strict=True)]
    model = ModelResults.of([repeats])
    torch.testing.assert_close(model.values[0], values.mean(0))
    torch.testing.assert_close(model.std_errors[0], torch.full((5,), 1.3 / 3, dtype=F64))


def test_without_draws_the_noise_is_independent_only_if_declared() -> None:
    pair = {"a": result(normal(8), 0.3), "b": result(normal(8, seed=1), 0.4)}
    independent = 0.5 / math.sqrt(8)
    said = compare(pair, common_noise=False).differences[0]
    assert said.monte_carlo == pytest.approx(independent) == said.independent
    assert said.variance_reduction == pytest.approx(1)
    for common in (True, None):
        difference = compare(pair, common_noise=common).differences[0]
        assert math.isnan(difference.monte_carlo)
        assert difference.std_error == said.std_error


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_comparison_does_not_depend_on_the_batch_size(size: int) -> None:
    x, models = TRUE.sample(5, seed=1), {"a": chain(TRUE, 3), "b": chain(WIDE, 3)}
    whole = compare_models(models, x, PathBound(3), reference="a")["b"]
    difference = compare_models(models, x, PathBound(3), reference="a", batch_size=size)["b"]
    torch.testing.assert_close(difference.per_sample, whole.per_sample)
    other = compare_models(models, x, PathBound(3), reference="a", seed=1)["b"]
    assert not torch.equal(other.per_sample, whole.per_sample)


def test_models_take_contexts_and_several_seeds_and_an_estimator_each() -> None:
    def model(seed: int) -> ReverseChain:
        torch.manual_seed(seed)
        network = ResidualMLP((2,), width=8, blocks=1, context_size=1).double()
        return ReverseChain(
            NoiseDenoiser(network), ForwardChain(LogSNRSchedule(4.0, -6.0), 3), (2,)
        )

    x, context = TRUE.sample(6, seed=1), normal(6, 1)
    models = {"a": [model(0), model(1)], "b": model(2)}
    bounds = {"a": PathBound(2), "b": PathBound(2)}
    comparison = compare_models(models, x, bounds, context=context, reference="b")
    assert comparison.models["a"].seeds == 2
    value = PathBound(2).estimate(models["b"], x, context=context).mean().value
    assert comparison.models["b"].value == pytest.approx(value)
    bound = TermwiseBound(8)
    repeated = {
        name: [
            [bound.estimate(m, x, seed=s, context=context) for s in repeat_seeds(0, 2)]
            for m in (chains if isinstance(chains, list) else [chains])
        ]
        for name, chains in models.items()
    }
    by_hand = compare(repeated, reference="b")["a"]
    comparison = compare_models(models, x, bound, context=context, reference="b", repeats=2)["a"]
    assert vars(by_hand) | {"per_sample": 0} == vars(comparison) | {"per_sample": 0}
    with pytest.raises(ValueError, match=r"as many repeats of every training seed; got \[2, 1\]"):
        compare(repeated | {"a": [repeated["a"][0], repeated["a"][1][:1]]})
    first, again = repeated["a"][0]
    for repeats, said in (
        ([first, repeated["a"][1][0]], "one model and estimator; got models"),
        ([first, replace(again, kind="estimate")], "got kinds estimate, lower bound"),
        ([first, replace(again, estimator="PathBound(2)")], "estimators PathBound, TermwiseBound"),
        ([first, first], "repeats with other noise; got the same values twice"),
    ):
        with pytest.raises(ValueError, match=said):
            compare(repeated | {"a": [repeats]})
    compare(repeated | {"a": [[first, replace(again, model="")]]})  # of an older file
    twice = [PathBound(2).estimate(models["b"], x, seed=s, context=context) for s in (0, 1)]
    with pytest.raises(ValueError, match="results of 'b' from different training seeds; got one"):
        compare({"b": twice, "a": twice[0]})
    with pytest.raises(ValueError, match=r"an estimator for every model; got none for \['b'\]"):
        compare_models(models, x, {"a": PathBound(2)}, context=context)
    with pytest.raises(ValueError, match="at least one training seed of 'a'"):
        compare_models({"a": [], "b": model(2)}, x, PathBound(2), context=context)
    with pytest.raises(ValueError, match="Expected repeats to be an integer >= 1; got 0"):
        compare_models(models, x, PathBound(2), context=context, repeats=0)


# -- the verdict -----------------------------------------------------------------------------------


def status(a: LogLikelihood, b: LogLikelihood) -> str:
    return compare({"a": a, "b": b}, reference="b")["a"].status


def test_only_a_lower_bound_above_an_upper_bound_decides() -> None:
    high, low = normal(50, seed=1), normal(50, seed=1) - 1 + 0.01 * normal(50, seed=2)
    assert status(result(high, kind="lower bound"), result(low, kind="upper bound")) == "decided"
    assert status(result(low, kind="upper bound"), result(high, kind="lower bound")) == "decided"
    assert (
        status(result(high, kind="lower bound"), result(low, kind="lower bound")) == "not decided"
    )
    assert (
        status(result(high, kind="upper bound"), result(low, kind="upper bound")) == "not decided"
    )
    assert status(result(high), result(low)) == "likely"
    assert status(result(high, kind="lower bound"), result(low)) == "likely"
    assert status(result(high), result(low, kind="lower bound")) == "not decided"
    assert status(result(high), result(high + 0.01 * normal(50, seed=3))) == "not decided"


def test_a_verdict_states_its_reason() -> None:
    pair = {"vlb": result(normal(50), kind="lower bound"), "b": result(normal(50) - 1)}
    line = compare(pair).verdicts[0]
    assert line.startswith("b below vlb by 1 ± ") and "nats per sample (-1 to -1)" in line
    assert "likely: vlb has the higher log p than b: as far as the estimates have no bias" in line
    bounds = {name: replace(each, kind="lower bound") for name, each in pair.items()}
    assert "may be looseness of the bounds alone" in compare(bounds).verdicts[0]
    equal = {"a": result(normal(9)), "b": result(normal(9, seed=1))}
    assert "differ by no more than the error" in compare(equal).verdicts[0]
    few = {"a": result(normal(9)), "b": result(normal(9) - 1)}
    assert (
        "9 independent samples, where a verdict takes 20 (to decide: 20"
        in (compare(few).verdicts[0])
    )


@pytest.mark.parametrize("spread, count", [(0.7, 16), (0.7, 8), (1.2, 32)])
def test_the_trend_in_K_limits_what_a_bound_lacks(spread: float, count: int) -> None:
    """log w ~ N(−s²/2, s²) has log E w = 0; the mean gap is known to 3 % from 4000 samples.

    Four last doublings are at most four times as much, where a bound lacks as little as one.
    """
    log_w = spread * normal(4000, count) - spread**2 / 2
    bound, far = weighted(log_w), result(torch.full((4000,), -9.0))
    gap_limit = compare({"a": bound, "b": far}).models["a"].gap
    lacking = -float(bound.value.mean())
    assert 1.2 * lacking < gap_limit < 4 * lacking
    path = replace(bound, value=log_w.mean(1), std_error=log_w.std(1) / count**0.5)
    more = compare({"a": path, "b": far}).models["a"].gap
    assert more - gap_limit == pytest.approx(float((bound.value - path.value).mean()))


def test_a_difference_beyond_what_the_looser_bound_lacks_is_likely() -> None:
    """Gaps of (e^{s²} − 1)/2K = 0.02 and an error of 0.004 (K = 16, s = 0.7)."""
    log_w = 0.7 * normal(2, 4000, 16) - 0.245
    better = weighted(log_w[0])
    assert status(better, weighted(log_w[1] - 0.2)) == "likely"
    assert status(better, weighted(log_w[1] - 0.015)) == "not decided"
    # as tight, but its weights are gone: nothing is known of its gap
    assert status(better, replace(weighted(log_w[1] - 0.2), log_weights=None)) == "not decided"


def test_a_bound_that_does_not_converge_says_nothing_about_log_p() -> None:
    """Weights with an sd of 12 nats: every doubling of K gains about as much as the one before.

    The bounds are 53 nats below log p = 0; the trend alone would say 19.
    """
    loose = weighted(12 * normal(500, 16) - 72)
    better = result(torch.full((500,), -20.0), kind="lower bound")
    comparison = compare({"a": better, "b": loose}, reference="b")
    assert math.isnan(comparison.models["b"].gap) and comparison["a"].status == "not decided"


def test_a_posterior_path_is_no_draw_of_the_noise() -> None:
    model = chain(TRUE, 3)
    sandwich = SandwichBound(8).estimate(model, 6)
    comparison = compare({"upper": sandwich.upper, "lower": sandwich.lower}, reference="lower")
    assert math.isnan(comparison["upper"].monte_carlo) and math.isnan(
        comparison.models["upper"].gap
    )


# -- input and output ------------------------------------------------------------------------------


def test_results_of_different_samples_are_refused() -> None:
    a, b = result(normal(5)), result(normal(5, seed=1))
    with pytest.raises(ValueError, match=r"same samples; got numbers: \[4, 5\]"):
        compare({"a": a, "b": result(normal(4))})
    with pytest.raises(ValueError, match=r"same samples; got dimensions: \[2, 3\]"):
        compare({"a": a, "b": replace(b, dimensions=3)})
    with pytest.raises(ValueError, match="at least two models; got 1"):
        compare({"a": a})
    with pytest.raises(ValueError, match="at least one training seed of 'b'; got none"):
        compare({"a": a, "b": []})
    with pytest.raises(ValueError, match="'b' to be of one kind; got"):
        compare({"a": a, "b": [b, replace(b, kind="lower bound")]})
    with pytest.raises(ValueError, match="Expected finite values; got 1 of 'b'"):
        compare(
            {
                "a": a,
                "b": replace(b, value=b.value.clone().index_fill_(0, torch.tensor([2]), torch.nan)),
            }
        )
    with pytest.raises(ValueError, match=r"a reference among \['a', 'b'\]; got 'c'"):
        compare({"a": a, "b": b}, reference="c")
    with pytest.raises(ValueError, match="Expected 5 clusters, one per sample; got 2"):
        compare({"a": a, "b": b}, clusters=[0, 1])
    with pytest.raises(ValueError, match="a level between 0 and 1; got 1"):
        compare({"a": a, "b": b}, level=1.0)


def test_results_of_other_samples_are_never_paired() -> None:
    """Indices 0 to 15 and 16 to 31 of one data set, of the same length."""
    x, bound = TRUE.sample(32, seed=1), PathBound(2)
    first, second = (chain(TRUE, 3), x[:16]), (chain(WIDE, 3), x[16:])
    a = bound.estimate(*first, indices=range(16))
    b = bound.estimate(*second, indices=range(16, 32))
    said = r"other data of a and b at 16 of 16 places, the first at 0 \(indices 0 and 16\)"
    for use in (compare, stacking_weights):
        with pytest.raises(ValueError, match=said):
            use({"a": a, "b": b})
    same = bound.estimate(chain(WIDE, 3), x[:16])
    assert compare({"a": a, "b": same}).notes[1:] == ()
    with pytest.raises(ValueError, match="other data of a and b at 2 of 16 places, the first at 3"):
        compare({"a": a, "b": same.select([0, 1, 2, 4, 3, *range(5, 16)])})
    with pytest.raises(ValueError, match="other data of a and b at 16"):  # repeats, too
        compare({"a": [[a, bound.estimate(*first, seed=1)]], "b": [[same, b]]})
    bare = replace(b, checksums=None)
    with pytest.raises(ValueError, match="other indices of a and b at 16 of 16 places"):
        compare({"a": a, "b": bare})
    unknown = compare({"a": a, "b": replace(bare, indices=None)})  # in other units, say
    assert "The results of b do not say which samples they are of" in unknown.notes[-1]
    with pytest.raises(ValueError, match="got 16 checksums of a and 15 of b"):
        compare({"a": a, "b": replace(same, checksums=torch.arange(15))})


def test_a_result_identifies_its_samples_and_their_contexts(tmp_path) -> None:
    x, bound = TRUE.sample(7, seed=1), PathBound(2)
    model = chain(TRUE, 3)
    whole = bound.estimate(model, x)
    assert whole.checksums is not None and whole.indices is not None
    assert whole.indices.tolist() == list(range(7)) and len(whole.checksums.unique()) == 7
    parts = [bound.estimate(model, x[i:j], indices=range(i, j)) for i, j in ((0, 3), (3, 7))]
    joined = LogLikelihood.concatenate(parts) + 1.5
    for name in ("checksums", "indices"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
        half = replace(parts[0], **{name: None})
        assert getattr(LogLikelihood.concatenate([half, parts[1]]), name) is None
    assert torch.equal(bound.estimate(model, x, batch_size=2).checksums, whole.checksums)
    assert torch.equal(sample_checksums(x.float()), sample_checksums(x.float().double()))
    assert torch.equal(sample_checksums(torch.zeros(1, 2)), sample_checksums(-torch.zeros(1, 2)))
    context = torch.arange(14.0).view(7, 2)
    with_context = sample_checksums(x, context)
    assert not bool((with_context == sample_checksums(x)).any())
    assert bool((with_context == sample_checksums(x, context.flip(0))).sum() == 1)
    sandwich = SandwichBound(2).estimate(model, 3)
    for side in (sandwich.lower, sandwich.upper):
        assert torch.equal(side.checksums, sample_checksums(sandwich.x_0))
    whole.save(tmp_path / "new.nc")
    back = LogLikelihood.load(tmp_path / "new.nc")
    assert torch.equal(back.checksums, whole.checksums) and not back.unbiased_weights
    assert torch.equal(back.indices, whole.indices)
    ImportanceBound(2).estimate(model, x).save(tmp_path / "unbiased.nc")
    assert LogLikelihood.load(tmp_path / "unbiased.nc").unbiased_weights


def test_an_older_file_does_not_identify_its_samples(tmp_path) -> None:
    whole = PathBound(2).estimate(chain(TRUE, 3), TRUE.sample(5, seed=1))
    dataset = whole.to_dataset().drop_vars(["checksums", "indices"])
    del dataset.attrs["unbiased_weights"]
    dataset.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    old = LogLikelihood.load(tmp_path / "old.nc")
    assert old.checksums is None and old.indices is None and not old.unbiased_weights
    assert torch.equal(old.value, whole.value)
    other = PathBound(2).estimate(chain(WIDE, 3), TRUE.sample(5, seed=1))
    comparison = compare({"old": tmp_path / "old.nc", "new": other})
    assert "The results of old do not say which samples" in comparison.notes[-1]
    with pytest.raises(ValueError, match=r"same samples; got numbers: \[4, 5\]"):
        compare({"old": tmp_path / "old.nc", "new": other.select(slice(4))})


def test_files_identify_their_data_and_noise(tmp_path) -> None:
    pair = {name: result(normal(8, seed=seed), 0.3) for seed, name in enumerate("ab")}

    def saved(name: str, **attributes: object) -> str:
        path = tmp_path / f"{name}.nc"
        pair[name].save(path, **attributes)
        return str(path)

    a = saved("a", data="moons", split="test", seed=0)
    with pytest.raises(ValueError, match=r"same samples; got data: \['blobs', 'moons'\]"):
        compare({"a": a, "b": saved("b", data="blobs", split="test", seed=0)})
    with pytest.raises(ValueError, match=r"same samples; got split: \['test', 'train'\]"):
        compare({"a": a, "b": saved("b", data="moons", split="train", seed=0)})
    a = saved("a", samples_checksum="12", seed=0)
    with pytest.raises(ValueError, match=r"got samples_checksum: \['12', '34'\]"):
        compare({"a": a, "b": saved("b", samples_checksum="34", seed=0)})
    independent = compare({"a": a, "b": saved("b", samples_checksum="12", seed=1)}).differences[0]
    assert independent.monte_carlo == pytest.approx(0.3 / 2)
    same = compare({"a": a, "b": saved("b", samples_checksum="12", seed=0)}).differences[0]
    assert math.isnan(same.monte_carlo)
    with pytest.raises(FileNotFoundError, match="Expected a file"):
        compare({"a": a, "b": tmp_path / "nothing.nc"})


def test_the_best_model_is_the_reference_and_comes_first() -> None:
    comparison = compare(
        {name: result(normal(9) + shift) for name, shift in zip("abc", (0, 2, 1), strict=True)}
    )
    assert comparison.reference == "b" and list(comparison.models) == ["b", "c", "a"]
    assert [each.model for each in comparison.differences] == ["c", "a"]
    assert comparison["a"].value == pytest.approx(-2)
    with pytest.raises(KeyError, match=r"Expected one of \['c', 'a'\]; got 'b'"):
        comparison["b"]


def test_one_sample_has_no_error() -> None:
    difference = compare({"a": result(torch.ones(1)), "b": result(torch.zeros(1))})["b"]
    assert (
        difference.value == -1 and math.isnan(difference.std_error) and math.isnan(difference.low)
    )
    assert difference.status == "not decided"


def test_exports_contain_the_same_figures() -> None:
    comparison = compare({"a": result(normal(9)), "b[x]": result(normal(9, seed=1))}, reference="a")
    exported = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert exported["reference"] == "a"
    assert exported["differences"]["b[x]"]["between_seeds"] is None
    assert exported["differences"]["b[x]"]["value"] == comparison["b[x]"].value
    frame = comparison.to_frame()
    assert list(frame.index) == list(comparison.models)
    assert frame.loc["b[x]", "difference_value"] == comparison["b[x]"].value
    assert math.isnan(frame.loc["a", "difference_value"])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison)
    text = console.export_text()
    assert "b[x]" in text and f"{comparison['b[x]'].value:+.3f}" in text
    assert comparison.verdicts[0] in str(comparison)


# -- stacking --------------------------------------------------------------------------------------


def test_stacking_weights_are_those_of_the_mixture_that_made_the_data() -> None:
    """Data of 0.3 a + 0.7 b: the weight's error is below 0.02 (5000 samples, 4 allowed)."""
    a = Gaussian(torch.zeros(1), torch.eye(1))
    b = Gaussian(torch.full((1,), 3.0), torch.eye(1))
    x = torch.cat([a.sample(1500, seed=0), b.sample(3500, seed=1)])
    weights = stacking_weights({"a": result(a.log_prob(x)), "b": b.log_prob(x)})
    assert weights["a"] == pytest.approx(0.3, abs=0.03)
    assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("offset", [0.0, -2000.0, 5000.0])
def test_stacking_does_not_underflow(offset: float) -> None:
    a = normal(200) + offset
    weights = stacking_weights({"a": a, "b": a - 3, "c": a - 5 + 0.1 * normal(200, seed=1)})
    assert weights["a"] == pytest.approx(1, abs=1e-6)
    mixed = stacking_weights({"a": a, "b": a + normal(200, seed=2)})
    assert mixed == pytest.approx(stacking_weights({"a": a - offset, "b": mixed_b(offset, a)}))


def mixed_b(offset: float, a: Tensor) -> Tensor:
    return a - offset + normal(200, seed=2)


def test_stacking_satisfies_the_conditions_of_the_maximum() -> None:
    log_p = 2 * normal(300, 4, seed=3) - 2000
    by_name = stacking_weights(dict(zip("abcd", log_p.unbind(1), strict=True)))
    weights = torch.tensor(list(by_name.values()), dtype=F64)
    p = (log_p - log_p.amax(1, keepdim=True)).exp()
    gradient = (p / (p @ weights)[:, None]).mean(0)
    assert float(gradient.max()) < 1 + 1e-6
    assert float(((gradient - 1) * weights).abs().max()) < 1e-6


def test_stacking_refuses_what_has_no_weights() -> None:
    a = normal(3)
    with pytest.raises(ValueError, match=r"one N for all; got \[\(2,\), \(3,\)\]"):
        stacking_weights({"a": a, "b": a[:2]})
    with pytest.raises(ValueError, match="got NaN or infinity"):
        stacking_weights({"a": a, "b": a * torch.nan})
    with pytest.raises(ValueError, match="a density under some model"):
        stacking_weights({"a": a - torch.inf, "b": a - torch.inf})
    assert stacking_weights({"a": a})["a"] == 1
    never = a - torch.tensor([torch.inf, 0.0, 0.0])
    assert stacking_weights({"a": a, "b": never - 1})["a"] == pytest.approx(1, abs=1e-6)


def test_noise_has_to_be_negligible_against_the_smallest_difference() -> None:
    """The values of the first two nearly agree: noise of 0.1 nats would choose between them."""
    a = normal(50)
    values = (a, a + 0.01 * normal(50, seed=1), 10 * normal(50, seed=2))
    models = {str(index): result(value, 0.1) for index, value in enumerate(values)}
    with pytest.raises(ValueError, match="Expected values whose noise is negligible"):
        stacking_weights(models)
    assert len(stacking_weights({name: models[name] for name in ("0", "2")})) == 2


def test_noise_adds_half_its_variance_to_the_log_of_a_mean() -> None:
    """E e^v = p e^{σ²/2}: the log of the mean of 10⁶ draws is known to 6e-4."""
    seen = 40 * float(log_mean_exp(0.5 * normal(10**6)))
    assert excess(result(normal(40), 0.5)) == pytest.approx(seen, rel=0.02)


def test_one_unbiased_model_does_not_make_the_others_so() -> None:
    noisy = result(normal(20), 2.0)
    unbiased = replace(result(normal(20, seed=1), 2.0), unbiased_weights=True)
    assert as_densities([unbiased, unbiased], "a test")[0].shape == (2, 20)
    for pair in ([unbiased, noisy], [noisy, unbiased]):
        with pytest.raises(ValueError, match="Expected values without noise"):
            as_densities(pair, "a test")


def test_stacking_refuses_noise_that_a_mixture_would_gain_from() -> None:
    """One model is better by 0.3 nats: it has all the weight, or the noise is refused."""
    log_p = normal(400) - 3
    better, worse = log_p + 0.15 + 0.1 * normal(400, seed=1), log_p - 0.15
    exact = {"better": result(better), "worse": result(worse)}
    assert stacking_weights(exact)["better"] == pytest.approx(1, abs=1e-6)
    noisy = {
        name: result(each + 2 * normal(400, seed=seed), 2.0)
        for seed, (name, each) in enumerate((("better", better), ("worse", worse)), 2)
    }
    with pytest.raises(ValueError, match="noise is negligible; got 'better', where noise may"):
        stacking_weights(noisy)
    unbiased = {name: replace(each, unbiased_weights=True) for name, each in noisy.items()}
    with pytest.raises(ValueError, match="compare\\(\\) needs no exp"):
        stacking_weights(unbiased)
    with pytest.raises(ValueError, match="noise is negligible; got 'worse'"):
        stacking_weights(exact | {"worse": result(worse, math.nan)})
    little = {name: replace(each, std_error=0 * each.value + 0.02) for name, each in exact.items()}
    assert stacking_weights(little) == stacking_weights(exact)
