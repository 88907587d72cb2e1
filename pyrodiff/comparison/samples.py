"""Results are paired only where they are of the same samples, in the same order.

A result of an estimator knows its samples by a checksum of each and of its context, and by their
indices in the data set.  One made by hand or read from an older file may know neither; it is then
taken at its word, and that is said.
"""

from collections.abc import Sequence

import torch

from pyrodiff.likelihood import LogLikelihood

__all__ = ["check_samples"]

_WHAT = {"checksums": "data", "indices": "indices"}


def check_samples(results: Sequence[tuple[str, LogLikelihood]]) -> tuple[str, ...]:
    """Notes on what is not known of the samples.

    Args:
        results: with the name of the model or the place in a list that each belongs to.

    Raises:
        ValueError: results of different samples.
    """
    sizes = sorted({len(result.value) for _, result in results})
    if len(sizes) > 1:
        raise ValueError(f"Expected results of the same samples; got numbers: {sizes}.")
    dimensions = sorted({result.dimensions for _, result in results})
    if len(dimensions) > 1:
        raise ValueError(f"Expected results of the same samples; got dimensions: {dimensions}.")
    for place, one in enumerate(results):
        for other in results[:place]:
            _check_pair(other, one)
    unknown = [
        name for name, result in results if result.checksums is None and result.indices is None
    ]
    if not unknown:
        return ()
    names = ", ".join(dict.fromkeys(unknown))
    return (
        f"The results of {names} do not say which samples they are of; they are taken for the "
        "same ones, in the same order.",
    )


def _check_pair(one: tuple[str, LogLikelihood], other: tuple[str, LogLikelihood]) -> None:
    for name, what in _WHAT.items():
        first, second = getattr(one[1], name), getattr(other[1], name)
        if first is None or second is None:
            continue
        if len(first) != len(second):
            raise ValueError(
                f"Expected results of the same samples; got {len(first)} {name} of {one[0]} and "
                f"{len(second)} of {other[0]}."
            )
        if torch.equal(first, second):
            return
        places = (first != second).nonzero().flatten().tolist()
        raise ValueError(
            f"Expected results of the same samples; got other {what} of {one[0]} and {other[0]} "
            f"at {len(places)} of {len(first)} places, the first at {places[0]}"
            f"{_indices(one[1], other[1], places[0])}. Of samples that are the same in other "
            "units a result may leave out what it knows: "
            "dataclasses.replace(result, checksums=None, indices=None)."
        )


def _indices(one: LogLikelihood, other: LogLikelihood, place: int) -> str:
    if one.indices is None or other.indices is None:
        return ""
    return f" (indices {int(one.indices[place])} and {int(other.indices[place])})"
