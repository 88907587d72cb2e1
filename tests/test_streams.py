"""Noise streams: a function of (seed, index) alone, and standard normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrodiff import streams
from pyrodiff.streams import NoiseStreams

EVENT = torch.Size((2, 3))
LIKE = torch.zeros((), dtype=torch.float64)


def take(seed: int, indices: list[int], draws: int, event: torch.Size = EVENT) -> Tensor:
    """Shape (draws, len(indices), *event)."""
    source = NoiseStreams(seed, indices, event)
    return torch.stack([source.normal(LIKE) for _ in range(draws)])


def test_values_depend_on_seed_and_index_alone() -> None:
    together = take(7, [0, 1, 2, 3, 4], 5)
    assert together.shape == (5, 5, 2, 3)
    for i in range(5):
        assert torch.equal(take(7, [i], 5)[:, 0], together[:, i])
    assert torch.equal(take(7, [4, 0, 2], 5), together[:, [4, 0, 2]])


@pytest.mark.parametrize("path", [0, 5])
def test_values_are_those_of_philox(path: int) -> None:
    """Pinned to the documented generator and transform: old runs stay reproducible."""
    bits = np.random.Philox(key=np.array([7, 3], dtype=np.uint64), counter=[0, 0, 0, path])
    expected = []
    for _ in range(4):
        words = [int(word) for word in bits.random_raw(3)]
        integers = [part for word in words for part in (word % 2**32, word // 2**32)]
        signed = [(value + 2**31) % 2**32 - 2**31 for value in integers]
        radius = [math.sqrt(-2 * math.log((abs(a) + 0.5) / 2**31)) for a in signed[:3]]
        angle = [math.pi * b / 2**31 for b in signed[3:]]
        cosines = [r * math.cos(v) for r, v in zip(radius, angle, strict=True)]
        sines = [r * math.sin(v) for r, v in zip(radius, angle, strict=True)]
        expected.append(torch.tensor(cosines + sines, dtype=torch.float64).reshape(2, 3))
    source = NoiseStreams(7, [3], EVENT, [path])
    found = torch.stack([source.normal(LIKE)[0] for _ in range(4)])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("values", [1, 5, 13, 60, 10_000])
def test_block_length_changes_nothing(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = take(1, [0, 5], 23)
    monkeypatch.setattr(streams, "_BLOCK_VALUES", values)
    assert torch.equal(take(1, [0, 5], 23), whole)


def test_global_generators_are_neither_read_nor_moved() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1]
    first = take(0, [0], 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(99)
    assert torch.equal(take(0, [0], 3), first)


def test_streams_differ() -> None:
    """Across seeds, indices (also exchanged for one another) and draws."""
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63, 0), (2**64 - 1, 2**40)]
    rows = torch.cat([take(seed, [index], 3)[:, 0].flatten(1) for seed, index in keys])
    assert len(rows.unique(dim=0)) == 3 * len(keys)


def test_moments_and_independence() -> None:
    """n = 240,000 values: five bounds at 4.5 standard errors, 4e-5 failures were seeds random."""
    values = take(3, list(range(1000)), 40)
    n = values.numel()
    mean, square, fourth = (float((values**k).mean()) for k in (1, 2, 4))
    assert abs(mean) < 4.5 * math.sqrt(1 / n)
    assert abs(square - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(fourth - 3) < 4.5 * math.sqrt(96 / n)
    between_draws = float((values[1:] * values[:-1]).mean())
    between_streams = float((values[:, 1:] * values[:, :-1]).mean())
    assert abs(between_draws) < 4.5 / math.sqrt(values[1:].numel())
    assert abs(between_streams) < 4.5 / math.sqrt(values[:, 1:].numel())


def test_dtype_follows_and_only_rounds() -> None:
    exact = NoiseStreams(2, [0, 1], EVENT).normal(LIKE)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = NoiseStreams(2, [0, 1], EVENT).normal(torch.zeros((), dtype=dtype))
        assert rounded.dtype == dtype
        resolution = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(rounded.double(), exact, rtol=resolution, atol=resolution)


def test_extreme_words_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """|a| = 0 and |a| = 2³¹ are the ends of the radius: about 6.7 and 0."""
    words = np.array([0x8000000080000000, 0, 0xFFFFFFFFFFFFFFFF, 0x7FFFFFFF7FFFFFFF], np.uint64)

    class Bits:
        def random_raw(self, count: int) -> np.ndarray:
            return np.resize(words, count)

    monkeypatch.setattr(streams, "_generator", lambda *_: Bits())
    for dtype in (torch.float32, torch.float64):
        found = NoiseStreams(0, [0], torch.Size([8])).normal(torch.zeros((), dtype=dtype))
        assert bool(found.isfinite().all()) and 6 < float(found.abs().max()) < 7


def test_odd_sizes_take_whole_words() -> None:
    odd = torch.Size([3])
    assert take(0, [1], 2, odd).shape == (2, 1, 3)
    assert torch.equal(take(0, [1], 2, odd)[0, 0, :2], take(0, [1], 1, torch.Size([4]))[0, 0, :2])


def test_paths_are_streams_of_their_own() -> None:
    source = NoiseStreams(3, [4, 4, 5], EVENT, [0, 1, 1])
    found = source.normal(LIKE)
    assert torch.equal(found[0], take(3, [4], 1)[0, 0])
    assert len(found.flatten(1).unique(dim=0)) == 3
    with pytest.raises(ValueError, match="Expected 2 paths, one per index; got 1"):
        NoiseStreams(3, [4, 5], EVENT, [0])


def test_a_draw_is_not_overwritten_by_the_next() -> None:
    source = NoiseStreams(0, [0], EVENT)
    first = source.normal(LIKE)
    kept = first.clone()
    source.normal(LIKE)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed in \[0, 2\*\*64\)"):
        NoiseStreams(seed, [0], EVENT)
