"""How often is a "likely" of ``compare`` wrong, and how often does a clear difference get one?

    python benchmarks/verdicts.py --output benchmarks/results/verdicts.json

- bounds: two chains with exact log p (a grid in each dimension, which the chains treat alike and
  apart).  The better one has few steps and the looser importance bound, so that the order of the
  bounds is the wrong one at K = 8.  A verdict for the worse one is wrong.
- clear: the same with the better chain ahead by a nat or more: a verdict for it is right.
- identical: M models with the same expectation; the reference is the best of them or a named one.
  Every "likely" is wrong, in either direction, and a repeat with one or more counts as wrong.
- skewed: two models with the same expectation, whose difference has the distribution of
  −(e^{sz} − E e^{sz}).

For bounds, a repeat is n samples without replacement from a pool of 2,000 exact values with 32
weights each, for K = 8 a block of them, so that repeats share some samples at n = 500.  The other
rows draw independent samples and need no network: they have eight times the repeats, and four times
for ten models, so that a rate near 2.5 % is counted to 0.2 %.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.comparison import Comparison, compare
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import ImportanceBound, LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp, weights_std_error
from pyrodiff.oracles import GaussianMixture, GridOracle
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, Variance

F64 = torch.float64
WEIGHTS = torch.tensor([0.6, 0.4], dtype=F64)
MEANS = torch.tensor([[1.0], [-0.8]], dtype=F64)
PARTICLES = 32


class Pair(NamedTuple):
    """Two chains of a mixture in each of d dimensions; B's components are wider.

    Args:
        steps, variance: of A; B has 24 steps and the large variance.
        dimensions: d.
        scale: of B's components; A's and the data's is 0.3.
    """

    steps: int
    variance: Variance
    dimensions: int
    scale: float


PAIRS = {
    "large variance, 4 steps, d = 8": Pair(4, FixedLarge(), 8, 0.525),
    "small variance, 24 steps, d = 4": Pair(24, FixedSmall(), 4, 0.37),
    "small variance, 8 steps, d = 4": Pair(8, FixedSmall(), 4, 0.53),
}
CLEAR = {"clear: large variance, 8 steps, d = 4": Pair(8, FixedLarge(), 4, 0.6)}


class Pool(NamedTuple):
    """Exact log p, (N,), and log weights, (N, 32), of a chain's samples."""

    log_p: Tensor
    log_w: Tensor


def chain(scale: float, steps: int, variance: Variance) -> ReverseChain:
    law = GaussianMixture(WEIGHTS, MEANS, scale)
    forward = ForwardChain(LogSNRSchedule(4.0, -6.0), steps)
    return ReverseChain(NoiseDenoiser(law.network()), forward, (1,), variance=variance)


@functools.cache
def pool(scale: float, steps: int, small: bool, dimensions: int, samples: int) -> Pool:
    """A chain that treats all dimensions alike and apart has sums of log p and of log w."""
    model = chain(scale, steps, FixedSmall() if small else FixedLarge())
    x = GaussianMixture(WEIGHTS, MEANS, 0.3).sample(samples * dimensions, seed=1)
    bound = ImportanceBound(PARTICLES).estimate(model, x, seed=2, batch_size=2**17)
    assert bound.log_weights is not None
    log_p = GridOracle(model, -9, 9, 2001).log_prob(x)
    shape = (samples, dimensions)
    return Pool(log_p.view(shape).sum(1), bound.log_weights.view(*shape, PARTICLES).sum(1))


def pools(pair: Pair, samples: int) -> tuple[Pool, Pool]:
    small, d = isinstance(pair.variance, FixedSmall), pair.dimensions
    return pool(0.3, pair.steps, small, d, samples), pool(pair.scale, 24, False, d, samples)


def bound(log_w: Tensor) -> LogLikelihood:
    calls, value = torch.full((len(log_w),), log_w.shape[1]), log_mean_exp(log_w)
    error = weights_std_error(log_w)
    return LogLikelihood(value, error, "lower bound", calls, 1, "weights", log_weights=log_w)


def exact(value: Tensor) -> LogLikelihood:
    calls = torch.zeros(len(value), dtype=torch.int64)
    return LogLikelihood(value, torch.zeros_like(value), "estimate", calls, 1, "exact")


