"""The result of every estimator: means and their errors, intervals, joins and the file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrodiff.likelihood import LogLikelihood

F64 = torch.float64


def by_hand(terms: bool = True) -> LogLikelihood:
    value = torch.tensor([-3.0, -5.0, -7.0], dtype=F64)
    error = torch.tensor([0.3, 0.0, 0.4], dtype=F64)
    parts = (-torch.arange(6.0, dtype=F64).reshape(3, 2), torch.tensor([1.0, 2.5], dtype=F64))
    calls = torch.full((3,), 8)
    return LogLikelihood(
        value, error, "lower bound", calls, 4, "by hand", *(parts if terms else ())
    )


def test_mean_and_bits_by_hand() -> None:
    value, between, monte_carlo = by_hand().mean()
    assert value == -5.0
    assert between == pytest.approx(2 / math.sqrt(3), rel=1e-12)
    assert monte_carlo == pytest.approx(0.5 / 3, rel=1e-12)
    unit = 4 * math.log(2)
    assert tuple(by_hand().bits_per_dim()) == pytest.approx(
        (5 / unit, between / unit, monte_carlo / unit), rel=1e-12
    )


def test_one_sample_has_no_spread() -> None:
    one = LogLikelihood(
        torch.tensor([-2.0]), torch.tensor([0.1]), "estimate", torch.ones(1), 1, "by hand"
    )
    assert math.isnan(one.mean().between_samples)
    assert one.mean().monte_carlo == pytest.approx(0.1)


def test_offset_moves_values_alone() -> None:
    moved = by_hand() + 2.5
    assert torch.equal(moved.value, by_hand().value + 2.5)
    assert torch.equal(moved.std_error, by_hand().std_error)
    assert moved.terms is not None and torch.equal(moved.terms, by_hand().terms)


def test_means_leave_out_values_that_are_not_finite() -> None:
    value = torch.tensor([-3.0, torch.nan, -5.0, -7.0], dtype=F64)
    with pytest.warns(UserWarning, match="NaN or infinity for 1 of 4 samples"):
        mean = replace(by_hand(False), value=value, std_error=torch.full((4,), 0.3)).mean()
    assert mean.value == -5.0
    assert mean.between_samples == pytest.approx(2 / math.sqrt(3), rel=1e-12)
    assert mean.monte_carlo == pytest.approx(0.3 / math.sqrt(3), rel=1e-6)


def test_skewness_goes_with_its_sample(tmp_path: Path) -> None:
    """Into selections, joins and files: an interval is that of the sample in any of them."""
    skewness = torch.tensor([0.5, -0.2, 1.0], dtype=F64)
    whole = replace(by_hand(), skewness=skewness, degrees_of_freedom=torch.full((3,), 5.0))
    parts = [whole.select([2]), whole.select(slice(0, 2))]
    joined = LogLikelihood.concatenate(parts)
    whole.save(tmp_path / "result.nc")
    back = LogLikelihood.load(tmp_path / "result.nc")
    for end in (0, 1):
        expected = whole.interval()[end]
        assert torch.equal(joined.interval()[end], expected[[2, 0, 1]])
        assert torch.equal(back.interval()[end], expected)
        assert float(parts[0].interval()[end]) == float(expected[2])
    assert not torch.equal(replace(whole, skewness=None).interval()[0], whole.interval()[0])


def test_a_join_is_unbiased_where_all_parts_are() -> None:
    unbiased = replace(by_hand(), unbiased_weights=True)
    assert LogLikelihood.concatenate([unbiased, unbiased]).unbiased_weights
    assert not LogLikelihood.concatenate([unbiased, by_hand()]).unbiased_weights


@pytest.mark.parametrize("terms", [True, False])
def test_file_round_trip(tmp_path: Path, terms: bool) -> None:
    path, result = tmp_path / "result.nc", by_hand(terms)
    result.save(path, split="test", seed=3)
    back = LogLikelihood.load(path)
    for name in ("kind", "network_evaluations", "dimensions", "estimator"):
        assert getattr(back, name) == getattr(result, name)
    for name in ("value", "std_error", "terms", "timesteps"):
        old, new = getattr(result, name), getattr(back, name)
        assert (old is None and new is None) or torch.equal(old, new)
    assert (back.terms is None) == (not terms)
    assert [file.name for file in tmp_path.iterdir()] == ["result.nc"]
    held = result.to_dataset(split="test").attrs
    assert held["split"] == "test" and held["units"] == "nats"


def test_unknown_errors_stay_unknown_in_a_file(tmp_path: Path) -> None:
    result = replace(by_hand(), std_error=torch.full((3,), torch.nan, dtype=F64))
    result.save(tmp_path / "result.nc")
    back = LogLikelihood.load(tmp_path / "result.nc")
    assert bool(back.std_error.isnan().all()) and torch.equal(back.value, result.value)
    assert math.isnan(back.mean().monte_carlo) and math.isfinite(back.mean().between_samples)


def test_remarks_are_joined_once_each_and_kept_in_a_file(tmp_path: Path) -> None:
    parts = [replace(by_hand(), remarks=text) for text in ("few", "", "heavy\nfew", "heavy")]
    joined = LogLikelihood.concatenate(parts)
    assert joined.remarks == "few\nheavy"
    joined.save(tmp_path / "result.nc")
    assert LogLikelihood.load(tmp_path / "result.nc").remarks == "few\nheavy"
    by_hand().save(tmp_path / "plain.nc")
    assert LogLikelihood.load(tmp_path / "plain.nc").remarks == ""


def test_files_from_before_remarks_still_load(tmp_path: Path) -> None:
    dataset = by_hand().to_dataset()
    del dataset.attrs["remarks"]
    dataset.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    assert LogLikelihood.load(tmp_path / "old.nc").remarks == ""


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a file .*none.nc; got nothing there"):
        LogLikelihood.load(tmp_path / "none.nc")


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    dataset = by_hand().to_dataset()
    del dataset.attrs["shared_calls"]
    dataset.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="old.nc what this version .* without 'shared_calls'"):
        LogLikelihood.load(tmp_path / "old.nc")
