r"""How many steps does a bound need? The bound of a trained run against T, by variance and grid.

    pyrodiff fit digits --output runs/digits
    python benchmarks/few_steps.py runs/digits --samples 500 --values values/digits \
        --output benchmarks/results/few-steps-digits.json

Every row is the bound of the run's network, as trained, on a respaced chain: one path for each test
sample, and the paired difference from the run's own chain on the same samples, with its standard
error (negative: better).  Grids, calibrations and analytic variances are fitted to validation
samples.  Calls are network calls per sample and path, products with the denoiser's Jacobian
counted.

With ``--learned RUN2``, made from the run by ``pyrodiff add-variance``, its variance is one of them
under the name "learned".

With ``--grid-of NAME`` all variances stand on the optimal grid of one of them.  The latents of a
sample are then the same under all, and the denoiser's Jacobian is computed once for all of them.

The folder of ``--values`` keeps what is fitted and the values of every hundred samples of a row, as
safetensors: what is found there is not computed again, so that a long table may be made in pieces,
by several processes.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import functools
import itertools
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.data import load
from pyrodiff.denoisers import Prediction
from pyrodiff.grids import GRIDS, Grid, OptimalGrid
from pyrodiff.kernels import Level
from pyrodiff.likelihood import PathBound
from pyrodiff.serialization import read_config
from pyrodiff.serialization.weights import read_weights, write_weights
from pyrodiff.variances import (
    AnalyticVariance,
    FixedLarge,
    FixedSmall,
    PosteriorCovariance,
    Variance,
)

BLOCK = 100  # samples whose values are kept in one file

POSTERIOR = {
    "isotropic, 1 probe": PosteriorCovariance("isotropic", probes=1),
    "diagonal, 1 probe": PosteriorCovariance("diagonal", probes=1),
    "diagonal, 2 probes": PosteriorCovariance("diagonal", probes=2),
    "diagonal, 4 probes": PosteriorCovariance("diagonal", probes=4),
    "diagonal": PosteriorCovariance("diagonal"),
    "rank 2 + diagonal, 2 probes": PosteriorCovariance("diagonal", rank=2, probes=2),
    "rank 3 + diagonal": PosteriorCovariance("diagonal", rank=3),
    "rank 4 + diagonal": PosteriorCovariance("diagonal", rank=4),
    "full": PosteriorCovariance("full"),
}
CALIBRATED = ", calibrated"


@dataclass(frozen=True, repr=False)
class Remembering(PosteriorCovariance):
    """The same covariance from Jacobians that are kept by noise level.

    The denoiser is replaced by its first-order expansion at x_t, which has the same Jacobian there.
    """

    memory: ClassVar[dict[float, tuple[Tensor, Tensor, Tensor]]] = {}

    def predict(
        self, denoise: Callable[[Tensor], Prediction], x_t: Tensor, level: Level
    ) -> Prediction:
        key = float(level.log_snr)
        if key not in self.memory or not torch.equal(self.memory[key][0], x_t):
            self.memory[key] = (x_t, *expansion(denoise, x_t))
        _, x0_hat, jacobian = self.memory[key]

        def expanded(x: Tensor) -> Prediction:
            change = torch.einsum("nij,nj->ni", jacobian, (x - x_t).flatten(1))
            return Prediction(x0_hat + change.reshape(x.shape), None, None)

        return super().predict(expanded, x_t, level)


def expansion(denoise: Callable[[Tensor], Prediction], x_t: Tensor) -> tuple[Tensor, Tensor]:
    """x̂_0(x_t) and its Jacobian, (N, d, d)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        x0_hat = denoise(x).x0_hat
        rows = []
        for i in range(x[0].numel()):
            unit = torch.zeros_like(x).flatten(1)
            unit[:, i] = 1.0
            unit = unit.reshape(x.shape)
            rows.append(torch.autograd.grad(x0_hat, x, unit, retain_graph=True)[0].flatten(1))
    return x0_hat.detach(), torch.stack(rows, 1)


FIXED = {"fixed small": FixedSmall(), "fixed large": FixedLarge()}
ANALYTIC = {"analytic": False, "analytic diagonal": True}
LEARNED = "learned"
NAMES = [*FIXED, *ANALYTIC, *POSTERIOR, *(name + CALIBRATED for name in POSTERIOR)]
CALIBRATION = ("log_snrs", "weights", "scales")
PARTS = ("kind", "rank", "probes", *CALIBRATION)


