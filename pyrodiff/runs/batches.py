"""The results of finished batches, a file each, until an evaluation is complete.

Every file says to which evaluation and to which samples its values belong, by a checksum over both
and over the values themselves; a file whose checksum differs is ignored.
"""

import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff import serialization
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.result import read_result
from pyrodiff.runs.choices import FORMER_NAMES, present_names
from pyrodiff.runs.settings import check_unchanged
from pyrodiff.serialization.folders import check_free, check_links, remove

__all__ = ["Batches", "checksum", "clear", "identity", "read_sealed", "seal"]

_SETTINGS = "settings.yaml"
_OURS = re.compile(r"batch-\d{6,}\.nc|pilot\.safetensors")


def checksum(*contents: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]


def identity(record: Mapping[str, Any]) -> str:
    """A checksum of all that the values of an evaluation depend on.

    It is taken of the settings by their former names, as in the files of earlier versions.
    """
    former = {present: name for name, present in FORMER_NAMES.items()}
    items = sorted((former.get(name, name), value) for name, value in record.items())
    return checksum(repr(items).encode())


def seal(result: LogLikelihood, *facts: object) -> str:
    """A checksum of all that a result holds, and of the facts that it belongs to."""
    contents = [repr(facts).encode()]
    for field in fields(result):
        value = getattr(result, field.name)
        contents.append(field.name.encode())
        contents.append(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return checksum(*contents)


def _bytes(value: Tensor) -> bytes:
    """Shape and values; every NaN gives the same bytes."""
    value = value.double()
    value = torch.where(value.isnan(), torch.nan, value)
    return repr(tuple(value.shape)).encode() + value.numpy().tobytes()


def read_sealed(path: Path, *facts: object) -> LogLikelihood | None:
    """The result in ``path``, saved with its seal over ``facts``; None for any other file."""
    with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):
        result, attributes = read_result(path)
        if attributes.get("seal") == seal(result, *facts):
            return result
    return None


def clear(folder: Path) -> None:
    """Remove what evaluations of any kind left in a run's folder ``evaluation``."""
    check_links(folder.parent, [folder.name])
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (entry / _SETTINGS).is_file() and not entry.is_symlink():
            remove(entry, lambda name: name == _SETTINGS or _OURS.fullmatch(name))
    remove(folder, lambda name: False)


class Batches:
    """The finished batches of one evaluation.

    Args:
        folder: which holds nothing else.
        record: all that the values depend on, as plain values.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]):
        self.folder, self.record = folder, dict(record)
        self.identity = identity(record)

    def prepare(self, resume: bool) -> None:
        """Make the folder ready.

        The settings are written first and removed last, so that all files beside them are theirs.

        Raises:
            ValueError: batches of other settings (``resume``).
            FileExistsError: a folder of other files.
        """
        check_links(self.folder.parent.parent, [self.folder.parent.name])
        check_links(self.folder.parent, [self.folder.name])
        path = self.folder / _SETTINGS
        if resume and path.is_file():
            before = present_names(serialization.read_config(path))
            del before["format"]
            check_unchanged(self.folder, before, self.record)
            return
        if not path.is_file():
            check_free(self.folder, "an evaluation")
        remove(self.folder, _OURS.fullmatch)
        serialization.write_config(path, self.record)

    def write(self, number: int, indices: range, result: LogLikelihood) -> None:
        """Save the result of a batch, whole or not at all."""
        result.save(self._path(number), seal=seal(result, *self._facts(indices)))

    def read(self, batches: Mapping[int, range]) -> dict[int, LogLikelihood]:
        """The results that are there and belong to these samples of this evaluation."""
        results = {
            number: read_sealed(self._path(number), *self._facts(indices))
            for number, indices in batches.items()
        }
        return {number: result for number, result in results.items() if result is not None}

    def remove(self) -> None:
        """Remove all files of this evaluation, and folders that are then empty."""
        remove(self.folder, lambda name: name == _SETTINGS or _OURS.fullmatch(name))
        remove(self.folder.parent, lambda name: False)

    def _facts(self, indices: range) -> tuple[object, ...]:
        return self.identity, indices.start, indices.stop

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.nc"
