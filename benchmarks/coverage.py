"""How honest the errors are: `python benchmarks/coverage.py`, about twenty minutes.

A 95 % interval of ``LogLikelihood.interval`` is for the expectation of the value: for a bound, of
that bound, not log p.  Here one sample is scored again and again with fresh noise, and the share of
the intervals that hold the mean over all repeats is counted.  The models are those of
``coverage_models.py``.

``PathBound`` and ``ImportanceBound`` are functions of K independent path weights: several thousand
are drawn for each model and cut into sets of K, anew in another order until there are 2000 sets.
(The coverage counted has a standard error of 0.5 %, as if all sets were of fresh weights: measured
over 60 repeats of normal draws; more where a few weights of thousands have all the say.)  The
lower bound of ``SandwichBound`` is the importance bound.
The other estimators are called once for each of 1000 repeats, for fewer models.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from coverage_models import SCHEDULES, Case, build, models
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood import (
    Dequantized,
    Estimator,
    LogLikelihood,
    ParticleBound,
    PathBound,
    ProbabilityFlow,
    UniformDequantizer,
)
from pyrodiff.likelihood.estimator import Batch
from pyrodiff.likelihood.paths.elbo import summary, weights_and_jump
from pyrodiff.likelihood.statistics import Summary, log_mean_of_weights

RESULT = Path(__file__).parent / "results" / "coverage-weights.json"
COUNTS = (4, 16, 64)
SETS, REPEATS, ROWS = 2000, 1000, 2048
LOW, HIGH = 0.93, 0.97
LABELS = ("schedule", "num_steps", "size", "denoiser", "variance")

# models of the estimators that are called as they are
FEW = (
    ("linear", 25, 1, "exact"),
    ("cosine", 10, 3, "exact"),
    ("log-snr", 10, 1, "trained"),
    ("log-snr", 50, 3, "trained"),
    ("linear", 25, 1, "biased"),
    ("cosine", 50, 16, "exact"),
    ("linear", 25, 3, "zero"),
)


class Draws(PathBound):
    """Weights of paths, and their summands at the jump of λ beside them, as ``log_weights``."""

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        weights = torch.cat(weights_and_jump(reverse, batch, self.particles), 1)
        value = weights.mean(1)
        calls = torch.zeros(len(value), dtype=torch.int64)
        return LogLikelihood(
            value=value,
            std_error=value,
            kind="estimate",
            calls=calls,
            dimensions=1,
            estimator=repr(self),
            log_weights=weights,
        )


def repeat(estimator: Estimator, case: Case, repeats: int) -> LogLikelihood:
    """The sample's estimate ``repeats`` times, each with noise of its own."""
    x_0 = case.x_0.expand(repeats, -1)
    return estimator.estimate(case.reverse, x_0, indices=range(repeats), batch_size=ROWS)


