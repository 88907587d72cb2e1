"""Data sets by name or from a file, checked, split and in model units.

>>> from pyrodiff.data import load
>>> load("digits")
DataSet('digits', 1150/147/500 of (1, 8, 8), 17 levels)

=================================  ================================================================
source                             data
=================================  ================================================================
``"digits"``                       scikit-learn's digits, 17 levels
``"mixture"``, ``"checkerboard"``  plane densities drawn from the seed; ``log_prob`` is exact
``"moons"``                        likewise; ``log_prob`` is a quadrature
``.npy``, ``.npz``                 arrays (N,), (N, d), (N, H, W), (N, H, W, C), (N, C, H, W)
``.csv``, ``.csv.gz``              tables of numbers
``.parquet``                       likewise, with ``pip install 'pyrodiff[parquet]'``
a folder                           images of one size and mode, 256 levels
=================================  ================================================================

Integer arrays of at least three axes are discrete, everything else is continuous unless ``levels``
is given. Files are not trusted: see ``pyrodiff.data.files``.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pyrodiff.checks import short
from pyrodiff.data.arrays import read_npy, read_npz
from pyrodiff.data.dataset import Affine, DataSet
from pyrodiff.data.files import MAX_BYTES, Context
from pyrodiff.data.images import read_folder
from pyrodiff.data.named import NAMES, MixtureParameters, digits, mixture_parameters, plane
from pyrodiff.data.prepare import Source, prepare
from pyrodiff.data.tables import read_csv, read_parquet

__all__ = [
    "MAX_BYTES",
    "NAMES",
    "Affine",
    "DataSet",
    "MixtureParameters",
    "load",
    "mixture_parameters",
]


def load(
    source: str | Path,
    *,
    seed: int = 0,
    num_samples: int | None = None,
    standardize: bool = True,
    levels: int | None = None,
    context: Context | None = None,
    key: str | None = None,
) -> DataSet:
    """A data set by name (one of ``NAMES``) or from a path.

    A string that is a name means the named set; ``Path("digits")`` or ``"./digits"`` is the folder.
    Files and folders without splits of their own are split 80/10/10 by the seed; of those with
    train and test alone, a tenth of train becomes the validation split.

    Args:
        source: a name, or the path of a ``.npy``, ``.npz``, ``.csv``, ``.csv.gz`` or ``.parquet``
            file or of a folder of images.
        seed: for the points of a plane density and for random splits; 0 to 2**32 - 1. The split of
            "digits" is fixed.
        num_samples: total number of points of a plane density; default 10,000.
        standardize: whether continuous data are standardised to mean 0 and standard deviation 1 per
            column or pixel of the train split.  Discrete data always go to the grid.
        levels: makes the data of a file discrete, integers 0 to levels - 1; for integer arrays of
            three axes or more, and images, 256 is the default (2 for Boolean arrays).
        context: what the model is conditioned on, as given, never standardised. "label" for
            "digits"; names or positions of columns for tables; for ``.npz`` the key of an array
            (whose splits are key_train, ...). Integer labels of one axis are made one-hot.
        key: the array of a ``.npz`` file that has several.

    Raises:
        ValueError: for an unknown name, an option that the source does not have, a file that cannot
            be read or is not trusted, and data that ``pyrodiff.data.prepare`` refuses.
        FileNotFoundError: if the path does not exist.
        ImportError: for ``.parquet`` without pyarrow.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"Expected a seed from 0 to 2**32 - 1; got {seed}.")
    if isinstance(source, str) and source in NAMES:
        _refuse_options(source, levels=levels, key=key)
        if source == "digits":
            _refuse_options(source, num_samples=num_samples)
            return prepare(digits(context if context is None else str(context)), levels=17)
        _refuse_options(source, context=context)
        drawn, log_prob = plane(source, seed, num_samples)
        return prepare(drawn, standardize=standardize, log_prob=log_prob)
    _refuse_options("a file", num_samples=num_samples)
    path = _existing(source)
    try:
        content = _read(path, context, key)
        return prepare(content, seed=seed, standardize=standardize, levels=levels)
    except MemoryError as error:
        raise ValueError(
            f"Expected data that fit into memory; got {path}, which do not."
        ) from error


def _refuse_options(source: str, **options: object) -> None:
    """Refuse options that would have no effect."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"Expected no {name}= for {source!r}; got {name}={short(value)}.")


def _existing(source: str | Path) -> Path:
    """The path, if it exists.

    Raises:
        ValueError: a string that looks like a name.
        FileNotFoundError: any other that does not exist.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and path.name == source and not path.suffix:
        near = get_close_matches(source.lower(), NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"Expected one of {', '.join(NAMES)}, or a path; got {short(source)}{hint}"
        )
    raise FileNotFoundError(f"Expected a file or folder; got {path}, which does not exist.")


def _read(path: Path, context: Context | None, key: str | None) -> Source:
    """Read a path by its ending."""
    ending = path.name.lower()
    if path.is_file() and ending.endswith(".npz"):
        return read_npz(path, context, key)
    _refuse_options(path.name, key=key)
    if path.is_dir():
        _refuse_options(path.name, context=context)
        return read_folder(path)
    if ending.endswith(".npy"):
        return read_npy(path, context)
    if ending.endswith((".csv", ".csv.gz")):
        return read_csv(path, context)
    if ending.endswith(".parquet"):
        return read_parquet(path, context)
    raise ValueError(
        "Expected a .npy, .npz, .csv, .csv.gz or .parquet file or a folder of images; "
        f"got {short(path.name)}."
    )
