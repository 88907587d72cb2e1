"""Runs compared: evaluated with the same noise, reported in the terminal and as a page.

The runs stay as they are.  Beside the report a folder of its name holds ``settings.yaml``, which
says what in it is ours (``pyrodiff.runs.report.folder``), figures, and each run's values, as
``pyrodiff.comparison.compare`` reads them; while the comparison is under way also ``evaluation/``,
with a folder for each evaluation that is named by all that its values depend on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyrodiff import serialization
from pyrodiff.comparison import Comparison, repeat_seeds
from pyrodiff.comparison import compare as compare_results
from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.result import read_result
from pyrodiff.runs import folder as run_folder
from pyrodiff.runs import own_data, read_run
from pyrodiff.runs.batches import read_sealed
from pyrodiff.runs.evaluation import evaluate_split, identity
from pyrodiff.runs.groups import Model, check_same_data, group, in_order_of_seeds, unique_names
from pyrodiff.runs.report import folder as report_folder
from pyrodiff.runs.report.page import write_report
from pyrodiff.runs.report.text import Report, print_comparison
from pyrodiff.runs.settings import ComparisonSettings, EvaluationSettings, read_settings
from pyrodiff.serialization.folders import locked
from pyrodiff.training.progress import say

__all__ = ["compare"]


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
        evaluation: what ``evaluate`` takes; the number of ``evaluations`` is by default the least
            of the runs' own settings.
        settings: repeats, processes, whether seeds are pairs, and whether to compare saved
            evaluations instead.
        output: the report, ``.html``.
        resume: go on with what an interrupted comparison of this output had finished; without it
            that is discarded.
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
    report_folder.check(page)
    configs = [read_run(run) for run in runs]
    names, held = unique_names(runs), [serialization.entry(each, "data") for each in configs]
    datasets = [own_data(Path(run), each) for run, each in zip(runs, held, strict=True)]
    evaluation = _settled(evaluation, settings, runs, configs)
    seeds = [each["seed"] for each in held]
    check_same_data(names, datasets, seeds, evaluation.split, evaluation.limit)
    models = group(names, configs)
    if len(models) < 2:
        raise ValueError(f"Expected at least two models; got training seeds of one, {models[0]}.")
    if settings.paired_seeds:
        models = in_order_of_seeds(models)
    repeats = 1 if settings.saved else settings.count(evaluation)
    noise = repeat_seeds(evaluation.seed, repeats)
    for run, config in zip(runs, configs, strict=True):
        run_folder.say_if_unsealed(run, config)
        if not settings.saved:
            serialization.read_weights(Path(run) / "model.safetensors")  # sound, or refused
    with locked(folder):
        report_folder.check(page)
        report_folder.claim(folder, _names(names, repeats, settings.saved))
        if not (resume or settings.saved):
            report_folder.clear_evaluations(folder)
        every = [
            [LogLikelihood.load(Path(run) / "evaluation.nc")]
            if settings.saved
            else _repeated(Path(run), folder, name, dataset, evaluation, noise, settings, quiet)
            for run, name, dataset in zip(runs, names, datasets, strict=True)
        ]
        found = _compared(models, runs, every, settings)
        report = Report(
            found, models, list(runs), names, every, datasets[0], evaluation, settings, noise
        )
        write_report(report, page)
        if not settings.saved:
            report_folder.clear_evaluations(folder)
    print_comparison(report)
    say(f"report -> {page}; figures and values -> {folder}/")
    return found


def _compared(
    models: Sequence[Model],
    runs: Sequence[str],
    every: Sequence[list[LogLikelihood]],
    settings: ComparisonSettings,
) -> Comparison:
    """The models by their runs' values; saved ones by their files, which know their split."""
    results: dict[str, Any] = {}
    for model in models:
        if settings.saved:
            results[model.name] = [Path(runs[i]) / "evaluation.nc" for i in model.runs]
        else:
            results[model.name] = [every[i] for i in model.runs]
    return compare_results(results, paired_seeds=settings.paired_seeds)


def _names(runs: Sequence[str], repeats: int, saved: bool) -> list[str]:
    """What the report's folder may come to hold."""
    values = [
        report_folder.value_name(number, name, repeat, repeats)
        for number, name in enumerate(runs, 1)
        for repeat in range(1, repeats + 1)
    ]
    return [f"{name}.png" for name in report_folder.FIGURES] + ([] if saved else values)


def _settled(
    evaluation: EvaluationSettings,
    settings: ComparisonSettings,
    runs: Sequence[str],
    configs: Sequence[dict[str, Any]],
) -> EvaluationSettings:
    """What is evaluated, the same for all runs."""
    if settings.saved:
        held = [read_result(Path(run) / "evaluation.nc")[1] for run in runs]
        saved = {name: held[0][name] for name in ("split", "seed") if name in held[0]}
        return read_settings(EvaluationSettings, evaluation.to_dict() | saved)
    given = (evaluation.evaluations, evaluation.std_error)
    if evaluation.estimator != "termwise" or given != (None, None):
        return evaluation
    own = (int(serialization.entry(config, "fit")["evaluations"]) for config in configs)
    return replace(evaluation, evaluations=min(own))


def _repeated(
    run: Path,
    folder: Path,
    name: str,
    dataset: DataSet,
    evaluation: EvaluationSettings,
    seeds: Sequence[int],
    settings: ComparisonSettings,
    quiet: bool,
) -> list[LogLikelihood]:
    """The evaluations of a run, one per repeat; what the run holds is left as it is."""
    results: list[LogLikelihood] = []
    for number, seed in enumerate(seeds, 1):
        if not quiet:
            say(name if len(seeds) == 1 else f"{name}, {number} of {len(seeds)}")
        own = replace(evaluation, seed=seed)
        known = identity(run, dataset, own)
        place = folder / "evaluation" / known
        result = read_sealed(place / "evaluation.nc", known)
        if result is None:
            for file in ("config.yaml", "model.safetensors"):
                serialization.write_bytes(place / file, (run / file).read_bytes())
            if identity(place, dataset, own) != known:
                raise ValueError(f"Expected {run} to stay as it is; got a run that was replaced.")
            options: dict[str, Any] = {"processes": settings.processes, "quiet": quiet}
            result = evaluate_split(place, dataset, own, resume=True, **options)
        results.append(result)
    return results