def file_name(*parts: object) -> str:
    """Words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


@dataclass(frozen=True, eq=False)
class Study:
    """A run, the samples that it is judged on, and those that are fitted to.

    Args:
        reverse: the run's chain.
        x: samples that it is judged on.
        other: samples for fits.
        values: the folder for what is found.
        particles: paths for each sample.
        grid_of: the variance whose optimal grid serves all, or None.
        learned: the same network with a learned variance, or None.
    """

    reverse: ReverseChain
    x: Tensor
    other: Tensor
    values: Path
    particles: int
    grid_of: str | None
    learned: ReverseChain | None = None

    def model(self, label: str) -> ReverseChain:
        """The chain whose network is used."""
        if label != LEARNED:
            return self.reverse
        assert self.learned is not None
        return self.learned

    def block(self, name: str, chain: ReverseChain, start: int) -> Tensor:
        """Values of up to a hundred samples, nats, found or made."""
        if self.particles > 1:
            name = f"{name}-{self.particles}-paths"
        path = self.values / name / f"{start}.safetensors"
        rows = range(start, min(start + BLOCK, len(self.x)))
        if path.exists():
            value = read_weights(path)["value"]
            if len(value) >= len(rows):
                return value[: len(rows)]
        bound = PathBound(self.particles)
        result = bound.estimate(chain, self.x[start : rows.stop], seed=0, indices=rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(path, {"value": result.value})
        return result.value

    @cached_property
    def own(self) -> Tensor:
        """Values of the run's own chain."""
        return torch.cat([self.block("own", self.reverse, start) for start in self.starts])

    @property
    def starts(self) -> range:
        return range(0, len(self.x), BLOCK)

    @functools.cache  # noqa: B019  (one study for the whole program)
    def variance(self, name: str) -> Variance:
        """The variance of that name, fitted where it has to be."""
        if name == LEARNED:
            return self.model(name).variance
        if name in FIXED:
            return FIXED[name]
        if name in ANALYTIC:
            diagonal = ANALYTIC[name]
            return AnalyticVariance.fit(self.reverse, self.other, diagonal=diagonal)
        bare = POSTERIOR[name.removesuffix(CALIBRATED)]
        if not name.endswith(CALIBRATED):
            return bare
        path = self.values / f"{file_name(name, len(self.other))}.json"
        if not path.exists():
            fitted = bare.fit(self.reverse, self.other)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, {part: getattr(fitted, part) for part in CALIBRATION})
        kept = json.loads(path.read_text())
        return replace(bare, **{part: tuple(kept[part]) for part in CALIBRATION})

    @functools.cache  # noqa: B019
    def grid(self, name: str, label: str) -> Grid:
        """The grid of that name for the variance of name ``label``."""
        if name in GRIDS:
            return GRIDS[name]
        path = self.values / f"{file_name(label, 'grid', len(self.other))}.safetensors"
        if not path.exists():
            chain = self.model(label).respaced(2, variance=self.variance(label))
            path.parent.mkdir(parents=True, exist_ok=True)
            OptimalGrid.fit(chain, self.other).save(path)
        return OptimalGrid.load(path)

    def chain(self, label: str, grid: str, num_steps: int) -> ReverseChain:
        """The run's network on another chain."""
        variance, levels = self.variance(label), self.grid(grid, self.grid_of or label)
        if self.grid_of is not None and isinstance(variance, PosteriorCovariance):
            variance = Remembering(**{part: getattr(variance, part) for part in PARTS})
        return self.model(label).respaced(num_steps, variance=variance, grid=levels).eval()

    def name(self, label: str, grid: str, num_steps: int) -> str:
        """Of the folder with a row's values: all that they depend on."""
        fitted = grid not in GRIDS or label not in (*POSTERIOR, *FIXED)
        whose = f"of {self.grid_of}" if self.grid_of and grid not in GRIDS else ""
        return file_name(label, grid, whose, num_steps, len(self.other) if fitted else "")

    def rows(self, labels: list[str], grid: str, num_steps: int) -> list[dict[str, object]]:
        """Lines of the table on equal latents where the grid is the same."""
        values: dict[str, list[Tensor]] = {label: [] for label in labels}
        for start, label in itertools.product(self.starts, labels):
            chain = self.chain(label, grid, num_steps)
            values[label].append(self.block(self.name(label, grid, num_steps), chain, start))
        whose = grid if grid in GRIDS or not self.grid_of else f"optimal for {self.grid_of}"
        return [
            {"variance": label, "grid": whose, "steps": num_steps}
            | self.figures(torch.cat(values[label]), num_steps * self.calls_per_step(label))
            for label in labels
        ]

    def calls_per_step(self, label: str) -> int:
        return 1 + self.variance(label).products(self.x[0].numel())

    def figures(self, value: Tensor, calls: int) -> dict[str, object]:
        """Means and their standard errors over samples, in the unit of the table."""
        cost, difference = (self.in_units(v) for v in (-value, self.own - value))
        root = math.sqrt(len(value))
        return {
            "value": float(cost.mean()),
            "std_error": float(cost.std()) / root,
            "difference": float(difference.mean()),
            "difference_error": float(difference.std()) / root,
            "calls": calls * self.particles,
        }

    def in_units(self, nats: Tensor) -> Tensor:
        return nats / (math.log(2) * self.x[0].numel()) if self.discrete else nats

    @property
    def discrete(self) -> bool:
        return self.reverse.decoder.discrete


