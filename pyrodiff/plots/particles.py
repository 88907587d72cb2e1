"""How the particles of a conditioned program fared on their way."""

from collections.abc import Iterable

from pyrodiff.conditioning import Posterior
from pyrodiff.plots.style import Axes, panels, plain_ticks, style

__all__ = ["particles"]


def particles(posterior: Posterior, axes: Iterable[Axes] | None = None) -> list[Axes]:
    """Effective number and ancestors of the particles along t, and their final weights.

    On the left the effective number before resampling, with a mark where particles were resampled,
    and how many of the first particles have descendants; on the right the final weights in
    descending order, as multiples of 1/K.

    Args:
        posterior: what ``TwistedSMC.run`` returned.
        axes: two matplotlib axes, or None for new ones.

    Returns:
        The two axes.

    Raises:
        ValueError: another number of axes than two.
    """
    left, right = panels(axes, 2, (9.5, 3.8))
    history, first, second = posterior.history, style(0), style(1)
    left.plot(
        history.timesteps, history.effective_samples, color=first.color, label="effective number"
    )
    left.plot(
        history.timesteps,
        history.ancestors,
        color=second.color,
        linestyle="--",
        label="first particles with descendants",
    )
    rows = list(zip(history.timesteps, history.effective_samples, history.resampled, strict=True))
    at = [(t, number) for t, number, resampled in rows if resampled]
    if at:
        left.plot(*zip(*at, strict=True), "o", color=first.color, label=f"{len(at)} × resampled")
    left.set(xlabel="t", ylabel="particles")
    left.set_yscale("log")
    left.set_ylim(0.8, 1.5 * len(posterior.samples))
    plain_ticks(left.yaxis)
    left.invert_xaxis()
    count = len(posterior.samples)
    weights = posterior.weights.sort(descending=True).values * count
    right.plot(range(1, count + 1), weights, color=first.color, marker=".", linestyle="none")
    right.axhline(1.0, color="black", linestyle="--", linewidth=1, label="weights all alike")
    right.set(xlabel="particle, by weight", ylabel="weight × K")
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    return [left, right]
