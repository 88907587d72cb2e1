"""``.csv``, ``.csv.gz`` and ``.parquet`` files: tables of numbers, with the names of columns."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from pyrodiff.checks import short
from pyrodiff.data.files import Array, Context, FileSizeError, check_bytes, unreadable
from pyrodiff.data.prepare import Source, take_columns

__all__ = ["read_csv", "read_parquet"]

_BROKEN_TEXT = (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError)


def read_csv(path: Path, context: Context | None = None) -> Source:
    """A table of numbers from a ``.csv`` or ``.csv.gz`` file, UTF-8, separated by commas.

    The first row is a header if none of its fields is a number, or if it counts 0, 1, 2, ... as
    pandas writes it for unnamed columns.

    Raises:
        ValueError: for a cell that is no number, a row of another length, or a header with an
            empty or repeated name, each with its row and column; for a file that cannot be read.
    """
    try:
        names, has_header = _read_header(path)
        values = _parse_csv(path, names, has_header)
    except _BROKEN_TEXT as error:
        raise unreadable(path, "a .csv file that is whole", error) from error
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    source = Source(name=name, arrays={"all": values}, columns=tuple(names))
    return source if context is None else take_columns(source, context)


def read_parquet(path: Path, context: Context | None = None) -> Source:
    """A table of numbers from a ``.parquet`` file; an empty cell counts as NaN.

    Raises:
        ImportError: if pyarrow, the extra ``parquet``, is not installed.
        ValueError: for a column that is not numeric, a file that cannot be read or is too large.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "Expected pyarrow for .parquet files; got none: pip install 'pyrodiff[parquet]'."
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for field in schema:
                if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
                    raise TypeError(
                        f"column {short(field.name)} of type {short(str(field.type))[1:-1]}"
                    )
            check_bytes(8 * file.metadata.num_rows * len(schema), path)
            table = file.read(use_threads=False)
        columns = [np.asarray(column.to_numpy(), dtype=np.float64) for column in table.columns]
    except TypeError as error:
        raise ValueError(f"Expected numeric columns in {path}; got {error}.") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "a .parquet file that is whole", error) from error
    if not columns:
        raise ValueError(f"Expected numeric columns in {path}; got none.")
    values = np.stack(columns, axis=1)
    source = Source(name=path.stem, arrays={"all": values}, columns=tuple(table.column_names))
    return source if context is None else take_columns(source, context)


class _BoundedGzip(gzip.GzipFile):
    """A gzip stream that stops at MAX_BYTES: gzip declares its size only modulo 4 GiB."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        check_bytes(self.tell(), self.name)
        return data

    def read1(self, size: int = -1) -> bytes:
        data = super().read1(size)
        check_bytes(self.tell(), self.name)
        return data


def _open_text(path: Path) -> io.TextIOWrapper:
    """A .csv or .csv.gz file as UTF-8 text."""
    check_bytes(path.stat().st_size, path)
    binary = _BoundedGzip(path) if path.suffix.lower() == ".gz" else path.open("rb")
    return io.TextIOWrapper(cast(IO[bytes], binary), encoding="utf-8-sig", newline="")


def _rows(text: io.TextIOWrapper) -> Iterator[list[str]]:
    """The rows that are not blank."""
    return (row for row in csv.reader(text) if row)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _read_header(path: Path) -> tuple[list[str], bool]:
    """The names of the columns, and whether the file itself gives them."""
    with _open_text(path) as text:
        first = [field.strip() for field in next(_rows(text), [])]
    counted = [str(i) for i in range(len(first))]
    numbers = [_is_number(field) for field in first]
    if not first:
        raise ValueError(f"Expected rows of numbers; got none in {path}.")
    if all(numbers):
        return counted, first == counted and len(first) > 1
    if any(numbers):
        column = numbers.index(False)
        raise ValueError(
            f"Expected a first row of names alone or of numbers alone in {path}; got "
            f"{short(first[column])} in column {column} beside the number "
            f"{first[numbers.index(True)][:80]}."
        )
    if "" in first or len(set(first)) < len(first):
        column = next(i for i, name in enumerate(first) if not name or name in first[:i])
        raise ValueError(
            f"Expected a name of its own for every column of {path}; got {short(first[column])} "
            f"for column {column} (pandas writes row numbers there unless told index=False)."
        )
    return first, True


def _parse_csv(path: Path, names: Sequence[str], has_header: bool) -> Array:
    """The values (N, d), float64, parsed by pandas to the last bit."""
    import pandas as pd

    with _open_text(path) as text:
        if has_header:
            next(_rows(text))
        try:
            frame = pd.read_csv(
                text,
                header=None,
                dtype=np.float64,
                low_memory=False,
                **_exact_floats(pd.__version__),
            )
        except pd.errors.EmptyDataError:
            return np.empty((0, len(names)))
        except (UnicodeDecodeError, FileSizeError):
            raise
        except (ValueError, OverflowError) as error:
            _explain_csv(path, names, has_header)
            raise unreadable(path, "a table of numbers", error) from error
    values = np.asarray(frame.to_numpy(), dtype=np.float64)
    if values.shape[1] != len(names) or np.isnan(values).any():
        _explain_csv(path, names, has_header)
    return values


def _exact_floats(version: str) -> dict[str, Any]:
    """The option for correctly rounded numbers, which is the only way since pandas 3.1."""
    major, minor = version.split(".")[:2]
    return {} if (int(major), int(minor)) >= (3, 1) else {"float_precision": "round_trip"}


def _explain_csv(path: Path, names: Sequence[str], has_header: bool) -> None:
    """Raise for the first row of another length or field that is no number, if there is one."""
    with _open_text(path) as text:
        rows = _rows(text)
        if has_header:
            next(rows)
        for number, row in enumerate(rows):
            if len(row) != len(names):
                raise ValueError(
                    f"Expected {len(names)} fields in every row of {path}; "
                    f"got {len(row)} in row {number}."
                )
            for name, field in zip(names, row, strict=True):
                if not _is_number(field):
                    raise ValueError(
                        f"Expected numbers alone in {path}; "
                        f"got {short(field)} in row {number}, column {short(name)}."
                    )
