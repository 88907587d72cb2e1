"""The structure of the package in figures: `python benchmarks/structure.py [--package TREE]`.

What is counted, and how:

files, lines        of the package; of a function those from ``def`` to its end, less the docstring
circle              the largest set of modules of which each reaches each by imports: all imports,
                    those inside functions included; those under ``if TYPE_CHECKING`` never run and
                    do not count, but in a package whose names are imported when they are used
                    (a module with ``__getattr__``), where they are the list of these names.
                    ``import a.b.c`` runs ``a`` and ``a.b``, too: that counts for whoever is not
                    inside them.
positional calls    calls with six or more positional arguments
public names        functions and classes on a module's top level without an underscore
private imports     names with an underscore (no dunders) taken from another module
private attributes  ``a._x`` where a is not ``self``, ``cls`` or ``super()`` and the file itself
                    defines no ``_x``: the file is the unit of privacy.  Those of other packages
                    (``torch._C``) and the documented ones of named tuples (``_replace``) do not
                    count.
parameters          whose annotation has ``Any`` in it (``Any``, ``dict[str, Any]``), among all but
                    ``self`` and ``cls``; ``any_alone`` where it is nothing but ``Any``
docstrings          public functions, classes and methods that have one
passed              functions of the package, and their files, that one ``SVI.step``,
                    ``pyrodiff fit`` and ``pyrodiff evaluate`` enter at least once (comprehensions
                    left out)
import              seconds and modules of ``import pyrodiff``, of its flat names and of
                    ``import pyro``: medians over fresh interpreters, taken in turn
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from structure_source import (
    Module,
    circles,
    import_graph,
    positional_calls,
    private_attributes,
    private_imports,
    read_figures,
    read_package,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pyrodiff"

# -- running ---------------------------------------------------------------------------------------

PASSED = """
import contextlib, io, json, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
import pyro, torch
import pyrodiff
from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.cli import main
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import VariationalBound
from pyrodiff.schedules import LogSNRSchedule

torch.set_num_threads(1)
folder = os.path.dirname(pyrodiff.__file__) + os.sep

def passed(work):
    codes = set()
    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder) and code.co_name[0] != "<":
            codes.add(code)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return {"functions": len(codes), "files": len({c.co_filename for c in codes})}

forward = ForwardChain(LogSNRSchedule(), num_steps=100)
reverse = ReverseChain(NoiseDenoiser(ResidualMLP((2,))), forward, event_shape=(2,))
svi = pyro.infer.SVI(reverse, forward, pyro.optim.Adam({"lr": 1e-3}), loss=VariationalBound())
pyro.set_rng_seed(0)
x_0 = torch.randn(256, 2)  # more samples than steps: t = 1, with its decoder, is among those drawn
svi.step(x_0)
counts = {"step": passed(lambda: svi.step(x_0))}

def command(*words):
    status = main(list(words))
    assert status == 0, status

with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
    run = os.path.join(work, "run")
    fit = ("--num-steps", "10", "--steps", "20", "--validate-every", "10", "--batch-size", "32",
           "--width", "16", "--blocks", "1", "--evaluations", "16", "--samples", "4")
    counts["fit"] = passed(lambda: command("fit", "mixture", "--output", run, *fit, "--quiet"))
    counts["evaluate"] = passed(lambda: command("evaluate", run, "--limit", "8", "--quiet"))
