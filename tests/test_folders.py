"""Folders and files of the commands: nothing of others is touched, nothing of ours mixed or torn.

Nothing here is random beyond the seeds; equalities are exact.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pyrodiff import runs, serialization
from pyrodiff.cli import main
from pyrodiff.likelihood import LogLikelihood, PathBound

TINY = "--network mlp --width 4 --blocks 1 --num_steps 3 --steps 2 --validate_every 1 --samples 4 "
TINY += "--validation_evaluations 2 --evaluations 4 --batch_size 8 --quiet"
EVALUATE = "--estimator path --limit 4 --batch_size 4 --quiet".split()  # two batches


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.csv"
    np.savetxt(path, np.random.default_rng(0).normal(size=(40, 2)), delimiter=",")
    return path


def fit(data: Path, folder: Path, *more: str) -> int:
    return main(["fit", str(data), "--output", str(folder), *TINY.split(), *more])


@pytest.fixture(scope="module")
def fitted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert fit(data, folder) == 0
    return folder


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def plant(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"foreign {name}")
    return contents(folder)


def refused(capsys: pytest.CaptureFixture[str], status: int, *parts: str) -> None:
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("pyrodiff ") and "Traceback" not in error
    for part in parts:
        assert part in error


def once(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object], batch: int = 1) -> None:
    """Do something while an evaluation by paths is at the batch of this number."""
    estimate, calls = PathBound.estimate, [0]

    def disturbed(self: PathBound, *arguments: Any, **options: Any) -> LogLikelihood:
        calls[0] += 1
        if calls[0] == batch + 1:
            action()
        return estimate(self, *arguments, **options)

    monkeypatch.setattr(PathBound, "estimate", disturbed)


def interrupt() -> None:
    raise KeyboardInterrupt


# -- nothing of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["", "--resume", "--overwrite"])
@pytest.mark.parametrize("config", ["", "name: theirs\n", "format: 1\npyrodiff: x\nmodel: {}\n"])
def test_fit_leaves_foreign_folders_alone(
    data: Path, tmp_path: Path, option: str, config: str, capsys
) -> None:
    names = ("model.safetensors", "checkpoints/last.ckpt", "evaluation/x", "metrics.csv")
    plant(tmp_path / "theirs", *names)
    if config:
        (tmp_path / "theirs" / "config.yaml").write_text(config)
    before = contents(tmp_path)
    status = fit(data, tmp_path / "theirs", *option.split())
    refused(capsys, status, "Expected a new ", "theirs", "Nothing was changed")
    assert contents(tmp_path) == before


def test_a_run_without_its_configuration_is_not_overwritten(run: Path, data: Path, capsys) -> None:
    (run / "config.yaml").unlink()
    before = contents(run)
    refused(capsys, fit(data, run, "--resume"), "was not written by pyrodiff")
    assert contents(run) == before


def test_overwriting_a_run_leaves_foreign_files(run: Path, data: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    names = ("notes.txt", "checkpoints/mine.ckpt", "evaluation/notes", "evaluation/x/batch-0.nc")
    before = {name: plant(run, name)[name] for name in names}
    assert fit(data, run, "--overwrite", "--seed", "1") == 0
    assert {name: contents(run)[name] for name in names} == before
    assert fit(data, run, "--resume", "--seed", "1") == 0
    assert {name: contents(run)[name] for name in names} == before


@pytest.mark.parametrize("name", ["checkpoints", "evaluation", "evaluation.nc", "samples.npy"])
def test_nothing_is_written_through_links(run: Path, data: Path, name: str, capsys) -> None:
    theirs = run.parent / "theirs"
    before = plant(theirs, "last.ckpt", "x")
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        (run / name).unlink()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(theirs if "." not in name else theirs / "x")
    again = ["fit", str(data), "--output", str(run), *TINY.split()]
    for command in (
        [*again, "--overwrite"],
        [*again, "--resume"],
        ["evaluate", str(run), *EVALUATE],
        ["sample", str(run), "-n", "2"],
    ):
        refused(capsys, main(command), f"got a link to {theirs}")
    assert contents(theirs) == before and (run / name).is_symlink()


def test_a_linked_folder_of_evaluations_is_refused(run: Path, capsys) -> None:
    before = plant(run.parent / "theirs", "settings.yaml", "batch-000000.nc")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "test-path").symlink_to(run.parent / "theirs")
    refused(capsys, main(["evaluate", str(run), *EVALUATE]), "got a link to")
    assert contents(run.parent / "theirs") == before


@pytest.fixture
def two(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two runs, in the working folder."""
    other = run.parent / "other"
    shutil.copytree(run, other)
    monkeypatch.chdir(run.parent)
    return ["compare", "run", "other", *EVALUATE]


