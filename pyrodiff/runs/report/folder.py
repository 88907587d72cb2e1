"""A report's page and the folder of its name: which of their files are ours.

``settings.yaml`` in the folder lists the files of comparisons; a file is put on the list before it
is written.  Files that are not on the list are neither replaced nor removed, and a page is
recognised by the name of its generator.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from pyrodiff import serialization
from pyrodiff.runs import batches
from pyrodiff.runs.respacing import clear_fits
from pyrodiff.serialization.files import sweep
from pyrodiff.serialization.folders import check_free, check_links, remove

__all__ = [
    "FIGURES",
    "GENERATOR",
    "check_page",
    "claim_files",
    "clear_evaluations",
    "settle_files",
    "value_name",
]

FIGURES = ("means", "differences", "terms", "ladder", "weights")
GENERATOR = '<meta name="generator" content="pyrodiff">'

_SETTINGS = "settings.yaml"
_NAME = re.compile(rf"(?:{'|'.join(FIGURES)})\.png|values/[^/]+\.nc")
_IDENTITY = re.compile(r"[0-9a-f]{16}")


def check_page(page: Path) -> None:
    """Refuse a page or a folder that no comparison wrote.

    Raises:
        ValueError: a name that does not end in ``.html``, or whose folder is a run.
        FileExistsError: a page or folder of other files.
    """
    folder = page.with_suffix("")
    if page.suffix != ".html":
        raise ValueError(f"Expected the name of a report to end in .html; got {page}.")
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"Expected a name for the report whose folder is no run; got {page}, beside the run "
            f"{folder}."
        )
    if page.is_symlink() or page.exists() and not _is_ours(page):
        raise FileExistsError(
            f"Expected no file {page}; got one that pyrodiff compare did not write. Nothing was "
            "changed: choose another --output."
        )
    if _listed(folder) is None:
        check_free(folder, "the figures and values of a report")
    check_links(folder, (_SETTINGS, "values", "evaluation"))


def claim_files(folder: Path, names: Iterable[str]) -> None:
    """Put the names on the list of our files in ``folder``, which is locked.

    Raises:
        FileExistsError: a file of such a name that is not on the list.
    """
    before = _listed(folder) or set()
    for name in sorted(set(names) - before):
        if (path := folder / name).exists() or path.is_symlink():
            raise FileExistsError(
                f"Expected no file {path}; got one that pyrodiff compare did not write. Nothing "
                "was changed: choose another --output."
            )
    _write(folder, before | set(names))


def settle_files(folder: Path, names: Iterable[str]) -> None:
    """Remove our files of other comparisons: all on the list but ``names``."""
    for name in sorted((_listed(folder) or set()) - set(names)):
        (folder / name).unlink(missing_ok=True)
        sweep(folder / name)
    remove(folder / "values", lambda name: False)
    _write(folder, set(names))


def clear_evaluations(folder: Path) -> None:
    """Remove the evaluations of comparisons under way in ``folder``."""
    evaluations = folder / "evaluation"
    check_links(folder, [evaluations.name])
    for entry in sorted(evaluations.iterdir()) if evaluations.is_dir() else []:
        if _IDENTITY.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            batches.clear(entry / "evaluation")
            clear_fits(entry)
            remove(entry, ("config.yaml", "model.safetensors", "evaluation.nc").__contains__)
    remove(evaluations, lambda name: False)


def value_name(number: int, run: str, repeat: int, repeats: int) -> str:
    """The name of an evaluation's file.

    Args:
        number, run: of the run, and its name.
        repeat, repeats: which of how many evaluations of the run.
    """
    slug = re.sub(r"[^\w.-]+", "-", run)
    return f"values/{number}-{slug}{f'-{repeat}' if repeats > 1 else ''}.nc"


def _is_ours(page: Path) -> bool:
    with page.open("rb") as file:
        return GENERATOR.encode() in file.read(4096)


def _listed(folder: Path) -> set[str] | None:
    """The names of our files in ``folder``; None where there is no list."""
    path = folder / _SETTINGS
    try:
        names = serialization.entry(serialization.read_config(path), "comparison")
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(names, list):
        return None
    return {name for name in names if isinstance(name, str) and _NAME.fullmatch(name)}


def _write(folder: Path, names: set[str]) -> None:
    serialization.write_config(folder / _SETTINGS, {"comparison": sorted(names)})
