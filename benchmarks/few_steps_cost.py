r"""What a reverse step costs with products of the Jacobian: seconds and memory.

    python benchmarks/few_steps_cost.py runs/digits --output FILE

A step is ``reverse.transition(x_t, t)``, without gradients: the denoiser, the products that the
variance asks for, and the normal of the step with what its density needs, evaluated at one point.
Beside it stands the bare network on the same batch.  All sides take turns, in an order that
alternates; ratios to the bare network are taken round by round, and their median is given.  The
time is the process's CPU time, as in ``steps.py``.  Peak memory is that of a process of its own
that takes one such step, less that of one that makes a bare call.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from few_steps import POSTERIOR
from rich.console import Console
from rich.table import Table
from steps import clocks, environment, write

from pyrodiff.chains import ReverseChain
from pyrodiff.variances import FixedSmall, PosteriorCovariance, Variance

STEPS = 25
BARE = "bare network"
VARIANCES: dict[str, Variance] = {
    "fixed small": FixedSmall(),
    "diagonal, 1 probe": POSTERIOR["diagonal, 1 probe"],
    "diagonal, 2 probes": POSTERIOR["diagonal, 2 probes"],
    "diagonal, 4 probes": POSTERIOR["diagonal, 4 probes"],
    "rank 2, 2 probes": PosteriorCovariance("diagonal", rank=2, probes=2),
    "full": POSTERIOR["full"],
}


def sides(run: Path, batch: int, names: list[str]) -> dict[str, Callable[[], object]]:
    """One step of each variance, and one call of the bare network."""
    reverse = ReverseChain.load(run).eval()
    x = torch.randn(batch, *reverse.event_shape, generator=torch.Generator().manual_seed(0))
    t, time = STEPS // 2, torch.zeros(batch)
    network = reverse.denoiser.network

    def step_of(variance: Variance) -> Callable[[], object]:
        chain = reverse.respaced(STEPS, variance=variance)
        return lambda: chain.transition(x, t).log_prob(x)

    found: dict[str, Callable[[], object]] = {BARE: lambda: network(x, time)}
    return found | {name: step_of(VARIANCES[name]) for name in names}


@torch.no_grad()
def interleave(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """CPU and wall seconds of each side, shape (rounds, 2)."""
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            start = clocks()
            steps[name]()
            seconds[name].append(clocks() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def row(name: str, seconds: dict[str, np.ndarray], size: int) -> dict[str, object]:
    ratios = seconds[name] / seconds[BARE]
    calls = 0 if name == BARE else 1 + VARIANCES[name].products(size)
    return {
        "variance": name,
        "calls": calls or 1,
        "ratio": float(np.median(ratios[:, 0])),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios[:, 0], [0.25, 0.75])],
        "wall_ratio": float(np.median(ratios[:, 1])),
        "milliseconds": float(1000 * np.median(seconds[name][:, 0])),
        "rounds": len(ratios),
    }


def peak_mib(run: Path, batch: int, name: str) -> float:
    """Peak memory of a process that takes one such step, MiB."""
    command = [sys.executable, __file__, str(run), "--batch", str(batch), "--only", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def show(rows: list[dict]) -> None:
    table = Table("variance", "calls", "ms", "over the bare network", "quartiles", "more MiB")
    for one in rows:
        low, high = one["ratio_quartiles"]
        cells = (f"{one['milliseconds']:.1f}", f"{one['ratio']:.2f}", f"{low:.2f}-{high:.2f}")
        more = f"{one['more_mib']:.0f}" if "more_mib" in one else ""
        table.add_row(one["variance"], str(one["calls"]), *cells, more)
    Console(width=110).print(table)


def main() -> None:
    """Print the table and store its figures; with --only, one step and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--variances", nargs="+", default=list(VARIANCES), choices=list(VARIANCES))
    parser.add_argument("--memory-of", nargs="*", default=[], choices=list(VARIANCES))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        chosen = [name for name in (options.only,) if name != BARE]
        with torch.no_grad():
            sides(options.run, options.batch, chosen)[options.only]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    seconds = interleave(sides(options.run, options.batch, options.variances), options.rounds)
    size = ReverseChain.load(options.run).event_shape.numel()
    rows = [row(name, seconds, size) for name in seconds]
    if options.memory_of:
        bare = peak_mib(options.run, options.batch, BARE)
        more = {name: peak_mib(options.run, options.batch, name) for name in options.memory_of}
        rows = [
            one | ({"more_mib": more[one["variance"]] - bare} if one["variance"] in more else {})
            for one in rows
        ]
        missing = [name for name in more if name not in seconds]
        rows += [{"variance": name, "more_mib": more[name] - bare} for name in missing]
    show([one for one in rows if "ratio" in one])
    if options.output is not None:
        facts = {
            "command": "python " + shlex.join(sys.argv),
            "batch": options.batch,
            "steps": STEPS,
        }
        write(options.output, facts | {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
