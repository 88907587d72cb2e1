r"""How many steps does a bound need? Bits per dimension against T, by variance and grid.

    pyrodiff fit digits --output runs/digits
    python benchmarks/few_steps.py runs/digits --output benchmarks/results/few-steps.json

Every row is the bound of the run's network on a respaced chain, from one path for each test sample,
with the paired difference from the run's own chain on the same samples.  Grids are fitted on
validation samples.  Calls are network calls per sample and path, products with the denoiser's
Jacobian counted.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import datetime
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import write

import pyrodiff
from pyrodiff.chains import ReverseChain
from pyrodiff.data import load
from pyrodiff.grids import GRIDS, Grid, OptimalGrid
from pyrodiff.likelihood import LogLikelihood, PathBound
from pyrodiff.serialization import read_config
from pyrodiff.variances import (
    AnalyticVariance,
    FixedLarge,
    FixedSmall,
    PosteriorCovariance,
    Variance,
)

FITTED_ON = 64  # validation samples


def variances(reverse: ReverseChain, other: torch.Tensor) -> dict[str, Variance]:
    """What is compared, by name."""
    return {
        "fixed small": FixedSmall(),
        "fixed large": FixedLarge(),
        "analytic": AnalyticVariance.fit(reverse, other),
        "isotropic, 1 probe": PosteriorCovariance("isotropic", probes=1),
        "diagonal, 1 probe": PosteriorCovariance("diagonal", probes=1),
        "diagonal, 4 probes": PosteriorCovariance("diagonal", probes=4),
        "diagonal": PosteriorCovariance("diagonal"),
        "rank 3 + diagonal": PosteriorCovariance("diagonal", rank=3),
        "full": PosteriorCovariance("full"),
    }


def row(result: LogLikelihood, own: LogLikelihood) -> dict[str, float]:
    """Bits per dimension, and the difference from the run's own chain, with its error."""
    unit = result.dimensions * math.log(2)
    difference = (own.value - result.value) / unit
    return {
        "bits_per_dim": float(-result.value.mean()) / unit,
        "difference": float(difference.mean()),
        "std_error": float(difference.std()) / math.sqrt(len(difference)),
        "calls": int(result.calls[0]),
    }


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--variances", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(options.run / "config.yaml")
    data, reverse = load(config["data"]["source"]), ReverseChain.load(options.run).eval()
    x, other = data.test[: options.samples], data.validation[:FITTED_ON]
    bound, started = PathBound(1), time.time()
    own = bound.estimate(reverse, x, seed=0)
    rows: dict[str, Any] = {f"T = {reverse.num_steps}": row(own, own)}
    table = Table("variance", "grid", "T", "bits/dim", "more than the run's", "calls")
    for name, variance in variances(reverse, other).items():
        if options.variances and name not in options.variances:
            continue
        fitted = OptimalGrid.fit(reverse.respaced(2, variance=variance), other)
        grids: dict[str, Grid] = {"log-snr": GRIDS["log-snr"], "optimal": fitted}
        for grid, steps in ((g, t) for g in grids for t in options.steps):
            short = reverse.respaced(steps, variance=variance, grid=grids[grid])
            figures = row(bound.estimate(short, x, seed=0), own)
            rows[f"{name}, {grid}, T = {steps}"] = figures
            difference = f"{figures['difference']:+.4f} ± {figures['std_error']:.4f}"
            table.add_row(
                *(name, grid, str(steps), f"{figures['bits_per_dim']:.4f}", difference),
                str(figures["calls"]),
            )
            print(f"{name}, {grid}, T = {steps}: {figures}", flush=True)
    Console().print(table)
    if options.output is not None:
        write(
            options.output,
            {
                "command": "python " + " ".join(sys.argv),
                "date": datetime.date.today().isoformat(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pyrodiff": pyrodiff.__version__,
                "fit": config["fit"],
                "data": repr(data),
                "samples": len(x),
                "seconds": round(time.time() - started),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
