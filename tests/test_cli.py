"""The command line: exit codes, messages, and round trips of fit, evaluate and sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pyrodiff.cli import _underscored, main, make_parser
from pyrodiff.likelihood import LogLikelihood

TINY = "--steps 30 --validate_every 10 --width 16 --num_steps 50 --evaluations 16 "
TINY += "--validation_evaluations 8 --batch_size 32 --quiet"
FILES = {"config.yaml", "model.safetensors", "metrics.csv", "evaluation.nc", "samples.png"}
FILES |= {"terms.png", "checkpoints"}


def fit(data: object, folder: Path, more: str = "") -> int:
    return main(["fit", str(data), "--output", str(folder), *TINY.split(), *more.split()])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    x = np.random.default_rng(0).normal(size=(200, 2)) @ np.array([[1.0, 0.5], [0.0, 0.3]])
    np.savetxt(folder / "one.csv", x, delimiter=",", fmt="%.17g")
    np.savetxt(folder / "ten.csv", 10 * x, delimiter=",", fmt="%.17g")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert fit("digits", folder, "--context label") == 0
    return folder


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert fit(table / "one.csv", folder) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], status: int, *parts: str) -> None:
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("pyrodiff ")
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("fit digits --objective vlbx", ("objective", "'vlbx'", "did you mean 'vlb'?")),
        ("fit digit", ("Expected one of", "got 'digit'", "did you mean 'digits'?")),
        ("fit none.csv", ("Expected a file or folder", "none.csv")),
        ("fit digits --num_steps 0", ("Expected num_steps > 0; got 0",)),
        ("fit digits --decoder gaussian", ("Expected decoder categorical or discretized",)),
        ("evaluate none", ("Expected a run's folder; got 'none'",)),
        ("evaluate none --split tests", ("Expected split to be one of", "'tests'")),
        ("evaluate none --estimator imprtance", ("did you mean 'importance'?",)),
        ("evaluate none --estimator path --std-error 0.1", ("'path' (particles)", "std_error")),
        ("evaluate none --estimator flow --evaluations=8", ("'flow' (particles)", "evaluations")),
        ("evaluate none --particles 8", ("'termwise' (evaluations, std_error)", "particles = 8")),
        ("evaluate none --std-error 0.1 --evaluations 8", ("got both, 8 and 0.1",)),
        ("evaluate none --std-error 0", ("Expected std_error > 0; got 0.0",)),
        ("evaluate none --evaluations 1", ("Expected evaluations >= 2; got 1",)),
        ("evaluate none --estimator path --particles 0", ("Expected particles >= 1; got 0",)),
        ("evaluate none --batch-size 0", ("Expected batch_size >= 1; got 0",)),
        ("evaluate none --limit 0", ("Expected limit >= 1; got 0",)),
        ("evaluate none --processes 0", ("Expected processes >= 1; got 0",)),
        ("sample none", ("Expected a run's folder; got 'none'",)),
    ],
)
def test_mistakes(arguments, parts, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, main(arguments.split()), f"pyrodiff {arguments.split()[0]}: error:", *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", ["", "fti digits", "fit", "fit digits --stepz 3"])
def test_unknown_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2 and "error" in capsys.readouterr().err


def test_config_file_gives_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("data: mixture\nobjective: hybrid\nwidth: 16\nlearning_rate: 0.01\n")
    parser = make_parser()
    given = ["fit", "mixture", "--objective", "hybrid", "--width", "16", "--learning_rate", "0.01"]
    one = parser.parse_args(["fit", "--config", str(path)]).fit.as_dict()
    other = parser.parse_args(given).fit.as_dict()
    assert one.pop("config") and other.pop("config") is None
    assert one == other and one["width"] == 16


def test_options_may_be_written_with_dashes() -> None:
    """Names alone are changed: values and paths keep their dashes."""
    dashes = ["evaluate", "a-run", "--std-error=-1e-3", "--batch-size", "8", "--data", "my-data"]
    argument = [_underscored(a) for a in dashes]
    assert argument == [
        *("evaluate", "a-run", "--std_error=-1e-3", "--batch_size", "8", "--data", "my-data")
    ]


def test_digits_by_class(labelled: Path, tmp_path: Path, capsys) -> None:
    assert {path.name for path in labelled.iterdir()} == FILES
    before = LogLikelihood.load(labelled / "evaluation.nc")
    assert main(["evaluate", str(labelled), "--quiet"]) == 0
    after = LogLikelihood.load(labelled / "evaluation.nc").value
    assert torch.equal(after, before.value)  # fit evaluates what lies in its folder
    path = tmp_path / "threes.npy"
    draw = ["sample", str(labelled), "-n", "3", "--output", str(path)]
    assert main([*draw, "--label", "3"]) == 0
    three = np.load(path)
    assert three.shape == (3, 1, 8, 8) and set(np.unique(three)) <= set(range(17))
    assert path.with_suffix(".png").is_file()
    assert main([*draw, "--label", "4"]) == 0 and not np.array_equal(np.load(path), three)
    refused(capsys, main(draw), "Expected a label; got none")
    refused(capsys, main([*draw, "--label", "10"]), "Expected a label from 0 to 9; got 10")


def test_table_round_trip_and_units(run: Path, table: Path, tmp_path: Path, capsys) -> None:
    assert {path.name for path in run.iterdir()} == FILES
    other = tmp_path / "ten"
    assert fit(table / "ten.csv", other) == 0
    one, ten = (LogLikelihood.load(folder / "evaluation.nc") for folder in (run, other))
    shift = ten.mean().value - one.mean().value  # same seeds: −d log 10 up to rounding
    assert shift == pytest.approx(-2 * np.log(10), abs=1e-3)
    draws = []
    for folder in (run, other):
        assert main(["sample", str(folder), "-n", "5"]) == 0
        draws.append(np.load(folder / "samples.npy"))
    np.testing.assert_allclose(draws[1], 10 * draws[0], rtol=1e-3, atol=1e-3)
    refused(capsys, main(["sample", str(run), "--label", "1"]), "Expected no label")
    status = main(["evaluate", str(run), "--data", str(table / "ten.csv"), "--quiet"])
    refused(capsys, status, "or data with the same transform")


def test_run_is_not_lost_by_accident(run: Path, table: Path, capsys) -> None:
    before = (run / "model.safetensors").read_bytes()
    data = table / "one.csv"
    refused(capsys, fit(data, run), "which holds a run", "--resume", "--overwrite")
    refused(capsys, fit(data, run, "--resume --blocks 3"), "in order to resume it", "3")
    assert (run / "model.safetensors").read_bytes() == before


def test_overwrite_and_hybrid_on_a_density(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no wrapped lines
    assert fit("mixture", tmp_path / "run", "--objective hybrid") == 0
    held = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert held["fit"]["variance"] == "learned-range"
    assert "exact log p of the data's law" in capsys.readouterr().out
    assert fit("mixture", tmp_path / "run", "--overwrite") == 0
    held = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert held["fit"]["objective"] == "vlb"


def test_hostile_config_is_not_executed(tmp_path: Path, capsys) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")
    for command in ("evaluate", "sample"):
        refused(capsys, main([command, str(tmp_path)]), "Expected plain YAML in")
    assert not marker.exists()
