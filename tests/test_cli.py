"""The command line: exit codes, messages, and round trips of fit, evaluate and sample."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pyrodiff.cli import main, make_parser, normalised
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.runs.build import make_network
from pyrodiff.runs.choices import CHOICES
from pyrodiff.runs.settings import FitSettings, recipe
from pyrodiff.runs.summary import worse_than_uniform
from pyrodiff.serialization import describe

TINY = "--steps 30 --validate_every 10 --width 16 --num_steps 50 --calls 16 "
TINY += "--validation_calls 8 --batch_size 32 --quiet"
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
        ("fit digits --num_steps 0", ("num_steps to be an integer >= 1; got 0.",)),
        ("fit digits --weight-decay -1", ("Expected weight_decay >= 0; got -1.0",)),
        ("fit digits --learning-rate .inf", ("learning_rate to be positive and finite; got inf",)),
        ("fit digits --calls 1", ("Expected calls to be an integer >= 2; got 1.",)),
        ("fit digits --decoder gaussian", ("Expected decoder categorical or discretized",)),
        ("fit digits --schedule cosine --log-snr-max 5", ("log_snr_max with schedule 'log-snr'",)),
        ("fit moons --schedule linear --log-snr-min -5", ("log_snr_min with schedule 'log-snr'",)),
        ("fit digits --network unet --width 48", ("positive multiple of 32; got 48",)),
        ("fit moons --network conv", ("Expected images", "Use network 'mlp'")),
        ("fit moons --network unet", ("Expected images", "Use network 'mlp'")),
        ("fit moons --context label", ("Expected no context= for 'moons'",)),
        ("fit digits --key x", ("Expected no key= for 'digits'",)),
        ("fit moons --levels 4", ("Expected no levels= for 'moons'",)),
        ("evaluate none", ("Expected a run's folder; got 'none'",)),
        ("evaluate none --split tests", ("Expected split to be one of", "'tests'")),
        ("evaluate none --estimator imprtance", ("did you mean 'importance'?",)),
        ("evaluate none --estimator path --std-error 0.1", ("'path' (particles)", "std_error")),
        ("evaluate none --estimator flow --calls=8", ("'flow' (particles)", "calls = 8")),
        ("evaluate none --particles 8", ("'termwise' (calls, std_error)", "particles = 8")),
        ("evaluate none --std-error 0.1 --calls 8", ("got both, 8 and 0.1",)),
        ("evaluate none --std-error 0", ("Expected std_error to be positive and finite; got 0.0",)),
        ("evaluate none --calls 1", ("Expected calls to be an integer >= 2; got 1.",)),
        (
            "evaluate none --estimator path --particles 0",
            ("particles to be an integer >= 1; got 0.",),
        ),
        ("evaluate none --batch-size 0", ("Expected batch_size to be an integer >= 1; got 0.",)),
        ("evaluate none --limit 0", ("Expected limit to be an integer >= 1; got 0.",)),
        ("evaluate none --processes 0", ("Expected processes to be an integer >= 1; got 0.",)),
        ("sample none", ("Expected a run's folder; got 'none'",)),
    ],
)
def test_mistakes(arguments, parts, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, main(arguments.split()), f"pyrodiff {arguments.split()[0]}: error:", *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        *("fit digits --objectiv simple", "fit digits --step 3", "fit digits --resum"),
        *("evaluate none --spli test", "sample none --num 3", "compare a b --save"),
    ],
)
def test_no_option_is_abbreviated(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2 and "nrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["", "fti digits", "fit", "fit digits --stepz 3"])
def test_unknown_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2 and "error" in capsys.readouterr().err


def network_of(arguments: str, *, image: bool = True) -> torch.nn.Module:
    """The network of ``pyrodiff fit DATA`` with some options, for images of 17 levels."""
    options = make_parser().parse_args(f"fit digits {arguments}".split()).fit.as_dict()
    names = FitSettings.__dataclass_fields__
    settings = FitSettings(**{name: options[name] for name in names})
    settings = recipe(settings, image=image, levels=17 if image else None)
    return make_network(settings, (1, 8, 8) if image else (2,), 17 if image else None, 0)


@pytest.mark.parametrize("network", CHOICES["network"])
@pytest.mark.parametrize("option", ["--width 96", "--blocks 3", "--dropout 0.5"])
def test_options_reach_every_network(network: str, option: str) -> None:
    usual = network_of(f"--network {network}")
    changed = network_of(f"--network {network} {option}")
    assert describe(usual) != describe(changed)
    layers = [[module.__class__, getattr(module, "p", None)] for module in changed.modules()]
    before = [[module.__class__, getattr(module, "p", None)] for module in usual.modules()]
    shapes = [[p.shape for p in net.parameters()] for net in (usual, changed)]
    if "dropout" not in option:
        assert shapes[0] != shapes[1]
    elif network == "unet":
        assert before != layers  # the others drop by a function, tested with the networks


def test_network_brings_its_own_defaults() -> None:
    """What suits convolutions on images does not reach an MLP."""
    one = recipe(FitSettings(network="mlp"), image=True, levels=17)
    other = recipe(FitSettings(network="mlp"), image=False, levels=None)
    names = ("width", "blocks", "dropout", "steps", "batch_size", "learning_rate", "weight_decay")
    for name in names:
        assert getattr(one, name) == getattr(other, name)
    conv = recipe(FitSettings(), image=True, levels=17)
    assert conv.network == "conv" and conv.weight_decay == 1.0 and conv.width == 32
    assert one.width == 256 and one.weight_decay == 1e-4 and one.dropout == 0.0
    assert (one.variance, conv.variance, other.variance) == (*["fixed-small"] * 2, "fixed-large")


def test_short_chain_needs_no_other_option(tmp_path: Path) -> None:
    """The default calls are more than twice as many as the steps."""
    folder, few = tmp_path / "run", "--steps 2 --width 8 --validate-every 2 --quiet"
    assert main(f"fit mixture --num-steps 20 --output {folder} {few}".split()) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["fit"]["calls"] == 128


def test_model_worse_than_a_uniform_code_says_so(tmp_path: Path, capsys) -> None:
    """An MLP that has learned nothing, at the noise in x_1 that the levels ask for."""
    few = "--steps 2 --learning-rate 1e-12 --network mlp --denoiser data"
    line = "Worse than a uniform code over the 17 levels (4.087 bits/dim)"
    assert fit("digits", tmp_path / "run", few.replace("--steps 2", "--validate_every 2")) == 0
    assert line in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--quiet", "--limit", "20"]) == 0
    assert line in capsys.readouterr().out


def test_model_better_than_a_uniform_code_says_nothing() -> None:
    ones, bits = torch.ones(3), 4.0
    value = -bits * math.log(2) * ones.double()
    result = LogLikelihood(value, 0 * ones, "lower bound", ones.long(), 1, "none")
    assert worse_than_uniform(result, 17) == [] and worse_than_uniform(result, None) == []
    assert (
        "Worse than a uniform code over the 15 levels (3.907" in worse_than_uniform(result, 15)[0]
    )


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
    argument = [normalised(a) for a in dashes]
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
