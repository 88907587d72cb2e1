"""How far each estimator stands from the exact log-likelihood: `python benchmarks/likelihood.py`.

The data are a mixture of ten Gaussians in 64 dimensions and the denoiser is the optimal one, so
that exact − value is looseness and Monte Carlo error, and none of it is training.  The model is
the chain, not the mixture: with variances that do not fit (``FixedSmall``, whose p(x_0 | x_1) is
too narrow for continuous data) its own log-likelihood lies below the exact one, and what no
estimator recovers is that.

The importance bounds come from one set of weights: a sample's 256 are cut into groups of K, whose
values are averaged; the first group's value is that of ``ImportanceBound(K)``.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rich
import torch
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import DataDenoiser
from pyrodiff.likelihood import (
    DenoisedTwist,
    Estimator,
    ImportanceBound,
    LogLikelihood,
    MarginalTwist,
    ParticleBound,
    PathBound,
    Pilot,
    ProbabilityFlow,
    SandwichBound,
    TermwiseBound,
)
from pyrodiff.likelihood.particles.twists import Twist
from pyrodiff.likelihood.statistics import log_mean_of_weights, pseudo_values
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import LinearSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, Variance

SIZE, COMPONENTS, SCALE = 64, 10, 0.12  # the scale puts the bound a nat below, FixedLarge
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH = 512
VARIANCES: dict[str, Variance] = {"large": FixedLarge(), "small": FixedSmall()}
TARGET = {"estimator": "ImportanceBound(32)", "variance": "FixedLarge()", "nats": 0.15}


def mixture() -> GaussianMixture:
    """Equal weights, means ~ N(0, I), isotropic components."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(COMPONENTS, SIZE, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.full((COMPONENTS,), 1 / COMPONENTS), means, SCALE)


@dataclass(frozen=True)
class Case:
    """A model, data that are judged, and other data for pilots and twists."""

    law: GaussianMixture
    reverse: ReverseChain
    test: Tensor
    train: Tensor

    def row(self, name: str, value: Tensor, error: Tensor, calls: float, x: Tensor) -> dict:
        """Figures of values and their standard errors, (N,) or (N, groups), nats."""
        groups = value.reshape(len(x), -1)
        gap = self.law.log_prob(x).unsqueeze(1) - groups
        return {
            "variance": repr(self.reverse.variance),
            "estimator": name,
            "calls": calls,
            "gap": float(gap.mean()),
            "gap_std_error": float(gap.mean(1).std() / math.sqrt(len(x))),
            "sd": float((gap - gap.mean()).square().mean().sqrt()),
            "reported_std_error": float(error.nanmean()),
            "known_errors": float(error.isfinite().double().mean()),
            "groups": groups.shape[1],
        }

    def judged(self, name: str, result: LogLikelihood, x: Tensor | None = None) -> dict:
        x = self.test if x is None else x
        return self.row(name, result.value, result.std_error, result.network_evaluations, x)


def estimators(case: Case) -> dict[str, Callable[[], Estimator]]:
    """All but the importance bounds, by name; what is fitted is fitted to the training data."""
    reverse, train = case.reverse, case.train
    exact = {"exact_up_to": SIZE}
    return {
        "TermwiseBound(), every t": TermwiseBound,
        "TermwiseBound(128)": lambda: TermwiseBound(128),
        "TermwiseBound(128, pilot)": lambda: TermwiseBound(128, pilot=Pilot.fit(reverse, train)),
        "PathBound(8)": lambda: PathBound(8),
        "ParticleBound(32, DenoisedTwist)": lambda: particle(DenoisedTwist()),
        "ParticleBound(32, DenoisedTwist.fit)": lambda: particle(
            DenoisedTwist.fit(reverse, train[:512])
        ),
        "ParticleBound(32, MarginalTwist.fit)": lambda: particle(MarginalTwist.fit(train)),
        "ProbabilityFlow()": ProbabilityFlow,
        "ProbabilityFlow(exact ∇·)": lambda: ProbabilityFlow(**exact),
        "ProbabilityFlow(scaled)": lambda: ProbabilityFlow("scaled"),
        "ProbabilityFlow(scaled, exact ∇·)": lambda: ProbabilityFlow("scaled", **exact),
    }


def particle(twist: Twist) -> ParticleBound:
    return ParticleBound(32, twist=twist, compare=False)  # the importance bounds stand beside it


