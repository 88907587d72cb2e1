r"""How the gap of a bound falls with T where all is exact: a mixture and its own denoiser.

    python benchmarks/few_steps_oracles.py --output benchmarks/results/few-steps-mixture.json

25 equal components N(m, I/s²) with the means m = 8 (i, j, i, j, …)/s, i and j in −2 … 2, in 8 and
64 dimensions; s² = 129 makes the variance of every coordinate 1.  The chain's levels are even in
log-SNR, from 7.5 to −6, and its network is the exact denoiser, so that the gap

    E log p(x_0) − E log w = KL(q(x_T) ‖ N(0, I)) + Σ_t KL_t + KL(q(x_0 | x_1) ‖ p_θ(x_0 | x_1))

is that of the steps' normals and of the two ends alone.  The ends do not know T: they are measured
by themselves, and taken out of the gap of the steps.

All are means of −log r with r a ratio of a normalised density to the true one, w/p(x_0) for the
whole chain, so that E r = 1 and r − 1 is a control variate: where r is near 1, −log r and it differ
by ½ (log r)², whose spread is of the size of the mean.  (Where log r spreads by more than 1, r has
a heavy tail, and the mean is the plain one.)  Every T has samples of its own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import itertools
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import PathBound
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, PosteriorCovariance, Variance

SIZES = (8, 64)
ENDS = (7.5, -6.0)  # λ_1 and λ_T, those of the digits' default recipe
STEPS = (10, 25, 50, 100, 200)
SLOPE_FROM = 25  # the least T that a slope is fitted to
VARIANCES: dict[str, Variance] = {
    "fixed small": FixedSmall(),
    "fixed large": FixedLarge(),
    "isotropic": PosteriorCovariance("isotropic"),
    "diagonal": PosteriorCovariance("diagonal"),
    "full": PosteriorCovariance("full"),
}

Figure = tuple[float, float]  # a mean and its standard error


def mixture(size: int) -> GaussianMixture:
    """25 components on a grid, repeated over the dimensions."""
    axis = torch.arange(-2.0, 3.0, dtype=torch.float64)
    means = 8 * torch.cartesian_prod(axis, axis).repeat(1, size // 2)
    scale = math.sqrt(1 + 8**2 * 2)
    return GaussianMixture(torch.ones(25) / 25, means / scale, 1 / scale)


def chain(law: GaussianMixture, num_steps: int, variance: Variance) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(*ENDS), num_steps)
    return ReverseChain(NoiseDenoiser(law.network()), forward, law.event_shape, variance).eval()


def minus_log(log_ratio: Tensor) -> Figure:
    """E(−log r), with r − 1, of mean 0, as the control variate."""
    if log_ratio.std() > 1:
        return float(-log_ratio.mean()), float(log_ratio.std()) / math.sqrt(len(log_ratio))
    control = log_ratio.expm1()
    centred = control - control.mean()
    slope = float(-(log_ratio * centred).mean() / centred.square().mean())
    values = -log_ratio - slope * control
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def gap(law: GaussianMixture, num_steps: int, variance: Variance, samples: int) -> Figure:
    """E log p(x_0) − E log w, nats."""
    x_0 = law.sample(samples, seed=num_steps)
    result = PathBound(1).estimate(chain(law, num_steps, variance), x_0, seed=num_steps)
    return minus_log(result.value - law.log_prob(x_0))


def prior_gap(law: GaussianMixture, samples: int) -> Figure:
    """KL(q(x_T) ‖ N(0, I)), nats."""
    last = law.noised(ENDS[1])
    x_T = last.sample(samples, seed=1)
    normal = torch.distributions.Normal(x_T.new_zeros(()), x_T.new_ones(()))
    return minus_log(normal.log_prob(x_T).sum(1) - last.log_prob(x_T))


@torch.no_grad()
def reconstruction_gap(law: GaussianMixture, variance: Variance, samples: int) -> Figure:
    """KL(q(x_0 | x_1) ‖ p_θ(x_0 | x_1)), nats, which is that of any T for an x-dependent Σ."""
    reverse, x_0 = chain(law, 2, variance), law.sample(samples, seed=2)
    noise = torch.randn(x_0.shape, dtype=x_0.dtype, generator=torch.Generator().manual_seed(3))
    level = reverse.level(torch.tensor(ENDS[0], dtype=torch.float64), x_0)
    x_1 = level.noised(x_0, noise)
    posterior = law.log_prob(x_0) - law.noised(ENDS[0]).log_prob(x_1)
    posterior += (-0.5 * noise.square() - level.sigma.log() - 0.5 * math.log(2 * math.pi)).sum(1)
    return minus_log(reverse.decode(x_1).log_prob(x_0) - posterior)


def slope(steps: list[int], values: list[Figure]) -> Figure:
    """The exponent of T, by least squares of logarithms weighted by their errors."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor([mean for mean, _ in values], dtype=torch.float64).log()
    weight = torch.tensor([(mean / error) ** 2 for mean, error in values], dtype=torch.float64)
    x = x - (weight * x).sum() / weight.sum()
    information = float((weight * x.square()).sum())
    return float((weight * x * y).sum()) / information, 1 / math.sqrt(information)


