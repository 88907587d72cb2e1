"""Checkpoints, signals and faults: whatever stops a training, it goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrodiff import data, training
from pyrodiff.runs.build import make_model, make_objective
from pyrodiff.runs.settings import FitSettings, recipe
from pyrodiff.serialization import files
from pyrodiff.training import checkpoints, validations
from pyrodiff.training.signals import Terminated

TINY = FitSettings(
    steps=6,
    validate_every=2,
    width=8,
    blocks=1,
    num_steps=20,
    calls=16,
    validation_calls=8,
    batch_size=32,
)
OPTIONS = "--validate_every 10 --width 16 --num_steps 50 --calls 16 "
OPTIONS += "--validation_calls 8 --batch_size 32 --quiet"


@pytest.fixture(scope="module")
def points() -> data.DataSet:
    return data.load("mixture", num_samples=300)


def fit(dataset: data.DataSet, folder: Path, settings: FitSettings = TINY, **options: Any) -> Any:
    settings = recipe(settings, image=dataset.is_image, levels=dataset.levels)
    torch.manual_seed(settings.seed)
    reverse = make_model(settings, dataset.event_shape, dataset.levels)
    objective = make_objective(settings)
    return training.fit(reverse, objective, dataset, settings, folder, progress=False, **options)


def rows(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.csv").read_text().splitlines()
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(text)]


Outcome = tuple[list[dict[str, float]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def whole(points: data.DataSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """An uninterrupted run and what came of it."""
    folder = tmp_path_factory.mktemp("whole")
    weights = fit(points, folder).state_dict()
    return folder, (rows(folder), {name: value.clone() for name, value in weights.items()})


@pytest.fixture
def broken(whole: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the uninterrupted run, for a test to spoil."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def check_same(folder: Path, weights: dict[str, Tensor], expected: Outcome) -> None:
    """The run has the same metrics and weights as the uninterrupted one."""
    for one, other in zip(rows(folder), expected[0], strict=True):
        assert one == pytest.approx(other, rel=1e-6, nan_ok=True)
    assert weights.keys() == expected[1].keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[1][name], rtol=0, atol=1e-6)


# -- faults --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing of ours may catch it: as good as SIGKILL."""


