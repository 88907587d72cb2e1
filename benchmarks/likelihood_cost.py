"""What the estimators cost beside their network: `python benchmarks/likelihood_cost.py`.

throughput  Rate of network calls inside an estimator over that of the bare network.  The shapes of
            the calls are recorded once and the bare side repeats them: forward passes, for
            ``ProbabilityFlow`` with a backward pass each.  Both sides alternate (A B, B A, …).
memory      Peak resident memory of a fresh process for each case, images of 28×28.
batches     Values of the same samples for batch sizes 1, 7 and 64.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rich
import torch
from rich.console import Console
from rich.table import Table
from steps import environment, interleave, timed, write
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.data import load
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import (
    Estimator,
    ImportanceBound,
    LogLikelihood,
    ParticleBound,
    PathBound,
    Pilot,
    ProbabilityFlow,
    TermwiseBound,
)
from pyrodiff.networks import ResidualMLP
from pyrodiff.runs.build import make_model
from pyrodiff.runs.settings import FitSettings, recipe
from pyrodiff.schedules import LinearSchedule

SHORT = {"validation_evaluations": 2, "evaluations": 2}  # not used; the defaults need T >= 64
LEAST_RATE, MOST_MEMORY = 0.95, 4.0  # of the bare network's; GiB
MEMORY_CASES = [  # estimator, network, samples, steps
    *itertools.product(("importance", "particle"), ("small",), (4, 16, 64), (25,)),
    *itertools.product(("importance", "particle"), ("small",), (4,), (400,)),
    *itertools.product(("importance",), ("recipe",), (4,), (2, 4)),
    ("importance", "unet", 4, 2),
]


def perturbed(reverse: ReverseChain) -> ReverseChain:
    """With output layers that are not zero, as fresh ones are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reverse.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise)
    return reverse


@dataclass(frozen=True)
class Model:
    """A model, data for it and for a pilot, and the rows of a network call."""

    reverse: ReverseChain
    x: Tensor
    train: Tensor
    rows: int


def mlp(blocks: int, num_steps: int) -> Model:
    torch.manual_seed(0)
    network = ResidualMLP((64,), width=256, blocks=blocks)
    forward = ForwardChain(LinearSchedule(), num_steps)
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
    return Model(perturbed(ReverseChain(NoiseDenoiser(network), forward, (64,))), x, x, 256)


def images(network: str | None, num_steps: int) -> Model:
    """The model that ``pyrodiff fit digits`` trains, or the same with another network."""
    torch.manual_seed(0)
    data = load("digits")
    settings = FitSettings(network=network, num_steps=num_steps, **SHORT)
    settings = recipe(settings, image=True, levels=data.levels)
    reverse = make_model(settings, tuple(data.event_shape), data.levels)
    return Model(perturbed(reverse), data.test, data.train, 64)


# name: the model for so many steps, and few enough steps for a pair of runs within a second
MODELS: dict[str, tuple[Callable[[int], Model], int]] = {
    "ResidualMLP, 4 blocks": (lambda steps: mlp(4, steps), 40),
    "ResidualMLP, 8 blocks": (lambda steps: mlp(8, steps), 24),
    "ResidualConvNet, digits": (lambda steps: images(None, steps), 20),
    "UNet, digits": (lambda steps: images("unet", steps), 4),
}


