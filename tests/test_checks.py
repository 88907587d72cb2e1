"""Checks of plain values, and names that classes had before."""

import inspect
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest

from pyrodiff.checks import check_choice, check_count, check_positive, renamed


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_counts_are_integers_of_at_least_so_many(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected paths to be an integer >= 1; got .*\."):
        check_count("paths", value)
    check_count("paths", 1)
    check_count("levels", 2, 2)
    with pytest.raises(ValueError, match="levels to be an integer >= 2; got 1"):
        check_count("levels", 1, 2)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_positive_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="Expected scale to be positive and finite; got"):
        check_positive("scale", value)
    check_positive("scale", 1e-300)


def test_choices_propose_the_nearest() -> None:
    check_choice("order", "noising", ("denoising", "noising"))
    with pytest.raises(ValueError, match=r"Expected order to be one of .*; got 'nosing'; did you"):
        check_choice("order", "nosing", ("denoising", "noising"))
    with pytest.raises(ValueError, match=r"got 'x'\.$"):
        check_choice("order", "x", ("denoising", "noising"))


@renamed(evaluations="calls")
@dataclass(frozen=True)
class Budget:
    calls: int = 3
    seed: int = 0


def test_former_names_of_parameters_keep_working() -> None:
    assert Budget(evaluations=5, seed=1) == Budget(5, 1) == Budget(calls=5, seed=1)  # type: ignore[call-arg]
    assert Budget(7).evaluations == 7  # type: ignore[attr-defined]
    assert repr(replace(Budget(), calls=4)) == "Budget(calls=4, seed=0)"
    assert list(inspect.signature(Budget).parameters) == ["calls", "seed"]
    with pytest.raises(FrozenInstanceError):
        Budget().evaluations = 5  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="Expected calls once; got it as evaluations"):
        Budget(calls=1, evaluations=1)  # type: ignore[call-arg]
