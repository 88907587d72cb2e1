r"""How good are samples of few steps? Two distances from the test images, by sampler and T.

    pyrodiff fit digits --output runs/digits
    python benchmarks/few_steps_samples.py runs/digits --values values/samples \
        --output benchmarks/results/few-steps-samples.json

The distances are those of notebook 02: the kernel distance (squared MMD with a cubic kernel;
Bińkowski et al., 2018) of the features of a small classifier of the training images, and the
energy distance of pixels (Székely and Rizzo, 2013).  Both are unbiased, and 0 in expectation for
samples of the data's law.  The samples are judged in groups of a hundred; the error is that of the
mean over groups.  The test images are the same for all, so that differences between samplers have
no other error than that, but the level of all of them moves with the choice of test images:
training images in groups of a hundred stand beside.  All samplers start from the same noise.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from few_steps import POSTERIOR, file_name
from rich.console import Console
from rich.table import Table
from steps import environment, write
from torch import Tensor, nn

from pyrodiff.chains import ReverseChain
from pyrodiff.data import load
from pyrodiff.samplers import DDIM, ProbabilityFlowSampler, Sampler
from pyrodiff.serialization import read_config
from pyrodiff.serialization.weights import read_weights, write_weights
from pyrodiff.variances import AnalyticVariance, FixedLarge, FixedSmall, Variance

GROUP = 100
STEPS = (10, 25, 50)
FULL = "ancestral, full"
TRAINING_STEPS = 600  # of the classifier


@dataclass(frozen=True)
class Way:
    """A way from noise to data."""

    variance: Variance
    sampler: Sampler | None = None


def ways(reverse: ReverseChain, other: Tensor) -> dict[str, Way]:
    """What is compared, by name."""
    return {
        "ancestral, fixed small": Way(FixedSmall()),
        "ancestral, fixed large": Way(FixedLarge()),
        "ancestral, analytic": Way(AnalyticVariance.fit(reverse, other)),
        "ancestral, diagonal, 1 probe": Way(POSTERIOR["diagonal, 1 probe"]),
        FULL: Way(POSTERIOR["full"]),
        "DDIM": Way(FixedSmall(), DDIM()),
        "probability flow (Heun)": Way(FixedSmall(), ProbabilityFlowSampler()),
    }


def classifier_features(images: Tensor, labels: Tensor) -> nn.Module:
    """The 64 features before the last layer of a classifier trained on labelled images."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
    )
    classifier = nn.Sequential(features, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.1)
    for _ in range(TRAINING_STEPS):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return features.requires_grad_(False)


def off_diagonal(kernel: Tensor) -> Tensor:
    """The mean over pairs of different samples."""
    return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))


def distances(train: Tensor, labels: Tensor) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """The two distances between sets of images."""
    features = classifier_features(train, labels)
    seen = features(train)
    centre, spread = seen.mean(0), seen.std(0).clamp(min=1e-3)

    def kernel(x: Tensor, y: Tensor) -> float:
        a, b = (((features(one) - centre) / spread).double() for one in (x, y))
        inside = [off_diagonal((one @ one.mT / 64 + 1) ** 3) for one in (a, b)]
        return float(sum(inside) - 2 * ((a @ b.mT / 64 + 1) ** 3).mean())

    def energy(x: Tensor, y: Tensor) -> float:
        a, b = x.flatten(1).double(), y.flatten(1).double()
        inside = [off_diagonal(torch.cdist(one, one)) for one in (a, b)]
        return float(2 * torch.cdist(a, b).mean() - sum(inside))

    return {"features": kernel, "pixels": energy}


@dataclass(frozen=True, eq=False)
class Study:
    """A run and what its samples are measured by."""

    reverse: ReverseChain
    test: Tensor
    distances: dict[str, Callable[[Tensor, Tensor], float]]
    values: Path

    def drawn(self, name: str, way: Way, num_steps: int, count: int) -> Tensor:
        """Samples, kept as a file."""
        path = self.values / f"{file_name(name, num_steps)}.safetensors"
        if path.exists():
            kept = read_weights(path)["samples"]
            if len(kept) >= count:
                return kept[:count]
        chain = self.reverse
        if num_steps != chain.num_steps:
            chain = chain.respaced(num_steps, variance=way.variance).eval()
        draw = (
            chain.sample
            if way.sampler is None
            else lambda n, **given: way.sampler.sample(chain, n, **given)
        )
        samples = draw(count, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(path, {"samples": samples})
        return samples

    def figures(self, samples: Tensor) -> dict[str, object]:
        """Mean distances of groups, and their standard errors."""
        groups = samples[: len(samples) // GROUP * GROUP].split(GROUP)
        facts: dict[str, object] = {"samples": len(samples)}
        for what, distance in self.distances.items():
            found = torch.tensor([distance(group, self.test) for group in groups])
            error = float(found.std()) / math.sqrt(len(found))
            facts |= {what: float(found.mean()), f"{what}_error": error}
        return facts


def calls(name: str, way: Way, steps: int, size: int) -> int:
    if isinstance(way.sampler, ProbabilityFlowSampler):
        return 2 * steps - 1
    products = 0 if way.sampler is not None else way.variance.products(size)
    return steps * (1 + products)


def show(rows: list[dict]) -> None:
    table = Table("sampler", "T", "calls", "samples", "features", "pixels")
    for row in rows:
        cells = [
            f"{row[what]:+.4f} ± {row[what + '_error']:.4f}" for what in ("features", "pixels")
        ]
        words = (str(row[key]) for key in ("sampler", "steps", "calls", "samples"))
        table.add_row(*words, *cells)
    Console(width=110).print(table)


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--full-samples", type=int, default=400, help="of the full covariance")
    parser.add_argument("--full-steps", type=int, nargs="*", default=[10, 25])
    parser.add_argument("--values", type=Path, required=True, help="folder for samples")
    parser.add_argument("--output", type=Path)
    options, started = parser.parse_args(), time.time()
    torch.set_num_threads(1)
    data = load(read_config(options.run / "config.yaml")["data"]["source"])
    labelled = load("digits", context="label")
    measures = distances(labelled.train, labelled.train_context.argmax(1))
    reverse = ReverseChain.load(options.run).eval()
    study = Study(reverse, data.test, measures, options.values)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    nothing = {"steps": "", "calls": 0}
    rows = [{"sampler": "training images"} | nothing | study.figures(data.train[order])]
    own = Way(reverse.variance)
    cases = [("ancestral, the run's own", own, reverse.num_steps, options.samples)]
    for name, way in ways(reverse, data.validation).items():
        full = name == FULL
        for steps in options.full_steps if full else STEPS:
            cases.append((name, way, steps, options.full_samples if full else options.samples))
    for name, way, steps, count in cases:
        facts = {"sampler": name, "steps": steps}
        facts |= {"calls": calls(name, way, steps, data.test[0].numel())}
        rows.append(facts | study.figures(study.drawn(name, way, steps, count)))
        print(rows[-1], f"{time.time() - started:.0f} s", flush=True)
    show(rows)
    if options.output is not None:
        facts = {"command": "python " + shlex.join(sys.argv), "group": GROUP, "data": repr(data)}
        write(options.output, facts | {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