print("PASSED " + json.dumps(counts))
"""

IMPORTS = {
    "import pyro": "import pyro",
    "import pyrodiff": "import pyrodiff",
    "flat names": "from pyrodiff import ForwardChain, ReverseChain",
}
FLAT = (
    "from pyrodiff import ForwardChain, LogSNRSchedule, NoiseDenoiser, ResidualMLP, ReverseChain, "
    "TermwiseBound, VariationalBound"
)
TIMED = """
import sys, time
before, start = len(sys.modules), time.perf_counter()
{}
print(time.perf_counter() - start, len(sys.modules) - before)
"""


def _run(code: str, folder: Path) -> str:
    """Standard output of the code in a fresh interpreter that sees this package first."""
    environment = os.environ | {
        "PYTHONPATH": str(folder.parent),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    with tempfile.TemporaryDirectory() as work:  # not where another copy of the package may be
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=work, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"Expected the code to run on {folder}; got\n{done.stderr}")
    return done.stdout


def passed(folder: Path) -> dict[str, Any]:
    """Functions and files that a step, a fit and an evaluation pass."""
    line = _run(PASSED, folder).rpartition("PASSED ")[2]
    return json.loads(line.splitlines()[0])


def import_costs(folder: Path, rounds: int) -> dict[str, Any]:
    """Median seconds and modules of each import, the statements taken in turn."""
    statements = dict(IMPORTS)
    try:
        _run(FLAT, folder)
        statements["flat names"] = FLAT
    except RuntimeError:  # before there were flat names: the two chains alone
        pass
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in statements}
    for number in range(rounds + 1):  # the first fills the caches
        for name, statement in statements.items():
            seconds, count = _run(TIMED.format(statement), folder).split()
            if number:
                samples[name].append((float(seconds), int(count)))
    return {
        name: {
            "statement": statements[name],
            "seconds": round(statistics.median(s for s, _ in taken), 4),
            "modules": int(statistics.median(m for _, m in taken)),
        }
        for name, taken in samples.items()
    }


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """All figures of a tree."""
    return {
        **read_figures(read_package(folder)),
        "passed": passed(folder),
        "import": import_costs(folder, rounds),
    }


# -- the picture -----------------------------------------------------------------------------------


def room(name: str) -> str:
    """The entry on the top level that a module belongs to."""
    return ".".join(name.split(".")[1:2])


def room_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {room(name): set() for name in modules if "." in name}
    for name, module in modules.items():
        if "." in name:
            targets = {room(target) for target in module.imports if "." in target}
            graph[room(name)] |= targets - {room(name)}
    return graph


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """Longest way down from each room; the rooms of a circle share theirs."""
    home = {name: number for number, names in enumerate(circles(graph)) for name in names}
    below: dict[int, set[int]] = {number: set() for number in home.values()}
    for name, targets in graph.items():
        below[home[name]] |= {home[target] for target in targets} - {home[name]}
    depth: dict[int, int] = {}

    def visit(number: int) -> int:
        if number not in depth:
            depth[number] = max((visit(n) + 1 for n in below[number]), default=0)
        return depth[number]

    return {name: visit(home[name]) for name in graph}


def draw(panels: dict[str, dict[str, Module]], path: Path) -> None:
    """The rooms of each tree with the imports between them; circles in red."""
    import matplotlib
    from PIL import Image

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(9.5 * len(panels), 11), squeeze=False)
    for axis, (title, modules) in zip(axes[0], panels.items(), strict=True):
        _draw_tree(axis, title, modules)
    figure.tight_layout(w_pad=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    few = Image.open(buffer).convert("RGB").quantize(160, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)  # a quarter of the size


WIDTH, ROW = 100.0, 5  # of a panel; rooms in a row


def _positions(graph: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Rooms in rows by level, a long row broken into several; each near what it imports."""
    rows: list[list[str]] = []
    by_level: dict[int, list[str]] = {}
    for name, level in levels(graph).items():
        by_level.setdefault(level, []).append(name)
    for level in sorted(by_level):
        names = sorted(by_level[level])
        count = -(-len(names) // ROW)
        size = -(-len(names) // count)
        rows += [names[i : i + size] for i in range(0, len(names), size)]
    x: dict[str, float] = {}
    for _ in range(8):  # a row's order follows the mean place of the neighbours
        for names in rows:
            near = {
                name: [x[o] for o in graph if o in x and (o in graph[name] or name in graph[o])]
                for name in names
            }
            places = {n: statistics.fmean(v) if v else WIDTH / 2 for n, v in near.items()}
            names.sort(key=lambda name: places[name])  # noqa: B023
            for number, name in enumerate(names):
                x[name] = WIDTH * (number + 0.5) / len(names)
    shift = [(WIDTH / 14) * (1 if number % 2 else -1) for number in range(len(rows))]
    return {
        name: (x[name] + (shift[number] if len(names) < ROW else 0), float(number))
        for number, names in enumerate(rows)
        for name in names
    }


def _draw_tree(axis: Any, title: str, modules: dict[str, Module]) -> None:
    from matplotlib.patches import FancyArrowPatch

    graph = room_graph(modules)
    places = _positions(graph)
    found = [names for names in circles(import_graph(modules)) if len(names) > 1]
    red = {(a, b) for names in found for a in names for b in modules[a].imports & set(names)}
    red_rooms = {(room(a), room(b)) for a, b in red if room(a) and room(b)}
    members = {name for names in found for name in names}
    for name, targets in graph.items():
        for target in sorted(targets):
            circular = (name, target) in red_rooms
            (x, y), (u, v) = places[name], places[target]
            bend = 0.0 if abs(y - v) == 1 else 0.12 if x <= u else -0.12
            arrow = FancyArrowPatch(
                (x, y),
                (u, v),
                connectionstyle=f"arc3,rad={bend if y != v else 0.35}",
                arrowstyle="-|>",
                mutation_scale=9,
                shrinkA=16,
                shrinkB=18,
                color="#c62828" if circular else "#90a4ae",
                alpha=0.75 if circular else 0.45,
                linewidth=1.3 if circular else 0.8,
                zorder=2 if circular else 1,
            )
            axis.add_patch(arrow)
    for name, (x, y) in places.items():
        inside = [m for m in modules if room(m) == name]
        circular = any(m in members for m in inside)
        label = f"{name}/  ({len(inside)})" if len(inside) > 1 else name
        axis.text(
            x,
            y,
            label,
            ha="center",
            va="center",
            fontsize=12,
            fontweight="bold" if len(inside) > 1 else "normal",
            color="#b71c1c" if circular else "#1a237e",
            bbox={
                "boxstyle": "round,pad=0.35",
                "facecolor": "#ffebee" if circular else "#e8eaf6",
                "edgecolor": "#c62828" if circular else "#3949ab",
            },
            zorder=3,
        )
    size = len(found[0]) if found else 1
    axis.set_title(f"{title}\nlargest circle: {size} file{'s' * (size > 1)}", fontsize=16)
    axis.set_xlim(-2, WIDTH + 2)
    axis.set_ylim(-0.6, max(y for _, y in places.values()) + 0.6)
    axis.axis("off")


# -- the command -----------------------------------------------------------------------------------


@contextlib.contextmanager
def tree(place: str) -> Iterator[Path]:
    """The package in a folder, or as it was at a commit."""
    if Path(place).is_dir():
        yield Path(place).resolve()
        return
    with tempfile.TemporaryDirectory() as work:
        command = ["git", "-C", str(ROOT), "archive", place, PACKAGE]
        archive = subprocess.run(command, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files_of_the_commit:
            files_of_the_commit.extractall(work, filter="data")
        yield Path(work) / PACKAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--package", default=str(ROOT / PACKAGE), help="the tree to measure: a folder or a commit"
    )
    parser.add_argument("--name", default="after", help="what the tree is called in FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the imports")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="TITLE=TREE",
        help="a tree (folder or commit) to the left of it in the picture",
    )
    parser.add_argument("--title", default="now", help="the tree's title in the picture")
    parser.add_argument("--rounds", type=int, default=7, help="of import times")
    parser.add_argument("--list", action="store_true", help="say where the counted places are")
    options = parser.parse_args()
    with tree(options.package) as folder:
        report(folder, options)


def report(folder: Path, options: argparse.Namespace) -> None:
    """What the options ask for, of one tree."""
    modules = read_package(folder)
    if options.list:
        for count in (positional_calls, private_imports, private_attributes):
            print(f"{count.__name__}:", *count(modules), sep="\n  ")
    if options.json is not None or not (options.figure or options.list):
        figures = measure(folder, options.rounds)
        print(json.dumps(figures, indent=1))
        if options.json is not None:
            stored = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps(stored | {options.name: figures}, indent=1) + "\n")
    if options.figure is not None:
        panels = {}
        for title, _, place in (value.partition("=") for value in options.beside):
            with tree(place) as other:
                panels[title] = read_package(other)
        draw(panels | {options.title: modules}, options.figure)


if __name__ == "__main__":
    main()