def operations(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """``act(n)`` before and after each file operation of a training, n counting both."""
    count = iter(range(10**6))

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            act(next(count))
            result = function(*arguments)
            act(next(count))
            return result

        return call

    for module in (validations, checkpoints):
        monkeypatch.setattr(module, "write_bytes", watched(files.write_bytes))
    monkeypatch.setattr(validations, "make_room", watched(checkpoints.make_room))


def test_killed_at_any_file_operation(
    whole: tuple[Path, Outcome],
    points: data.DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers: list[int] = []
    with monkeypatch.context() as patch:
        operations(patch, numbers.append)
        check_same(tmp_path, fit(points, tmp_path).state_dict(), whole[1])
    # a row, the best (every time here), room and the last, at each of three validations
    assert len(numbers) == 3 * 4 * 2

    def kill(last: int) -> Callable[[int], None]:
        def act(number: int) -> None:
            if number == last:
                raise Killed

        return act

    for last in (9, 13, *range(16, 24)):  # the last validation, whose model is the best, and before
        folder = tmp_path / str(last)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            operations(patch, kill(last))
            fit(points, folder)
        check_same(folder, fit(points, folder, resume=True).state_dict(), whole[1])
        assert not [name for name in folder.rglob("*") if name.suffix == ".tmp"]


def test_full_disk_names_the_file_and_loses_nothing(
    whole: tuple[Path, Outcome],
    points: data.DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        original = validations.make_room

        def room(folder: Path) -> None:
            original(folder)
            if (folder / "previous.ckpt").exists():  # at the second validation
                patch.setattr(os, "fsync", full)

        patch.setattr(validations, "make_room", room)
        with pytest.raises(OSError, match=r"No space left on device: .*last\.ckpt"):
            fit(points, tmp_path)
    assert (tmp_path / "checkpoints" / "previous.ckpt").is_file()
    check_same(tmp_path, fit(points, tmp_path, resume=True).state_dict(), whole[1])


def test_checkpoints_never_leave_their_folder(
    points: data.DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary folder on another file system cannot be moved from in one step."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not-there"))
    fit(points, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_checkpoints_are_flushed_with_their_folder(
    points: data.DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    original = os.fsync

    def fsync(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    fit(points, tmp_path)
    folder = tmp_path / "checkpoints"
    paths = [tmp_path, folder, tmp_path / "metrics.csv", *folder.iterdir()]
    assert len(paths) == 6 and {path.stat().st_ino for path in paths} <= flushed


# -- damage --------------------------------------------------------------------------------------


def flip(path: Path, share: float = 0.5) -> None:
    """One bit of a file, in the midst of its tensors."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """A write that was interrupted."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("names", [["last.ckpt"], ["last.ckpt", "previous.ckpt"]])
def test_resumes_from_the_newest_sound_checkpoint(
    names: list[str],
    damage: Callable[[Path], object],
    broken: Path,
    whole: tuple[Path, Outcome],
    points: data.DataSet,
) -> None:
    for name in names:
        damage(broken / "checkpoints" / name)
    after = "best.ckpt" if "previous.ckpt" in names else "previous.ckpt"
    with pytest.warns(UserWarning, match=rf"last\.ckpt; got .* {after} is taken instead"):
        weights = fit(points, broken, resume=True).state_dict()
    check_same(broken, weights, whole[1])


def test_resumes_from_the_previous_checkpoint_if_the_last_is_missing(
    broken: Path, whole: tuple[Path, Outcome], points: data.DataSet
) -> None:
    (broken / "checkpoints" / "last.ckpt").unlink()
    check_same(broken, fit(points, broken, resume=True).state_dict(), whole[1])


def test_damaged_best_checkpoint_is_warned_of(broken: Path, points: data.DataSet) -> None:
    """The training had ended: nothing is left to make a better one."""
    flip(broken / "checkpoints" / "best.ckpt")
    with pytest.warns(UserWarning, match=r"best\.ckpt; got a damaged .* last\.ckpt is taken"):
        weights = fit(points, broken, resume=True).state_dict()
    last = training.read_checkpoint(broken / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(value, last[f"reverse.{name}"]) for name, value in weights.items())


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_checkpoint_that_cannot_be_read_is_not_replaced(
    name: str, broken: Path, points: data.DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be sound: another one would give other weights without an error."""
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=f"Input/output error.*{name}"):
        fit(points, broken, resume=True)


def test_every_flipped_byte_is_noticed(whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    """PyTorch alone reads other values without a word."""
    original = whole[0] / "checkpoints" / "last.ckpt"
    expected = torch.load(original, weights_only=True)["state_dict"]
    refused = 0
    for i in range(60):
        path = Path(shutil.copy(original, tmp_path / "copy.ckpt"))
        flip(path, (i + 0.5) / 60)
        try:
            state = training.read_checkpoint(path)["state_dict"]
        except ValueError:
            refused += 1
        else:  # padding between entries, which nobody reads
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert refused >= 30


def test_new_training_removes_checkpoints_of_an_earlier_one(
    broken: Path, points: data.DataSet
) -> None:
    """Else a run that is stopped early would go on from another's."""
    once = replace(TINY, steps=2, seed=1)
    fit(points, broken, once)
    folder = broken / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    for path in folder.iterdir():
        assert training.read_checkpoint(path)["global_step"] == 2


def test_no_sound_checkpoint_is_an_error(broken: Path, points: data.DataSet) -> None:
    for path in (broken / "checkpoints").iterdir():
        cut(path)
    before = sorted(broken.rglob("*"))
    with pytest.raises(ValueError, match=r"Expected a checkpoint of tensors .*last\.ckpt; got"):
        fit(points, broken, resume=True)
    assert sorted(broken.rglob("*")) == before


def test_checkpoint_of_another_shape(broken: Path, points: data.DataSet) -> None:
    for width in (4, 16):
        with pytest.raises(ValueError, match=r"of this model in .*last\.ckpt; \d+ tensors of its"):
            fit(points, broken, replace(TINY, width=width), resume=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("loops"),
        lambda state: state.pop("running_loss"),
        lambda state: state.pop("optimizer_states"),
        lambda state: state.update(callbacks=[1, 2]),
        lambda state: state.update(lr_schedulers={"a": 1}),
        lambda state: state["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(7, 7)),
        lambda state: state["callbacks"]["Validations"].update(best="none"),
        lambda state: state.update(current_model_state=[]),
        lambda state: state.update(state_dict={5: torch.zeros(2)}),
    ],
)
def test_checkpoint_of_another_program_is_refused(
    spoil: Callable[[Any], object], points: data.DataSet, broken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    # the first of three validations: there is more to train
    state = torch.load(broken / "checkpoints" / "previous.ckpt", weights_only=True)
    spoil(state)
    torch.save(state, folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"Expected a checkpoint of this .*last\.ckpt; "):
        fit(points, tmp_path / "run", resume=True)


class Trap:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_hostile_checkpoint_is_not_executed(points: data.DataSet, tmp_path: Path) -> None:
    marker, last = tmp_path / "marker", tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    for write in (
        lambda: last.write_bytes(pickle.dumps(Trap(marker), protocol=2)),
        lambda: torch.save({"state_dict": Trap(marker)}, last),
    ):
        write()
        with pytest.raises(ValueError, match="Expected a checkpoint of tensors and plain values"):
            fit(points, tmp_path, resume=True)
        assert not marker.exists() and not (tmp_path / "metrics.csv").exists()
    torch.load(last, weights_only=False)
    assert marker.exists()  # the trap works: it was avoided above


def test_reading_a_checkpoint(whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    content = (whole[0] / "checkpoints" / "last.ckpt").read_bytes()
    path = tmp_path / "last.ckpt"
    for size in (0, 100, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="Expected a checkpoint of tensors and plain values"):
            training.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint .*; got nothing there"):
        training.read_checkpoint(tmp_path / "none.ckpt")
    for other in ([1, 2], {"state_dict": 3}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="Expected a training checkpoint in .*another kind"):
            training.read_checkpoint(path)


def test_compressed_entries_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="got compressed entries, which no checkpoint has"):
        training.read_checkpoint(path)


# -- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_raises_and_the_run_can_be_resumed(
    number: signal.Signals,
    error: type[BaseException],
    whole: tuple[Path, Outcome],
    points: data.DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with heeding_interrupts(), monkeypatch.context() as patch:
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        step = training.DiffusionModule.training_step

        def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
            if module.global_step == 3:
                os.kill(os.getpid(), number)
            return step(module, batch, batch_idx)

        patch.setattr(training.DiffusionModule, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt) as end:
            fit(points, tmp_path)
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert type(end.value) is error
    assert [row["step"] for row in rows(tmp_path)] == [2]
    check_same(tmp_path, fit(points, tmp_path, resume=True).state_dict(), whole[1])


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[None]:
    """SIGINT as in a terminal: what a shell starts in the background ignores it, tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start(folder: Path) -> subprocess.Popen[str]:
    """A long ``pyrodiff fit`` in a process of its own, once it has written a checkpoint."""
    options = ["fit", "mixture", "--output", str(folder), "--steps", "1000000", "--patience", "0"]
    with heeding_interrupts():
        process = subprocess.Popen(
            [sys.executable, "-m", "pyrodiff.cli", *options, *OPTIONS.split()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    deadline = time.monotonic() + 600
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    return process


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_fit_says_how_to_resume_after_a_signal(
    number: signal.Signals, status: int, word: str, tmp_path: Path
) -> None:
    process = start(tmp_path / "run")
    try:
        process.send_signal(number)
        _, error = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == status
    assert error == f"pyrodiff fit: {word}; --resume goes on with what is finished\n"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "last.ckpt").is_file() or (folder / "previous.ckpt").is_file()
