"""The command line: ``pyrodiff fit DATA``, ``evaluate RUN``, ``compare RUN RUN …`` and others.

Parsing imports neither torch nor Pyro, so that help and mistakes are answered at once; what a
command needs is imported when it runs (``pyrodiff.runs``).
"""

import contextlib
import re
import sys
import warnings
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from pyrodiff import runs
from pyrodiff._version import __version__
from pyrodiff.checks import short
from pyrodiff.runs.chain_settings import ChainSettings
from pyrodiff.runs.choices import FORMER_NAMES, present_names
from pyrodiff.runs.settings import FLAGS, ComparisonSettings, EvaluationSettings, FitSettings
from pyrodiff.runs.terminal import complain, let_go, make_forgiving
from pyrodiff.runs.variance_settings import VarianceSettings
from pyrodiff.training.settings import Settings
from pyrodiff.training.signals import Terminated, stoppable

__all__ = ["main", "make_parser", "normalised", "settings_of"]

Kind = TypeVar("Kind", bound=Settings)

_CHOSEN = {field.name for field in fields(FitSettings) if field.default is None}


class _Formatter(DefaultHelpFormatter):
    """Options with dashes, and defaults in words."""

    def _format_action_invocation(self, action: Action) -> str:
        return _dashed(super()._format_action_invocation(action))

    def _format_usage(self, *arguments: Any, **options: Any) -> str:
        return _dashed(super()._format_usage(*arguments, **options))

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        if action.dest in _CHOSEN and self._prog.endswith(" fit"):
            return text.replace("default: null", "default: chosen for the data")
        return text.replace(", default: null", "")


def _dashed(text: str) -> str:
    return re.sub(r"--[a-z_]+", lambda option: option[0].replace("_", "-"), text)