def study(size: int, name: str, samples: int, prior: Figure) -> dict[str, object]:
    """All that is measured of one variance."""
    law, variance = mixture(size), VARIANCES[name]
    gaps = {t: gap(law, t, variance, samples) for t in STEPS}
    facts: dict[str, object] = {"size": size, "variance": name, "samples": samples, "gaps": gaps}
    if isinstance(variance, PosteriorCovariance):
        end = reconstruction_gap(law, variance, samples)
        floor = prior[0] + end[0]
        error = math.hypot(prior[1], end[1])
        inner = {t: (mean - floor, math.hypot(spread, error)) for t, (mean, spread) in gaps.items()}
        chosen = [t for t in STEPS if t >= SLOPE_FROM]
        facts |= {"prior": prior, "reconstruction": end, "gaps_of_steps": inner}
        facts |= {"slope": slope(chosen, [inner[t] for t in chosen])}
    return facts


def ratio(rows: list[dict], size: int, kind: str) -> Figure:
    """The gap of full at T = 25 over that of isotropic at T = 200."""
    by_name = {row["variance"]: row[kind] for row in rows if row["size"] == size and kind in row}
    (one, error), (other, other_error) = by_name["full"][25], by_name["isotropic"][200]
    return one / other, one / other * math.hypot(error / one, other_error / other)


def show(rows: list[dict]) -> None:
    table = Table("d", "variance", *(f"T = {t}" for t in STEPS), "slope, ends taken out")
    for row in rows:
        cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in row["gaps"].values()]
        last = "{:.2f} ± {:.2f}".format(*row["slope"]) if "slope" in row else ""
        table.add_row(str(row["size"]), row["variance"], *cells, last)
    Console(width=140).print(table)


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs=2, default=[2500, 200], help="by dimensions")
    parser.add_argument("--output", type=Path)
    options, started = parser.parse_args(), time.time()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows: list[dict] = []
    priors = {size: prior_gap(mixture(size), 100_000) for size in SIZES}
    for (size, samples), name in itertools.product(
        zip(SIZES, options.samples, strict=True), VARIANCES
    ):
        rows.append(study(size, name, samples, priors[size]))
        print(rows[-1], f"{time.time() - started:.0f} s", flush=True)
    show(rows)
    kinds = ("gaps", "gaps_of_steps")
    ratios = {size: {kind: ratio(rows, size, kind) for kind in kinds} for size in SIZES}
    print("full at T = 25 over isotropic at T = 200:", ratios)
    if options.output is not None:
        facts = {
            "command": "python " + shlex.join(sys.argv),
            "ends": ENDS,
            "full_25_to_200": ratios,
        }
        write(options.output, facts | {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
