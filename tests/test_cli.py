"""The command line: exit codes, messages, and round trips of fit, evaluate and sample."""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pyrodiff import runs
from pyrodiff.cli import main, make_parser, normalised
from pyrodiff.grids import OptimalGrid
from pyrodiff.likelihood import LogLikelihood, TermwiseBound
from pyrodiff.runs.build import load_model, make_network
from pyrodiff.runs.choices import CHOICES
from pyrodiff.runs.folder import sealed
from pyrodiff.runs.sampling import transform
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, recipe
from pyrodiff.runs.summary import worse_than_uniform
from pyrodiff.serialization import describe
from pyrodiff.variances import PosteriorCovariance

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
        ("evaluate none --grid uniform", ("Expected steps with a grid; got grid 'uniform' alone",)),
        ("evaluate none --steps 0", ("Expected steps to be an integer >= 1; got 0.",)),
        ("evaluate none --steps 5 --grid uni", ("Expected grid to be one of", "'uniform'?")),
        ("evaluate none --variance fulll", ("Expected variance to be one of", "'full'?")),
        ("evaluate none --variance learned-range", ("Expected variance to be one of", "-range'")),
        (
            "evaluate none --variance full --probes 2",
            ("probes with variance isotropic or diagonal; got probes = 2 with variance 'full'.",),
        ),
        (
            "evaluate none --variance isotropic --rank 2",
            ("Expected rank with variance diagonal; got rank = 2 with variance 'isotropic'.",),
        ),
        ("sample none --steps 5 --probes 2", ("got probes = 2 with no variance.",)),
        ("evaluate none --estimator flow --steps 5", ("which has no steps; got {'steps': 5}.",)),
        ("compare a b --saved --steps 5", ("no options of evaluations", "got steps.")),
        ("sample none --grid optimal", ("Expected steps with a grid",)),
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
    arguments = [
        "fit",
        "mixture",
        "--objective",
        "hybrid",
        "--width",
        "16",
        "--learning_rate",
        "0.01",
    ]
    one = parser.parse_args(["fit", "--config", str(path)]).fit.as_dict()
    other = parser.parse_args(arguments).fit.as_dict()
    assert one.pop("config") and other.pop("config") is None
    assert one == other and one["width"] == 16


def test_numbers_of_a_config_file_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    """YAML takes 1e-3 for text; options after the file win."""
    path = tmp_path / "settings.yaml"
    path.write_text("data: mixture\nlearning_rate: 1e-3\nseed: 3\n")
    parser = make_parser()
    options = parser.parse_args(["fit", "--config", str(path), "--seed", "5"]).fit
    assert options.learning_rate == 0.001 and options.seed == 5


