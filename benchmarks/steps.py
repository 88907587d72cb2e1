"""What pyrodiff costs beside hand-written code: `python benchmarks/steps.py [--quick]`.

Ratios of time, pyrodiff over bare, measured side by side: blocks of steps alternate (A B, B A, …)
on networks with equal weights, one thread.  The time is the process's CPU time, which other work
on the machine disturbs less than the clock on the wall; that one is given beside it.  Before a case
is timed, both sides are shown to give the same loss and the same gradient from the same seed.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import copy
import datetime
import gc
import itertools
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import bare
import lightning
import numpy as np
import pyro
import rich
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.util import zero_grads
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pyrodiff
from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import (
    HybridLoss,
    MeanLoss,
    MinSNR,
    NoiseLoss,
    VariationalBound,
    WeightedLoss,
)
from pyrodiff.schedules import LinearSchedule
from pyrodiff.serialization import write_atomically
from pyrodiff.variances import FixedLarge, LearnedRange

SIZE = 64
ADAM = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
TARGETS = {"ELBOModule": 1.05, "Trace_ELBO": 1.3}
OBJECTIVES = {
    "NoiseLoss": (NoiseLoss, bare.noise_loss),
    "VariationalBound": (VariationalBound, bare.variational_bound),
    "MeanLoss": (MeanLoss, bare.mean_loss),
    "WeightedLoss(MinSNR())": (lambda: WeightedLoss(MinSNR()), bare.weighted_loss),
    "HybridLoss": (HybridLoss, bare.hybrid_loss),
}

Side = Callable[[], np.ndarray]  # runs one block; CPU and wall seconds per step


def clocks() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter()])


class Pair:
    """The same network on both sides, and their losses as functions of data."""

    def __init__(self, objective: pyro.infer.ELBO, loss: Callable, num_steps: int):
        learned = isinstance(objective, HybridLoss)
        torch.manual_seed(0)
        network = ResidualMLP((SIZE,), width=256, blocks=4, learned_variance=learned)
        with torch.no_grad():  # its output layers start at zero: nothing to compare
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.network = copy.deepcopy(network)
        self.objective, self.forward = objective, ForwardChain(LinearSchedule(), num_steps)
        variance = LearnedRange() if learned else FixedLarge()
        self.reverse = ReverseChain(NoiseDenoiser(network), self.forward, (SIZE,), variance)
        tables = bare.Tables(num_steps, SIZE)
        self.bare = lambda x_0: loss(self.network, tables, x_0)
        self.ours = objective(self.reverse, self.forward)

    def check(self, x_0: Tensor) -> float:
        """The relative distance of the gradients; raises unless both sides are the same loss."""
        values, gradients = [], []
        for loss, network in ((self.ours, self.reverse), (self.bare, self.network)):
            torch.manual_seed(1)
            value = loss(x_0)
            gradients.append(torch.autograd.grad(value, list(network.parameters())))
            values.append(value.item())
        ours, theirs = (torch.cat([g.flatten() for g in part]) for part in gradients)
        distance = float((ours - theirs).norm() / theirs.norm())
        if not (np.isclose(*values, rtol=1e-4) and distance < 1e-3):
            raise RuntimeError(f"Not the same loss: {values}, gradients differ by {distance:.1e}.")
        return distance


def timed(step: Callable[[], object], block: int) -> Side:
    def run() -> np.ndarray:
        start = clocks()
        for _ in range(block):
            step()
        return (clocks() - start) / block

    return run


def torch_side(loss: Callable[[Tensor], Tensor], network: nn.Module, x_0: Tensor, block: int):
    optimizer = torch.optim.AdamW(network.parameters(), **ADAM)

    def step() -> None:
        optimizer.zero_grad()
        loss(x_0).backward()
        optimizer.step()

    return timed(step, block)


def svi_sides(pair: Pair, x_0: Tensor, block: int) -> tuple[Side, Side]:
    svi = SVI(pair.reverse, pair.forward, pyro.optim.AdamW(dict(ADAM)), loss=pair.objective)
    optimizer, parameters = pyro.optim.AdamW(dict(ADAM)), list(pair.network.parameters())

    def step() -> float:
        loss = pair.bare(x_0)
        loss.backward()
        optimizer(parameters)
        zero_grads(parameters)
        return loss.item()

    return timed(lambda: svi.step(x_0), block), timed(step, block)


class Module(lightning.LightningModule):
    def __init__(self, loss: Callable[[Tensor], Tensor], network: nn.Module):
        super().__init__()
        self.network, self.loss = network, loss
        self.optimizer = torch.optim.AdamW(network.parameters(), **ADAM)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


class Clock(lightning.Callback):
    def __init__(self):
        self.ticks: list[np.ndarray] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.ticks.append(clocks())


def lightning_side(loss: Callable[[Tensor], Tensor], network: nn.Module, x_0: Tensor, block: int):
    """Whole turns of Lightning's loop, start of batch to start of batch; two turns to warm up."""
    module = Module(loss, network)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )

    def run() -> np.ndarray:
        clock = Clock()
        batches = torch.utils.data.DataLoader([x_0] * (block + 3), batch_size=None)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, callbacks=[clock], **quiet
        )
        trainer.fit(module, train_dataloaders=batches)
        return (clock.ticks[-1] - clock.ticks[2]) / block

    return run