def tables(options: argparse.Namespace, study: Study) -> Iterator[list[dict[str, object]]]:
    """The lines of the table, those with the same grid and T together."""
    own = study.figures(study.own, study.reverse.num_steps * study.reverse.calls_per_step)
    name = f"the run's, {study.reverse.variance!r}"
    yield [{"variance": name, "grid": "own", "steps": study.reverse.num_steps} | own]
    for grid, steps in itertools.product(options.grids, options.steps):
        if study.grid_of is not None:
            yield study.rows(options.variances, grid, steps)
            Remembering.memory.clear()
        else:
            yield from (study.rows([label], grid, steps) for label in options.variances)


def show(rows: list[dict[str, object]], unit: str) -> None:
    table = Table("variance", "grid", "T", unit, "more than the run's", "calls")
    for row in rows:
        difference = f"{row['difference']:+.4f} ± {row['difference_error']:.4f}"
        words = (str(row[key]) for key in ("variance", "grid", "steps"))
        table.add_row(*words, f"{row['value']:.4f}", difference, str(row["calls"]))
    Console(width=120).print(table)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--fitted-on", type=int, default=64, help="validation samples")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--variances", nargs="+", default=NAMES, choices=[*NAMES, LEARNED])
    parser.add_argument("--learned", type=Path, help="the run with an added variance")
    parser.add_argument("--grids", nargs="+", default=["log-snr", "optimal"])
    parser.add_argument("--grid-of", choices=NAMES, help="one optimal grid for all")
    parser.add_argument("--particles", type=int, default=1, help="paths for each sample")
    parser.add_argument("--values", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--output", type=Path, help="JSON, to which the table is added")
    return parser.parse_args()


def main() -> None:
    """Print the table and store its figures."""
    options, started = parsed(), time.time()
    torch.set_num_threads(1)
    config = read_config(options.run / "config.yaml")
    data, reverse = load(config["data"]["source"]), ReverseChain.load(options.run).eval()
    x, other = data.test[: options.samples], data.validation[: options.fitted_on]
    learned = ReverseChain.load(options.learned).eval() if options.learned else None
    study = Study(reverse, x, other, options.values, options.particles, options.grid_of, learned)
    unit, rows = "bits/dim" if study.discrete else "nats", []
    for part in tables(options, study):
        rows += part
        for row in part:
            print(row, f"{time.time() - started:.0f} s", flush=True)
    show(rows, unit)
    if options.output is not None:
        command = "python " + shlex.join(sys.argv)
        facts = {"command": command, "environment": environment(), "data": repr(data)}
        facts |= {"samples": len(x), "fitted_on": len(other), "unit": unit, "rows": rows}
        add(options.output, facts)


def add(path: Path, table: dict[str, object]) -> None:
    """Put a table into a file of tables, in the place of one by the same command."""
    tables = json.loads(path.read_text())["tables"] if path.exists() else []
    kept = [one for one in tables if one["command"] != table["command"]]
    write(path, {"tables": [*kept, table]})


if __name__ == "__main__":
    main()
