"""The floors of the package: imports run downwards only, also those inside functions.

``benchmarks/structure.py`` reads the source and says what it counts, and how.  Nothing is random.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

import pyrodiff

ROOT = Path(__file__).parents[1]

FLOORS = {
    # what everybody may use
    "_version": 0,
    "checks": 0,
    # tools: noise, arithmetic, λ(u), files
    "finite": 1,
    "precision": 1,
    "schedules": 1,
    "serialization": 1,
    "streams": 1,
    # Gaussian kernels between noise levels, covariances and distributions of a step; networks
    "kernels": 2,
    "networks": 2,
    "covariances": 2.1,
    "distributions": 2.2,
    # one axis of the reverse step each
    "decoders": 3,
    "denoisers": 3,
    "variances": 3.1,
    # which levels a chain of few steps visits
    "grids": 3.2,
    # a chain's parts as plain values and back; the two Pyro programs, and how to draw from them
    "serialization.catalogue": 4,
    "serialization.networks": 4.1,
    "serialization.models": 4.2,
    "samplers": 4,
    "chains": 5,
    # what a model is trained by
    "timesteps": 5,
    "objectives": 6,
    # exact answers
    "oracles": 7,
    # how likely the model finds data
    "likelihood.dequantizers": 8.0,
    "likelihood.jumps": 8.0,
    "likelihood.statistics": 8.0,
    "likelihood.estimates": 8.1,
    "likelihood.densities": 8.2,
    "likelihood.samples": 8.2,
    "likelihood.arviz": 8.3,
    "likelihood.result": 8.4,
    "likelihood.estimator": 8.5,
    "likelihood.paths": 8.6,
    "likelihood.dequantization": 8.7,
    "likelihood.flow": 8.7,
    "likelihood.particles": 8.7,
    "likelihood.termwise": 8.7,
    "likelihood": 8.9,
    # several models
    "conditioning": 9,
    "comparison": 9,
    "vae": 9,
    # the application
    "data": 10,
    "plots": 11,
    "training": 12,
    "runs": 13,
    "cli": 14,
    "__main__": 14.1,
    # the flat names, each loaded when it is first used
    "": 15,
}
"""Floor of each module, by the longest prefix of its name that stands here."""

LONG_FILES: dict[str, str] = {}
"""Files of more than 300 lines, each with its reason."""

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions of more than 60 lines (without the docstring), each with its reason."""