@pytest.mark.parametrize("name", ["page/means.png", "page/evaluation/x", "page/values/1-a.nc"])
@pytest.mark.parametrize("option", ["", "--resume", "--saved"])
def test_compare_leaves_foreign_folders_alone(two, name: str, option: str, capsys) -> None:
    plant(Path(), name)
    before = contents(Path())
    command = two[:3] if option == "--saved" else two
    status = main([*command, "--output", "page.html", *option.split()])
    refused(capsys, status, "Expected a new or empty folder", "got page", "Nothing was changed")
    assert contents(Path()) == before


def test_compare_leaves_foreign_pages_and_files_alone(two, capsys) -> None:
    Path("page.html").write_text("<html>theirs")
    refused(capsys, main([*two, "--output", "page.html"]), "Expected no file page.html")
    assert Path("page.html").read_text() == "<html>theirs"
    assert main([*two, "--output", "own.html"]) == 0
    names = ("own/values/7-mine.nc", "own/evaluation/notes", "own/0123456789abcdef/x", "own/n.png")
    before = {name: plant(Path(), name)[name] for name in names}
    assert main([*two, "--seed", "1", "--output", "own.html"]) == 0
    assert {name: contents(Path())[name] for name in names} == before
    (Path("own") / "values" / "1-other.nc").write_text("foreign")
    status = main(["compare", "other", "run", *EVALUATE, "--output", "own.html"])
    refused(capsys, status, "Expected no file own/values/1-other.nc")
    assert (Path("own") / "values" / "1-other.nc").read_text() == "foreign"


def test_listed_names_cannot_leave_the_folder(two) -> None:
    """Whoever edits the list of our files makes no command remove others."""
    assert main([*two, "--output", "page.html"]) == 0
    path = Path("page/settings.yaml")
    settings = yaml.safe_load(path.read_text())
    settings["comparison"] += ["../victim.nc", "values/../../victim.nc", "/tmp/victim.nc", 3]
    path.write_text(yaml.safe_dump(settings))
    Path("victim.nc").write_text("theirs")
    assert main([*two, "--output", "page.html"]) == 0
    assert Path("victim.nc").read_text() == "theirs"


# -- samples -------------------------------------------------------------------------------------


def test_samples_are_written_only_to_npy_files(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "x.txt").write_text("theirs")
    before = contents(tmp_path)
    for name in ("x.txt", "y.txt", "y.png", "y"):
        status = main(["sample", str(run), "-n", "2", "--output", str(tmp_path / name)])
        refused(capsys, status, "Expected a name of samples to end in .npy", name)
    assert contents(tmp_path) == before


