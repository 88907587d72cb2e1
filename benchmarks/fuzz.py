"""Fuzz everything that pyrodiff reads, and count how the cases ended.

    make fuzz                      50,000 cases, counted in benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --cases 5000 --targets models results --seed 1

Cases that ended in another way than allowed (a right value, our own ValueError, an OSError, within
10 seconds of processor time and 500 MiB) are kept in build/fuzz/, a folder each with its traceback.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing.targets import TARGETS  # noqa: E402
from fuzzing.worker import Worker  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import pyrodiff  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
BROKEN = Path("build/fuzz")


def fuzz(name: str, cases: int, start: int) -> Counter[str]:
    """Outcomes of a target's cases by kind."""
    target = TARGETS[name]
    variants, counts, worker = target.valid(), Counter[str](), Worker(target.read)

    def check(random: Random) -> None:
        files = target.change(dict(random.choice(variants)), random)
        outcome = worker.run(files)
        counts[outcome.kind] += 1
        if not outcome.allowed:
            folder = BROKEN / f"{name}-{start}-{sum(counts.values())}"
            for file, content in files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            (folder / "outcome.txt").write_text(f"{outcome.kind}\n{outcome.detail}\n")

    options = settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(start)(options(given(st.randoms(use_true_random=False))(check)))()
    worker.close()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    total = sum(target.share for target in TARGETS.values())
    every = {} if options.targets == list(TARGETS) else _stored(options.output)
    for name in options.targets:
        count = round(options.cases * TARGETS[name].share / total)
        outcomes = fuzz(name, count, options.seed)
        every[name] = {"seed": options.seed, **dict(sorted(outcomes.items()))}
        print(name, every[name], flush=True)
    return _store(options.output, every)


def _stored(path: Path) -> dict[str, dict[str, int]]:
    """Counts by target of earlier calls, for other targets."""
    return json.loads(path.read_text())["targets"] if path.exists() else {}


def _store(path: Path, every: dict[str, dict[str, int]]) -> int:
    """Write the counts; returns whether any case ended in a way that is not allowed."""
    sums = Counter[str]()
    for counts in every.values():
        sums.update({kind: count for kind, count in counts.items() if kind != "seed"})
    broken = sums.total() - sums["right"] - sums["ValueError"] - sums["OSError"]
    record = {"pyrodiff": pyrodiff.__version__, "cases": sums.total(), "not_allowed": broken}
    record |= {"outcomes": dict(sorted(sums.items())), "targets": every}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{sums.total()} cases, {broken} of them not allowed -> {path}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
