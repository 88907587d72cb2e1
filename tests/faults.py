"""Faults at every file operation of the commands, as a database is tested.

For every file operation of a tiny ``fit``, ``evaluate``, ``sample`` and ``compare`` in turn,

kill       the process ends there, in the middle of a write where it is one;
disk full  this and every later operation that takes room fails;
I/O error  this operation fails.

Then the command is given again (with --resume, where that is how one goes on), and has to give the
files of an undisturbed run, bit for bit, or a clear error.  Files of others lie beside and inside
all folders, and have to stay as they are.

    python tests/faults.py [--every N] [--output FILE]

prints the counts, writes them as JSON, and ends with status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import errno
import importlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

KILLED = 137
KINDS = ("kill", "disk full", "I/O error")

TINY = "--network mlp --width 4 --blocks 1 --num_steps 3 --steps 2 --validate_every 1 --samples 4 "
TINY += "--validation_calls 2 --calls 4 --batch_size 8 --quiet"
FIT = f"fit data.csv --output run {TINY}"
EVALUATE = "evaluate run --estimator path --limit 4 --batch_size 4 --quiet"
OTHER = FIT.replace("output run", "output other") + " --seed 1 --data_seed 0 --objective simple"
COMPARE = "compare run other --estimator path --limit 4 --batch_size 4 --output page.html --quiet"


class Scenario(NamedTuple):
    """A command that is disturbed.

    Args:
        before: commands that make the world it starts from.
        command: the one that is disturbed.
        again: how one goes on.
        last: what remains where that is refused.
        foreign: files of others, made after ``before``.
    """

    before: tuple[str, ...]
    command: str
    again: str
    last: str
    foreign: tuple[str, ...] = ()


INSIDE = ("run/notes.txt", "run/checkpoints/mine.ckpt", "run/evaluation/notes/batch-000000.nc")
ALWAYS = ("notes.txt", ".run.0123456789abcdef.tmp", "results/model.safetensors")
SCENARIOS = {
    "fit": Scenario((), FIT, f"{FIT} --resume", f"{FIT} --overwrite"),
    "fit --overwrite": Scenario(
        (f"{FIT} --seed 5", "stop evaluate run --estimator path --limit 4 --batch_size 4 --quiet"),
        f"{FIT} --overwrite",
        f"{FIT} --resume",
        f"{FIT} --overwrite",
        INSIDE,
    ),
    "fit --resume": Scenario(
        (f"stop {FIT}",),
        f"{FIT} --resume",
        f"{FIT} --resume",
        f"{FIT} --overwrite",
        ("run/notes.txt", "run/checkpoints/mine.ckpt"),
    ),
    "evaluate": Scenario((FIT,), EVALUATE, f"{EVALUATE} --resume", EVALUATE, INSIDE),
    "evaluate, termwise": Scenario(
        (FIT,),
        "evaluate run --calls 2 --limit 4 --batch_size 4 --quiet",
        "evaluate run --calls 2 --limit 4 --batch_size 4 --quiet --resume",
        "evaluate run --calls 2 --limit 4 --batch_size 4 --quiet",
    ),
    "evaluate over another": Scenario(
        (FIT, f"stop {EVALUATE} --seed 3"), EVALUATE, f"{EVALUATE} --resume", EVALUATE, INSIDE
    ),
    "evaluate --resume": Scenario(
        (FIT, f"stop {EVALUATE}"), f"{EVALUATE} --resume", f"{EVALUATE} --resume", EVALUATE
    ),
    "sample": Scenario((FIT,), "sample run -n 5", "sample run -n 5", "sample run -n 5", INSIDE),
    "sample --output": Scenario(
        (FIT, "sample run -n 3 --output mine/x.npy"),
        "sample run -n 5 --output mine/x.npy",
        "sample run -n 5 --output mine/x.npy",
        "rm mine/x.npy; sample run -n 5 --output mine/x.npy",
        ("mine/y.npy", "mine/y.png"),
    ),
    "compare": Scenario(
        (FIT, OTHER),
        COMPARE,
        f"{COMPARE} --resume",
        COMPARE,
    ),
    "compare over another": Scenario(
        (
            FIT,
            OTHER,
            COMPARE.replace("path", "importance --particles 30"),
        ),
        COMPARE,
        f"{COMPARE} --resume",
        COMPARE,
        ("page/notes.txt", "page/values/9-mine.nc", "page/evaluation/notes.txt"),
    ),
}


# -- faults --------------------------------------------------------------------------------------


class Faults:
    """Counts the file operations under ``root``, and disturbs the one of number ``at``."""

    TAKING = frozenset({"create", "write", "fsync", "mkdir", "replace", "rename"})
    CHANGING = (TAKING - {"fsync"}) | {"unlink", "remove", "rmdir"}  # what a file system holds

    def __init__(self, root: Path, kind: str = "", at: int = -1):
        self.root, self.kind, self.at, self.count = f"{root}{os.sep}", kind, at, 0
        self.names: list[str] = []

    def install(self) -> None:
        """Put a watch on the functions of this process, for good."""
        self._write, os.write = os.write, self.write
        for name in ("fsync", "mkdir", "rmdir", "unlink", "remove", "replace", "rename", "open"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        builtins.open = io.open = self._watched("open", builtins.open)  # type: ignore[assignment]

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *arguments: Any, **options: Any) -> Any:
            if self._is_ours(path):
                creates = name == "open" and _creates(*arguments, **options)
                self._next("create" if creates else name, path)
            return function(path, *arguments, **options)

        return watched

    def write(self, handle: int, content: Any) -> int:
        """``os.write``, half of which is done when it is disturbed."""
        if not self._is_ours(handle):
            return self._write(handle, content)
        half = memoryview(content)[: len(content) // 2]
        self._next("write", None, lambda: self._write(handle, half))
        return self._write(handle, content)

    def _next(self, name: str, path: Any, first: Callable[[], object] = lambda: None) -> None:
        number, self.count = self.count, self.count + 1
        self.names.append(name)
        if self.at < 0 or number < self.at or (number > self.at and self.kind != "disk full"):
            return
        if self.kind == "disk full" and name not in self.TAKING:
            return
        if number == self.at:
            first()
        if self.kind == "kill":
            os._exit(KILLED)
        code = errno.ENOSPC if self.kind == "disk full" else errno.EIO
        where = () if path is None or isinstance(path, int) else (os.fspath(path),)
        raise OSError(code, os.strerror(code), *where)

    def _is_ours(self, path: Any) -> bool:
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            return os.path.abspath(os.fsdecode(path)).startswith(self.root)
        except (OSError, TypeError):
            return False


def _creates(how: int | str = "r", *_: Any, mode: str = "r", **__: Any) -> bool:
    """Whether arguments of ``os.open``, or of ``open``, let a file come into being."""
    if isinstance(how, int):
        return bool(how & os.O_CREAT)
    return bool(set("wax") & set(how + mode))


# -- running -------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a command ended: its status, what it said, and the names of its file operations."""

    status: int
    said: str
    names: list[str]