def sides(route: str, pair: Pair, x_0: Tensor, block: int) -> tuple[Side, Side]:
    if route == "SVI":
        return svi_sides(pair, x_0, block)
    make = {"ELBOModule": torch_side, "Lightning": lightning_side}[route]
    return make(pair.ours, pair.reverse, x_0, block), make(pair.bare, pair.network, x_0, block)


def interleave(ours: Side, theirs: Side, pairs: int) -> np.ndarray:
    """Seconds per step, shape (pairs, sides, clocks); which side goes first alternates."""
    ours(), theirs()
    gc.collect()
    seconds = np.empty((pairs, 2, 2))
    for i in range(pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            seconds[i, side] = (ours, theirs)[side]()
    return seconds


def summary(case: dict, seconds: np.ndarray, distance: float) -> dict:
    every = np.sort(seconds[:, 0] / seconds[:, 1], axis=0)
    ratios, n = every[:, 0], len(every)
    margin = 0.98 * np.sqrt(n)  # order statistics: 95 % interval of a median
    ends = max(int(n / 2 - margin), 0), min(int(np.ceil(n / 2 + margin)), n - 1)
    milliseconds = 1000 * np.median(seconds, axis=0)
    return {
        **case,
        "ratio": float(np.median(ratios)),
        "ratio_95": [float(ratios[end]) for end in ends],
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "wall_ratio": float(np.median(every[:, 1])),
        "ours_ms": float(milliseconds[0, 0]),
        "bare_ms": float(milliseconds[1, 0]),
        "pairs": n,
        "gradient_distance": distance,
        "target": TARGETS.get(case["route"]),
    }


def training_steps(pairs: int, batch: int = 256, num_steps: int = 1000) -> list[dict]:
    rows, x_0 = [], torch.randn(batch, SIZE, generator=torch.Generator().manual_seed(2))
    for route, name in itertools.product(("ELBOModule", "SVI", "Lightning"), OBJECTIVES):
        pyro.clear_param_store()
        objective, loss = OBJECTIVES[name]
        pair = Pair(objective(), loss, num_steps)
        distance = pair.check(x_0)
        block = 8 if route == "Lightning" else 4
        case = {"objective": name, "route": route, "num_steps": num_steps, "batch": batch}
        seconds = interleave(*sides(route, pair, x_0, block), pairs)
        rows.append(show(summary(case, seconds, distance)))
    return rows


def trajectories(pairs: int, batch: int, num_steps: int) -> list[dict]:
    """Forward and backward along all T steps, without an optimizer."""
    pyro.clear_param_store()
    x_0 = torch.randn(batch, SIZE, generator=torch.Generator().manual_seed(2))
    pair = Pair(Trace_ELBO(), bare.trajectory_bound, num_steps)
    distance = pair.check(x_0)

    def side(loss: Callable[[Tensor], Tensor], network: nn.Module) -> Side:
        def step() -> None:
            network.zero_grad()
            loss(x_0).backward()

        return timed(step, 1)

    seconds = interleave(side(pair.ours, pair.reverse), side(pair.bare, pair.network), pairs)
    case = {"objective": "Trace_ELBO", "route": "Trace_ELBO", "num_steps": num_steps}
    return [show(summary({**case, "batch": batch}, seconds, distance))]


def show(row: dict) -> dict:
    rich.print(f"[dim]{row['route']:>10} {row['objective']:<24} {row['ratio']:.3f}[/]")
    return row


def environment() -> dict:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "lightning": lightning.__version__,
        "pyrodiff": pyrodiff.__version__,
    }


def table(rows: list[dict]) -> Table:
    view = Table(title="pyrodiff over hand-written code, CPU time per step: medians")
    for heading in ("objective", "through", "T", "batch"):
        view.add_column(heading, no_wrap=True)
    for heading in ("ours / ms", "bare / ms", "ratio", "95 %", "quartiles", "wall", "target"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["ratio_95"]
        first, third = row["ratio_quartiles"]
        target = row["target"]
        met = target is None or row["ratio"] <= target
        view.add_row(
            row["objective"],
            row["route"],
            str(row["num_steps"]),
            str(row["batch"]),
            f"{row['ours_ms']:.2f}",
            f"{row['bare_ms']:.2f}",
            f"[{'green' if met else 'red'}]{row['ratio']:.3f}[/]",
            f"{low:.3f}-{high:.3f}",
            f"{first:.3f}-{third:.3f}",
            f"{row['wall_ratio']:.3f}",
            "" if target is None else f"≤ {target}",
        )
    return view


def write(path: Path, result: dict, **options: bool) -> None:
    """All of it or nothing."""
    text = json.dumps(result, indent=1, ensure_ascii=False, **options) + "\n"
    write_atomically(path, lambda name: name.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pairs, T = 100 in Trace_ELBO")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, help=f"JSON; default in {results}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if options.quick:
        rows = training_steps(pairs=9) + trajectories(pairs=5, batch=256, num_steps=100)
    else:
        rows = training_steps(pairs=40) + trajectories(pairs=6, batch=64, num_steps=1000)
        rows += trajectories(pairs=7, batch=256, num_steps=100)
    console = Console()
    console.width = max(console.width, 140)
    console.print(table(rows))
    name = "steps-quick.json" if options.quick else "steps-cpu.json"
    output = options.output or results / name
    write(output, {"environment": environment(), "optimizer": {"AdamW": ADAM}, "rows": rows})
    print(f"Written to {output}")


if __name__ == "__main__":
    main()