def importance(case: Case) -> Iterator[dict]:
    """A row for each K, plain and by the jackknife, from one set of weights."""
    most = max(COUNTS)
    result = ImportanceBound(most).estimate(case.reverse, case.test, batch_size=BATCH)
    assert result.log_weights is not None
    for count in COUNTS:
        groups = result.log_weights.unflatten(1, (-1, count))
        calls = float(count * case.reverse.num_steps)
        value, std_error, _, _ = log_mean_of_weights(groups)
        yield case.row(f"ImportanceBound({count})", value, std_error, calls, case.test)
        if count >= 8:
            value = pseudo_values(groups).mean(-1)
            name = f"ImportanceBound({count}, jackknife)"
            yield case.row(name, value, std_error, calls, case.test)


def sandwich(case: Case) -> Iterator[dict]:
    """Both bounds, for samples of the model."""
    found = SandwichBound(32).estimate(case.reverse, len(case.test), batch_size=BATCH)
    gap = found.gap()
    for side in ("lower", "upper"):
        row = case.judged(f"SandwichBound(32), {side}", getattr(found, side), found.x_0)
        yield row | {"upper_minus_lower": [gap.value, gap.between_samples]}


def figures(case: Case) -> Iterator[dict]:
    for name, make in estimators(case).items():
        start = time.perf_counter()
        result = make().estimate(case.reverse, case.test, batch_size=BATCH)
        row = case.judged(name, result)
        yield row | {"shared_calls": result.shared_calls, "wall_s": time.perf_counter() - start}
    yield from importance(case)
    yield from sandwich(case)


def make_case(variance: Variance, samples: int, num_steps: int) -> Case:
    law = mixture()
    forward = ForwardChain(LinearSchedule(), num_steps)
    reverse = ReverseChain(DataDenoiser(law.network("data")), forward, (SIZE,), variance)
    return Case(law, reverse, law.sample(samples, seed=1), law.sample(4096, seed=2))


def show(row: dict) -> dict:
    rich.print(f"[dim]{row['variance']:>12} {row['estimator']:<36} {row['gap']:9.3f}[/]")
    return row


def table(rows: list[dict]) -> Table:
    view = Table(title="exact − value, nats: 10 Gaussians in 64 dimensions, the optimal denoiser")
    for heading in ("variance", "estimator"):
        view.add_column(heading, no_wrap=True)
    for heading in ("calls", "gap", "±", "sd", "reported ±"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        view.add_row(
            row["variance"],
            row["estimator"],
            f"{row['calls']:,.0f}",
            f"{row['gap']:.3f}",
            f"{row['gap_std_error']:.3f}",
            f"{row['sd']:.3f}",
            f"{row['reported_std_error']:.3f}",
        )
    return view


def requirement(rows: list[dict]) -> dict:
    """Whether the importance bound is as near as it should be, and how far the plain bound is."""
    found = {row["estimator"]: row for row in rows if row["variance"] == TARGET["variance"]}
    gap = found[TARGET["estimator"]]["gap"]
    plain = found["PathBound(8)"]["gap"]
    return TARGET | {"gap": gap, "elbo_gap": plain, "met": gap <= TARGET["nats"]}


def store(path: Path, rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """Add rows to those stored of other variances, and write all; returns them."""
    stored = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": []}
    known = {row["variance"] for row in rows}
    every = [*(row for row in stored["rows"] if row["variance"] not in known), *rows]
    setting = {
        "dimensions": SIZE,
        "components": COMPONENTS,
        "scale": SCALE,
        "schedule": repr(LinearSchedule()),
        "num_steps": options.num_steps,
        "samples": options.samples,
        "dtype": "float64",
    }
    command = " ".join(["python", *sys.argv])
    run = {"command": command, "environment": environment(), "setting": setting}
    result = {"unit": "nats", "runs": [*stored["runs"], run], "rows": every}
    if any(row["variance"] == TARGET["variance"] for row in every):
        result["requirement"] = requirement(every)
    write(path, result)
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--variances", nargs="+", choices=VARIANCES, default=list(VARIANCES))
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "likelihood-mixture.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    for name in options.variances:
        case = make_case(VARIANCES[name], options.samples, options.num_steps)
        rows = store(options.output, [show(row) for row in figures(case)], options)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table(rows))
    if any(row["variance"] == TARGET["variance"] for row in rows):
        console.print(json.dumps(requirement(rows)))
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
