"""Files that are damaged or hostile: a right value or our own error, in bounded time and memory.

``make fuzz`` runs many more cases than these; FUZZ_CASES sets the number.
"""

import os
from collections.abc import Callable
from random import Random

import pytest
from fuzzing.targets import TARGETS
from fuzzing.worker import run, supported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
_TOTAL = sum(target.share for target in TARGETS.values())

pytestmark = pytest.mark.skipif(not supported(), reason="address-space limits are Linux's")


def case(name: str) -> Callable[[Random], None]:
    """The property of a target: every outcome is an allowed one."""
    target = TARGETS[name]
    variants = target.valid()

    def check(random: Random) -> None:
        files = target.change(dict(random.choice(variants)), random)
        outcome = run(target.read, files)
        assert outcome.allowed, f"{outcome.kind}\n{outcome.detail}"

    return check


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_right(name: str) -> None:
    for files in TARGETS[name].valid():
        outcome = run(TARGETS[name].read, files)
        assert outcome.kind == "right", outcome.detail


@pytest.mark.parametrize("name", TARGETS)
def test_no_file_does_harm(name: str) -> None:
    options = settings(
        max_examples=max(1, round(CASES * TARGETS[name].share / _TOTAL)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(st.randoms(use_true_random=False))(case(name)))()