def test_printed_configuration_is_read_again(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "moons", "--width", "8", "--print-config"])
    assert not end.value.code
    path = tmp_path / "settings.yaml"
    path.write_text(capsys.readouterr().out)
    options = make_parser().parse_args(["fit", "--config", str(path)]).fit
    assert options.width == 8 and options.calls == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: &a mixture\n", "the anchor or alias 'a'"),
        ("data: !!python/object/apply:os.mkdir ['marker']\n", "the tag"),
        ("data: [\n", "Expected plain YAML in settings.yaml"),
        ("mixture\n", "Expected settings by name in settings.yaml; got 'mixture'."),
        ("config: settings.yaml\n", "names of options in settings.yaml; got unknown 'config'."),
        ("stepz: 3\n", "names of options in settings.yaml; got unknown 'stepz'."),
        ("calls: 8\nevaluations: 8\n", "Expected calls once"),
        ("data: mixture\nvalidation_calls: 1\n", "validation_calls to be an integer >= 2; got 1."),
    ],
)
def test_config_files_are_not_trusted(text, message, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(text)
    refused(capsys, main(["fit", "--config", "settings.yaml"]), "pyrodiff fit: error:", message)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_config_files_have_a_largest_size(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("data: mixture\n")
    monkeypatch.setattr("pyrodiff.serialization.config.MAX_CONFIG_BYTES", 8)
    refused(capsys, main(["fit", "--config", str(path)]), "Expected a configuration of at most")
    refused(capsys, main(["fit", "--config", f"{path}s"]), "Expected a file", "got nothing there")


# -- former names --------------------------------------------------------------------------------


def test_former_names_of_options() -> None:
    """What README shows, and what scripts have."""
    former = "--evaluations 8 --validation-evaluations=4 --validate_every 5"
    present = "--calls 8 --validation-calls=4 --validate_every 5"
    options = [
        make_parser().parse_args([normalised(word) for word in ["fit", "moons", *line.split()]])
        for line in (former, present)
    ]
    assert options[0].fit == options[1].fit
    assert (options[0].fit.calls, options[0].fit.validation_calls) == (8, 4)
    words = ["evaluate", "run", "--evaluations", "64"]
    assert make_parser().parse_args([normalised(word) for word in words]).evaluate.calls == 64


def test_former_names_in_python() -> None:
    settings = FitSettings(evaluations=8, validation_evaluations=4)
    assert settings == FitSettings(calls=8, validation_calls=4)
    assert (settings.evaluations, settings.validation_evaluations) == (8, 4)
    assert EvaluationSettings(evaluations=8) == EvaluationSettings(calls=8)
    with pytest.raises(TypeError, match="Expected calls once"):
        EvaluationSettings(calls=8, evaluations=8)
    with pytest.raises(ValueError, match="Expected calls once"):
        runs.evaluate("run", calls=8, evaluations=8)


def test_former_names_in_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("data: mixture\nevaluations: 8\nvalidation_evaluations: 4\n")
    options = make_parser().parse_args(["fit", "--config", str(path)]).fit
    assert (options.calls, options.validation_calls) == (8, 4)


def with_former_names(path: Path) -> None:
    """Write a file of settings as an earlier version did."""
    config = yaml.safe_load(path.read_text())
    values = config.get("fit", config)
    former = {"calls": "evaluations", "validation_calls": "validation_evaluations"}
    renamed = {former.get(name, name): value for name, value in values.items()}
    assert renamed != values
    if "fit" in config:
        config["fit"] = renamed
        config = sealed({name: value for name, value in config.items() if name != "checksum"})
    else:
        config = renamed
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def test_run_of_an_earlier_version_goes_on(table: Path, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "one")
    with_former_names(folder / "config.yaml")
    before = (folder / "config.yaml").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "evaluation.nc").unlink()
    assert fit(table / "one.csv", folder, "--resume") == 0
    assert (folder / "config.yaml").read_bytes() == before
    for name in ("model.safetensors", "metrics.csv"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    result = runs.evaluate(str(folder), quiet=True)
    assert int(result.calls.max()) == 16  # the run's own setting, by its former name
    assert torch.equal(runs.evaluate(str(folder), evaluations=16, quiet=True).value, result.value)


def test_evaluation_of_an_earlier_version_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its finished batches are used: nothing but the rest is asked of the estimator."""
    folder, asked = shutil.copytree(run, tmp_path / "one"), list[range]()
    estimate = TermwiseBound.estimate

    def interrupted(self: TermwiseBound, *arguments: object, **options: Any) -> LogLikelihood:
        asked.append(options["indices"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return estimate(self, *arguments, **options)

    command = {"batch_size": 8, "limit": 20, "quiet": True}
    whole = runs.evaluate(str(folder), **command)
    monkeypatch.setattr(TermwiseBound, "estimate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.evaluate(str(folder), **command)
    with_former_names(folder / "evaluation" / "test-termwise" / "settings.yaml")
    result = runs.evaluate(str(folder), resume=True, **command)
    assert torch.equal(result.value, whole.value)
    assert asked[2:] and asked[0] not in asked[2:]


# -- the command itself --------------------------------------------------------------------------


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "pyrodiff", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for sentence in ("Train a model on DATA and write a run.", "Draw samples from the model of a"):
        assert sentence in done.stdout


def test_help_shows_options_and_defaults_as_they_are_meant(capsys) -> None:
    for command in ("fit", "evaluate", "sample", "compare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "default: null" not in text and "evaluations " not in text.split("options:")[0]
        assert not re.search(r"--[a-z]+_", text)
        if command == "fit":
            assert "default: chosen for the data" in " ".join(text.split())


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


def test_samples_of_few_steps(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """They are those of the respaced chain, and what is fitted lies in the run, or nowhere."""
    monkeypatch.setattr(OptimalGrid, "fit", functools.partial(OptimalGrid.fit, candidates=16))
    folder, path = shutil.copytree(run, tmp_path / "run"), tmp_path / "few.npy"
    options = "-n 5 --seed 3 --steps 7 --variance diagonal --probes 1 --grid optimal".split()
    assert main(["sample", str(folder), *options, "--output", str(path)]) == 0
    assert not (folder / "grids").exists()
    assert main(["sample", str(folder), *options]) == 0
    assert capsys.readouterr().out.count("chain: 7 steps, variance diagonal (probes 1), ") == 2
    assert np.array_equal(np.load(path), np.load(folder / "samples.npy"))
    grid = OptimalGrid.load(folder / "grids" / "diagonal-probes-1.safetensors")
    variance = PosteriorCovariance("diagonal", probes=1)
    few = load_model(folder).respaced(7, variance=variance, grid=grid).eval()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    values = transform(config["data"], few.event_shape).inverse(few.sample(5, seed=3))
    np.testing.assert_allclose(np.load(path), values.numpy(), rtol=1e-5, atol=1e-6)


def test_networks_that_cannot_serve_another_chain(
    table: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    few = "--steps 2 --validate_every 2"
    learned, mean = tmp_path / "learned", tmp_path / "mean"
    assert fit(table / "one.csv", learned, f"{few} --objective hybrid") == 0
    assert fit(table / "one.csv", mean, f"{few} --denoiser mean --objective mean") == 0
    for command in ("evaluate", "sample"):
        status = main([command, str(learned), "--variance", "full"])
        refused(capsys, status, "whose network predicts it, LearnedRange()", "variance 'full'.")
        status = main([command, str(mean), "--steps", "5"])
        refused(capsys, status, "predicts the mean of its own chain's steps; got steps = 5.")
    assert main(["sample", str(learned), "--steps", "5", "-n", "2"]) == 0  # its own variance
    command = ["evaluate", str(mean), "--variance", "full", "--estimator", "path"]
    assert main([*command, "--limit", "2", "--quiet"]) == 0
    monkeypatch.setattr(OptimalGrid, "fit", functools.partial(OptimalGrid.fit, candidates=9))
    command = ["evaluate", str(learned), "--steps", "10", "--grid", "optimal", "--quiet"]
    refused(capsys, main(command), "Expected at most 9 steps, the candidates; got 10.")


def test_run_is_not_lost_by_accident(run: Path, table: Path, capsys) -> None:
    before = (run / "model.safetensors").read_bytes()
    data = table / "one.csv"
    refused(capsys, fit(data, run), "which holds a run", "--resume", "--overwrite")
    refused(capsys, fit(data, run, "--resume --blocks 3"), "in order to resume it", "3")
    assert (run / "model.safetensors").read_bytes() == before


def test_overwrite_and_hybrid_on_a_density(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no wrapped lines
    assert fit("mixture", tmp_path / "run", "--objective hybrid") == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["fit"]["variance"] == "learned-range"
    assert "exact log p of the data's law" in capsys.readouterr().out
    (tmp_path / "run" / "grids").mkdir()
    (tmp_path / "run" / "grids" / "diagonal-probes-1.safetensors").touch()
    assert fit("mixture", tmp_path / "run", "--overwrite") == 0
    assert not (tmp_path / "run" / "grids").exists()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["fit"]["objective"] == "vlb"


def test_hostile_config_is_not_executed(tmp_path: Path, capsys) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")
    for command in ("evaluate", "sample"):
        refused(capsys, main([command, str(tmp_path)]), "Expected plain YAML in")
    assert not marker.exists()
