"""``pyrodiff compare``: the same noise for all runs, honest grouping, a page that asks for nothing.

Nothing here is random beyond the seeds: values are those of ``compare_models`` or of the saved
files, to the rounding of a float32 network.
"""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyrodiff import data, serialization
from pyrodiff import runs as runs_module
from pyrodiff.cli import main
from pyrodiff.comparison import compare, compare_models
from pyrodiff.likelihood import ImportanceBound, LogLikelihood, PathBound
from pyrodiff.runs.build import load_model, make_model
from pyrodiff.runs.comparison import compare as compare_runs
from pyrodiff.runs.dataset import describe, load_source
from pyrodiff.runs.groups import group, unique_names
from pyrodiff.runs.report.folder import GENERATOR
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, recipe
from pyrodiff.runs.splits import evaluate_split

TINY = {"network": "mlp", "width": 8, "blocks": 1, "num_steps": 12, "calls": 16}
TINY["validation_calls"] = 8
EVIL = "<script>alert(1)&$x_"


def write(source: object, folder: Path, data_seed: int = 0, **options: Any) -> Path:
    """A run as ``fit`` writes it, but of an untrained model; with an evaluation of 20 samples."""
    context = options.pop("context", None)
    section = {"source": str(source), "seed": data_seed, "context": context}
    dataset = load_source(section)
    settings = FitSettings(**(TINY | options))
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    torch.manual_seed(settings.seed + 10 * (settings.objective == "simple"))
    size = 0 if context is None else dataset.test_context.shape[1]
    reverse = make_model(settings, dataset.event_shape, dataset.levels, context_size=size)
    for weights in reverse.parameters():  # an untrained network's output may be zero
        weights.data += 0.02 * torch.randn_like(weights)
    described = section | describe(dataset)
    config = {"model": reverse.config(), "data": described, "fit": settings.to_dict()}
    serialization.write_config(folder / "config.yaml", config)
    serialization.write_weights(folder / "model.safetensors", reverse.state_dict())
    contexts = None if context is None else dataset.test_context[:20]
    result = PathBound().estimate(reverse.eval(), dataset.test[:20], context=contexts)
    result.save(folder / "evaluation.nc", data=dataset.name, split="test", seed=0)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of one model and another one of digits."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a-0": write("digits", folder / "a-0"),
        "a-1": write("digits", folder / "a-1", seed=1),
        "b": write("digits", folder / "b", objective="simple"),
    }


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moons")
    return {
        "0": write("moons", folder / "m-0"),
        "1": write("moons", folder / "m-1", 1, seed=1),
        "other": write("moons", folder / "wide", seed=1, objective="simple"),
    }


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyrodiff compare: error:")
    for part in parts:
        assert part in error


class Page(HTMLParser):
    """Tags, their attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# -- values --------------------------------------------------------------------------------------


def test_values_are_those_of_compare_models(runs: dict[str, Path], tmp_path: Path) -> None:
    """Common noise, two seeds as one model; what the runs hold is left as it was."""
    before = {path: path.read_bytes() for run in runs.values() for path in run.glob("*.*")}
    comparison = compare_runs(
        [str(run) for run in runs.values()],
        EvaluationSettings("importance", particles=4, limit=30, seed=7),
        output=str(tmp_path / "page.html"),
        quiet=True,
    )
    models = {name: load_model(run) for name, run in runs.items()}
    x_0 = data.load("digits").test[:30]
    several = {"a": [models["a-0"], models["a-1"]], "b": models["b"]}
    whole = compare_models(several, x_0, ImportanceBound(4), seed=7)
    assert comparison.models.keys() == {"a", "b"} and comparison.models["a"].seeds == 2
    assert comparison.reference == whole.reference
    for name in ("value", "std_error", "between_seeds", "monte_carlo", "low", "high"):
        one, other = (getattr(each.differences[0], name) for each in (comparison, whole))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)
    assert before == {path: path.read_bytes() for run in runs.values() for path in run.glob("*.*")}
    files = sorted((tmp_path / "page" / "values").iterdir())
    assert [path.name for path in files] == ["1-a-0.nc", "2-a-1.nc", "3-b.nc"]
    again = compare({"a": files[:2], "b": files[2]})
    assert again.differences[0].value == pytest.approx(comparison.differences[0].value, abs=1e-9)


def test_common_noise_cancels(runs: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """A copy of a run differs from it by nothing, and is no other seed of its model."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(runs["b"], copy)
    evaluation = EvaluationSettings("path", particles=1, limit=20)
    comparison = compare_runs([str(runs["b"]), "copy"], evaluation, quiet=True)
    assert comparison.models.keys() == {"b", "copy"}
    assert comparison.differences[0].value == 0 and comparison.differences[0].std_error == 0
    assert comparison.differences[0].monte_carlo == 0 < comparison.differences[0].independent
    assert comparison.models["b"].calls == 24  # two repeats of 12
    assert len(list(Path("comparison/values").iterdir())) == 4
    seeds = {float(LogLikelihood.load(path).value[0]) for path in Path().glob("comparison/*/*.nc")}
    assert len(seeds) == 2  # other noise in each repeat, the same for both


