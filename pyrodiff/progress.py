"""The progress bar of long work: what is done, the time left, and running figures."""

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["progress_bar"]


def progress_bar(quiet: bool = False) -> Progress:
    """A bar whose tasks have a field ``figures``, shown at the right; nothing where ``quiet``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=quiet,
    )
