"""An evaluation in the terminal: its progress and its result."""

import math
import warnings
from dataclasses import replace

import torch

from pyrodiff.data import DataSet
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.runs.chain_settings import DEFAULT_GRID, ChainSettings
from pyrodiff.runs.respacing import calls_per_step
from pyrodiff.runs.settings import EvaluationSettings
from pyrodiff.runs.terminal import console, progress_bar, say

__all__ = ["Counter", "chain_lines", "print_evaluation", "worse_than_uniform"]

_TRUSTED = 0.7  # k̂ up to which a mean of weights can be trusted (Vehtari et al., 2024)


class Counter:
    """A progress bar over samples with the running mean and its standard error.

    In bits per dimension for images and discrete data, else in nats.

    Args:
        dataset: the data.
        quiet: show nothing.
    """

    def __init__(self, dataset: DataSet, quiet: bool):
        self.bar, self.offset = progress_bar(quiet), dataset.log_density_offset()
        self.bits = dataset.is_image or dataset.levels is not None

    def __enter__(self) -> "Counter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def pilot(self, done: int, total: int) -> None:
        """Show the progress of the pilot."""
        if not self.bar.tasks:
            self.bar.add_task("pilot", total=total, figures="network calls")
        self.bar.update(self.bar.tasks[0].id, completed=done)

    def start(self, total: int, results: dict[int, LogLikelihood]) -> None:
        """Begin with the results of finished batches."""
        done = sum(len(result.value) for result in results.values())
        self.task = self.bar.add_task("evaluation", total=total, completed=done, figures="")

    def show(self, results: dict[int, LogLikelihood]) -> None:
        """Show the results so far."""
        if self.bar.disable:
            return
        whole = LogLikelihood.concatenate(list(results.values())) + self.offset
        value, error, _ = whole.bits_per_dim() if self.bits else whole.mean()
        figures = f"{value:.3f} ± {error:.3f} {'bits/dim' if self.bits else 'nats'}"
        self.bar.update(self.task, completed=len(whole.value), figures=figures)


def print_evaluation(result: LogLikelihood, dataset: DataSet, settings: EvaluationSettings) -> None:
    """Print the mean over samples with its errors, what it estimates, and what it cost."""
    from rich.table import Table

    table = Table(title=f"{dataset.name}, {settings.split}: {len(result.value)} samples")
    for name in ("", "value", "± between samples", "of which Monte Carlo"):
        table.add_column(name, justify="left" if not name else "right")
    # a lower bound on log p is an upper bound on bits, hence "bound" for both
    what = "estimate of" if result.kind == "estimate" else "bound on"
    bits, nats = result.bits_per_dim(), result.mean()
    table.add_row(f"{what} bits/dim (lower is better)", *(f"{v:.4f}" for v in bits))
    table.add_row(f"{what} log p (nats, higher is better)", *(f"{v:.3f}" for v in nats))
    if result.reference is not None:
        importance = replace(result, value=result.reference).mean()
        row = f"{importance.value:.3f}", f"{importance.between_samples:.3f}", ""
        table.add_row("importance bound, as many particles", *row)
    if dataset.log_prob is not None and dataset.levels is None:
        x = getattr(dataset, settings.split)[: settings.limit]
        exact = dataset.log_prob(dataset.transform.inverse(x))
        error = float(exact.std() / len(exact) ** 0.5) if len(exact) > 1 else math.nan
        table.add_row(
            "exact log p of the data's law", f"{float(exact.mean()):.3f}", f"{error:.3f}", ""
        )
    console().print(table)
    chain = chain_lines(settings, dataset.dimensions)
    say(*_lines(result, settings, chain), *worse_than_uniform(result, dataset.levels))


def chain_lines(settings: ChainSettings, size: int) -> list[str]:
    """A line on a chain that is not the run's own; else none.

    Args:
        settings: of the chain.
        size: values of an event.
    """
    if not settings.changes:
        return []
    options = [f"{name} {getattr(settings, name)}" for name in ("probes", "rank")]
    given = ", ".join(option for option in options if not option.endswith("None"))
    variance = f"variance {settings.variance or 'of the run'}{f' ({given})' if given else ''}"
    per_step = calls_per_step(settings, size)
    grid = "" if settings.steps is None else f", grid {settings.grid or DEFAULT_GRID}"
    products = ", products with the Jacobian counted" if per_step > 1 else ""
    steps = "steps of the run" if settings.steps is None else f"{settings.steps} steps"
    calls = f"{per_step} network call{'s' if per_step > 1 else ''} each"
    return [f"chain: {steps}, {variance}{grid}; {calls}{products}"]


def _lines(result: LogLikelihood, settings: EvaluationSettings, chain: list[str]) -> list[str]:
    article = "an" if result.kind == "estimate" else "a"
    of = "of" if result.kind == "estimate" else "on"
    lines = [f"{result.estimator}: {article} {result.kind} {of} log p", *chain]
    error = result.std_error
    if bool(error.isfinite().any()):
        # NaN, unknown, counts as large
        ordered = error.nan_to_num(torch.inf).sort().values
        lines.append(
            f"Monte Carlo error of a sample: median {_quantile(ordered, 0.5)}, "
            f"9 in 10 below {_quantile(ordered, 0.9)} nats"
        )
    lines += result.remarks.splitlines()
    calls = f"{result.network_evaluations:.6g} network calls per sample"
    shared = f", and {result.shared_calls} for all together" if result.shared_calls else ""
    lines.append(calls + shared)
    if settings.estimator == "importance":
        lines += _weights(result)
    if result.looser is not None:
        looser, count = int(result.looser.sum()), len(result.value)
        lines.append(f"looser than the importance bound for {looser} of {count} samples")
    return lines


def worse_than_uniform(result: LogLikelihood, levels: int | None) -> list[str]:
    """A line for a model whose codes are longer than one length for all levels; else none.

    Args:
        result: of discrete data, or of continuous data, for which there is no such code.
        levels: the number of values that an entry can take; None for continuous data.
    """
    if levels is None or result.bits_per_dim().value <= math.log2(levels):
        return []
    return [
        f"Worse than a uniform code over the {levels} levels ({math.log2(levels):.3f} bits/dim): "
        "it is of no use as a model of these data. More steps, another network, or a lower weight "
        "decay or learning rate may help."
    ]


def _quantile(ordered: torch.Tensor, level: float) -> str:
    return f"{float(ordered[math.ceil(level * len(ordered)) - 1]):.3g}"


def _weights(result: LogLikelihood) -> list[str]:
    """A line on how unequal the weights are."""
    assert result.log_weights is not None and result.effective_sample_size is not None
    count, effective = result.log_weights.shape[1], float(result.effective_sample_size.median())
    line = f"effective number of particles: median {effective:.1f} of {count}; Pareto k̂ "
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its next version
        k = result.pareto_k
    if k is None or bool(k.isnan().all()):
        return [f"{line}is unknown from so few particles"]
    return [f"{line}above {_TRUSTED} for {float((k > _TRUSTED).double().mean()):.0%} of samples"]
