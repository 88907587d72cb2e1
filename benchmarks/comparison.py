"""Does the interval of ``compare`` cover the true difference, and what does pairing save?

    python benchmarks/comparison.py --output benchmarks/results/comparison.json

Two chains with the exact denoisers of two mixtures, so that their bounds and log p are known
functions of the data.  Each repeat has N fresh samples of the first mixture's law and fresh noise.

- log p: exact values, whose true difference is a Kullback–Leibler divergence.
- ELBO: ``PathBound``, ``ImportanceBound`` and ``TermwiseBound`` (two evaluations each), whose
  expected difference is estimated from separate samples and noise; its error stands beside it.
- Seeds: three trained models on either side, made of the exact values by adding random effects.

The unpaired error is that of two separate evaluations: other samples and other noise for each
model, at as many network calls.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.comparison import Comparison, compare
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import (
    Estimator,
    ImportanceBound,
    LogLikelihood,
    PathBound,
    TermwiseBound,
)
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
MEANS = torch.tensor([[1.0, 1.0], [-1.0, -0.5], [0.0, 1.5]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
TRUE = GaussianMixture(WEIGHTS, MEANS, 0.4)
OTHER = GaussianMixture(WEIGHTS, 1.05 * MEANS, 0.42)
ESTIMATORS = {
    "path, 2 paths": PathBound(2),
    "importance, K = 4": ImportanceBound(4),
    "termwise, 2 × 16 calls": TermwiseBound(16),
}


def chain(law: GaussianMixture) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(4.0, -6.0), 16)
    return ReverseChain(NoiseDenoiser(law.network()), forward, (2,))


def exact(value: Tensor) -> LogLikelihood:
    calls = torch.zeros(len(value), dtype=torch.int64)
    return LogLikelihood(value, torch.zeros_like(value), "estimate", calls, 2, "exact")


def part(result: LogLikelihood, some: slice) -> LogLikelihood:
    """The result of some of the samples."""
    rows: dict[str, Any] = {}
    for name in ("value", "std_error", "calls", "degrees_of_freedom", "terms", "log_weights"):
        value = getattr(result, name)
        rows[name] = None if value is None else value[some]
    return LogLikelihood(**(vars(result) | rows))


def evaluate(x: Tensor, estimator: Estimator, seed: int) -> dict[str, list[LogLikelihood]]:
    """Both models with the same noise; twice where the estimator keeps no draws."""
    seeds = (seed, seed + 1) if isinstance(estimator, TermwiseBound) else (seed,)
    models = {"true": chain(TRUE), "other": chain(OTHER)}
    return {
        name: [estimator.estimate(model, x, seed=s, batch_size=2**14) for s in seeds]
        for name, model in models.items()
    }


def one(found: dict[str, list[LogLikelihood]], some: slice) -> Comparison:
    """The comparison of one repeat."""
    models = {name: [[part(run, some) for run in runs]] for name, runs in found.items()}
    return compare(models, reference="true")


def figures(
    comparisons: list[Comparison], truth: float, truth_error: float
) -> dict[str, float | None]:
    found = [comparison["other"] for comparison in comparisons]
    covered = sum(each.low <= truth <= each.high for each in found) / len(found)
    unpaired = [math.hypot(*(m.std_error for m in c.models.values())) for c in comparisons]
    paired = torch.tensor([each.std_error for each in found], dtype=F64)
    ratios = torch.tensor(unpaired, dtype=F64) / paired
    reduction = torch.tensor([each.variance_reduction for each in found], dtype=F64).nanmedian()
    return {
        "coverage": covered,
        "coverage_std_error": math.sqrt(covered * (1 - covered) / len(found)),
        "true_difference": truth,
        "true_difference_std_error": truth_error,
        "mean_difference": sum(each.value for each in found) / len(found),
        "reported_std_error": float(paired.square().mean().sqrt()),
        "spread_over_repeats": float(torch.tensor([each.value for each in found]).std()),
        "unpaired_over_paired": float(ratios.median()),
        "unpaired_over_paired_5_percent": float(ratios.quantile(0.05)),
        # of a difference of exact values there is none
        "variance_reduction": None if reduction.isnan() else float(reduction),
    }


def mean_and_error(d: Tensor) -> tuple[float, float]:
    return float(d.mean()), float(d.std() / math.sqrt(len(d)))


@functools.cache
def log_p_difference() -> tuple[float, float]:
    x = TRUE.sample(4_000_000, seed=1)
    return mean_and_error(OTHER.log_prob(x) - TRUE.log_prob(x))


def exact_values(repeats: int, samples: int) -> dict[str, float | None]:
    truth = log_p_difference()
    x = TRUE.sample(repeats * samples, seed=2)
    values = {"true": TRUE.log_prob(x), "other": OTHER.log_prob(x)}
    found = []
    for start in range(0, len(x), samples):
        some = slice(start, start + samples)
        results = {name: exact(value[some]) for name, value in values.items()}
        found.append(compare(results, reference="true"))
    return figures(found, *truth)


def bounds(estimator: Estimator, repeats: int, samples: int) -> dict[str, float | None]:
    found = evaluate(TRUE.sample(repeats * samples, seed=3), estimator, 10)
    # the truth from samples and noise of its own, as many again
    other = evaluate(TRUE.sample(repeats * samples, seed=4), estimator, 20)
    mean = {name: torch.stack([run.value for run in runs]).mean(0) for name, runs in other.items()}
    truth = mean_and_error(mean["other"] - mean["true"])
    starts = range(0, repeats * samples, samples)
    return figures([one(found, slice(start, start + samples)) for start in starts], *truth)


def seeds(
    repeats: int, samples: int, runs: int, between: float, alike: float = 0.0, paired: bool = False
) -> dict[str, float | None]:
    """v_is = log p(x_i) + a_s + b_s + e_is for either side, sd of e half of a nat.

    a_s, of sd ``alike``, is the effect of seed s on both sides.
    """
    truth = log_p_difference()
    generator, found = torch.Generator().manual_seed(5), []
    for repeat in range(repeats):
        x = TRUE.sample(samples, seed=1000 + repeat)
        both = alike * torch.randn(runs, 1, generator=generator, dtype=F64) if alike else 0.0
        results = {}
        for name, law in (("true", TRUE), ("other", OTHER)):
            shift = between * torch.randn(runs, 1, generator=generator, dtype=F64)
            rest = 0.5 * torch.randn(runs, samples, generator=generator, dtype=F64)
            results[name] = [exact(value) for value in law.log_prob(x) + both + shift + rest]
        found.append(compare(results, reference="true", paired_seeds=paired))
    return figures(found, *truth)


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, sizes = time.perf_counter(), (options.repeats, options.samples)
    rows = {"log p, exact": exact_values(*sizes)}
    for name, estimator in ESTIMATORS.items():
        rows[f"bound, {name}"] = bounds(estimator, *sizes)
    for runs, between in ((2, 0.1), (3, 0.0), (3, 0.1), (3, 0.3), (5, 0.3)):
        rows[f"{runs} seeds, sd {between:g} nats"] = seeds(*sizes, runs, between)
    for paired in (False, True):
        name = f"3 seeds, sd 0.1 nats and 0.3 alike{', paired' * paired}"
        rows[name] = seeds(*sizes, 3, 0.1, 0.3, paired)
    table = Table("values", "coverage", "unpaired/paired (5 % of repeats)", "spread/reported")
    for name, row in rows.items():
        ratio = f"{row['unpaired_over_paired']:.1f} ({row['unpaired_over_paired_5_percent']:.1f})"
        coverage = f"{row['coverage']:.3f} ± {row['coverage_std_error']:.3f}"
        spread = f"{row['spread_over_repeats'] / row['reported_std_error']:.3f}"
        table.add_row(name, coverage, ratio, spread)
    Console().print(table)
    if options.output is not None:
        held = {
            "command": "python " + " ".join(sys.argv),
            "environment": environment(),
            "repeats": options.repeats,
            "samples": options.samples,
            "seconds": round(time.perf_counter() - started),
            "rows": rows,
        }
        write(options.output, held, allow_nan=False)


if __name__ == "__main__":
    main()