def test_samples_replace_only_samples(run: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "new" / "x.npy"
    draw = ["sample", str(run), "-n", "2", "--output", str(path)]
    assert main(draw) == 0 and main([*draw, "--seed", "1"]) == 0
    assert np.load(path).shape == (2, 2)
    picture = path.with_suffix(".png")
    saved = path.read_bytes(), picture.read_bytes()
    path.write_bytes(saved[0][:-1] + b"x")  # the user's own values
    refused(capsys, main(draw), f"Expected no file {path}")
    path.write_bytes(saved[0])
    picture.write_bytes(b"theirs")
    refused(capsys, main(draw), f"Expected no file {picture}")
    path.unlink()
    refused(capsys, main(draw), f"Expected no file {picture}")
    assert picture.read_bytes() == b"theirs" and not path.exists()
    assert main(["sample", str(run), "-n", "2", "--output", str(run / "samples.npy")]) == 0


def test_a_report_draws_samples_anew(two) -> None:
    """One seed and count for all, whatever was drawn into the runs before."""

    def pictures() -> list[str]:
        page = Path("page.html").read_text("utf-8")
        assert page.count("40 samples of") == 0 and page.count("256 samples of") == 4
        return re.findall(r'"256 samples of \w+, from seed 0\." src="([^"]+)"', page)

    command = [*two, "--output", "page.html"]
    assert main(command) == 0
    before = pictures()
    assert len(before) == 2 and before[0] == before[1]  # copies of one run
    assert main(["sample", "run", "-n", "3", "--seed", "5"]) == 0
    assert main(command) == 0 and pictures() == before


# -- one at a time -------------------------------------------------------------------------------


def test_two_evaluations_at_once_do_not_mix(run: Path, monkeypatch, capsys) -> None:
    command = ["evaluate", str(run), *EVALUATE]
    assert main(command) == 0
    whole = (run / "evaluation.nc").read_bytes()
    statuses = []

    def other() -> None:
        for more in ("--seed 9", "--estimator importance", "--resume"):
            statuses.append(main([*command, *more.split()]))
        statuses.append(main(["sample", str(run), "-n", "2"]))

    once(monkeypatch, other)
    assert main(command) == 0 and statuses == [2, 2, 2, 2]
    assert capsys.readouterr().err.count("another command is writing to") == 4
    assert (run / "evaluation.nc").read_bytes() == whole
    assert main([*command, "--seed", "9"]) == 0  # released


def test_fit_beside_fit_is_refused(run: Path, data: Path, monkeypatch, capsys) -> None:
    from pyrodiff import training

    work, statuses = training.fit, []

    def disturbed(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(training, "fit", work)
        for option in ("--overwrite", "--resume"):
            statuses.append(fit(data, run, option))
        statuses.append(main(["evaluate", str(run), *EVALUATE]))
        return work(*arguments, **options)

    before = contents(run)
    monkeypatch.setattr(training, "fit", disturbed)
    assert fit(data, run, "--overwrite") == 0 and statuses == [2, 2, 2]
    assert capsys.readouterr().err.count("another command is writing to") == 3
    after = contents(run)
    assert after.keys() == before.keys()
    for name in ("model.safetensors", "evaluation.nc", "metrics.csv"):
        assert after[name] == before[name]


def test_comparisons_of_one_output_at_once(two, monkeypatch, capsys) -> None:
    command, statuses = [*two, "--output", "page.html"], list[int]()
    once(monkeypatch, lambda: statuses.append(main(command)))
    assert main(command) == 0 and statuses == [2]
    assert "another command is writing to" in capsys.readouterr().err


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    from pyrodiff.serialization.folders import locked

    program = "import os, sys; from pathlib import Path\n"
    program += "from pyrodiff.serialization.folders import locked\n"
    program += "lock = locked(Path(sys.argv[1])); lock.__enter__(); os.kill(os.getpid(), 9)"
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with locked(tmp_path):
        with pytest.raises(BlockingIOError, match="another command is writing to"):
            with locked(tmp_path):
                pass
    assert not list(tmp_path.iterdir())


def test_batches_of_another_evaluation_are_ignored(run: Path, monkeypatch) -> None:
    """Of another seed, of other samples, or damaged: computed again."""
    command = ["evaluate", str(run), *EVALUATE, "--batch_size", "2"]  # four batches
    assert main(command) == 0
    whole = (run / "evaluation.nc").read_bytes()
    parts, saved = run / "evaluation" / "test-path", run.parent / "saved"
    with monkeypatch.context() as patch:
        once(patch, interrupt, 3)
        assert main([*command, "--seed", "9"]) == 130
    shutil.copytree(parts, saved)
    with monkeypatch.context() as patch:
        once(patch, interrupt, 3)
        assert main(command) == 130
    files = sorted(parts.glob("batch-*.nc"))
    assert [file.name[-4] for file in files] == ["0", "1", "2"]
    shutil.copy(saved / files[0].name, files[0])
    shutil.copy(files[2], files[1])
    flip(files[2], LogLikelihood.load(files[2]).value.numpy().tobytes())
    assert main([*command, "--resume"]) == 0
    assert (run / "evaluation.nc").read_bytes() == whole


# -- checksums -----------------------------------------------------------------------------------


def flip(path: Path, part: bytes, bit: int = 0) -> None:
    """Turn over one bit of the file, in the middle of ``part``."""
    content = bytearray(path.read_bytes())
    place = content.index(part) + len(part) // 2
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_of_the_weights_is_noticed(two, bit: int, capsys) -> None:
    weights = Path("run/model.safetensors")
    value = max(serialization.read_weights(weights).values(), key=torch.Tensor.numel)
    flip(weights, value.numpy().tobytes(), bit)
    for command in (["evaluate", "run", *EVALUATE], ["sample", "run"], two):
        refused(capsys, main(command), "run/model.safetensors", "differ from its checksum")
    with pytest.raises(ValueError, match="differ from its checksum"):
        runs.evaluate("run", quiet=True)


def test_a_changed_digit_of_the_configuration_is_noticed(two, capsys) -> None:
    flip(Path("run/config.yaml"), b"num_steps: 3")
    for command in (["evaluate", "run", *EVALUATE], ["sample", "run"], two):
        refused(capsys, main(command), "run/config.yaml as it was written", "checksum")


def test_runs_without_checksums_are_read_with_a_notice(run: Path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(run / "model.safetensors"), run / "model.safetensors")
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["checksum"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (["evaluate", *EVALUATE], ["sample", "-n", "2"]):
        assert main([command[0], str(run), *command[1:]]) == 0
        assert "written without checksums" in capsys.readouterr().err


def test_a_finished_evaluation_of_a_comparison_is_checked(two, monkeypatch) -> None:
    """What an interrupted comparison kept is believed only as it was written."""
    command = [*two, "--repeats", "1", "--output", "page.html"]
    assert main(command) == 0
    whole = contents(Path("page/values"))
    with monkeypatch.context() as patch:
        patch.setattr("pyrodiff.runs.report.page._page", lambda *_: interrupt())
        assert main(command) == 130
    (done,) = Path("page/evaluation").glob("*/evaluation.nc")
    flip(done, LogLikelihood.load(done).value.numpy().tobytes())
    assert main([*command, "--resume"]) == 0
    assert contents(Path("page/values")) == whole


# -- full disks, umask, terminals ----------------------------------------------------------------


def in_a_child(action: Callable[[], int]) -> tuple[int, str]:
    """The exit status of ``action`` in a process of its own (negative: a signal); what it said."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside idle threads
        child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(writing, 2)
            sys.stderr = open(2, "w", closefd=False, encoding="utf-8")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
            status = action()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


@pytest.mark.parametrize(
    "command",
    ["evaluate run", "fit data.csv --output new", "sample run -n 999", "compare run run2"],
)
def test_no_room_for_a_file(run: Path, data: Path, monkeypatch, command: str) -> None:
    """A limit on the size of files stands for a full disk: an error that names the file."""
    monkeypatch.chdir(run.parent)
    shutil.copy(data, "data.csv")
    shutil.copytree(run, "run2")
    before = contents(Path())
    more = TINY.split() if command.startswith("fit") else []
    more += EVALUATE if command.startswith(("evaluate", "compare")) else []

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        return main([*command.split(), *more])

    status, output = in_a_child(limited)
    assert status == 2 and re.search(r"File too large: '(run|new|comparison)/\S+'", output), output
    assert not [name for name in contents(Path()) if name.endswith(".tmp")]
    assert {name: contents(Path())[name] for name in before} == before


@pytest.mark.parametrize("command", ["evaluate", "compare", "fit", "sample"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_every_command(two, data, monkeypatch, command, number, status) -> None:
    from pyrodiff.chains import ReverseChain

    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(number)

    once(monkeypatch, stop)
    if command in ("fit", "sample"):
        monkeypatch.setattr(ReverseChain, "sample", stop)
    arguments = {
        "evaluate": ["evaluate", "run", *EVALUATE],
        "compare": two,
        "fit": ["fit", str(data), "--output", "new", *TINY.split()],
        "sample": ["sample", "run"],
    }[command]
    ended, output = in_a_child(lambda: main(arguments))
    assert ended == status, output
    assert f"pyrodiff {command}: {'terminated' if status == 143 else 'interrupted'}" in output
    assert ("--resume goes on with what is finished" in output) == (command != "sample")
    assert not list(Path().rglob(".pyrodiff.lock"))


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_the_umask_is_honoured(run: Path, tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        assert main(["sample", str(run), "-n", "2"]) == 0
        serialization.write_atomically(tmp_path / "x", lambda name: name.write_text("x"))
    finally:
        os.umask(before)
    for path in (run / "samples.npy", run / "samples.png", tmp_path / "x"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_temporary_files_of_dead_processes_are_swept(tmp_path: Path) -> None:
    """And those of the living, and of others, are not."""
    path = tmp_path / "x.nc"
    digits = "0123456789abcdef"
    dead = tmp_path / f".x.nc.{digits}.tmp"
    others = [tmp_path / name for name in (f".y.nc.{digits}.tmp", ".x.nc.tmp", f"x.nc.{digits}")]

    def write(name: Path) -> None:
        assert name.name.startswith(".x.nc.") and not dead.exists()
        name.write_text("outer")
        serialization.write_atomically(path, lambda name: name.write_text("inner"))
        assert name.exists() and path.read_text() == "inner"

    for each in (dead, *others):
        each.write_text("left")
    serialization.write_atomically(path, write)
    assert path.read_text() == "outer"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_commands_sweep_temporary_files_of_all_results(two) -> None:
    """A killed command's picture, which the next command has none of; not a file of others."""
    digits = "0123456789abcdef"
    left = [Path(f"run/.terms.png.{digits}.tmp"), Path(f"page/.ladder.png.{digits}.tmp")]
    theirs = [Path(f"run/.mine.{digits}.tmp"), Path(f"page/.mine.{digits}.tmp")]
    Path("page").mkdir()
    for each in left:
        each.write_text("left")
    assert main(["evaluate", "run", *EVALUATE]) == 0
    assert main([*two, "--repeats", "1", "--particles", "1", "--output", "page.html"]) == 0
    for each in theirs:
        each.write_text("theirs")
    assert main([*two, "--repeats", "1", "--particles", "1", "--output", "page.html"]) == 0
    assert not any(each.exists() for each in left) and all(each.exists() for each in theirs)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(OSError, match=r"Expected something to be written to .*x\.txt"):
        serialization.write_atomically(path, lambda name: np.save(name, np.ones(3)))
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", ["ascii", "closed", "none"])
def test_printing_never_fails(two, kind: str, monkeypatch) -> None:
    """Characters that a terminal lacks, and terminals that are gone, lose no result."""
    content = io.BytesIO()
    output = io.TextIOWrapper(content, encoding="ascii", write_through=True)
    if kind == "closed":
        output.close()
    monkeypatch.setattr(sys, "stdout", None if kind == "none" else output)
    before = Path("run/evaluation.nc").read_bytes()
    runs.evaluate("run", estimator="path", limit=4, batch_size=2)
    assert Path("run/evaluation.nc").read_bytes() != before
    assert main([*two[:-1], "--output", "page.html"]) == 0 and Path("page.html").is_file()
    assert main(["sample", "run", "-n", "2"]) == 0
    if kind == "ascii":
        text = content.getvalue().decode()
        assert "+/- between samples" in text and "2 samples -> run" in text


def test_a_closed_pipe_changes_no_status() -> None:
    """As in ``pyrodiff evaluate RUN | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    program = "from pyrodiff.runs.terminal import let_go, say; say('x' * 9999); let_go()"
    ended = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ended.returncode == 0 and not ended.stderr
