"""The command ``compare``: runs evaluated with the same noise, a report in the terminal and a page.

The runs stay as they are.  Beside the page lies a folder of its name with ``settings.yaml``, which
lists the files that are ours (``pyrodiff.runs.report.folder``), figures, and each run's values, as
``pyrodiff.comparison.compare`` reads them; while the comparison is under way also ``evaluation/``,
with a folder for each evaluation that is named by a checksum of all that its values depend on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pyrodiff import serialization
from pyrodiff.comparison import Comparison, repeat_seeds
from pyrodiff.comparison import compare as compare_results
from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.result import read_result
from pyrodiff.runs.batches import read_sealed
from pyrodiff.runs.dataset import own_data
from pyrodiff.runs.folder import read_run, say_if_unsealed
from pyrodiff.runs.groups import (
    Model,
    check_same_data,
    group,
    in_order_of_seeds,
    unique_names,
)
from pyrodiff.runs.report.folder import (
    FIGURES,
    check_page,
    claim_files,
    clear_evaluations,
    value_name,
)
from pyrodiff.runs.report.page import write_report
from pyrodiff.runs.report.text import Report, print_comparison
from pyrodiff.runs.respacing import default_calls
from pyrodiff.runs.settings import ComparisonSettings, EvaluationSettings, read_settings
from pyrodiff.runs.splits import Evaluation, evaluate_split, model_checksum
from pyrodiff.runs.terminal import say
from pyrodiff.serialization.folders import locked

__all__ = ["compare"]


class _Run(NamedTuple):
    """A run that is compared.

    Args:
        folder: as given.
        name: by which it is told from the others.
        config: its configuration.
        dataset: its data.
    """

    folder: str
    name: str
    config: dict[str, Any]
    dataset: DataSet

    @property
    def result(self) -> Path:
        """The file of its saved evaluation."""
        return Path(self.folder) / "evaluation.nc"


class _Plan(NamedTuple):
    """What is compared, and how.

    Args:
        runs: all of them.
        models: which runs are one model.
        evaluation: the same for all runs.
        settings: of the comparison.
        noise: the seed of each repeat.
    """

    runs: Sequence[_Run]
    models: Sequence[Model]
    evaluation: EvaluationSettings
    settings: ComparisonSettings
    noise: Sequence[int]


def compare(
    runs: Sequence[str],
    evaluation: EvaluationSettings | None = None,
    settings: ComparisonSettings | None = None,
    output: str = "comparison.html",
    resume: bool = False,
    quiet: bool = False,
) -> Comparison:
    """Which run's model is better on the same samples; prints tables and writes a report.

    All are evaluated with the same noise.  Runs that differ in their training seed alone are one
    model, whose error holds the spread between them.

    Args:
        runs: the runs' folders.
        evaluation: what ``evaluate`` takes; ``calls`` is by default the least of the runs' own
            settings.
        settings: repeats, processes, whether seeds are pairs, and whether to compare saved
            evaluations instead.
        output: the report, ``.html``.
        resume: go on with the finished evaluations of an interrupted comparison of this output;
            without it they are discarded.
        quiet: show no progress.

    Raises:
        ValueError: runs of other data or units, a run twice, fewer than two models, paired seeds
            that differ, options without effect; what ``evaluate`` raises.
        FileNotFoundError: no run there, or no evaluation in it (saved).
        FileExistsError: a page, or a folder of its name, that no comparison wrote.
        BlockingIOError: another comparison of this output is under way.
    """
    evaluation, settings = evaluation or EvaluationSettings(), settings or ComparisonSettings()
    settings.check(len(runs), evaluation)
    if settings.saved and resume:
        raise ValueError("Expected nothing to resume with saved evaluations; got resume.")
    page, folder = Path(output), Path(output).with_suffix("")
    check_page(page)
    plan = _plan(runs, evaluation, settings)
    with locked(folder):
        check_page(page)
        report = _report(plan, _results(folder, plan, resume, quiet))
        write_report(report, page)
        if not settings.saved:
            clear_evaluations(folder)
    print_comparison(report)
    say(f"report -> {page}; figures and values -> {folder}/")
    return report.comparison


def _plan(
    folders: Sequence[str], evaluation: EvaluationSettings, settings: ComparisonSettings
) -> _Plan:
    """All that is known before anything is evaluated; runs that cannot be compared are refused."""
    runs = _read_runs(folders)
    evaluation = _common_evaluation(evaluation, settings, runs)
    _check_data(runs, evaluation)
    models = _models(runs, settings)
    repeats = 1 if settings.saved else settings.count(evaluation)
    _check_files(runs, settings)
    return _Plan(runs, models, evaluation, settings, repeat_seeds(evaluation.seed, repeats))


def _read_runs(folders: Sequence[str]) -> list[_Run]:
    """The runs with their data.

    Raises:
        ValueError: the same folder twice.
    """
    configs = [read_run(folder) for folder in folders]
    runs = []
    for folder, name, config in zip(folders, unique_names(folders), configs, strict=True):
        section = serialization.entry(config, "data")
        runs.append(_Run(folder, name, config, own_data(Path(folder), section)))
    return runs


def _common_evaluation(
    evaluation: EvaluationSettings, settings: ComparisonSettings, runs: Sequence[_Run]
) -> EvaluationSettings:
    """The evaluation that all runs have in common."""
    if settings.saved:
        attributes = [read_result(run.result)[1] for run in runs][0]
        saved = {name: attributes[name] for name in ("split", "seed") if name in attributes}
        return read_settings(EvaluationSettings, evaluation.to_dict() | saved)
    if evaluation.estimator != "termwise" or evaluation.std_error is not None:
        return evaluation
    if evaluation.calls is not None:
        return evaluation
    size = runs[0].dataset.dimensions
    return replace(
        evaluation, calls=min(default_calls(run.config, evaluation, size) for run in runs)
    )


def _check_data(runs: Sequence[_Run], evaluation: EvaluationSettings) -> None:
    """Refuse runs of other data."""
    check_same_data(
        [run.name for run in runs],
        [run.dataset for run in runs],
        [serialization.entry(run.config, "data")["seed"] for run in runs],
        evaluation.split,
        evaluation.limit,
    )


def _models(runs: Sequence[_Run], settings: ComparisonSettings) -> list[Model]:
    """Which runs are one model."""
    models = group([run.name for run in runs], [run.config for run in runs])
    if len(models) < 2:
        raise ValueError(f"Expected at least two models; got training seeds of one, {models[0]}.")
    return in_order_of_seeds(models) if settings.paired_seeds else models


def _check_files(runs: Sequence[_Run], settings: ComparisonSettings) -> None:
    """Refuse damaged weights before any long work."""
    for run in runs:
        say_if_unsealed(run.folder, run.config)
        if not settings.saved:
            serialization.read_weights(Path(run.folder) / "model.safetensors")


def _results(folder: Path, plan: _Plan, resume: bool, quiet: bool) -> list[list[LogLikelihood]]:
    """For each run its evaluations, one per seed of the noise; saved ones are read."""
    saved = plan.settings.saved
    names = [run.name for run in plan.runs]
    claim_files(folder, _file_names(names, len(plan.noise), saved))
    if saved:
        return [[LogLikelihood.load(run.result)] for run in plan.runs]
    if not resume:
        clear_evaluations(folder)
    repeats = [replace(plan.evaluation, seed=seed) for seed in plan.noise]
    processes = plan.settings.processes
    return [_repeated(run, folder, repeats, processes, quiet) for run in plan.runs]


def _report(plan: _Plan, results: Sequence[list[LogLikelihood]]) -> Report:
    """The models compared by their runs' values; saved ones by their files, with their split."""
    saved = plan.settings.saved
    values: dict[str, Any] = {
        model.name: [plan.runs[i].result if saved else results[i] for i in model.runs]
        for model in plan.models
    }
    return Report(
        comparison=compare_results(values, paired_seeds=plan.settings.paired_seeds),
        models=plan.models,
        runs=[run.folder for run in plan.runs],
        names=[run.name for run in plan.runs],
        results=results,
        dataset=plan.runs[0].dataset,
        evaluation=plan.evaluation,
        settings=plan.settings,
        noise=plan.noise,
    )


