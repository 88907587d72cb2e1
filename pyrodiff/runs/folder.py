"""A run's folder, recognised by its ``config.yaml``, which is written first and never removed.

The names of the run's own files are listed here; any other file in the folder is left alone.  The
configuration holds a checksum over itself, and so do the weights.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyrodiff import serialization
from pyrodiff.checks import check_types, conforms, short
from pyrodiff.runs import batches
from pyrodiff.runs.choices import present_names
from pyrodiff.runs.respacing import FITS, clear_fits
from pyrodiff.runs.settings import FitSettings, check_unchanged
from pyrodiff.runs.terminal import say
from pyrodiff.serialization.files import sweep
from pyrodiff.serialization.folders import check_free, check_links, locked, remove

__all__ = ["check_folder", "opened", "prepare_folder", "read_run", "say_if_unsealed", "sealed"]

_CONFIG, _SECTIONS = "config.yaml", ("model", "data", "fit")
_RESULTS = ("model.safetensors", "metrics.csv", "evaluation.nc", "terms.png")
_SAMPLES = ("samples.png", "samples.npy")
_FOLDERS = ("checkpoints", "evaluation", FITS)
_NEEDED = {
    "data": ("source", "seed", "levels_found", "shift", "scale", "context_shape"),
    "fit": ("calls", "seed"),
}
_DATA: dict[str, Any] = {
    "source": str,
    "seed": int,
    "context": str | int | list[str | int] | None,
    "key": str | None,
    "levels": int | None,
    "levels_found": int | None,
    "shift": object,  # numbers, nested as the data are
    "scale": object,
    "context_shape": list[int] | None,
}


def read_run(run: str | Path) -> dict[str, Any]:
    """A run's configuration; its settings have their present names, whatever those in the file.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a configuration that is damaged, or was changed by hand.
    """
    if not Path(run).is_dir():
        raise FileNotFoundError(f"Expected a run's folder; got {str(run)!r}, which is none.")
    path = Path(run) / _CONFIG
    config = serialization.read_config(path)
    if "checksum" in config and config["checksum"] != _checksum(config):
        raise ValueError(
            f"Expected {path} as it was written; got a text that differs from its checksum. "
            "Restore a copy; or, if you changed it yourself, remove the line of the checksum."
        )
    if isinstance(config.get("fit"), dict):
        config["fit"] = present_names(config["fit"])
    _check_sections(config, path)
    return config


def _check_sections(config: dict[str, Any], path: Path) -> None:
    """Refuse sections that no run holds; a missing section is refused where it is needed."""
    for section in config.keys() & _NEEDED.keys():
        for name in _NEEDED[section]:
            serialization.entry(config[section], name)
    check_types(FitSettings, config.get("fit", {}))
    for name, value in config.get("data", {}).items():
        if not conforms(value, _DATA.get(name, object)):
            raise ValueError(f"Expected {name} of the data in {path}; got {short(value)}.")


def sealed(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a checksum over it."""
    return config | {"checksum": _checksum(config)}


def _checksum(config: dict[str, Any]) -> str:
    header = ("format", "pyrodiff", "checksum")
    content = {str(name): value for name, value in config.items() if name not in header}
    return batches.checksum(json.dumps(content, default=str).encode())


def say_if_unsealed(run: str | Path, config: dict[str, Any]) -> None:
    """Print a line if a run was written by a version without checksums."""
    if "checksum" not in config:
        say(
            f"{run}: written without checksums (by pyrodiff {config.get('pyrodiff')}): "
            "damage to its weights would go unnoticed.",
            name="stderr",
        )


def check_folder(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether ``folder`` holds a run, which may be resumed or replaced; if not, it is free.

    Raises:
        FileExistsError: a folder of other files, or a run without ``resume`` or ``overwrite``.
    """
    if not (folder / _CONFIG).is_file():
        check_free(folder, "a run")
        return False
    try:
        config = serialization.read_config(folder / _CONFIG)
        for name in ("pyrodiff", *_SECTIONS):
            serialization.entry(config, name)
    except ValueError as error:
        raise FileExistsError(
            f"Expected a new folder, or a run; got {folder}, whose {_CONFIG} is not a run's: "
            f"{error} Nothing was changed: choose another --output."
        ) from error
    check_links(folder, (_CONFIG, *_RESULTS, *_SAMPLES, *_FOLDERS))
    if not (resume or overwrite):
        raise FileExistsError(
            f"Expected a new folder; got {folder}, which holds a run. "
            "Use --resume to go on with it, --overwrite to replace it, or another --output."
        )
    return True


def prepare_folder(folder: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make the folder, which is locked, ready for a run.

    Raises:
        FileExistsError: see ``check_folder``.
        ValueError: a run of other settings (``resume``).
    """
    exists = check_folder(folder, resume, overwrite)
    if exists and resume:
        before = read_run(folder)
        for section in config:
            check_unchanged(folder, serialization.entry(before, section), config[section])
        return
    if exists:
        _clear(folder)
    serialization.write_config(folder / _CONFIG, sealed(config))


def _clear(folder: Path) -> None:
    """Remove all files of a run but its configuration."""
    from pyrodiff.training.checkpoints import BEST, LAST, PREVIOUS

    remove(folder, (_RESULTS + _SAMPLES).__contains__)
    for name in (LAST, PREVIOUS, BEST):  # in this order: those that are left can be resumed
        remove(folder / "checkpoints", name.__eq__)
    batches.clear(folder / "evaluation")
    clear_fits(folder)


@contextlib.contextmanager
def opened(run: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A run's folder, locked so that results can be written into it, and its configuration.

    Raises:
        BlockingIOError: another command writes to it.
        FileExistsError: one of its names is a link.
        FileNotFoundError, ValueError: see ``read_run``.
    """
    folder = Path(run)
    read_run(folder)
    check_links(folder, (*_RESULTS, *_SAMPLES, *_FOLDERS))
    with locked(folder):
        for name in (*_RESULTS, *_SAMPLES):
            sweep(folder / name)
        config = read_run(folder)
        say_if_unsealed(folder, config)
        yield folder, config
