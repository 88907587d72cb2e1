r"""Posterior samples and the evidence of a mixture observed through a random linear operator.

    python benchmarks/conditioning.py --output benchmarks/results/conditioning-mixture.json

The protocol of Cardoso, Janati, Le Corff and Moulines (2024): 25 Gaussians of unit covariance with
means (8i, 8j, 8i, …), i, j = −2 … 2, and random weights; y = A x + s ε, where the singular values
of A, and s over the largest, are uniform on [0, 1].  Denoiser, evidence and posterior are exact.
Samples are compared with as many exact ones by the largest of their W2 distances along random
directions, beside that of two exact sets.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff import ForwardChain, LogSNRSchedule, NoiseDenoiser, PosteriorCovariance, ReverseChain
from pyrodiff.conditioning import TwistedSMC
from pyrodiff.oracles import GaussianMixture

F64 = torch.float64
DIRECTIONS = 1000
DRAWS = 1000


class Problem(NamedTuple):
    """A mixture, a measurement, and what is exact about it."""

    law: GaussianMixture
    matrix: Tensor
    scale: float
    y: Tensor
    log_evidence: float


def problem(size: int, observed: int, seed: int) -> Problem:
    """The seed's mixture, operator and measurement."""
    generator = torch.Generator().manual_seed(seed)
    grid = [(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    means = torch.tensor(grid, dtype=F64).repeat(1, size // 2)
    weights = torch.rand(25, generator=generator, dtype=F64)
    law = GaussianMixture(weights / weights.sum(), means, 1.0)
    left, _, right = torch.linalg.svd(
        torch.randn(observed, size, generator=generator, dtype=F64), full_matrices=False
    )
    values = torch.rand(observed, generator=generator, dtype=F64)
    matrix = left @ torch.diag(values) @ right
    scale = float(torch.rand((), generator=generator, dtype=F64) * values.max())
    x = law.sample(1, seed=10_000 + seed)
    y = x @ matrix.mT + scale * torch.randn(1, observed, generator=generator, dtype=F64)
    spread = matrix @ matrix.mT + scale**2 * torch.eye(observed, dtype=F64)
    parts = torch.distributions.MultivariateNormal(means @ matrix.mT, spread).log_prob(y)
    return Problem(law, matrix, scale, y, float((law.weights.log() + parts).logsumexp(0)))


def program(reverse: ReverseChain, task: Problem) -> Callable[[Tensor], Tensor]:
    """The measurement as a Pyro program."""

    def measured(y: Tensor) -> Tensor:
        x = reverse(num_samples=1)
        return pyro.sample("y", dist.Normal(x @ task.matrix.mT, task.scale).to_event(1), obs=y)

    return measured


def largest_w2(x: Tensor, y: Tensor) -> float:
    """The largest W2 distance of equally many points along random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], DIRECTIONS, generator=generator, dtype=F64)
    directions = directions / directions.norm(dim=0)
    gaps = (x.double() @ directions).sort(0).values - (y.double() @ directions).sort(0).values
    return float(gaps.square().mean(0).sqrt().max())


def one(options: argparse.Namespace, observed: int, seed: int) -> dict[str, float]:
    """The errors of one run."""
    task = problem(options.dimensions, observed, seed)
    schedule = LogSNRSchedule(maximum=7.5, minimum=-10.0)
    forward = ForwardChain(schedule, num_steps=options.steps)
    variance = PosteriorCovariance("full")
    if options.rank is not None:
        variance = PosteriorCovariance("diagonal", rank=options.rank, probes=1)
    denoiser, shape = NoiseDenoiser(task.law.network()), (options.dimensions,)
    reverse = ReverseChain(denoiser, forward, shape, variance).eval()
    smc = TwistedSMC(program(reverse, task), reverse, particles=options.particles)
    started = time.process_time()
    posterior = smc.run(task.y, seed=seed)
    seconds = time.process_time() - started
    low, high = posterior.interval(0.95)
    exact = task.law.posterior(task.matrix, task.y[0], task.scale)
    draws = exact.sample(DRAWS, seed=seed)
    return {
        "error": posterior.log_evidence - task.log_evidence,
        "std_error": posterior.std_error,
        "covered": float(low <= task.log_evidence <= high),
        "effective": posterior.effective_samples,
        "pareto_k": posterior.pareto_k,
        "calls": posterior.calls,
        "seconds": seconds,
        "w2": largest_w2(posterior.resample(DRAWS, seed=seed), draws),
        "w2_exact": largest_w2(exact.sample(DRAWS, seed=seed + 1), draws),
    }


def row(runs: list[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and their errors."""
    known = [r for r in runs if not math.isnan(r["std_error"])]
    errors = [r["error"] for r in runs]
    means = {key: statistics.fmean(r[key] for r in runs) for key in ("effective", "w2", "w2_exact")}
    return {
        "runs": len(runs),
        "mean_error": statistics.fmean(errors),
        "mean_error_std_error": statistics.stdev(errors) / math.sqrt(len(errors)),
        "sd_error": statistics.stdev(errors),
        "errors_known": len(known),
        "covered": statistics.fmean(r["covered"] for r in known) if known else math.nan,
        "median_std_error": statistics.median(r["std_error"] for r in known) if known else math.nan,
        "seconds": statistics.median(r["seconds"] for r in runs),
        "calls": runs[0]["calls"],
        **means,
    }


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimensions", type=int, default=8)
    parser.add_argument("--observed", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--particles", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    table = Table("observed", "log Ẑ − exact", "sd", "covered", "effective", "W2", "of exact", "s")
    for observed in options.observed:
        runs = [one(options, observed, seed) for seed in range(options.seeds)]
        figures = rows[f"d_y = {observed}"] = row(runs)
        table.add_row(
            str(observed),
            f"{figures['mean_error']:+.4f} ± {figures['mean_error_std_error']:.4f}",
            f"{figures['sd_error']:.4f}",
            f"{100 * figures['covered']:.0f} % of {figures['errors_known']}",
            f"{figures['effective']:.0f}",
            f"{figures['w2']:.2f}",
            f"{figures['w2_exact']:.2f}",
            f"{figures['seconds']:.1f}",
        )
    Console().print(table)
    if options.output is not None:
        write(
            options.output,
            {
                "command": "python " + " ".join(sys.argv),
                **environment(),
                "dimensions": options.dimensions,
                "particles": options.particles,
                "steps": options.steps,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