class _PlainConfig(ActionConfigFile):
    """Settings from a YAML file that is read without trust, by present or former names."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        from pyrodiff.serialization.config import read_plain

        settings = read_plain(Path(values))
        if not isinstance(settings, dict):
            raise ValueError(f"Expected settings by name in {values}; got {short(settings)}.")
        settings = present_names(settings)
        options = set(parser.get_defaults().keys()) - {"config"}
        if unknown := sorted(settings.keys() - options):
            raise ValueError(
                f"Expected names of options in {values}; got unknown {short(unknown[0])}."
            )
        super().__call__(parser, cfg, yaml.safe_dump(settings), option_string)


def _parser(description: str) -> ArgumentParser:
    return ArgumentParser(description=description, formatter_class=_Formatter)


def _fit_parser() -> ArgumentParser:
    parser = _parser("Train a model on DATA and write a run.")
    parser.add_argument("--config", action=_PlainConfig, help="Settings from a YAML file.")
    parser.add_argument(
        "data",
        type=str,
        help="digits, moons, checkerboard, mixture, or the path of a .npy, .npz, .csv or .parquet "
        "file or of a folder of images.",
    )
    parser.add_argument("--output", type=str | None, help="The run's folder; default: runs/DATA.")
    parser.add_argument("--context", type=str | None, help="What to condition on: label (digits).")
    parser.add_argument("--key", type=str | None, help="The array of an .npz file with several.")
    parser.add_argument("--levels", type=int | None, help="Treat the data as integers 0 … N-1.")
    parser.add_argument(
        "--data_seed",
        type=int | None,
        help="Of the split, and of data that are drawn; default: --seed. Runs that are to be "
        "compared need the same.",
    )
    parser.add_class_arguments(FitSettings)
    return _with_writing(parser)


def _with_writing(parser: ArgumentParser) -> ArgumentParser:
    """The parser with the options of commands that train and write a run."""
    parser.add_argument("--resume", action="store_true", help="Go on from the last checkpoint.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing run.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _parser("Bound the log-likelihood of data under the model of RUN.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("--data", type=str | None, help="Other data than the run's own.")
    parser.add_class_arguments(EvaluationSettings)
    parser.add_argument(
        "--processes", type=int, default=1, help="Worker processes among which batches are shared."
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with the finished batches of an interrupted evaluation; without it they are "
        "discarded.",
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def _sample_parser() -> ArgumentParser:
    parser = _parser("Draw samples from the model of RUN.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("-n", "--num_samples", type=int, default=64, help="Number of samples.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--batch_size", type=int, default=256, help="Samples per network call.")
    parser.add_class_arguments(ChainSettings)
    parser.add_argument("--label", type=int | None, help="The class, for a class-conditional run.")
    parser.add_argument("--output", type=str | None, help="A .npy file; default: RUN/samples.npy.")
    return parser


def _compare_parser() -> ArgumentParser:
    parser = _parser(
        "Compare the models of runs on the same samples with the same noise. Runs that differ in "
        "their training seed alone count as one model."
    )
    parser.add_argument("runs", type=str, nargs="+", help="The runs' folders.")
    parser.add_class_arguments(EvaluationSettings)
    parser.add_class_arguments(ComparisonSettings, skip=set(FLAGS))
    parser.add_argument(
        "--saved",
        action="store_true",
        help="Compare the evaluations saved in the runs, and make none.",
    )
    parser.add_argument(
        "--paired_seeds",
        action="store_true",
        help="Pair runs of the same training seed: what a seed does to all models alike cancels.",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="comparison.html",
        help="The report; figures and per-sample values go to the folder of its name.",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with the finished evaluations of an interrupted comparison of this output.",
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def _add_variance_parser() -> ArgumentParser:
    parser = _parser("Train a variance for the network of RUN, which stays; write a new run.")
    parser.add_argument("run", type=str, help="The run's folder, which is not written to.")
    parser.add_argument("--output", type=str | None, help="The new run; default: RUN-variance.")
    parser.add_class_arguments(VarianceSettings)
    return _with_writing(parser)


def make_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="pyrodiff",
        formatter_class=_Formatter,
        description="Variational diffusion models as Pyro programs.",
        version=__version__,
        allow_abbrev=False,  # nor do the commands
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (make, sentence) in _COMMANDS.items():
        commands.add_subcommand(name, make(), help=sentence)
    return parser


_COMMANDS = {
    "fit": (_fit_parser, "Train a model on DATA and write a run."),
    "evaluate": (_evaluate_parser, "Bound the log-likelihood of data under the model of a run."),
    "sample": (_sample_parser, "Draw samples from the model of a run."),
    "compare": (_compare_parser, "Compare the models of runs on the same samples."),
    "add-variance": (_add_variance_parser, "Train a learned variance for a run: fewer steps."),
}


def settings_of(kind: type[Kind], options: Namespace) -> Kind:
    """Those of the options that are settings of a kind.

    Raises:
        ValueError: what the settings refuse.
    """
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in options.as_dict().items() if name in names})


def normalised(argument: str) -> str:
    """``--batch-size=8`` as ``--batch_size=8``, and former names of options as present ones."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{FORMER_NAMES.get(name, name)}{sign}{value}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; or 2 for a mistake, explained in one line; or 130 where it was interrupted (SIGINT); or 143
    where it was terminated (SIGTERM).
    """
    make_forgiving()
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        let_go()


def _main(arguments: Sequence[str]) -> int:
    command = next(iter(arguments), "")
    try:
        options = make_parser().parse_args([normalised(argument) for argument in arguments])
        command = options.command
        with stoppable(), _plain_warnings(command):
            _run(command, options[command])
    except (ValueError, OSError, ImportError) as error:
        complain(f"pyrodiff {command}: error: {error}")
        if isinstance(error, ChildProcessError):
            complain("What is finished is kept: --resume goes on with it.")
        return 2
    except KeyboardInterrupt as end:
        what, status = ("terminated", 143) if isinstance(end, Terminated) else ("interrupted", 130)
        advice = "; --resume goes on with what is finished" if command != "sample" else ""
        complain(f"pyrodiff {command}: {what}{advice}")
        return status
    return 0


@contextlib.contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Show warnings as errors are shown: in a line, without the line of code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        complain(f"pyrodiff {command}: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _run(command: str, options: Namespace) -> None:
    """Mistakes in the settings are answered before torch is imported."""
    values = options.as_dict()
    if command == "fit":
        runs.fit(settings_of(FitSettings, options), **_rest(FitSettings, values))
    elif command == "add-variance":
        runs.add_variance(settings_of(VarianceSettings, options), **_rest(VarianceSettings, values))
    elif command == "evaluate":
        settings_of(EvaluationSettings, options)
        runs.evaluate(**values)
    elif command == "compare":
        evaluation = settings_of(EvaluationSettings, options)
        comparison = settings_of(ComparisonSettings, options)
        comparison.check(len(options.runs), evaluation)
        others = {name: values[name] for name in ("output", "resume", "quiet")}
        runs.compare(options.runs, evaluation, comparison, **others)
    else:
        settings_of(ChainSettings, options)
        runs.sample(**values)


def _rest(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Options that are no settings of a kind."""
    names = values.keys() - {field.name for field in fields(kind)} - {"config"}
    return {name: values[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
