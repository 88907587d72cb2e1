"""README and guide are true: their snippets run, their commands parse, their results are printed.

Nothing is random beyond fixed seeds.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

import pyrodiff
from pyrodiff import likelihood
from pyrodiff.cli import make_parser, normalised, settings_of
from pyrodiff.likelihood import Estimator, SandwichBound
from pyrodiff.runs.choices import ESTIMATORS
from pyrodiff.runs.settings import EvaluationSettings

ROOT = Path(__file__).parents[1]
NAMES = ["README.md", "docs/index.md", "docs/which_number.md"]
HOW_TO = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/howto/*.md"))
PAGES = {name: (ROOT / name).read_text("utf-8") for name in [*NAMES, *HOW_TO]}
GUIDE = PAGES["docs/which_number.md"]
FIT = re.compile(r"(?<=^for _ in )range\(\d+\)", re.MULTILINE)  # here, two steps will do

every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
WITH_COMMANDS = [page for page in PAGES.values() if "```sh" in page]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of all commands in blocks of shell and in tables that name a run or data."""
    lines = "".join(blocks(page, "sh")).splitlines() + re.findall(r"`(pyrodiff [^`]+)`", page)
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pyrodiff ")]
    return [words for words in found if len(words) > 1 and not {"DATA", "--help"} & {*words}]


@every_page
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as somebody would paste them; assertions among them hold."""
    monkeypatch.chdir(tmp_path)
    found, names = blocks(page, "python"), dict[str, Any]()
    assert len(found) > 1
    for number, source in enumerate(found):
        exec(compile(FIT.sub("range(2)", source), f"<block {number}>", "exec"), names)  # noqa: S102


def test_trainings_are_cut_short() -> None:
    how_to = [f"docs/howto/{name}.md" for name in ("network", "objective", "variance")]
    for name in ("README.md", "docs/index.md", *how_to):
        assert len(FIT.findall(PAGES[name])) == 1


def test_the_first_example_prints_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    """In full, twelve lines of code at most.  Other arithmetic moves the value by 1e-6 nats."""
    source, result = blocks(PAGES["README.md"], "python")[0], blocks(PAGES["README.md"], "text")[0]
    assert len([line for line in source.splitlines() if line]) <= 12
    exec(compile(source, "<README>", "exec"), {})  # noqa: S102
    printed, stored = capsys.readouterr().out.split(), result.split()
    assert len(printed) == len(stored)
    for word, expected in zip(printed, stored, strict=True):
        try:
            assert float(word) == pytest.approx(float(expected), abs=0.011)  # the last digit
        except ValueError:
            assert word == expected


def test_the_first_screen_of_the_readme() -> None:
    """One sentence, the picture, how to install, an example and its result come first."""
    page = PAGES["README.md"]
    first_screen = page[: page.index("\n## ")]
    marks = ["Pyro", "![", "reverse.png", "pip install", "```python", "```text"]
    places = [first_screen.index(mark) for mark in marks]
    assert places == sorted(places)
    sentence = first_screen.split("\n\n")[1]
    assert sentence.count(". ") == 0 and sentence.endswith(".")


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page[2:10])
def test_commands_parse(page: str) -> None:
    found = commands(page)
    assert len(found) >= 3
    for words in found:
        options = make_parser().parse_args([normalised(word) for word in words])
        if words[0] == "evaluate":
            settings_of(EvaluationSettings, options["evaluate"])  # options go with the estimator


def test_every_estimator_is_on_the_page() -> None:
    classes = [getattr(likelihood, name) for name in likelihood.__all__]
    estimators = [c for c in classes if issubclass(c, Estimator) and c is not Estimator]
    assert len(estimators) > 5
    for estimator in [*estimators, SandwichBound]:
        assert GUIDE.count(f"`{estimator.__name__}") >= 2, estimator.__name__
    for name in ESTIMATORS.keys() - {"termwise"}:
        assert f"--estimator {name}" in GUIDE


PARTS = ["schedule", "denoiser", "variance", "objective", "estimator"]


@pytest.mark.parametrize("name", PARTS)
def test_a_new_part_takes_under_thirty_lines(name: str) -> None:
    """Complete in the first block, in public names, and saved and loaded again further down."""
    first, *others = blocks(PAGES[f"docs/howto/{name}.md"], "python")
    bases = [
        base
        for node in ast.walk(ast.parse(first))
        if isinstance(node, ast.ClassDef)
        for base in map(ast.unparse, node.bases)
    ]
    assert name.capitalize() in bases
    assert len(first.splitlines()) < 30
    assert any(".save(" in block and ".load(" in block for block in others)


HOOKS = {
    "Schedule": ["log_snr", "table"],
    "Denoiser": ["x0_hat"],
    "Variance": ["log_variance", "learned"],
    "Objective": ["terms", "constant", "default_timesteps", "check_model"],
    "Estimator": ["estimate_batch", "check", "samples_per_batch"],
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_public_and_explained(kind: str) -> None:
    """What a part of one's own overrides has a docstring and stands on its page."""
    base, page = getattr(pyrodiff, kind), PAGES[f"docs/howto/{kind.lower()}.md"]
    for name in HOOKS[kind]:
        assert re.search(rf"\b{name}\b", page), name
        method = getattr(base, name, None)
        assert not callable(method) or method.__doc__, name


@every_page
def test_pages_use_public_names(page: str) -> None:
    """No name with an underscore, but methods of Python's own and the ``_`` of a loop."""
    for source in blocks(page, "python"):
        for node in ast.walk(ast.parse(source)):
            names = {getattr(node, field, None) for field in ("attr", "id", "name", "module")}
            names |= set(str(getattr(node, "module", "")).split("."))
            private = {n for n in names if n and re.match(r"_(?!_).", n)}
            assert not private


@every_page
def test_flat_names_are_imported_flat(page: str) -> None:
    """What ``pyrodiff`` itself offers is imported from there."""
    for source in blocks(page, "python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pyrodiff."):
                assert not {alias.name for alias in node.names} & set(pyrodiff.__all__)


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files that are there, and headings; the reference is written when the site is built."""
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if target.startswith("http") or "reference/" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / name).parent / file if file else ROOT / name
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text("utf-8")), target


SOURCE = Path(pyrodiff.__file__).parent
EXAMPLES = [
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0


def test_there_are_examples() -> None:
    rooms = ["chains", "data", "likelihood.termwise", "comparison", "schedules", "vae"]
    for room in rooms:
        assert [name for name in EXAMPLES if f"{name}.".startswith(f"pyrodiff.{room}.")], room


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("benchmarks/*.py")))
def test_benchmarks_find_what_they_import(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when it is run by its path
    runpy.run_path(str(ROOT / "benchmarks" / name), run_name="imported")