def share(verdicts: list[bool]) -> dict[str, float]:
    p = sum(verdicts) / len(verdicts)
    return {"share": p, "std_error": math.sqrt(p * (1 - p) / len(verdicts))}


def bounds(pair: Pair, n: int, particles: int, repeats: int, samples: int) -> dict[str, object]:
    """Shares of wrong and of right verdicts of the two chains' order."""
    a, b = pools(pair, samples)
    generator, differences = torch.Generator().manual_seed(n + particles), []
    for _ in range(repeats):
        some = torch.randperm(samples, generator=generator)[:n]
        start = int(torch.randint(PARTICLES // particles, (1,), generator=generator)) * particles
        block = slice(start, start + particles)
        pair_of = {"a": bound(a.log_w[some, block]), "b": bound(b.log_w[some, block])}
        differences.append(compare(pair_of, reference="a")["b"])
    truth = float((a.log_p - b.log_p).mean())
    block = slice(0, particles)
    seen = float((log_mean_exp(a.log_w[:, block]) - log_mean_exp(b.log_w[:, block])).mean())
    assert truth > 0
    return {
        "n": n,
        "K": particles,
        "difference_of_log_p": truth,
        "difference_of_bounds": seen,
        "wrong": share([d.status == "likely" and d.value > 0 for d in differences]),
        "right": share([d.status == "likely" and d.value < 0 for d in differences]),
    }


def likely(comparison: Comparison) -> bool:
    """Whether any difference has a verdict."""
    return any(difference.status != "not decided" for difference in comparison.differences)


def identical(models: int, named: bool, n: int, repeats: int) -> dict[str, object]:
    """At least one verdict among models that differ by chance alone."""
    generator, wrong = torch.Generator().manual_seed(models), []
    for _ in range(repeats):
        common = 3 * torch.randn(1, n, generator=generator, dtype=F64)
        values = common + torch.randn(models, n, generator=generator, dtype=F64)
        results = {f"m{place}": exact(value) for place, value in enumerate(values)}
        wrong.append(likely(compare(results, reference="m0" if named else None)))
    reference = "named" if named else "best"
    row = {"models": models, "reference": reference, "n": n, "repeats": repeats}
    return row | share(wrong)


def skewed(scale: float, n: int, repeats: int) -> dict[str, object]:
    """A verdict on a difference without expectation, by the skewness of its law."""
    generator, wrong = torch.Generator().manual_seed(n), []
    for _ in range(repeats):
        z = torch.randn(n, generator=generator, dtype=F64)
        d = math.exp(scale**2 / 2) - (scale * z).exp()
        wrong.append(likely(compare({"a": exact(d), "b": exact(0 * d)}, reference="b")))
    return {"scale": scale, "n": n, "repeats": repeats} | share(wrong)


def table(title: str, rows: list[dict[str, object]]) -> Table:
    shown = Table(*rows[0], title=title)
    for row in rows:
        shown.add_row(*map(cell, row.values()))
    return shown


def cell(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['share']:.3f} ± {value['std_error']:.3f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Print the tables and store their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, repeats = time.perf_counter(), options.repeats
    sizes = [(n, k) for n in (10, 30, 100, 500) for k in (8, 32)]
    groups: dict[str, list[dict[str, object]]] = {}
    for name, pair in (PAIRS | CLEAR).items():
        groups[name] = [bounds(pair, n, k, repeats, options.samples) for n, k in sizes]
        Console().print(table(name, groups[name]))
    cases: dict[str, Callable[[], list[dict[str, object]]]] = {
        "identical": lambda: [
            identical(m, named, n, repeats * (8 if m < 10 else 4))
            for m in (3, 5, 10)
            for named in (False, True)
            for n in (30, 100)
        ],
        "skewed": lambda: [
            skewed(scale, n, 8 * repeats) for scale in (0.5, 1.0, 2.0) for n in (5, 10, 30, 200)
        ],
    }
    for name, rows in cases.items():
        groups[name] = rows()
        Console().print(table(name, groups[name]))
    if options.output is not None:
        record = {
            "command": "python " + " ".join(sys.argv),
            "environment": environment(),
            "repeats": repeats,
            "samples": options.samples,
            "seconds": round(time.perf_counter() - started),
            "rows": groups,
        }
        write(options.output, record, allow_nan=False)


if __name__ == "__main__":
    main()
