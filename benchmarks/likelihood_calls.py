r"""Network calls for a given standard error: the termwise bound against what is cheap to do.

    pyrodiff fit digits --output runs/digits-mlp --network mlp --width 256 --denoiser noise \
        --decoder discretized --variance fixed-large --schedule linear --steps 4000 \
        --batch_size 128 --learning_rate 1e-3 --weight_decay 0.1 --dropout 0.1
    python benchmarks/likelihood_calls.py runs/digits-mlp --samples 400 --repeats 4

and for MNIST (an .npz file with 30,000 images to train on, 500 and 1000 to validate and test)

    pyrodiff fit mnist.npz --output runs/mnist --network conv --width 16 --blocks 2 \
        --denoiser noise --decoder discretized --variance fixed-large --schedule linear \
        --steps 3000 --batch_size 16 --learning_rate 2e-3 --weight_decay 0.01 --dropout 0
    python benchmarks/likelihood_calls.py runs/mnist --samples 200 --repeats 2

What is compared is variance × calls of one sample's bound, averaged over test samples, against two
that anybody has: every t once, whose variance Σ_t Var L_t two draws at every t estimate without
bias; and even strata of t with two draws each, at the same number of calls.  A reconstruction that
needs no network is computed in all of them.  Budgets are repeated with other seeds, and the spread
over the repeats stands beside the standard error that was reported.  The pilot's calls are not in
the ratios: it pays for itself from as many samples on as are printed.  Each ingredient is then
added in turn.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import datetime
import itertools
import math
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from steps import write
from torch import Tensor

import pyrodiff
from pyrodiff.chains import ReverseChain
from pyrodiff.data import load
from pyrodiff.likelihood import Pilot, TermwiseBound
from pyrodiff.likelihood.termwise import pilot as pilot_module
from pyrodiff.likelihood.termwise.controls import Controls, Prepared
from pyrodiff.objectives import variational_term
from pyrodiff.runs.build import load_model
from pyrodiff.serialization import read_config

BUDGETS = (32, 64, 128, 256)
INGREDIENTS = {
    "strata and their allocation": ("none", "none"),
    "+ the pilot's mean curve over t": ("mean", "none"),
    "+ ‖ε‖² − d and x_0·ε": ("mean", "two"),
    "+ curves that know x_0": ("all", "two"),
    "+ hat functions of the values": ("all", "values"),
    "+ of their surroundings (images)": ("all", "surroundings"),
    "+ the affine denoiser (all)": ("all", "all"),
}


@dataclass(frozen=True, eq=False)
class Some(Controls):
    """Controls of which some are left out."""

    curve: str = "all"
    kind: str = "all"

    def columns(self) -> Tensor:
        """What is kept of the controls as a linear map of them, (F, F')."""
        hats, total, first = self.num_hats, self.num_controls, self.knots[0]
        values = int((~first.isnan()).sum())
        eye = torch.eye(total, dtype=torch.float64)
        if self.kind == "none":
            return eye[:, :0]
        if self.kind == "two":
            linear, square = torch.zeros(total, 1), torch.zeros(total, 1)
            linear[:values, 0], square[hats : hats + values, 0] = first[:values], 1.0
            return torch.cat([linear, square], 1).double()
        if self.kind == "values":
            return eye[:, [*range(values), *range(hats, hats + values)]]
        if self.kind == "surroundings":
            return eye[:, [*range(2 * hats), *range(2 * hats + 3, total)]]
        return eye

    def noise(self, prepared: Prepared, t: Tensor, noise: Tensor) -> Tensor:
        every = super().noise(prepared, t, noise)
        kept = every @ self.columns().to(every)
        # as many columns as before, the last of them empty
        return torch.nn.functional.pad(kept, (0, every.shape[-1] - kept.shape[-1]))

    def curves(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        hats, expected = super().curves(prepared)
        if self.curve == "all":
            return hats, expected
        return torch.ones_like(hats), torch.ones_like(expected)


def restricted(reverse: ReverseChain, x: Tensor, curve: str, kind: str, calls: int) -> Pilot:
    """A pilot that knows some of the controls only."""

    class Fitted(Some):
        @classmethod
        def fit(cls, x: Tensor, log_snr: Tensor) -> Some:
            return Some(**vars(Controls.fit(x, log_snr)), curve=curve, kind=kind)

    original = pilot_module.Controls
    pilot_module.Controls = Fitted
    try:
        pilot = Pilot.fit(reverse, x, calls=calls)
    finally:
        pilot_module.Controls = original
    if curve != "none":
        return pilot
    level = pilot.baseline.sum(1)  # of a curve that is the same for every sample
    misfit = (pilot.misfit.square() + level.square()).sqrt()
    return replace(pilot, baseline=torch.zeros_like(pilot.baseline), misfit=misfit)


def first_step(reverse: ReverseChain, x: Tensor) -> int:
    """1, or 2 where the decoder explains x_0 without the network."""
    step = reverse.forward_chain.step(1, x, len(reverse.event_shape))
    return 1 if reverse.decoder.expected_log_prob(x, step) is None else 2


def plain_variance(reverse: ReverseChain, x: Tensor) -> tuple[float, float]:
    """Σ_t Var L_t, averaged over samples, and its standard error.

    Two draws at every t up to 64, which hold most of it, and at every ninth beyond.
    """
    steps, late = reverse.num_steps, torch.arange(65, reverse.num_steps + 1, 9)
    weights = dict.fromkeys(range(first_step(reverse, x), min(64, steps) + 1), 1.0)
    weights |= {int(t): (steps - 64) / len(late) for t in late}
    total = torch.zeros(len(x), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t, weight in weights.items():
            pair = (torch.randn(x.shape, generator=generator) for _ in range(2))
            one, two = (variational_term(reverse, x, t, noise).double() for noise in pair)
            total += weight * (one - two).square() / 2
    return float(total.mean()), float(total.std() / math.sqrt(len(x)))


def even_strata_variance(reverse: ReverseChain, x: Tensor, budget: int, repeats: int) -> float:
    """That of even strata of t with two draws each, averaged over samples."""
    first, strata = first_step(reverse, x), budget // 2
    edges = torch.linspace(first, reverse.num_steps + 1, strata + 1, dtype=torch.float64)
    edges = edges.round().long()
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(len(x), dtype=torch.float64)
    with torch.no_grad():
        for low, high in itertools.pairwise(edges.tolist()):
            for _ in range(repeats):
                pair = []
                for _ in range(2):
                    t = torch.randint(low, high, (len(x),), generator=generator)
                    noise = torch.randn(x.shape, generator=generator)
                    pair.append(variational_term(reverse, x, t, noise).double())
                # the variance of a mean of two is a quarter of their squared difference
                total += (high - low) ** 2 * (pair[0] - pair[1]).square() / 4 / repeats
    return float(total.mean())


def variances(
    reverse: ReverseChain, x: Tensor, bound: TermwiseBound, repeats: int
) -> tuple[float, float]:
    """Mean over samples of the reported variance and of the spread over repeats."""
    found = [bound.estimate(reverse, x, seed=seed) for seed in range(repeats)]
    reported = torch.stack([result.std_error.square() for result in found]).mean()
    spread = torch.stack([result.value for result in found]).var(0).mean()
    return float(reported), float(spread)


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--pilot", type=int, default=20_000, help="network calls of the pilot")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(options.run / "config.yaml")
    data, reverse = load(config["data"]["source"]), load_model(options.run)
    x, steps = data.test[: options.samples], reverse.num_steps
    plain, error = plain_variance(reverse, x)
    passes = steps - first_step(reverse, x) + 1
    print(f"every t once: variance {plain:.3f} ± {error:.3f} nats², {passes} calls")
    pilot = Pilot.fit(reverse, data.train, calls=options.pilot)
    headings = ("to every t once: pilot, none", "to even strata: pilot, none", "pays from")
    table = Table("budget", "std error", "spread over seeds", *headings)
    rows = {}
    for budget in BUDGETS:
        even = even_strata_variance(reverse, x, budget, options.repeats)
        reported, spread = variances(
            reverse, x, TermwiseBound(budget, pilot=pilot), options.repeats
        )
        alone, _ = variances(reverse, x, TermwiseBound(budget), options.repeats)
        to_every = [plain * passes / (value * budget) for value in (reported, alone)]
        to_even = [even / value for value in (reported, alone)]
        # calls that the same error costs without the pilot, less those with it, per sample
        saved = budget * (alone / reported - 1)
        pays = math.ceil(pilot.calls / saved) if saved > 0 else None
        rows[budget] = {
            "reported": reported,
            "spread": spread,
            "alone": alone,
            "even_strata": even,
            "to_every_t_once": to_every,
            "to_even_strata": to_even,
            "pilot_pays_from": pays,
        }
        errors = (f"{math.sqrt(value):.3f}" for value in (reported, spread))
        ratios = (", ".join(f"{ratio:.1f}" for ratio in pair) for pair in (to_every, to_even))
        table.add_row(str(budget), *errors, *ratios, f"{pays} samples")
    Console().print(table)
    table, parts = Table("ingredient (budget 128)", "std error", "ratio to plain"), {}
    for name, (curve, kind) in INGREDIENTS.items():
        part = restricted(reverse, data.train, curve, kind, options.pilot)
        reported, _ = variances(reverse, x, TermwiseBound(128, pilot=part), 2)
        parts[name] = plain * passes / (reported * 128)
        table.add_row(name, f"{math.sqrt(reported):.3f}", f"{parts[name]:.1f}")
    Console().print(table)
    if options.output is not None:
        held = {
            "command": "python " + " ".join(sys.argv),
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyrodiff": pyrodiff.__version__,
            "fit": config["fit"],
            "data": repr(data),
            "samples": len(x),
            "pilot_calls": pilot.calls,
            "plain": {"variance": plain, "std_error": error, "calls": passes},
            "budgets": rows,
            "ingredients": parts,
        }
        write(options.output, held)


if __name__ == "__main__":
    main()
