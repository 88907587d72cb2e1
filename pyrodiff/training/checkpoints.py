"""Checkpoints of a training: written whole or not at all; when read, checked and never executed.

best.ckpt        after the validation with the least bound
last.ckpt        after the last validation
previous.ckpt    after the one before

A checkpoint is an uncompressed zip archive of tensors and plain values.  PyTorch ignores its
checksums; here they are compared before anything is read.  Each of the three holds all that is
needed to resume the training, which takes the newest that is sound.
"""

import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from pyrodiff.checks import reason, short
from pyrodiff.serialization.files import named, write_bytes

__all__ = [
    "BEST",
    "LAST",
    "PREVIOUS",
    "DurableCheckpoints",
    "first_sound",
    "make_room",
    "read_checkpoint",
]

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
_STATES = ("state_dict", "current_model_state")  # averaged weights, and those that are trained
_KINDS: dict[str, type] = dict.fromkeys((*_STATES, "averaging_state", "loops", "callbacks"), dict)
_KINDS |= {"optimizer_states": list, "lr_schedulers": list, "running_loss": float}


class DurableCheckpoints(TorchCheckpointIO):
    """Writes and reads checkpoints for Lightning."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write beside the target, flush, move into place."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_bytes(Path(path), content.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See ``read_checkpoint``."""
        return read_checkpoint(Path(path))


def make_room(folder: Path) -> None:
    """Make ``last.ckpt`` the previous one; at every moment one of the two exists."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as tensors and plain values; anything else is refused, unexecuted.

    Raises:
        FileNotFoundError: no such file.
        OSError: the disk cannot read it, which does not mean that the checkpoint is damaged.
        ValueError: damaged, truncated, or not such a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint {path}; got nothing there.")
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:  # of the disk: the checkpoint itself may be sound
        raise named(error, path) from error
    try:
        _check_archive(content)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"Expected a training checkpoint in {path}; got another kind of file.")
    return checkpoint


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Expected a checkpoint of tensors and plain values in {path}; got {reason(error)}"
    )


def _check_archive(content: io.BytesIO) -> None:
    """Compare every checksum; raise BadZipFile or ValueError."""
    with zipfile.ZipFile(content) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries, which no checkpoint has.")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"a damaged entry {short(damaged)} (its checksum differs).")
    content.seek(0)


def first_sound(folder: Path, names: tuple[str, ...], expected: dict[str, Tensor]) -> Path | None:
    """The first sound checkpoint, or None where there is none at all; warns of damaged ones.

    Args:
        folder: of the checkpoints.
        names: of the files, the preferred one first.
        expected: the state of the module, whose names and shapes the checkpoint's must have.

    Raises:
        OSError: a checkpoint that the disk cannot read; no other is taken in its place.
        ValueError: checkpoints none of which is sound; the message is that of the first.
    """
    reasons: list[ValueError] = []
    for path in (folder / name for name in names):
        if not path.is_file():
            continue
        try:
            _check_contents(path, read_checkpoint(path), expected)
        except ValueError as error:
            reasons.append(error)
            continue
        if reasons:
            warnings.warn(f"{reasons[0]} {path.name} is taken instead.", stacklevel=2)
        return path
    if reasons:
        raise reasons[0]
    return None


def _check_contents(path: Path, checkpoint: dict[str, Any], expected: dict[str, Tensor]) -> None:
    for key, kind in _KINDS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(
                f"Expected a checkpoint of this library in {path}; got {key} of type "
                f"{type(checkpoint.get(key)).__name__}."
            )
    for key in _STATES:
        shapes, got = _shapes(expected), _shapes(checkpoint[key])
        if wrong := [n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n)]:
            name = min(wrong, key=str)
            raise ValueError(
                f"Expected a checkpoint of this model in {path}; {len(wrong)} tensors of its {key} "
                f"differ, the first {short(name)}: expected {shapes.get(name)}; "
                f"got {got.get(name)}."
            )


def _shapes(state: dict[Any, Any]) -> dict[Any, tuple[int, ...] | None]:
    return {
        name: tuple(value.shape)
        if isinstance(value, Tensor) and value.layout == torch.strided
        else None
        for name, value in state.items()
    }
