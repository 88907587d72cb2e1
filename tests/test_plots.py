"""Figures: what is drawn, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyrodiff import plots
from pyrodiff.likelihood import LogLikelihood

F64 = torch.float64


def result(terms: Tensor | None) -> LogLikelihood:
    timesteps = None if terms is None else torch.arange(1, terms.shape[1] + 1, dtype=F64)
    value, error = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    return LogLikelihood(
        value, error, "lower bound", torch.full_like(value, 4), 2, "made by hand", terms, timesteps
    )


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


def test_terms_below_zero_are_on_a_linear_axis() -> None:
    assert plots.terms(result(torch.ones(2, 3, dtype=F64))).get_yscale() == "linear"


def test_terms_refuses_a_result_without_terms() -> None:
    with pytest.raises(ValueError, match="Expected a result with terms; got none from made by"):
        plots.terms(result(None))


def test_given_axes_are_drawn_on() -> None:
    for draw in (
        lambda axes: plots.samples_grid(torch.zeros(2, 1, 4, 4), axes),
        lambda axes: plots.samples_scatter(torch.zeros(2, 2), axes=axes),
        lambda axes: plots.terms(result(-torch.ones(2, 3, dtype=F64)), axes),
    ):
        axes = Figure().add_subplot()
        assert draw(axes) is axes
        assert axes.images or axes.collections


def test_no_window_system_is_touched() -> None:
    code = """
import sys, torch
from pyrodiff import plots
plots.samples_scatter(torch.zeros(2, 2))
print("matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr
