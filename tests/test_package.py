"""The package itself: names that are imported when they are first used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyrodiff
from pyrodiff import chains

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "pyro", "lightning", "numpy", "matplotlib", "sklearn", "xarray")


def run(code: str) -> str:
    """Standard output of the code in a fresh interpreter, without the import hook of the tests."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lazy_names_are_the_modules_own() -> None:
    assert pyrodiff.ForwardChain is chains.ForwardChain
    assert pyrodiff.ReverseChain is chains.ReverseChain
    assert pyrodiff.chains is chains


def test_every_listed_name_is_there() -> None:
    names = dir(pyrodiff)
    assert names == sorted(names) and set(pyrodiff.__all__) <= set(names)
    assert {"chains", "likelihood", "objectives", "training", "vae"} <= set(names)
    for name in names:
        assert getattr(pyrodiff, name) is not None
    assert pyrodiff.__version__.count(".") == 2


CONTRACT = """
ForwardChain ReverseChain
LinearSchedule CosineSchedule LogSNRSchedule BetaSchedule
NoiseDenoiser DataDenoiser VelocityDenoiser MeanDenoiser
FixedSmall FixedLarge LearnedRange LearnedDiagonal
GaussianDecoder DiscretizedGaussianDecoder CategoricalDecoder
ResidualMLP ResidualConvNet UNet
VariationalBound NoiseLoss MeanLoss HybridLoss WeightedLoss variational_term
TermwiseBound PathBound ImportanceBound ParticleBound ProbabilityFlow SandwichBound
Dequantized Pilot
Schedule Denoiser Variance Decoder Objective Estimator LogLikelihood Level Step VAE
""".split()
"""Names that the README and the guide import from ``pyrodiff`` itself."""


def documented_names() -> set[str]:
    """Names that code on the pages imports from ``pyrodiff``, and classes that the README shows."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    names = set()
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pyrodiff":
                names |= {alias.name for alias in node.names}
    table = re.findall(r"^\| .* \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    return names | set(re.findall(r"`([A-Z][a-z]+(?:[A-Z]\w+)?)`", "\n".join(table)))


def test_contract_and_documented_names_are_flat() -> None:
    names = set(CONTRACT) | documented_names()
    assert len(names) > 40 and [name for name in sorted(names) if name not in dir(pyrodiff)] == []
    for name in names:
        assert getattr(pyrodiff, name) is not None


def test_a_flat_name_is_that_of_its_module() -> None:
    """One object under both paths, so that ``isinstance`` and pickles agree."""
    for name in set(pyrodiff.__all__) - {"__version__"}:
        value = getattr(pyrodiff, name)
        if inspect.ismodule(value):
            assert value.__name__ == f"pyrodiff.{name}"
        else:
            assert getattr(importlib.import_module(value.__module__), name) is value


def test_flat_names_have_docstrings() -> None:
    for name in set(pyrodiff.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(pyrodiff, name)), name


def test_type_checkers_see_the_flat_names(tmp_path: Path) -> None:
    """The lazy names are declared under ``TYPE_CHECKING``, each with its module."""
    assert (Path(pyrodiff.__file__).parent / "py.typed").exists()
    tree = ast.parse(Path(pyrodiff.__file__).read_text("utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    declared = {
        alias.asname: f"{node.module}.{alias.name}"
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {n for n in pyrodiff.__all__ if not inspect.ismodule(getattr(pyrodiff, n))}
    assert names - {"__version__"} == declared.keys()
    for name, source in declared.items():
        module, _, last = source.rpartition(".")
        assert getattr(importlib.import_module(module), last) is getattr(pyrodiff, name)


def test_the_package_runs_as_a_program() -> None:
    for arguments, expected in ([["--version"], pyrodiff.__version__], [["--help"], "evaluate"]):
        command = [sys.executable, "-m", "pyrodiff", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and expected in done.stdout


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'pyrodiff' has no attribute 'Forwardchain'"):
        _ = pyrodiff.Forwardchain
    assert not hasattr(pyrodiff, "_hidden")


def test_import_is_light_until_a_name_is_used() -> None:
    code = f"""
import sys, pyrodiff
assert dir(pyrodiff)
print([m for m in {HEAVY} if m in sys.modules])
pyrodiff.schedules
print("torch" in sys.modules)
"""
    assert run(code).splitlines() == ["[]", "True"]


def test_flat_names_import_no_more_than_pyro_does() -> None:
    """Beside PyTorch, Pyro and what these import, nothing heavy comes with a model's parts."""
    code = """
import sys, pyro
before = {name.partition(".")[0] for name in sys.modules}
from pyrodiff import ForwardChain, LogSNRSchedule, NoiseDenoiser, ResidualMLP, ReverseChain
from pyrodiff import TermwiseBound, VariationalBound
new = {name.partition(".")[0] for name in sys.modules} - before
print(sorted(new & {"lightning", "diffusers", "matplotlib", "arviz", "xarray", "sklearn",
                    "pandas", "scipy", "h5netcdf", "h5py", "rich", "jsonargparse"}))
"""
    assert run(code).strip() == "[]"


def test_help_of_the_command_line_imports_no_torch() -> None:
    code = """
import sys
from pyrodiff.cli import main
for arguments in (["--help"], ["fit", "--help"], ["sample", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code
    else:
        raise AssertionError("no exit")
print("heavy:", [m for m in ("torch", "pyro", "lightning") if m in sys.modules])
"""
    output = run(code)
    assert "heavy: []" in output
    assert "--objective" in output and "--num-samples" in output