def run(command: str, root: Path, kind: str = "", at: int = -1) -> Ended:
    """A command in a process of its own, in the folder ``root``."""
    with tempfile.TemporaryDirectory() as work:
        said, counted = Path(work) / "said", Path(work) / "counted"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside idle threads
            child = os.fork()
        if child == 0:
            _child(command, root, Faults(root, kind, at), said, counted)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        names = counted.read_text().split("\n") if counted.exists() else []
        return Ended(status, said.read_text(errors="replace"), names)


def _child(command: str, root: Path, faults: Faults, said: Path, counted: Path) -> None:
    status = 99
    try:
        os.chdir(root)
        output = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False, encoding="utf-8") for n in (1, 2))
        if command.startswith("rm "):
            name, command = command.removeprefix("rm ").split("; ")
            Path(name).unlink(missing_ok=True)
        if command.startswith("stop "):
            command = command.removeprefix("stop ")
            _stop_in_the_middle()
        if modules := command.startswith("modules "):
            command = command.removeprefix("modules ")
        faults.install()
        from pyrodiff.cli import main

        status = main(command.split())
        if modules:
            Path("modules").write_text("\n".join(sys.modules))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        faults.at = -1
        counted.write_text("\n".join(faults.names))
        os._exit(status)


def _stop_in_the_middle() -> None:
    """Interrupt the next command: a fit after its first validation, an evaluation after a batch."""
    from pyrodiff.runs.batches import Batches
    from pyrodiff.training.validations import Validations

    def stopping(work: Callable[..., object]) -> Callable[..., None]:
        def stopped(*arguments: Any) -> None:
            work(*arguments)
            raise KeyboardInterrupt

        return stopped

    Batches.write = stopping(Batches.write)
    Validations.on_train_epoch_end = stopping(Validations.on_train_epoch_end)


def files(root: Path) -> dict[str, bytes]:
    """The contents of all files; the page without its date."""
    contents = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".html":
                content = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", content)
            contents[str(path.relative_to(root))] = content
    return contents


def results(root: Path) -> dict[str, bytes]:
    """What a command is judged by: everything but its checkpoints, which are for going on."""
    ours = re.compile(r"run/checkpoints/(best|last|previous)\.ckpt")
    return {name: content for name, content in files(root).items() if not ours.fullmatch(name)}


@contextlib.contextmanager
def world(template: Path) -> Iterator[Path]:
    """A fresh copy of a folder."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "world"
        shutil.copytree(template, root)
        yield root


def make(scenario: Scenario, root: Path) -> None:
    """The world of a scenario."""
    import numpy as np

    root.mkdir()
    x = np.random.default_rng(0).normal(size=(40, 2))
    np.savetxt(root / "data.csv", x, delimiter=",")
    for command in scenario.before:
        ended = run(command, root)
        assert ended.status == (130 if command.startswith("stop ") else 0), ended.said
    for name in (*ALWAYS, *scenario.foreign):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"foreign {name}")


# -- judging -------------------------------------------------------------------------------------


_NAMED = re.compile(r"error: .*(run|other|page|mine|data\.csv)\S*")


def clear(ended: Ended) -> bool:
    """Whether the command refused in one line that names a file."""
    return ended.status == 2 and "Traceback" not in ended.said and bool(_NAMED.search(ended.said))


def judge(
    scenario: Scenario, template: Path, expected: dict[str, bytes], kind: str, at: int
) -> str:
    """Disturb one operation, go on, and say what came of it; "LOST: …" if anything did."""
    foreign = {n: c for n, c in files(template).items() if c.startswith(b"foreign ")}

    def touched(root: Path) -> list[str]:
        now = files(root)
        return [name for name in foreign if now.get(name) != foreign[name]]

    with world(template) as root:
        first = run(scenario.command, root, kind, at)
        if kind == "kill" and first.status != KILLED:
            return f"LOST: not killed but {first.status}: {first.said[-500:]}"
        if kind != "kill" and first.status != 0 and not clear(first):
            return f"LOST: no clear error but {first.status}: {first.said[-1500:]}"
        if first.status == 0 and results(root) != expected:
            return f"LOST: finished with other files: {differ(results(root), expected)}"
        outcome = {KILLED: "killed", 0: "finished all the same"}.get(first.status, "refused")
        again = run(scenario.again, root)
        end = "the same files"
        if again.status != 0:
            if not clear(again):
                return f"LOST: no clear error but {again.status}: {again.said[-1500:]}"
            end = "a clear error, then the same files"
            again = run(scenario.last, root)
        if lost := touched(root):
            return f"LOST: files of others: {lost}"
        if again.status != 0 or results(root) != expected:
            return f"LOST: {again.status} {differ(results(root), expected)} {again.said[-500:]}"
        return f"{outcome}; again: {end}"


def differ(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """The names of files that differ."""
    return [n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n)]


def check(name: str, every: int, first: int) -> tuple[int, collections.Counter[str]]:
    """The number of file operations of a scenario, and how many faults had which outcome."""
    scenario, outcomes = SCENARIOS[name], collections.Counter[str]()
    with tempfile.TemporaryDirectory() as work:
        template = Path(work) / "template"
        make(scenario, template)
        with world(template) as root:
            clean = run(scenario.command, root)
            assert clean.status == 0, clean.said
            expected = results(root)
        with world(template) as root:
            assert run(scenario.command, root).status == 0
            assert not (names := differ(results(root), expected)), f"not reproducible: {names}"
        # A process killed between two changes leaves what it leaves at the second.
        affected = {"kill": Faults.CHANGING, "disk full": Faults.TAKING, "I/O error": clean.names}
        number = first
        for at, operation in enumerate(clean.names):
            for kind in KINDS:
                if operation not in affected[kind]:
                    continue
                number += 1
                if number % every == 0:
                    outcome = judge(scenario, template, expected, kind, at)
                    if outcome.startswith("LOST"):
                        print(f"{name}, {kind} at {at} ({operation}): {outcome}", flush=True)
                        outcome = "LOST"
                    outcomes[f"{kind}: {outcome}"] += 1
    return len(clean.names), outcomes


def warm_up() -> None:
    """Import what the commands import, so that it is there after every fork.

    Nothing is computed in this process, whose threads would be lost to its children.
    """
    import torch

    import pyrodiff.cli
    import pyrodiff.runs.comparison
    import pyrodiff.runs.evaluation
    import pyrodiff.runs.fitting
    import pyrodiff.runs.sampling  # noqa: F401

    torch.set_num_threads(1)
    _spare_time()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "world"
        make(Scenario((), "", "", ""), root)
        names: set[str] = set()
        for command in (*SCENARIOS["compare over another"].before, "sample run", EVALUATE):
            ended = run(f"modules {command}", root)
            assert ended.status == 0, ended.said
            names |= set((root / "modules").read_text().split("\n"))
    for name in sorted(names):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _spare_time() -> None:
    """Let pictures be blank and pilots short: their files are written all the same."""
    import functools

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from pyrodiff.likelihood.termwise.pilot import Pilot
    from pyrodiff.runs import evaluation, pictures
    from pyrodiff.runs.report import figures

    def blank(draw: object, mark: str = "") -> bytes:
        content, info = io.BytesIO(), PngInfo()
        if mark:
            info.add_text("Source", mark)
        Image.new("L", (1, 1)).save(content, "png", pnginfo=info)
        return content.getvalue()

    pictures.png = evaluation.png = figures._png = blank
    Pilot.fit = functools.partial(Pilot.fit, calls=64)


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb every file operation of the commands.")
    parser.add_argument("--every", type=int, default=1, help="Take one fault in so many.")
    parser.add_argument("--first", type=int, default=0, help="Which one: 0 … every - 1.")
    parser.add_argument("--output", type=Path, help="Write the counts as JSON.")
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    options = parser.parse_args()
    warm_up()
    total, table = collections.Counter[str](), {}
    for name in options.scenarios:
        operations, outcomes = check(name, options.every, options.first)
        table[name] = {"operations": operations, "outcomes": dict(sorted(outcomes.items()))}
        total += outcomes
        print(f"{name}: {operations} operations, {dict(outcomes)}", flush=True)
    lost = sum(count for outcome, count in total.items() if outcome.endswith("LOST"))
    summary = {"faults": total.total(), "lost": lost, "outcomes": dict(sorted(total.items()))}
    print(json.dumps(summary, indent=2))
    if options.output:
        text = json.dumps(summary | {"every": options.every, "scenarios": table}, indent=2)
        options.output.write_text(f"{text}\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