def draws_of(case: Case, folder: Path | None) -> Tensor:
    """log w and its summand at the jump of λ, (2, thousands), from the folder where they are."""
    path = folder and folder / f"{'-'.join(map(str, case.labels.values()))}.pt"
    if path and path.is_file():
        return torch.load(path, weights_only=True)
    size, num_steps = case.x_0.shape[1], case.reverse.num_steps
    few = size > 16 and num_steps > 50
    number = 2048 if few else 8192 if size > 16 or num_steps > 50 else 16384
    found = repeat(Draws(64), case, number // 64).log_weights
    assert found is not None
    draws = torch.stack([part.flatten() for part in found.chunk(2, 1)])
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(draws, path)
    return draws


def sets_of(draws: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sets of ``count`` draws, (sets, count): all draws in several orders."""
    number = draws.shape[1]
    generator = torch.Generator().manual_seed(count)
    orders = range(math.ceil(SETS * count / number))
    order = torch.cat([torch.randperm(number, generator=generator) for _ in orders])
    log_w, jump = (values[order].reshape(-1, count) for values in draws)
    return log_w, jump


def result(found: Summary) -> LogLikelihood:
    """What the estimators make of a summary."""
    calls = torch.zeros(len(found.value), dtype=torch.int64)
    options = {"degrees_of_freedom": found.degrees_of_freedom, "remarks": found.remarks}
    return LogLikelihood(found.value, found.std_error, "estimate", calls, 1, "benchmark", **options)


def row(name: str, count: int, case: Case, found: LogLikelihood, truth: float | None) -> dict:
    """How many intervals hold the truth, by default the mean over repeats."""
    truth = float(found.value.mean()) if truth is None else truth
    low, high = found.interval()
    known = found.std_error.isfinite()
    inside = ((low <= truth) & (truth <= high))[known].double()
    some = bool(known.any())
    return {
        "estimator": name,
        "count": count,
        **case.labels,
        "repeats": len(found.value),
        "known": round(float(known.double().mean()), 4),
        "coverage": round(float(inside.mean()), 4) if some else None,
        "std_error": float(f"{found.std_error[known].square().mean().sqrt():.4g}")
        if some
        else None,
        "spread": float(f"{found.value.std():.4g}"),
    }


def of_weights(case: Case, folder: Path | None) -> Iterator[dict]:
    """Rows of the path and importance bounds of one model."""
    draws = draws_of(case, folder)
    for count in COUNTS:
        log_w, jump = sets_of(draws, count)
        truth = float(draws[0].mean())
        yield row("PathBound", count, case, result(summary(log_w, jump)), truth)
        found = result(log_mean_of_weights(log_w))
        yield row("ImportanceBound", count, case, found, None)
        found = result(log_mean_of_weights(log_w, debiased=True))
        yield row("ImportanceBound, jackknife", count, case, found, None)


def called(labels: Sequence[tuple]) -> Iterator[dict]:
    """Rows of the other estimators."""
    for label in labels:
        case = build(*label)
        for count in COUNTS[1:]:
            found = repeat(ParticleBound(count, compare=False), case, REPEATS)
            yield row("ParticleBound", count, case, found, None)
        # bins of a width at which the density varies
        bins = UniformDequantizer(0.2)
        for count in COUNTS[1:]:
            for name, importance in (("Dequantized", False), ("Dequantized, importance", True)):
                estimator = Dequantized(PathBound(1), bins, count, importance)
                yield row(name, count, case, repeat(estimator, case, REPEATS), None)


def flows() -> Iterator[dict]:
    """Rows of the probability flow, whose solves take hundreds of calls."""
    for label in (("log-snr", 50, 1, "exact"), ("linear", 25, 3, "trained")):
        case = build(*label)
        for name, options in (
            ("ProbabilityFlow", {}),
            ("ProbabilityFlow, importance", {"importance": True}),
            ("ProbabilityFlow, scaled", {"offset": "scaled", "exact_up_to": 0}),
        ):
            if name.endswith("scaled") and label[2] == 1:
                continue  # in one dimension no divergence is random
            estimator = ProbabilityFlow(particles=16, rtol=1e-3, atol=1e-3, **options)
            yield row(name, 16, case, repeat(estimator, case, 500), None)


def judged(rows: Sequence[dict]) -> Table:
    """For each estimator and K: how many rows have errors, and the coverage of these."""
    groups: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for each in rows:
        groups[each["estimator"], each["count"]].append(each)
    table = Table(title=f"coverage of 95 % intervals; outside: beyond {LOW:.0%} … {HIGH:.0%}")
    for name in ("estimator", "K", "rows", "with errors", "least", "median", "most", "outside"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for (name, count), group in groups.items():
        some = sorted(each["coverage"] for each in group if each["known"] >= 0.05)
        outside = sum(not LOW <= value <= HIGH for value in some)
        figures = (some[0], some[len(some) // 2], some[-1]) if some else (math.nan,) * 3
        cells = (f"{100 * value:.1f}" for value in figures)
        table.add_row(name, str(count), str(len(group)), str(len(some)), *cells, str(outside))
    return table


def outside(rows: Sequence[dict]) -> Iterator[str]:
    """The rows whose coverage is not within the ends, one line each."""
    for each in rows:
        if each["known"] >= 0.05 and not LOW <= each["coverage"] <= HIGH:
            model = " ".join(str(each[label]) for label in LABELS)
            counted = f"{each['coverage']:.3f} of {each['known']:.2f} × {each['repeats']}"
            yield f"{each['estimator']}({each['count']}), {model}: {counted}"


def parts(quick: bool, folder: Path | None = None) -> dict[str, Callable[[], Iterator[dict]]]:
    """The rows by name of their part."""
    limits = {"steps": (10, 50), "sizes": (1, 3)} if quick else {}

    def weights(schedule: str) -> Iterator[dict]:
        for case in models((schedule,), **limits):
            yield from of_weights(case, folder)

    by_schedule = {name: partial(weights, name) for name in SCHEDULES}
    return by_schedule | {"called": partial(called, FEW[: 2 if quick else None]), "flows": flows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = parts(quick=False)
    parser.add_argument("--parts", nargs="+", choices=every, default=[*every], metavar="PART")
    parser.add_argument("--show", action="store_true", help="print the stored table, run nothing")
    parser.add_argument("--quick", action="store_true", help="T ≤ 50 and d ≤ 3 alone; not stored")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON; other parts stay in it")
    parser.add_argument("--draws", type=Path, help="a folder that keeps the weights of each model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, output = [], options.output
    if output.is_file() and not options.quick:
        rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    for name in [] if options.show else options.parts:
        start = time.perf_counter()
        fresh = []
        for each in parts(options.quick, options.draws)[name]():
            fresh.append({"part": name} | each)
            print(*fresh[-1].values())
            sys.stdout.flush()
        print(f"{name}: {time.perf_counter() - start:.0f} s")
        rows = [row for row in rows if row["part"] != name] + fresh
        if not options.quick:
            write(output, {"environment": environment(), "allowed": [LOW, HIGH], "rows": rows})
    console = Console()
    console.width = max(console.width, 100)
    console.print(judged(rows))
    for line in outside(rows):
        print(line)


if __name__ == "__main__":
    main()
