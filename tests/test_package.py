"""The package itself: names that are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyrodiff
from pyrodiff import chains

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