def test_termwise_takes_the_runs_own_number(runs: dict[str, Path], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = write("digits", tmp_path / "more", calls=20)
    assert main(["compare", str(runs["b"]), str(more), "--limit=9", "--repeats=1", "--quiet"]) == 0
    assert Path("comparison/terms.png").is_file()
    text = Page(Path("comparison.html").read_text("utf-8")).text
    assert "--calls=16 --limit=9 --repeats=1" in text and "16 network calls" in text
    assert "unknown" in text and "Monte Carlo part of a difference is unknown" in text


def test_saved_evaluations(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    names = [str(runs["a-0"]), str(runs["b"])]
    page = tmp_path / "page.html"
    assert main(["compare", *names, "--saved", "--output", str(page)]) == 0
    out = capsys.readouterr().out
    values = [LogLikelihood.load(f"{name}/evaluation.nc").value.double() for name in names]
    comparison = compare({"a-0": f"{names[0]}/evaluation.nc", "b": f"{names[1]}/evaluation.nc"})
    assert abs(comparison.differences[0].value) == pytest.approx(
        abs(float((values[0] - values[1]).mean()))
    )
    assert "test: 20 samples" in out.replace("\n", " ")
    assert not (tmp_path / "page" / "values").exists()


def test_processes_reach_the_evaluations(
    runs: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    asked = []

    def evaluate(*args: Any, processes: int, **options: Any) -> LogLikelihood:
        asked.append(processes)
        return evaluate_split(*args, **options)

    monkeypatch.setattr("pyrodiff.runs.comparison.evaluate_split", evaluate)
    monkeypatch.chdir(tmp_path)
    options = ["--estimator", "path", "--limit", "3", "--processes", "2", "--quiet"]
    assert main(["compare", str(runs["a-0"]), str(runs["b"]), *options]) == 0
    assert asked == [2, 2]


def test_interrupted_comparison_is_resumed(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(runs["a-0"]), str(runs["b"])]
    options = ["--estimator", "path", "--limit", "6", "--batch-size", "4", "--quiet"]
    command = ["compare", *names, *options]
    assert main([*command, "--output", "whole.html"]) == 0
    estimate, calls = PathBound.estimate, list[int]()

    def interrupted(*args: Any, **more: Any) -> LogLikelihood:
        calls.append(len(calls))
        if len(calls) == 5:  # the second batch of the second run
            raise KeyboardInterrupt
        return estimate(*args, **more)

    monkeypatch.setattr(PathBound, "estimate", interrupted)
    assert main(command) == 130
    assert "--resume goes on with what is finished" in capsys.readouterr().err
    left = {path.name for path in Path("comparison").iterdir()}
    assert left == {"evaluation", "settings.yaml"} and not Path("comparison.html").exists()
    calls.extend(range(10))  # no other interruption
    before = len(calls)
    assert main([*command, "--resume"]) == 0
    assert len(calls) - before == 2
    for name in ("1-a-0.nc", "2-b.nc"):
        one, other = (LogLikelihood.load(f"{at}/values/{name}") for at in ("whole", "comparison"))
        assert torch.equal(one.value, other.value)
    assert not Path("comparison/evaluation").exists()
    before = len(calls)
    assert main(command) == 0 and len(calls) - before == 6
    capsys.readouterr()  # the runs here have no checksums, which every command says
    refused(capsys, [*names, "--saved", "--resume"], "nothing to resume with saved evaluations")


# -- what may be compared ------------------------------------------------------------------------


def test_drawn_data_need_one_data_seed(moons: dict[str, Path], tmp_path: Path, capsys) -> None:
    options = ["--limit", "9", "--quiet", "--output", str(tmp_path / "page.html")]
    options += ["--estimator", "path"]
    several = [str(moons["0"]), str(moons["1"])]
    message = (
        "of the same data in the same units",
        "in m-0",
        "in m-1",
        "(data seed 1)",
        "--data-seed",
    )
    refused(capsys, [*several, *options], *message)
    assert not list(tmp_path.iterdir())
    assert main(["compare", str(moons["0"]), str(moons["other"]), *options]) == 0
    assert "bits/dim" not in capsys.readouterr().out  # of a density they depend on its units


def test_other_data_or_units(runs, moons, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = "another event shape: (1, 8, 8) in b, (2,) in m-0"
    refused(capsys, [str(runs["b"]), str(moons["0"])], message)
    x = np.random.default_rng(0).normal(size=(60, 2))
    for name, scale in (("one", 1), ("ten", 10)):
        np.savetxt(tmp_path / f"{name}.csv", scale * x, delimiter=",")
        write(tmp_path / f"{name}.csv", tmp_path / name)
    refused(capsys, ["one", "ten"], "another shift of the transform", "in one", "in ten")
    labelled = write("digits", tmp_path / "labelled", context="label")
    refused(capsys, [str(runs["b"]), str(labelled)], "another context: none in b, (10,) in")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none", "Expected at least two runs; got 1."),
        ("none other", "Expected a run's folder; got 'none'"),
        ("none other --repeats 0", "repeats to be an integer >= 1; got 0"),
        ("none other --processes 0", "processes to be an integer >= 1; got 0"),
        ("none other --estimator imprtance", "did you mean 'importance'?"),
        ("none other --output a.pdf", "to end in .html; got a.pdf"),
        ("none other --saved --seed 3 --limit 2", "with saved ones; got limit, seed"),
    ],
)
def test_mistakes(arguments: str, message: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments.split(), message)
    assert not list(tmp_path.iterdir())


def test_runs_twice_and_seeds_of_one_model(runs, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    a = str(runs["a-0"])
    refused(capsys, [a, f"{a}/../a-0"], "Expected every run once", "a-0 again")
    refused(capsys, [a, str(runs["a-1"])], "Expected at least two models; got training seeds")
    message = "whose folder is no run"  # its terms.png would be lost
    refused(capsys, [a, str(runs["b"]), "--output", f"{a}.html"], message)
    empty = tmp_path / "empty"
    shutil.copytree(runs["b"], empty)
    (empty / "evaluation.nc").unlink()
    refused(capsys, [a, "empty", "--saved"], "Expected a file empty/evaluation.nc")


def test_open_verdicts_come_with_the_command_that_would_decide(
    runs: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    """Both are bounds of two paths, and 9 samples are few; the page says the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    names = [str(runs["a-0"]), str(runs["b"])]
    options = ["--estimator", "path", "--limit", "9", "--quiet"]
    assert main(["compare", *names, *options]) == 0
    comparison = compare({"a": "comparison/values/1-a-0.nc", "b": "comparison/values/2-b.nc"})
    advice = comparison.differences[0].advice
    out, page = capsys.readouterr().out, Page(Path("comparison.html").read_text("utf-8")).text
    assert advice.samples is not None
    command = f"To decide: pyrodiff compare {' '.join(names)} --estimator=path"
    command += f" --limit={advice.samples}"
    total = len(data.load("digits").test)
    message = command if advice.samples <= total else f"would take about {advice.samples} samples"
    assert message in out and message in page
    assert main(["compare", *names, "--saved"]) == 0
    verdict = compare({name: f"{name}/evaluation.nc" for name in names}).differences[0]
    out = capsys.readouterr().out
    if verdict.advice.particles is not None:
        assert f"--estimator=importance --particles={verdict.advice.particles}" in out
    assert (
        "wrong in 2.5 % of repetitions at most"
        in Page(Path("comparison.html").read_text("utf-8")).text
    )


def test_paired_seeds(runs: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    other = write("digits", tmp_path / "b-1", seed=1, objective="simple")
    names = [str(runs["a-1"]), str(runs["a-0"]), str(runs["b"]), str(other)]
    assert main(["compare", *names, "--saved", "--paired-seeds"]) == 0
    page = Page(Path("comparison.html").read_text("utf-8"))
    assert "--saved --paired-seeds" in page.text
    results = {name: LogLikelihood.load(Path(name) / "evaluation.nc") for name in names}
    ordered = {
        "a": [results[names[1]], results[names[0]]],
        "b": [results[names[2]], results[names[3]]],
    }
    expected = compare(ordered, paired_seeds=True).differences[0]
    assert f"± {expected.std_error:.2g}" in capsys.readouterr().out
    assert "taken as pairs" in page.text
    message = "the same training seeds of all models, at least two"
    refused(capsys, [*names[1:], "--saved", "--paired-seeds"], message)
    refused(capsys, [names[1], names[2], "--paired-seeds"], message)


def test_names() -> None:
    assert unique_names(["r/a", "r/b"]) == ["a", "b"]
    assert unique_names(["r/a", "s/a", "b"]) == ["r/a", "s/a", "b"]

    def models(names: list[str], kinds: str) -> list[str]:
        """Names of the models, where runs of one letter differ in their seeds."""
        configs = [
            {"model": {"kind": kind}, "fit": {"seed": seed}} for seed, kind in enumerate(kinds)
        ]
        return [model.name for model in group(names, configs)]

    assert models(["vlb-0", "vlb-1", "simple"], "aab") == ["vlb", "simple"]
    assert models(["vlb/seed0", "vlb/seed1", "x/seed0"], "aab") == ["vlb", "x/seed0"]
    assert models(["vlb-10", "vlb-11", "v2-s0", "v2-s1"], "aabb") == ["vlb", "v2-s"]
    assert models(["one", "two", "three"], "aab") == ["one and others", "three"]
    assert models(["a", "a-1", "b"], "aab") == ["a and others", "b"]
    assert models(["x-1", "x-2", "x-3", "x-4"], "aabb") == ["x", "x-3 and others"]


def test_fit_takes_a_seed_of_the_data(tmp_path: Path, monkeypatch) -> None:
    """The split is that of the data's seed, the training seed stays its own."""
    stub = SimpleNamespace(fit=lambda *_, **__: None)  # Lightning takes long to import
    monkeypatch.setattr("pyrodiff.runs.fitting.training", stub)
    monkeypatch.setattr("pyrodiff.runs.fitting.evaluate_dataset", lambda *_, **__: None)
    for name, more in (("one", ["--data-seed", "5"]), ("other", [])):
        options = ["--output", str(tmp_path / name), "--seed", "3", "--width", "8", "--quiet"]
        assert main(["fit", "moons", *options, *more]) == 0
    one, other = (runs_module.read_run(str(tmp_path / name)) for name in ("one", "other"))
    assert (one["data"]["seed"], other["data"]["seed"]) == (5, 3)
    assert one["fit"]["seed"] == other["fit"]["seed"] == 3


# -- the page ------------------------------------------------------------------------------------


def test_page_is_one_file_and_escapes_names(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(runs["b"], EVIL)
    options = "--estimator importance --particles 30 --limit 12 --quiet"
    assert main(["compare", str(runs["a-0"]), EVIL, *options.split()]) == 0
    out = capsys.readouterr().out
    for word in (EVIL, "of which Monte Carlo", "± paired error", "95\u00a0% interval", "log p"):
        assert word in out
    assert {path.name for path in tmp_path.iterdir()} == {EVIL, "comparison", "comparison.html"}
    figures = {path.name for path in Path("comparison").glob("*.png")}
    assert figures == {"means.png", "differences.png", "ladder.png", "weights.png"}
    text = Path("comparison.html").read_text("utf-8")
    page = Page(text)
    assert not page.open and EVIL in page.text
    assert "script" not in {tag for tag, _ in page.tags} and "default-src 'none'" in text
    sources = [
        attributes[key] or ""
        for _, attributes in page.tags
        for key in ("src", "href")
        if key in attributes
    ]
    assert len(sources) == 6 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"url\(|@import|https?://", text)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    for word in (
        "12 held-out samples",
        "ImportanceBound(particles=30",
        "lower bound",
        "360",
        "torch",
    ):
        assert word in page.text
    assert f"seed {0}, common to all models" in page.text and "pyrodiff compare" in page.text


def test_failed_report_leaves_the_old_one(runs, tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"{GENERATOR} old")

    def torn(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyrodiff.runs.report.page._page", torn)
    names = [str(runs["a-0"]), str(runs["b"])]
    assert main(["compare", *names, "--saved", "--output", str(page)]) == 130
    assert page.read_text() == f"{GENERATOR} old"
    with pytest.raises(ValueError, match="Expected at least two runs; got 1"):
        compare_runs(names[:1])