def _structure() -> ModuleType:
    path = ROOT / "benchmarks" / "structure_source.py"
    specification = importlib.util.spec_from_file_location("structure_source", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["structure_source"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


structure = _structure()
MODULES = structure.read_package(Path(pyrodiff.__file__).parent)


def prefix(module: str) -> str:
    """The entry of the table that a module falls under."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in FLOORS), "" if not parts else module)


def upward_imports(modules: dict) -> list[str]:
    """Imports of what is not on a lower floor, but for those within one entry of the table."""
    return [
        f"{module.name} ({FLOORS[prefix(module.name)]}) imports {target} ({FLOORS[prefix(target)]})"
        for module in modules.values()
        for target in sorted(module.imports)
        if prefix(target) != prefix(module.name)
        and FLOORS[prefix(target)] >= FLOORS[prefix(module.name)]
    ]


def largest_circle(modules: dict) -> set[str]:
    """The modules of the largest circle of imports."""
    largest = structure.circles(structure.import_graph(modules))[0]
    return set(largest) if len(largest) > 1 else set()


def none(faults: Iterable[str]) -> None:
    """Fail with one fault a line."""
    lines = sorted(faults)
    assert not lines, "\n".join(["", *lines])


def test_every_module_has_a_floor() -> None:
    none(name for name in MODULES if prefix(name) not in FLOORS)


def test_every_floor_has_a_module() -> None:
    none(FLOORS.keys() - {prefix(name) for name in MODULES})


def test_the_page_has_the_same_floors() -> None:
    page = (ROOT / "docs" / "layout.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
    floors = {
        name.removesuffix("/"): int(floor)
        for floor, names in rows
        for name in re.findall(r"`([\w./]+)`", names)
    }
    assert floors == {name: int(FLOORS[name]) for name in floors}
    none({name for name in FLOORS if name.isalpha()} - floors.keys())


def test_imports_run_downwards() -> None:
    none(upward_imports(MODULES))


def test_no_circle_of_imports() -> None:
    none(largest_circle(MODULES))


def test_private_names_stay_in_their_file() -> None:
    none(structure.private_imports(MODULES))
    none(structure.private_attributes(MODULES))


def test_no_call_has_six_positional_arguments() -> None:
    none(structure.positional_calls(MODULES))


def test_files_are_short() -> None:
    long = {name for name, lines in structure.files(MODULES).items() if lines > 300}
    none(long ^ LONG_FILES.keys())


def test_functions_are_short() -> None:
    lengths = structure.functions(MODULES).items()
    long = {name.split(":")[0] + " " + name.split()[1] for name, lines in lengths if lines > 60}
    none(long ^ LONG_FUNCTIONS.keys())


# -- the checks themselves, on a small package with one fault each ---------------------------------

SOUND = {
    "__init__": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from pyrodiff.chains import Chain
        def __getattr__(name):
            raise AttributeError(name)
    """,
    "checks": "LEAST = 1",
    "kernels": "from pyrodiff.checks import LEAST",
    "chains": "from pyrodiff import kernels",
    "likelihood.__init__": "from pyrodiff.likelihood.result import Result",
    "likelihood.result": """
        from typing import TYPE_CHECKING
        from pyrodiff.chains import kernels
        if TYPE_CHECKING:
            from pyrodiff.comparison import compare
        class Result:
            def __eq__(self, other): return self._values == other._values
            def __init__(self): self._values = kernels._replace(1, 2, 3, 4, 5)
    """,
    "likelihood.estimator": "from .result import Result",
    "comparison.__init__": "import pyrodiff.likelihood.estimator",
}


def planted(folder: Path, **changes: str) -> dict:
    """The modules of the sound package with lines added to some of them."""
    for name in SOUND.keys() | changes.keys():
        path = (folder / "pyrodiff").joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = textwrap.dedent(SOUND.get(name, "")) + "\n" + changes.get(name, "") + "\n"
        path.write_text(text, encoding="utf-8")
    return structure.read_package(folder / "pyrodiff")


def test_a_sound_package_passes(tmp_path: Path) -> None:
    modules = planted(tmp_path)
    assert all(prefix(name) in FLOORS for name in modules)
    assert upward_imports(modules) == [] and largest_circle(modules) == set()
    assert structure.private_imports(modules) == structure.private_attributes(modules) == []
    assert structure.positional_calls(modules) == []


@pytest.mark.parametrize(
    "line",
    [
        "from pyrodiff.chains import Chain",
        "import pyrodiff.chains",
        "from pyrodiff import chains",
        "from . import chains",
        "from .chains import Chain",
        "def late():\n    from pyrodiff.chains import Chain",
        "try:\n    import pyrodiff.chains\nexcept ImportError:\n    pass",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, line: str) -> None:
    modules = planted(tmp_path, checks=line)
    assert upward_imports(modules) == ["pyrodiff.checks (0) imports pyrodiff.chains (5)"]
    assert largest_circle(modules) == {f"pyrodiff.{n}" for n in ("checks", "kernels", "chains")}


def test_an_import_of_a_flat_name_is_found(tmp_path: Path) -> None:
    """It reaches all that the lazy names stand for."""
    modules = planted(tmp_path, kernels="def late():\n    from pyrodiff import Chain")
    assert upward_imports(modules) == ["pyrodiff.kernels (2) imports pyrodiff (15)"]
    assert largest_circle(modules) == {"pyrodiff", "pyrodiff.kernels", "pyrodiff.chains"}


def test_an_import_runs_the_packages_above(tmp_path: Path) -> None:
    """``likelihood.result`` cannot be had without ``likelihood``, which holds everything in it."""
    modules = planted(tmp_path, chains="from pyrodiff.likelihood.result import Result")
    assert len(upward_imports(modules)) == 2
    assert largest_circle(modules) == {
        f"pyrodiff.{name}" for name in ("chains", "likelihood", "likelihood.result")
    }


def test_a_circle_inside_a_room_is_found(tmp_path: Path) -> None:
    line = "def late():\n    from pyrodiff.likelihood.estimator import Estimator"
    modules = planted(tmp_path, **{"likelihood.result": line})
    assert len(largest_circle(modules)) == 2


def test_a_module_without_a_floor_is_found(tmp_path: Path) -> None:
    modules = planted(tmp_path, misc="")
    assert [name for name in modules if prefix(name) not in FLOORS] == ["pyrodiff.misc"]


@pytest.mark.parametrize(
    "line",
    [
        "from pyrodiff.kernels import _hidden",
        "from pyrodiff import kernels\nkernels._hidden()",
    ],
)
def test_a_private_import_is_found(tmp_path: Path, line: str) -> None:
    assert len(structure.private_imports(planted(tmp_path, chains=line))) == 1


@pytest.mark.parametrize("line", ["chain._steps", "f(1)._steps", "a.chain._steps = 2"])
def test_a_private_attribute_of_another_file_is_found(tmp_path: Path, line: str) -> None:
    assert len(structure.private_attributes(planted(tmp_path, kernels=line))) == 1


def test_a_call_with_six_positional_arguments_is_found(tmp_path: Path) -> None:
    modules = planted(tmp_path, chains="f(1, 2, 3, 4, 5, 6)\nf(1, 2, 3, 4, 5, sixth=6)")
    assert len(structure.positional_calls(modules)) == 1


def test_lines_of_functions_and_files(tmp_path: Path) -> None:
    modules = planted(tmp_path, checks='def f():\n    """Two\n    lines."""\n    return 1')
    assert structure.functions(modules)["pyrodiff/checks.py:2 f"] == 2
    assert structure.files(modules)["pyrodiff/checks.py"] == 5
