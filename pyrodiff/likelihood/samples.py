"""Whose values these are, and of which samples: results are compared only where both are known.

Every result of an estimator identifies its samples by a checksum of each (with its context) and by
their indices in the data set, and its model by a checksum.  A result made by hand, or read from an
older file, may have neither; its samples are then assumed to be the same, and a note says so.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrodiff.likelihood.estimates import Estimates

__all__ = ["check_samples", "same_model", "sample_checksums"]

_WHAT = {"checksums": "data", "indices": "indices"}


def sample_checksums(x_0: Tensor, context: Tensor | None = None) -> Tensor:
    """A checksum of each sample and its context, int64, shape (N,).

    Taken of the values as float32, so that models of different precision agree on their samples.

    Args:
        x_0: shape (N, …), in the units of the model.
        context: shape (N, …) or None.
    """
    parts = [x_0] if context is None else [x_0, context]
    rows = [(part.detach().cpu().float() + 0.0).contiguous().numpy() for part in parts]  # no −0
    digests = [
        hashlib.blake2b(b"".join(row[i].tobytes() for row in rows), digest_size=8).digest()
        for i in range(len(x_0))
    ]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def same_model(one: Estimates, other: Estimates) -> bool:
    """Whether both are of one trained model; by their values where a checksum is missing."""
    if one.model and other.model:
        return one.model == other.model
    return torch.equal(one.value, other.value)


def check_samples(results: Sequence[tuple[str, Estimates]]) -> tuple[str, ...]:
    """Check that results are of the same samples; return notes on what cannot be checked.

    Args:
        results: each with a name for messages: its model's, or its position in a list.

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


def _check_pair(one: tuple[str, Estimates], other: tuple[str, Estimates]) -> None:
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


def _indices(one: Estimates, other: Estimates, place: int) -> str:
    if one.indices is None or other.indices is None:
        return ""
    return f" (indices {int(one.indices[place])} and {int(other.indices[place])})"