def estimators(model: Model, num_steps: int) -> dict[str, tuple[Estimator, int]]:
    """Estimators, and how many samples of each fill the rows of a network call."""
    rows, calls = model.rows, min(128, 2 * num_steps)
    pilot = Pilot.fit(model.reverse, model.train, batch_size=rows, calls=6400)
    return {
        "TermwiseBound": (TermwiseBound(calls), rows),
        "TermwiseBound, pilot": (TermwiseBound(calls, pilot=pilot), rows),
        "PathBound(8)": (PathBound(8), rows // 8),
        "ImportanceBound(32)": (ImportanceBound(32), rows // 32),
        "ParticleBound(8)": (ParticleBound(8, compare=False), rows // 8),
        # few and coarse steps: it is the rate that is looked at
        "ProbabilityFlow": (
            ProbabilityFlow(rtol=0.1, atol=0.1, exact_up_to=0, max_steps=10_000),
            rows // 2,
        ),
    }


def record(network: nn.Module, run: Callable[[], object]) -> list[tuple[int, bool]]:
    """Rows of each network call that ``run`` makes, and whether it is differentiated."""
    calls: list[tuple[int, bool]] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        calls.append((len(arguments[0]), arguments[0].requires_grad))

    handle = network.register_forward_pre_hook(note)
    run()
    handle.remove()
    return calls


def bare(network: nn.Module, x: Tensor, calls: list[tuple[int, bool]]) -> Callable[[], None]:
    """The recorded calls, and nothing else."""
    time, probe = torch.linspace(-5, 5, len(x)), torch.ones_like(x)

    def run() -> None:
        network.eval()
        for rows, differentiated in calls:
            with torch.set_grad_enabled(differentiated):
                part = x[:rows].requires_grad_(differentiated)
                y = network(part, time[:rows])
                if differentiated:
                    torch.autograd.grad(y, part, probe[:rows])

    return run


def median_interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the median."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (4000, len(values))), axis=1)
    return [float(q) for q in np.quantile(medians, [0.025, 0.975])]


def rate(name: str, label: str, estimator: Estimator, model: Model, count: int, pairs: int) -> dict:
    """The figures of one estimator on one model, ``count`` samples at a time."""
    network, x = model.reverse.denoiser.network, model.x[:count]

    def ours() -> LogLikelihood:
        return estimator.estimate(model.reverse, x, batch_size=model.rows)

    calls = record(network, ours)
    x_t = torch.randn(model.rows, *x.shape[1:], generator=torch.Generator().manual_seed(3))
    seconds = interleave(timed(ours, 1), timed(bare(network, x_t, calls), 1), pairs)
    ratios = seconds[:, 1] / seconds[:, 0]  # bare over ours: the same calls in more time
    cpu, wall = np.median(ratios, axis=0)
    medians = np.median(seconds, axis=0)
    least = seconds[:, :, 0].min(0)  # the quietest run of each side: other work only adds time
    return {
        "network": name,
        "estimator": label,
        "rate": float(cpu),
        "rate_of_quietest": float(least[1] / least[0]),
        "rate_95": median_interval(ratios[:, 0]),
        "wall_rate": float(wall),
        "wall_rate_95": median_interval(ratios[:, 1]),
        "ours_s": float(medians[0, 0]),
        "bare_s": float(medians[1, 0]),
        "network_calls": len(calls),
        "rows": sum(n for n, _ in calls),
        "rows_per_call": model.rows,
        "pairs": pairs,
        "met": bool(cpu >= LEAST_RATE),
    }


def throughput(pairs: int, chosen: list[str], without: list[str]) -> Iterator[dict]:
    for name in chosen:
        make, num_steps = MODELS[name]
        model = make(num_steps)
        for label, (estimator, count) in estimators(model, num_steps).items():
            if label not in without:
                row = rate(name, label, estimator, model, count, pairs) | {"num_steps": num_steps}
                figures = (row["rate"], row["rate_of_quietest"], row["ours_s"])
                rich.print(f"[dim]{name:<24} {label:<22}", *(f"{v:.3f}" for v in figures))
                yield row


def memory_model(network: str, num_steps: int) -> ReverseChain:
    """A model of 28×28 images of 256 levels: the recipe's, a small one of its kind, the U-Net."""
    chosen = {"small": {"width": 8, "blocks": 1}, "recipe": {}, "unet": {"network": "unet"}}
    settings = FitSettings(num_steps=num_steps, **SHORT, **chosen[network])
    settings = recipe(settings, image=True, levels=256)
    return perturbed(make_model(settings, (1, 28, 28), 256))


def peak() -> float:
    """Peak resident memory of this process, GiB."""
    kilo = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilo / (2**30 if sys.platform == "darwin" else 2**20)


def memory_case(estimator: str, network: str, samples: int, num_steps: int) -> dict:
    """One case, in a process that has done nothing else."""
    torch.set_num_threads(1)
    reverse = memory_model(network, num_steps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (samples, 1, 28, 28), generator=generator) / 127.5 - 1
    before = peak()
    kinds = {"importance": ImportanceBound(64), "particle": ParticleBound(64, compare=False)}
    kinds[estimator].estimate(reverse, x)
    return {
        "estimator": f"{type(kinds[estimator]).__name__}(64)",
        "network": network,
        "samples": samples,
        "num_steps": num_steps,
        "batch_size": 256,
        "before_gib": before,
        "peak_gib": peak(),
    }


def memory() -> Iterator[dict]:
    for case in MEMORY_CASES:
        command = [sys.executable, __file__, "--case", *map(str, case)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(found.stdout.splitlines()[-1])
        rich.print(f"[dim]{case} {row['before_gib']:.3f} {row['peak_gib']:.3f} GiB[/]")
        yield row | {"met": row["peak_gib"] < MOST_MEMORY}


def batches(samples: int = 6, num_steps: int = 50) -> Iterator[dict]:
    """Values by batch size, and the largest difference from those of the largest size."""
    model, sizes = images(None, num_steps), (1, 7, 64)
    model = replace(model, x=model.x[:samples])
    chosen = estimators(model, num_steps) | {"ImportanceBound(8)": (ImportanceBound(8), 0)}
    del chosen["ImportanceBound(32)"]
    for label, (estimator, _) in chosen.items():
        values = {
            size: estimator.estimate(model.reverse, model.x, batch_size=size).value
            for size in sizes
        }
        last = values[sizes[-1]]
        worst = {size: float((value - last).abs().max()) for size, value in values.items()}
        rich.print(f"[dim]{label:<22} {worst}[/]")
        yield {
            "estimator": label,
            "values": {size: value.tolist() for size, value in values.items()},
            "difference": worst,
            "relative": max(worst.values()) / float(last.abs().mean()),
        }


def keep(path: Path, part: str, row: dict) -> dict:
    """Put a row in the place of the stored one of the same case; returns all that is stored."""
    result = json.loads(path.read_text()) if path.exists() else {}
    stamp = {"command": " ".join(["python", *sys.argv]), "environment": environment()}

    def case(row: dict) -> list:
        return [row.get(name) for name in ("network", "estimator", "samples", "num_steps")]

    others = [old for old in result.get(part, []) if case(old) != case(row)]
    result[part] = [*others, row | {"run": stamp}]
    write(path, result)
    return result


def tables(result: dict) -> list[Table]:
    views = []
    view = Table(title="rate of network calls over the bare network's: medians")
    for heading in ("network", "estimator", "rate", "95 %", "wall", "ours / s", "bare / s"):
        view.add_column(heading, no_wrap=True)
    for row in result.get("throughput", []):
        low, high = row["rate_95"]
        view.add_row(
            row["network"],
            row["estimator"],
            f"[{'green' if row['met'] else 'red'}]{row['rate']:.3f}[/]",
            f"{low:.3f}-{high:.3f}",
            *(f"{row[name]:.3f}" for name in ("wall_rate", "ours_s", "bare_s")),
        )
    views.append(view)
    view = Table("estimator", "network", "samples", "T", "peak / GiB", title="peak memory")
    for row in result.get("memory", []):
        names = (str(row[n]) for n in ("estimator", "network", "samples", "num_steps"))
        view.add_row(*names, f"{row['peak_gib']:.3f}")
    views.append(view)
    view = Table("estimator", "largest difference / nats", "relative", title="batches of 1, 7, 64")
    for row in result.get("batches", []):
        worst = max(row["difference"].values())
        view.add_row(row["estimator"], f"{worst:.1e}", f"{row['relative']:.1e}")
    return [view for view in (*views, view) if view.row_count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parts = ("throughput", "memory", "batches")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, help="others stay as stored"
    )
    parser.add_argument("--networks", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--without", nargs="+", default=[], help="estimators not to time")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "likelihood-cost.json")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        estimator, network, samples, num_steps = options.case
        print(json.dumps(memory_case(estimator, network, int(samples), int(num_steps))))
        return
    torch.set_num_threads(1)
    rows = {
        "throughput": lambda: throughput(options.pairs, options.networks, options.without),
        "memory": memory,
        "batches": batches,
    }
    result: dict = {}
    for part in options.parts:
        for row in rows[part]():
            result = keep(options.output, part, row)
    console = Console()
    console.width = max(console.width, 120)
    for view in tables(result):
        console.print(view)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
