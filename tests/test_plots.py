"""Figures: what is drawn, and what is refused."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyrodiff import plots
from pyrodiff.conditioning import Blind, History, Posterior
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp, weights_std_error
from pyrodiff.oracles import Gaussian
from pyrodiff.plots.style import plus_minus, style
from pyrodiff.schedules import CosineSchedule, LogSNRSchedule

F64 = torch.float64


def result(terms: Tensor | None, samples: int = 2) -> LogLikelihood:
    timesteps = None if terms is None else torch.arange(1, terms.shape[1] + 1, dtype=F64)
    value, error = torch.zeros(samples, dtype=F64), torch.zeros(samples, dtype=F64)
    return LogLikelihood(
        value, error, "lower bound", torch.full_like(value, 4), 2, "bound by hand", terms, timesteps
    )


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def assert_distinct(lines: Iterable[Any]) -> None:
    """No two series share a colour or a marker: they differ in black and white, too."""
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert all(len(set(values)) == len(looks) for values in zip(*looks, strict=True))


def test_grid_places_every_image() -> None:
    # image i has the constant grey i/4: three columns, two rows, a margin of one pixel
    images = (torch.arange(5.0) / 4)[:, None, None, None].expand(5, 1, 2, 3)
    axes = plots.samples_grid(images, low=0.0, high=1.0)
    assert isinstance(axes, Axes)
    canvas = torch.as_tensor(axes.images[0].get_array())
    assert canvas.shape == (2 * 3 + 1, 3 * 4 + 1, 3)
    for index in range(5):
        top, left = 1 + (index // 3) * 3, 1 + (index % 3) * 4
        patch = canvas[top : top + 2, left : left + 3]
        assert torch.equal(patch, torch.full_like(patch, index / 4))
    assert bool((canvas[0] == 1).all()) and bool((canvas[4:6, 9:12] == 1).all())  # margin, no sixth


def test_grid_clamps_and_keeps_colours() -> None:
    image = torch.tensor([-3.0, 0.0, 3.0])[None, :, None, None].expand(1, 3, 4, 4)
    axes = plots.samples_grid(image)
    pixel = torch.as_tensor(axes.images[0].get_array())[2, 2]
    torch.testing.assert_close(pixel, torch.tensor([0.0, 0.5, 1.0], dtype=pixel.dtype))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 2, 8, 8), (0, 1, 8, 8)])
def test_grid_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Expected images \(N, 1 or 3, H, W\); got shape"):
        plots.samples_grid(torch.zeros(shape))


def test_scatter_draws_samples_over_data() -> None:
    samples, data = torch.randn(10, 3), torch.randn(100, 3)
    axes = plots.samples_scatter(samples, data)
    below, above = (torch.as_tensor(c.get_offsets().data) for c in axes.collections)
    torch.testing.assert_close(above.float(), samples[:, :2])
    torch.testing.assert_close(below.float(), data[:40, :2])  # at most four times as many
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["data", "samples"]


def test_scatter_of_one_dimension() -> None:
    samples = torch.randn(10, 1, requires_grad=True)
    axes = plots.samples_scatter(samples)
    points = torch.as_tensor(axes.collections[0].get_offsets().data).float()
    torch.testing.assert_close(points[:, 0], samples.detach()[:, 0])
    assert bool((points[:, 1] == 0).all()) and axes.get_ylabel() == ""


def test_terms_shows_losses_and_two_standard_errors() -> None:
    terms = -torch.tensor([[4.0, 2.0, 1.0], [6.0, 2.0, 3.0]], dtype=F64)
    axes = plots.terms(result(terms))
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3]
    torch.testing.assert_close(
        torch.as_tensor(line.get_ydata()), torch.tensor([5.0, 2, 2]).double()
    )
    # standard deviations √2, 0, √2 of two samples: standard errors 1, 0, 1
    band = torch.as_tensor(axes.collections[0].get_paths()[0].vertices)
    for t, low, high in ((1, 3.0, 7.0), (2, 2.0, 2.0), (3, 0.0, 4.0)):
        heights = band[band[:, 0] == t, 1]
        assert abs(float(heights.min()) - low) < 1e-12 and abs(float(heights.max()) - high) < 1e-12
    assert axes.get_xscale() == "log" and axes.get_yscale() == "log"


def test_terms_within_a_decade_or_two_have_plain_numbers() -> None:
    axes = plots.terms(result(-torch.tensor([[0.9, 7.0, 2.5]], dtype=F64).expand(2, 3)))
    axes.figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert {"1", "2", "5"} <= set(labels) and axes.get_yscale() == "log"
    axes = plots.terms(result(-torch.tensor([[0.9, 700.0, 2.5]], dtype=F64).expand(2, 3)))
    assert "10^" in axes.get_yticklabels()[2].get_text()


def test_negative_terms_are_on_a_linear_axis() -> None:
    assert plots.terms(result(torch.ones(2, 3, dtype=F64))).get_yscale() == "linear"


def test_terms_refuses_a_result_without_terms() -> None:
    with pytest.raises(ValueError, match="Expected a result with terms; got none from bound by"):
        plots.terms(result(None))


def test_terms_of_several_results() -> None:
    one, two = (result(-torch.rand(50, 6, dtype=F64) - scale) for scale in (0.1, 2.0))
    axes = plots.terms({"vlb": one, "simple": two})
    for line, band, bound in zip(axes.lines, axes.collections, (one, two), strict=True):
        assert bound.terms is not None
        mean, error = -bound.terms.mean(0), bound.terms.std(0) / math.sqrt(50)
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), mean)
        corners = torch.as_tensor(band.get_paths()[0].vertices)
        for t in range(1, 7):
            heights = corners[corners[:, 0] == t, 1]
            torch.testing.assert_close(heights.max(), mean[t - 1] + 2 * error[t - 1])
            torch.testing.assert_close(heights.min(), mean[t - 1] - 2 * error[t - 1])
    assert legend(axes) == ["vlb", "simple"]
    assert_distinct(axes.lines)


def test_a_negative_first_term_stands_in_the_legend() -> None:
    # L_1 is −4 and −6, of mean −5 and standard error 1; the others are positive
    axes = plots.terms(result(torch.tensor([[4.0, -2.0, -1.0], [6.0, -2.0, -3.0]], dtype=F64)))
    assert axes.lines[0].get_xdata().tolist() == [2, 3]
    assert legend(axes)[0] == "mean over samples; $L_1$ = −5.0 ± 2.0, not drawn"
    assert axes.get_yscale() == "log"


def test_terms_of_both_signs_are_all_drawn() -> None:
    axes = plots.terms(result(torch.tensor([[-4.0, 2.0, -1.0], [-6.0, 2.0, -3.0]], dtype=F64)))
    assert axes.lines[0].get_ydata().tolist() == [5, -2, 2] and axes.get_yscale() == "symlog"


def test_terms_of_one_sample_have_no_band() -> None:
    axes = plots.terms(result(-torch.ones(1, 3, dtype=F64)))
    assert axes.lines[0].get_ydata().tolist() == [1, 1, 1]
    assert len(axes.collections[0].get_paths()) == 0


# -- schedules ---------------------------------------------------------------------------------


def test_schedule_shows_log_snr_and_scales() -> None:
    several = {"cosine": CosineSchedule(), "log-SNR": LogSNRSchedule(10.0, -5.0)}
    left, right = plots.schedule(several)
    for index, one in enumerate(several.values()):
        u = torch.as_tensor(left.lines[index].get_xdata())
        log_snr = torch.as_tensor(left.lines[index].get_ydata())
        assert float(u.min()) > 0 and float(u.max()) < 1 and bool(log_snr.isfinite().all())
        torch.testing.assert_close(log_snr, one.log_snr(u))
        alpha, sigma = (torch.as_tensor(right.lines[2 * index + i].get_ydata()) for i in (0, 1))
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
        torch.testing.assert_close((alpha**2 / sigma**2).log(), log_snr)
    assert legend(left) == ["cosine", "log-SNR"]
    assert_distinct(left.lines)
    assert legend(plots.schedule(CosineSchedule())[0]) == ["CosineSchedule"]


# -- trajectories ------------------------------------------------------------------------------


def test_strip_has_a_row_per_sample_and_a_column_per_t() -> None:
    # x_t of sample i has the constant grey t/10 + i/100
    grey = torch.arange(5.0)[:, None] / 10 + torch.arange(2.0) / 100
    trajectory = grey[:, :, None, None, None].expand(5, 2, 1, 3, 4)
    for direction, chosen in (("forward", [0, 3, 4]), ("reverse", [4, 3, 0])):
        axes = plots.trajectory_strip(trajectory, [3, 0, 4], direction=direction, low=0, high=1)
        canvas = torch.as_tensor(axes.images[0].get_array())
        assert canvas.shape == (2 * 4 + 1, 3 * 5 + 1, 3)
        for row, column in itertools.product(range(2), range(3)):
            patch = canvas[1 + 4 * row : 4 + 4 * row, 1 + 5 * column : 5 + 5 * column]
            assert torch.equal(patch, grey[chosen[column], row].expand_as(patch))
            assert axes.get_xticks()[column] == 1 + 5 * column + 1.5  # the middle of four pixels
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            f"$t={t}$" for t in chosen
        ]


def test_points_keep_their_colour() -> None:
    trajectory = torch.randn(21, 30, 3)
    drawn = plots.trajectory_points(trajectory, [0, 10, 20], direction="reverse")
    assert [axes.get_title() for axes in drawn] == ["$t=20$", "$t=10$", "$t=0$"]
    for axes, t in zip(drawn, (20, 10, 0), strict=True):
        points = torch.as_tensor(axes.collections[0].get_offsets().data).float()
        torch.testing.assert_close(points, trajectory[t, :, :2])
        low, high = axes.get_xlim()
        assert -low == high > float(trajectory[[0, 10, 20], :, :2].abs().max())
        assert axes.get_xlim() == axes.get_ylim() == drawn[0].get_xlim()
    colours = [axes.collections[0].get_array() for axes in drawn]
    assert (colours[0] == colours[1]).all() and (colours[0] == colours[2]).all()
    middle = trajectory[0, :, :2].double() - trajectory[0, :, :2].double().mean(0)
    torch.testing.assert_close(torch.as_tensor(colours[0]), torch.atan2(middle[:, 1], middle[:, 0]))


def test_trajectories_show_eight_timesteps_by_default() -> None:
    drawn = plots.trajectory_points(torch.randn(1001, 2, 2))
    assert [axes.get_title() for axes in drawn][::7] == ["$t=0$", "$t=1000$"] and len(drawn) == 8
    assert len(plots.trajectory_points(torch.randn(3, 2, 2))) == 3


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.trajectory_strip(torch.zeros(3, 2, 8, 8)), r"\(T \+ 1, N, 1 or 3, H, W\)"),
        (lambda: plots.trajectory_strip(torch.zeros(3, 2, 2, 8, 8)), "got shape"),
        (lambda: plots.trajectory_points(torch.zeros(3, 2, 1)), r"\(T \+ 1, N, d >= 2\); got"),
        (lambda: plots.trajectory_points(torch.zeros(3, 2, 2), [0, 3]), "timesteps from 0 to 2"),
        (lambda: plots.trajectory_points(torch.zeros(3, 2, 2), []), "timesteps from 0 to 2"),
        (
            lambda: plots.trajectory_points(torch.zeros(3, 2, 2), direction="back"),
            "Expected direction to be one of .*; got 'back'",
        ),
        (
            lambda: plots.trajectory_points(torch.zeros(3, 2, 2), [0], axes=[None, None]),
            "Expected 1 axes, one per panel; got 2",
        ),
    ],
)
def test_trajectories_refuse(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


# -- bounds ------------------------------------------------------------------------------------


def weighted(log_w: Tensor, **changes: Any) -> LogLikelihood:
    """The importance bound of these weights; ten network calls a path."""
    value, calls = log_mean_exp(log_w), torch.full((len(log_w),), 10 * log_w.shape[1])
    error = weights_std_error(log_w)
    bound = LogLikelihood(
        value, error, "lower bound", calls, 2, "ImportanceBound()", log_weights=log_w
    )
    return replace(bound, **changes)


def test_ladder_of_weights_by_hand() -> None:
    log_w = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0, 4.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]]).double()
    particles, value, error = plots.ladder(weighted(log_w.log()))
    assert particles.tolist() == [1, 2, 4, 6]
    first = torch.stack([log_w[0].log().mean(), torch.tensor([2, 6, 6.5]).double().log().mean()])
    first = torch.cat([first, torch.tensor([4.0, 29 / 6]).double().log()])
    torch.testing.assert_close(value, (first + math.log(2)) / 2)
    # K = 2: the spread of three groups of the first sample; the second has none
    three = torch.tensor([2.0, 6.0, 6.5]).double().log().std() / math.sqrt(3)
    torch.testing.assert_close(error[1], three / 2)
    # K = 4 and 6, of one group each: from K = 2 on, at the rate from K = 1 to 2 or half
    one = log_w[0].log().var()
    rate = max(0.5, float(three.square() * 3 / one))
    for rung, k in ((2, 4), (3, 6)):
        expected = three * math.sqrt(3) * rate ** (math.log2(k / 2) / 2) / 2
        torch.testing.assert_close(error[rung], expected)


@pytest.mark.parametrize("spread, count", [(0.5, 16), (1.5, 32), (2.5, 24)])
def test_every_rung_of_a_ladder_has_its_true_error(spread: float, count: int) -> None:
    """The root mean square of the errors over 400 seeds is the spread of the rung's value.

    Log-normal weights of 30 samples.  The spread is known to 4 % (its kurtosis being near 3), the
    errors' mean square to less; a quarter is allowed below, and above, where the rate at which the
    variance falls is not known to be as slow, half.
    """
    generator = torch.Generator().manual_seed(0)
    log_w = spread * torch.randn(400, 30, count, generator=generator, dtype=F64)
    drawn = [plots.ladder(weighted(each)) for each in log_w]
    true = torch.stack([each.value for each in drawn]).std(0)
    error = torch.stack([each.std_error for each in drawn]).square().mean(0).sqrt()
    assert float((error / true).min()) > 0.75 and float((error / true).max()) < 1.5


def test_ladder_of_log_normal_weights_climbs_to_the_exact_value() -> None:
    """Weights exp(s z − s²/2) have mean 1; E log w = −s²/2, E L_K ≈ −(e^{s²} − 1)/(2K).

    Every figure lies within 4.5 standard errors of the answer: fails for 1 in 10⁴ seeds.
    """
    s = 0.5
    log_w = s * torch.randn(400, 256, dtype=F64) - s**2 / 2
    particles, value, error = plots.ladder(weighted(log_w))
    assert particles.tolist() == [2**i for i in range(9)]
    assert abs(float(value[0]) + s**2 / 2) < 4.5 * float(error[0])
    torch.testing.assert_close(
        error[0], torch.tensor(s / math.sqrt(log_w.numel())).double(), rtol=0.05, atol=0
    )
    for rung in (6, 7):  # K = 64 and 128: later terms are below a tenth of an error
        expected = -math.expm1(s**2) / (2 * int(particles[rung]))
        assert abs(float(value[rung]) - expected) < 4.5 * float(error[rung])
    assert bool((value.diff() > 0).all())  # for nested groups always (Jensen)


def test_bound_ladder_draws_rungs_lines_and_points() -> None:
    one, two = (weighted(torch.randn(20, 16, dtype=F64) * s) for s in (0.5, 1.5))
    # twenty calls, where a path takes ten; errors of 1 for each of 20 samples
    flow = result(None, samples=20)
    flow = replace(flow, calls=torch.full((20,), 20), std_error=torch.ones(20, dtype=F64))
    exact = torch.linspace(0, 1, 20, dtype=F64)
    axes = plots.bound_ladder({"a": one, "b": two}, exact=exact, others={"flow": flow})
    for container, bound in zip(axes.containers, (one, two), strict=False):
        line, _, (bars,) = container
        particles, value, error = plots.ladder(bound)
        assert line.get_xdata().tolist() == particles.tolist() == [1, 2, 4, 8, 16]
        assert line.get_ydata().tolist() == value.tolist()
        for segment, v, e in zip(bars.get_segments(), value, error, strict=True):
            torch.testing.assert_close(
                torch.as_tensor(segment[:, 1]), torch.stack([v - 2 * e, v + 2 * e])
            )
    point, _, (bars,) = axes.containers[2]
    assert point.get_xdata().tolist() == [2] and point.get_ydata().tolist() == [0]
    ends = torch.as_tensor(bars.get_segments()[0][:, 1])
    torch.testing.assert_close(ends, torch.tensor([-2, 2]).double() / math.sqrt(20))
    (line,) = [line for line in axes.lines if line.get_label() == "exact"]
    torch.testing.assert_close(torch.as_tensor(line.get_ydata()).double(), exact.mean().expand(2))
    assert set(legend(axes)) == {"a", "b", "flow", "exact"}
    assert_distinct([container[0] for container in axes.containers])


def test_ladder_of_one_path_has_one_rung_of_unknown_error() -> None:
    axes = plots.bound_ladder(weighted(torch.ones(3, 1, dtype=F64)))
    assert axes.containers[0][0].get_ydata().tolist() == [1.0]


def test_point_of_unknown_error_has_no_bar() -> None:
    flow = result(None, samples=20)
    flow = replace(flow, std_error=torch.full((20,), torch.nan, dtype=F64))
    axes = plots.bound_ladder(weighted(torch.randn(20, 4, dtype=F64)), others={"flow": flow})
    assert not axes.containers[1].has_yerr


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda w: plots.bound_ladder(result(None)), "a result with log_weights; got none from"),
        (lambda w: plots.ladder(replace(w, kind="upper bound")), "the weights of independent"),
        (
            lambda w: plots.ladder(replace(w, log_weights=torch.full((2, 4), -torch.inf))),
            "the weights of independent paths",
        ),
        (lambda w: plots.bound_ladder({}), "at least one entry to draw; got none"),
        (
            lambda w: plots.bound_ladder({"a": w, "b": weighted(torch.zeros(3, 4))}),
            r"results on the same samples; got \[2, 3\]",
        ),
        (lambda w: plots.pareto_k(w), "at least 30 weights a sample to fit k̂; got 4"),
        (lambda w: plots.pareto_k(result(None)), "a result with log_weights; got none from"),
    ],
)
def test_bounds_refuse(draw: Callable[[LogLikelihood], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(weighted(torch.zeros(2, 4, dtype=F64)))


def test_pareto_k_draws_every_sample_that_has_one() -> None:
    log_w = torch.randn(30, 100, dtype=F64) * torch.linspace(0.1, 4, 30).double()[:, None]
    log_w[7] = 0.0  # equal weights
    bound = weighted(log_w)
    k_hat, size = bound.pareto_k, bound.effective_sample_size
    assert k_hat is not None and size is not None and bool(k_hat[7].isnan())
    left, right = plots.pareto_k({"model": bound})
    known = k_hat.isfinite()
    assert left.lines[0].get_ydata().tolist() == k_hat[known].sort().values.tolist()
    assert left.lines[1].get_ydata() == [0.7, 0.7] and right.lines[1].get_xdata() == [0.7, 0.7]
    drawn = dict(zip(right.lines[0].get_xdata(), right.lines[0].get_ydata(), strict=True))
    expected = dict(zip(k_hat[known].tolist(), (size / 100)[known].tolist(), strict=True))
    assert drawn == expected
    above = int((k_hat > 0.7).sum())
    assert above > 0 and legend(left)[0] == f"model: {above} of 30 above 0.7, 1 unknown"


# -- models ------------------------------------------------------------------------------------


def valued(*values: float, error: float = 0.1, kind: Any = "lower bound") -> LogLikelihood:
    value = torch.tensor(values, dtype=F64)
    return LogLikelihood(
        value, torch.full_like(value, error), kind, torch.ones(len(value)).long(), 2, "by hand"
    )


def bars(axes: Axes) -> list[list[float]]:
    """The ends of the bars and the markers, row by row as they are drawn."""
    return [[float(v) for v in line.get_xdata()] for line in axes.lines if len(line.get_xdata())]


def test_forest_shows_both_parts_of_the_error() -> None:
    # values 1 and 3: mean 2, standard error 1; Monte Carlo √(2 · 0.1²)/2
    axes = plots.forest({"a": valued(1, 3), "b": valued(4, 4, kind="upper bound")})
    monte_carlo = 2 * math.sqrt(2 * 0.01) / 2
    expected = [[0, 4], [2 - monte_carlo, 2 + monte_carlo], [2]]
    expected += [[4, 4], [4 - monte_carlo, 4 + monte_carlo], [4]]
    for bar, row in zip(bars(axes), expected, strict=True):
        assert bar == pytest.approx(row)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert legend(axes) == ["± 2 standard errors", "Monte Carlo part", "lower bound", "upper bound"]
    markers = [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 1]
    assert markers == [">", "<"]
    assert [text.get_text() for text in axes.texts] == ["2.0 ± 1.0", "4"]


def test_forest_of_differences_is_paired() -> None:
    # the models differ by 1 and 2: mean 1.5, standard error 0.5
    axes = plots.forest({"a": valued(-10, 30), "b": valued(-9, 32)}, reference="a")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b"]
    assert bars(axes)[:2] == [[0.5, 2.5], [1.5]]
    assert bars(axes)[2] == [0, 0] and axes.get_xlabel() == "log-likelihood less that of a (nats)"
    assert legend(axes) == ["± 2 standard errors"]


def test_forest_of_rows() -> None:
    plain = SimpleNamespace(name="a", value=1, error=0.5)
    full = SimpleNamespace(
        model="b", value=2.0, std_error=0.5, monte_carlo=0.25, low=0.0, high=5.0, kind="estimate"
    )
    for rows in ([plain, full], SimpleNamespace(rows=(plain, full))):
        axes = plots.forest(rows)
        assert bars(axes) == [[0, 2], [1], [0, 5], [1.5, 2.5], [2]]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_forest_of_a_comparison() -> None:
    models = {"a": SimpleNamespace(value=2.0, std_error=0.5, monte_carlo=0.1, kind="estimate")}
    models["b"] = SimpleNamespace(value=1.0, std_error=0.5, monte_carlo=0.1, kind="estimate")
    difference = SimpleNamespace(model="b", value=-1.0, std_error=0.25, low=-1.75, high=-0.25)
    compared = SimpleNamespace(models=models, reference="a", differences=(difference,), level=0.9)
    assert bars(plots.forest(compared)) == [[1, 3], [1.8, 2.2], [2], [0, 2], [0.8, 1.2], [1]]
    rows = SimpleNamespace(rows=[difference], level=0.9)
    assert legend(plots.forest(rows)) == ["90 % interval"]
    axes = plots.forest(compared, reference="a")
    assert bars(axes)[:2] == [[-1.75, -0.25], [-1]] and legend(axes) == ["90 % interval"]
    with pytest.raises(ValueError, match="the reference of the comparison, 'a'; got 'b'"):
        plots.forest(compared, reference="b")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda a: plots.forest({}), "Expected at least one model; got none"),
        (lambda a: plots.forest({"a": a}, reference="a"), "at least one model; got none"),
        (lambda a: plots.forest({"a": a}, reference="c"), r"one of \['a'\]; got 'c'"),
        (
            lambda a: plots.forest({"a": a, "b": valued(1, 2, 3)}, reference="a"),
            "results on the same 2 samples; got 3 of 'b'",
        ),
        (lambda a: plots.forest([], reference="a"), "Expected models by name to subtract 'a'"),
        (lambda a: plots.forest(3), "Expected name → LogLikelihood, or rows; got int"),
        (lambda a: plots.forest([1.0]), "Expected rows with name, value and error; got 1.0"),
    ],
)
def test_forest_refuses(draw: Callable[[LogLikelihood], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(valued(1, 2))


# -- densities ---------------------------------------------------------------------------------


def test_map_points_are_the_centres_of_cells() -> None:
    points = plots.map_points((0.0, 4.0, 10.0, 12.0), 2)
    assert points.tolist() == [[1, 10.5], [3, 10.5], [1, 11.5], [3, 11.5]]


def test_density_maps_share_their_colours() -> None:
    narrow = Gaussian(torch.tensor([0.5, -0.5]), torch.diag(torch.tensor([0.04, 0.09])))
    wide, limits = Gaussian(torch.zeros(2), torch.eye(2)), (-2.0, 2.0, -3.0, 3.0)
    at_points = wide.log_prob(plots.map_points(limits, 50))
    log_probs = {"truth": narrow.log_prob, "flat": at_points, "square": at_points.reshape(50, 50)}
    truth, flat, square = plots.density_map(log_probs, limits, 50)
    pictures = [axes.images[0] for axes in (truth, flat, square)]
    expected = narrow.log_prob(plots.map_points(limits, 50)).exp().reshape(50, 50)
    torch.testing.assert_close(torch.as_tensor(pictures[0].get_array()), expected)
    # a density integrates to one
    area = 4 * 6 / 50**2
    assert abs(float(pictures[0].get_array().sum()) * area - 1) < 1e-3
    assert {picture.get_clim() for picture in pictures} == {(0.0, float(expected.max()))}
    assert (pictures[1].get_array() == pictures[2].get_array()).all()
    assert pictures[0].origin == "lower" and pictures[0].get_extent() == list(limits)
    # the peak is where it should be: x of 0.5 to the right, y of −0.5 below the middle
    row, column = divmod(int(expected.argmax()), 50)
    assert column > 25 and row < 25
    assert [axes.get_title() for axes in (truth, flat, square)] == list(log_probs)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.map_points((1.0, 0.0, 0.0, 1.0)), "that rise, and resolution >= 2; got"),
        (lambda: plots.map_points((0.0, 1.0, 0.0, 1.0), 1), "and 1"),
        (lambda: plots.density_map({}, (0.0, 1.0, 0.0, 1.0)), "one density; got none"),
        (
            lambda: plots.density_map({"p": torch.zeros(9)}, (0.0, 1.0, 0.0, 1.0), 2),
            r"log p of 'p' at 4 points; got shape \(9,\)",
        ),
        (
            lambda: plots.density_map({"p": torch.full((4,), torch.nan)}, (0.0, 1.0, 0.0, 1.0), 2),
            "log p of 'p' below infinity and not NaN",
        ),
    ],
)
def test_density_maps_refuse(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


# -- axes --------------------------------------------------------------------------------------


def strip(axes: Any) -> Any:
    return plots.trajectory_strip(torch.zeros(3, 2, 1, 4, 4), axes=axes)


ON_ONE: dict[str, Callable[[Any], Any]] = {
    "samples_grid": lambda axes: plots.samples_grid(torch.zeros(2, 1, 4, 4), axes),
    "samples_scatter": lambda axes: plots.samples_scatter(torch.zeros(2, 2), axes=axes),
    "terms": lambda axes: plots.terms(result(-torch.ones(2, 3, dtype=F64)), axes),
    "trajectory_strip": strip,
    "bound_ladder": lambda axes: plots.bound_ladder(weighted(torch.zeros(2, 4)), axes=axes),
    "forest": lambda axes: plots.forest({"a": valued(1, 2)}, axes=axes),
}


def conditioned() -> Posterior:
    """Forty particles on a chain of two steps, resampled once."""
    history = History([2, 1, 0], [40.0, 15.0, 38.0], [40, 40, 25], [False, True, False], [0.1, 0.2])
    return Posterior(
        samples=torch.zeros(40, 2),
        log_weights=torch.linspace(0, 1, 40, dtype=F64),
        log_evidence=0.5,
        std_error=0.1,
        degrees_of_freedom=10.0,
        calls=80,
        likelihood=Blind(),
        history=history,
    )


ON_TWO: dict[str, Callable[[Any], Any]] = {
    "schedule": lambda axes: plots.schedule(CosineSchedule(), axes),
    "trajectory_points": lambda axes: plots.trajectory_points(torch.ones(2, 3, 2), axes=axes),
    "pareto_k": lambda axes: plots.pareto_k(weighted(torch.randn(2, 30, dtype=F64)), axes),
    "density_map": lambda axes: plots.density_map(
        {"a": torch.zeros(4), "b": torch.zeros(4)}, (0.0, 1.0, 0.0, 1.0), 2, axes
    ),
    "particles": lambda axes: plots.particles(conditioned(), axes),
}


@pytest.mark.parametrize("name", ON_ONE)
def test_given_axes_are_drawn_on(name: str) -> None:
    axes = Figure().add_subplot()
    assert ON_ONE[name](axes) is axes
    assert axes.images or axes.collections or axes.lines
    assert isinstance(ON_ONE[name](None), Axes)


@pytest.mark.parametrize("name", ON_TWO)
def test_given_panels_are_drawn_on(name: str) -> None:
    axes = Figure().subplots(1, 2)  # an array
    assert ON_TWO[name](axes) == list(axes)
    assert all(panel.images or panel.collections or panel.lines for panel in axes)
    drawn = ON_TWO[name](None)
    assert len(drawn) == 2 and drawn[0].figure is drawn[1].figure
    with pytest.raises(ValueError, match="Expected 2 axes, one per panel; got 1"):
        ON_TWO[name](axes[:1])


def test_every_figure_is_tested_and_changes_no_global_setting() -> None:
    before = dict(matplotlib.rcParams)
    for draw in (*ON_ONE.values(), *ON_TWO.values()):
        drawn = draw(None)
        figure = (drawn[0] if isinstance(drawn, list) else drawn).figure
        figure.savefig(io.BytesIO(), format="png", dpi=50)  # warnings are errors
    assert dict(matplotlib.rcParams) == before
    assert {*ON_ONE, *ON_TWO, "ladder", "map_points"} == set(plots.__all__)


def test_looks_differ_in_colour_marker_and_line() -> None:
    looks = [style(index) for index in range(40)]
    assert len(set(map(repr, looks))) == 40
    for one, other in itertools.pairwise(looks):
        assert all(a != b for a, b in zip(one, other, strict=True))


# What is left of linear RGB without cones of one kind (Machado, Oliveira and Fernandes, 2009,
# severity 1), and CIE XYZ from linear RGB, divided by its white.
BLIND = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "long": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "medium": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "short": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [[0.4339, 0.3763, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8729]]


@pytest.mark.parametrize("cones", BLIND)
def test_colours_differ_for_colour_blind_readers(cones: str) -> None:
    """CIE 1976 distances of the seven colours; one of 2.3 is just noticeable."""
    rgb = torch.tensor([matplotlib.colors.to_rgb(style(i).color) for i in range(7)], dtype=F64)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(BLIND[cones], dtype=F64).T).clamp(0, 1)
    xyz = seen @ torch.tensor(XYZ, dtype=F64).T
    f = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.T
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    assert float(torch.pdist(lab).min()) > 15


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(-1.2345, 0.0123, "−1.234 ± 0.012"), (-204.6, 61.2, "−205 ± 61"), (3.5, math.nan, "3.5")],
)
def test_values_are_written_to_two_digits_of_their_error(
    value: float, error: float, text: str
) -> None:
    assert plus_minus(value, error) == text


def test_no_window_system_is_touched() -> None:
    code = """
import sys, torch
from pyrodiff import plots
before = "matplotlib" in sys.modules
plots.samples_scatter(torch.zeros(2, 2))
plots.trajectory_points(torch.ones(3, 2, 2))
plots.density_map({"a": torch.zeros(4)}, (0.0, 1.0, 0.0, 1.0), 2)
print(before, "matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr
