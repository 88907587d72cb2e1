"""The command line: ``pyrodiff fit DATA``, ``evaluate RUN``, ``sample RUN``, ``compare RUN RUN …``.

Parsing imports neither torch nor Pyro, so that help and mistakes are answered at once; what a
command needs is imported when it runs (``pyrodiff.runs``).
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import pyrodiff
from pyrodiff.runs.settings import FLAGS, ComparisonSettings, EvaluationSettings, FitSettings
from pyrodiff.training.progress import let_go, make_forgiving, say
from pyrodiff.training.signals import Terminated, stoppable

__all__ = ["main", "make_parser"]


def _fit_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a model on DATA and write a run.")
    parser.add_argument("--config", action="config", help="Settings from a YAML file.")
    parser.add_argument(
        "data",
        type=str,
        help="digits, moons, checkerboard, mixture, or the path of a .npy, .npz, .csv or .parquet "
        "file or of a folder of images.",
    )
    parser.add_argument("--output", type=str | None, help="The run's folder (runs/DATA).")
    parser.add_argument("--context", type=str | None, help="What to condition on: label (digits).")
    parser.add_argument("--key", type=str | None, help="The array of an .npz file with several.")
    parser.add_argument("--levels", type=int | None, help="Treat the data as integers 0 … N-1.")
    parser.add_argument(
        "--data_seed",
        type=int | None,
        help="Of the split, and of data that are drawn (--seed). Runs that are to be compared need "
        "the same.",
    )
    parser.add_class_arguments(FitSettings)
    parser.add_argument("--resume", action="store_true", help="Go on from the last checkpoint.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a run that is there.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Bound the log-likelihood of data under the model of RUN.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("--data", type=str | None, help="Other data than the run's own.")
    parser.add_class_arguments(EvaluationSettings)
    parser.add_argument("--processes", type=int, default=1, help="Workers to share batches among.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with the finished batches of an interrupted evaluation (else discarded).",
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def _sample_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Draw samples from the model of RUN.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("-n", "--num_samples", type=int, default=64, help="How many.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--batch_size", type=int, default=256, help="Samples per network call.")
    parser.add_argument("--label", type=int | None, help="The class, for a class-conditional run.")
    parser.add_argument("--output", type=str | None, help="A .npy file (RUN/samples.npy).")
    return parser


def _compare_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Compare the models of runs on the same samples with the same noise. Runs that "
        "differ in their training seed alone count as one model."
    )
    parser.add_argument("runs", type=str, nargs="+", help="The runs' folders.")
    parser.add_class_arguments(EvaluationSettings)
    parser.add_class_arguments(ComparisonSettings, skip=set(FLAGS))
    parser.add_argument(
        "--saved",
        action="store_true",
        help="Compare the evaluations that the runs hold, and make none.",
    )
    parser.add_argument(
        "--paired_seeds",
        action="store_true",
        help="Take runs of one seed as pairs: what models owe to a seed alike is no error.",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="comparison.html",
        help="The report; figures and per-sample values go to a folder of its name beside it.",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with what an interrupted comparison of the same output had finished.",
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def make_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="pyrodiff",
        description="Variational diffusion models as Pyro programs.",
        version=pyrodiff.__version__,
        allow_abbrev=False,  # nor do the commands
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("fit", _fit_parser())
    commands.add_subcommand("evaluate", _evaluate_parser())
    commands.add_subcommand("sample", _sample_parser())
    commands.add_subcommand("compare", _compare_parser())
    return parser


def _settings(kind: type[Any], options: Namespace) -> Any:
    values, names = options.as_dict(), kind.__dataclass_fields__
    return kind(**{name: value for name, value in values.items() if name in names})


def _underscored(argument: str) -> str:
    """``--batch-size=8`` as ``--batch_size=8``: options may be written with dashes."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{sign}{value}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0, or 2 for a mistake, explained in one line, or 130 where it was interrupted (SIGINT), or 143
    where it was terminated (SIGTERM).
    """
    make_forgiving()
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        let_go()


def _main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args([_underscored(argument) for argument in arguments])
    command = options.command
    try:
        with stoppable(), _plain_warnings(command):
            _run(command, options[command])
    except (ValueError, OSError, ImportError) as error:
        _complain(f"pyrodiff {command}: error: {error}")
        if isinstance(error, ChildProcessError):
            _complain("What is finished is kept: --resume goes on with it.")
        return 2
    except KeyboardInterrupt as end:
        what, status = ("terminated", 143) if isinstance(end, Terminated) else ("interrupted", 130)
        kept = "; --resume goes on with what is finished" if command != "sample" else ""
        _complain(f"pyrodiff {command}: {what}{kept}")
        return status
    return 0


@contextlib.contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Show warnings as errors are: in a line, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _complain(f"pyrodiff {command}: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _complain(line: str) -> None:
    say(line, name="stderr")


def _run(command: str, values: Any) -> None:
    if command == "fit":
        settings = _settings(FitSettings, values)
        from pyrodiff import runs

        runs.fit(settings, **_others(values))
    elif command == "evaluate":
        _settings(EvaluationSettings, values)  # mistakes are answered before torch is imported
        from pyrodiff import runs

        runs.evaluate(**values.as_dict())
    elif command == "compare":
        evaluation = _settings(EvaluationSettings, values)
        comparison = _settings(ComparisonSettings, values)
        comparison.check(len(values.runs), evaluation)
        from pyrodiff.runs.comparison import compare

        others = {name: values[name] for name in ("output", "resume", "quiet")}
        compare(values.runs, evaluation, comparison, **others)
    else:
        from pyrodiff import runs

        runs.sample(**values.as_dict())


def _others(values: Namespace) -> dict[str, Any]:
    names = (
        *("data", "output", "context", "key", "levels", "data_seed"),
        *("resume", "overwrite", "quiet"),
    )
    return {name: values[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