def _file_names(runs: Sequence[str], repeats: int, saved: bool) -> list[str]:
    """All files that the report's folder may come to hold."""
    values = [
        value_name(number, name, repeat, repeats)
        for number, name in enumerate(runs, 1)
        for repeat in range(1, repeats + 1)
    ]
    return [f"{name}.png" for name in FIGURES] + ([] if saved else values)


def _repeated(
    run: _Run, folder: Path, repeats: Sequence[EvaluationSettings], processes: int, quiet: bool
) -> list[LogLikelihood]:
    """The evaluations of a run; its own folder is left as it is."""
    weights = (Path(run.folder) / "model.safetensors").read_bytes()
    model = model_checksum(Path(run.folder) / "config.yaml", weights)
    results: list[LogLikelihood] = []
    for number, settings in enumerate(repeats, 1):
        if not quiet:
            say(run.name if len(repeats) == 1 else f"{run.name}, {number} of {len(repeats)}")
        identity = Evaluation(model, run.dataset, settings).identity()
        copy = folder / "evaluation" / identity
        result = read_sealed(copy / "evaluation.nc", identity)
        if result is None:
            _copy(run, weights, copy)
            options: dict[str, Any] = {"processes": processes, "quiet": quiet, "model": model}
            options["fits"] = folder / "evaluation" / model  # the same for all repeats
            result = evaluate_split(copy, run.dataset, settings, resume=True, **options)
        results.append(result)
    return results


def _copy(run: _Run, weights: bytes, folder: Path) -> None:
    """Copy the model of a run.

    Raises:
        ValueError: a run that was replaced since it was read.
    """
    config = (Path(run.folder) / "config.yaml").read_bytes()
    serialization.write_bytes(folder / "config.yaml", config)
    serialization.write_bytes(folder / "model.safetensors", weights)
    model = serialization.entry(serialization.read_config(folder / "config.yaml"), "model")
    if model != serialization.entry(run.config, "model"):
        raise ValueError(f"Expected {run.folder} to stay as it is; got a run that was replaced.")
