"""Runs compared: evaluated with the same noise, reported in the terminal and as a page.

The runs stay as they are.  Beside the report a folder of its name holds figures, and each run's
values, as ``pyrodiff.comparison.compare`` reads them; while the comparison is under way also
``evaluation/``, with a folder for each evaluation that is named by all that its values depend on.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyrodiff import serialization
from pyrodiff.comparison import Comparison, repeat_seeds
from pyrodiff.comparison import compare as compare_results
from pyrodiff.data import DataSet
from pyrodiff.evaluation import evaluate_split, identity
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.result import read_result
from pyrodiff.report import write_report
from pyrodiff.report_text import Report, print_comparison
from pyrodiff.run_groups import check_same_data, group, in_order_of_seeds, unique_names
from pyrodiff.runs import own_data, read_run
from pyrodiff.settings import ComparisonSettings, EvaluationSettings

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
    """
    evaluation, settings = evaluation or EvaluationSettings(), settings or ComparisonSettings()
    settings.check(len(runs), evaluation)
    if settings.saved and resume:
        raise ValueError("Expected nothing to resume with saved evaluations; got resume.")
    _check_output(Path(output))
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
    place = Path(output).with_suffix("") / "evaluation"
    if not (resume or settings.saved):
        shutil.rmtree(place, ignore_errors=True)
    noise = repeat_seeds(evaluation.seed, 1 if settings.saved else settings.count(evaluation))
    if settings.saved:
        every = [[LogLikelihood.load(Path(run) / "evaluation.nc")] for run in runs]
        results: Any = {m.name: [Path(runs[i]) / "evaluation.nc" for i in m.runs] for m in models}
    else:
        every = [
            _repeated(Path(run), place, name, dataset, evaluation, noise, settings.processes, quiet)
            for run, name, dataset in zip(runs, names, datasets, strict=True)
        ]
        results = {m.name: [every[i] for i in m.runs] for m in models}
    found = compare_results(results, paired_seeds=settings.paired_seeds)
    report = Report(
        found, models, list(runs), names, every, datasets[0], evaluation, settings, noise
    )
    print_comparison(report)
    written = write_report(report, Path(output))
    if not settings.saved:
        shutil.rmtree(place)
    print(f"report -> {written}; figures and values -> {written.with_suffix('')}/")
    return found


def _check_output(path: Path) -> None:
    if path.suffix != ".html":
        raise ValueError(f"Expected the name of a report to end in .html; got {path}.")
    if (path.with_suffix("") / "config.yaml").exists():
        raise ValueError(
            f"Expected a name for the report whose folder is no run; got {path}, beside the run "
            f"{path.with_suffix('')}."
        )


def _settled(
    evaluation: EvaluationSettings,
    settings: ComparisonSettings,
    runs: Sequence[str],
    configs: Sequence[dict[str, Any]],
) -> EvaluationSettings:
    """What is evaluated, the same for all runs."""
    if settings.saved:
        held = [read_result(Path(run) / "evaluation.nc")[1] for run in runs]
        split, seed = held[0].get("split", "test"), int(held[0].get("seed", 0))
        return replace(evaluation, split=split, seed=seed)
    given = (evaluation.evaluations, evaluation.std_error)
    if evaluation.estimator != "termwise" or given != (None, None):
        return evaluation
    own = (int(serialization.entry(config, "fit")["evaluations"]) for config in configs)
    return replace(evaluation, evaluations=min(own))


def _repeated(
    run: Path,
    place: Path,
    name: str,
    dataset: DataSet,
    evaluation: EvaluationSettings,
    seeds: Sequence[int],
    processes: int,
    quiet: bool,
) -> list[LogLikelihood]:
    """The evaluations of a run, one per repeat; what the run holds is left as it is."""
    results: list[LogLikelihood] = []
    for number, seed in enumerate(seeds, 1):
        if not quiet:
            print(name if len(seeds) == 1 else f"{name}, {number} of {len(seeds)}")
        own = replace(evaluation, seed=seed)
        folder = place / identity(run, dataset, own)
        if (folder / "evaluation.nc").exists():
            results.append(LogLikelihood.load(folder / "evaluation.nc"))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "model.safetensors"):
            shutil.copyfile(run / file, folder / file)
        options: dict[str, Any] = {"resume": True, "processes": processes, "quiet": quiet}
        results.append(evaluate_split(folder, dataset, own, **options))
    return results
