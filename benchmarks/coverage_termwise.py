"""How often the termwise bound's 95 % intervals cover it, and what a call is worth.

    python benchmarks/coverage_termwise.py                 # all models: about half an hour
    python benchmarks/coverage_termwise.py --sizes 1 --steps 10 --repeats 500

A row is a model of ``coverage_models``, a budget of network calls, and whether there is a pilot (of
4,000 calls on other data).  One sample is scored ``--repeats`` times with noise of its own; the
bound is the mean of all rows of a model, weighted by their precision.  Ratios are of variance ×
calls: to that of every t once, and of a pilot to none.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import time
from pathlib import Path

import torch
from coverage_models import DENOISERS, SCHEDULES, SIZES, STEPS, Case, models
from steps import environment, write

from pyrodiff.likelihood import LogLikelihood, Pilot, TermwiseBound

BUDGETS = (8, 16, 32, 64, 128)
PILOT_CALLS = 4_000
ROUNDING = 1e-6  # of the bound: rows that vary less are exact


def repeat(case: Case, bound: TermwiseBound, repeats: int, seed: int) -> LogLikelihood:
    x_0 = case.x_0.expand(repeats, -1)
    size = x_0.shape[1]
    return bound.estimate(case.reverse, x_0, seed=seed, batch_size=max(256, 65_536 // size))


def every_step_cost(case: Case, passes: int = 40, budget: int = 40_000) -> float:
    """Variance × calls of every t once: T Σ_t Var L_t."""
    num_steps = case.reverse.num_steps
    result = repeat(case, TermwiseBound(), max(passes, budget // num_steps), seed=99)
    assert result.terms is not None
    return float(result.terms.var(0).sum()) * num_steps


def rows_of(case: Case, repeats: int) -> list[dict[str, object]]:
    pilot = Pilot.fit(case.reverse, case.other, calls=PILOT_CALLS, seed=7)
    settings = [(budget, used) for budget in BUDGETS for used in (None, pilot)]
    results = [
        repeat(case, TermwiseBound(budget, pilot=used), repeats, seed=budget)
        for budget, used in settings
    ]
    precision = [1 / max(float(r.value.var()), 1e-300) for r in results]
    means = [float(r.value.mean()) for r in results]
    bound = sum(p * m for p, m in zip(precision, means, strict=True)) / sum(precision)
    every, rows = every_step_cost(case), []
    for (budget, used), result in zip(settings, results, strict=True):
        low, high = result.interval()
        known = low.isfinite()
        covered = ((low <= bound) & (bound <= high))[known]
        variance = float(result.value.var())
        rows.append(
            case.labels
            | {
                "budget": budget,
                "pilot": used is not None,
                "exact": variance < (ROUNDING * bound) ** 2,
                "coverage": float(covered.double().mean()) if int(known.sum()) else None,
                "known": float(known.double().mean()),
                "std_error": float(result.std_error.square().mean().sqrt()),
                "spread": variance**0.5,
                "every_t_once": variance * budget / every if every > 0 else None,
            }
        )
    return rows


def summary(rows: list[dict[str, object]]) -> None:
    for budget in BUDGETS:
        for used in (False, True):
            some = [r for r in rows if r["budget"] == budget and r["pilot"] is used]
            some = [r for r in some if not r["exact"]]
            covered = [float(str(r["coverage"])) for r in some if r["coverage"] is not None]
            inside = sum(0.93 <= c <= 0.97 for c in covered)
            ratio = sorted(float(str(r["every_t_once"])) for r in some if r["every_t_once"]) or [
                0.0
            ]
            print(
                f"{budget:4d} calls {'with a pilot' if used else 'alone':13s}"
                f" rows {len(some):3d}, intervals in {len(covered):3d}, 93-97 % in {inside:3d}, "
                f"least {min(covered, default=float('nan')):.3f}, "
                f"most {max(covered, default=float('nan')):.3f};"
                f" to every t once: median {ratio[len(ratio) // 2]:.3f}, most {ratio[-1]:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1500)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--denoisers", nargs="+", default=list(DENOISERS))
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, rows = time.time(), []
    chosen = (options.schedules, options.steps, options.sizes, options.denoisers)
    for case in models(*chosen):
        rows += rows_of(case, options.repeats)
        labels = "/".join(str(v) for v in case.labels.values())
        print(f"{time.time() - start:6.0f} s  {labels}", flush=True)
    summary(rows)
    if options.output is not None:
        stored = {"environment": environment(), "repeats": options.repeats, "rows": rows}
        write(options.output, stored)


if __name__ == "__main__":
    main()
