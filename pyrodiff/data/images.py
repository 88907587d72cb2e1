"""Folders of images: one size, one mode, 8 bits a channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyrodiff.data.files import Array, check_bytes, unreadable
from pyrodiff.data.prepare import Source

__all__ = ["read_folder"]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


def read_folder(path: Path) -> Source:
    """The images of a folder in the order of their names, as uint8 (N, H, W) or (N, H, W, 3).

    If the folder has subfolders train and test, and perhaps validation (or valid, val), these are
    the splits. Files whose endings are not those of images are skipped.

    Raises:
        ValueError: for a folder without images; for the first file that cannot be read, has more
            than one frame, is neither 8-bit grayscale (L) nor RGB, or differs from the first file.
    """
    folders = {"all": path}
    if (path / "train").is_dir() and (path / "test").is_dir():
        folders = {"train": path / "train", "test": path / "test"}
        for name in ("validation", "valid", "val"):
            if (path / name).is_dir():
                folders.setdefault("validation", path / name)
    files = {split: _list_images(folder) for split, folder in folders.items()}
    shape = _check_headers([file for split in files.values() for file in split])
    arrays = {split: _decode(images, shape) for split, images in files.items()}
    return Source(name=path.resolve().name, arrays=arrays)


def _list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; hidden files and subfolders are skipped."""
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise ValueError(
            f"Expected images ({', '.join(SUFFIXES)}) in {folder}; got none "
            "(subfolders other than train, test and validation are not searched)."
        )
    return files


def _check_headers(files: Sequence[Path]) -> tuple[int, ...]:
    """The common shape (H, W) or (H, W, 3), from the headers alone: nothing is decoded yet."""
    from PIL import Image

    first: tuple[tuple[int, int], str] | None = None
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                kind = (image.size, image.mode)
                frames = getattr(image, "n_frames", 1)
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise unreadable(file, "an image that is whole", error) from error
        if kind[1] not in ("L", "RGB") or frames != 1:
            raise ValueError(
                "Expected one frame of mode L (8-bit grayscale) or RGB; "
                f"got {frames} of mode {kind[1]} in {file}."
            )
        first = first or kind
        if kind != first:
            raise ValueError(
                f"Expected images of one size and mode, {first[0]} {first[1]} as {files[0].name}; "
                f"got {kind[0]} {kind[1]} in {file}."
            )
    assert first is not None
    (width, height), mode = first
    shape = (height, width) if mode == "L" else (height, width, 3)
    check_bytes(len(files) * int(np.prod(shape)), files[0].parent)
    return shape


def _decode(files: Sequence[Path], shape: tuple[int, ...]) -> Array:
    """All images as one array (N, *shape), uint8."""
    from PIL import Image

    images = np.empty((len(files), *shape), dtype=np.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file, formats=FORMATS) as image:
                images[i] = np.asarray(image)
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise unreadable(file, "an image that is whole", error) from error
    return images
