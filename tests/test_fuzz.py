"""Files that are damaged or hostile: a right value or our own error, in bounded time and memory.

``make fuzz`` runs many more cases than these; FUZZ_CASES sets the number.
"""

import os
from collections.abc import Iterator
from random import Random

import pytest
from fuzzing.targets import TARGETS, Target
from fuzzing.worker import Worker, supported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
_TOTAL = sum(target.share for target in TARGETS.values())

pytestmark = pytest.mark.skipif(not supported(), reason="address-space limits are Linux's")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


@pytest.fixture
def worker(target: Target) -> Iterator[Worker]:
    worker = Worker(target.read)
    yield worker
    worker.close()


def test_valid_files_are_right(target: Target, worker: Worker) -> None:
    for files in target.valid():
        outcome = worker.run(files)
        assert outcome.kind == "right", outcome.detail


def test_no_file_does_harm(target: Target, worker: Worker) -> None:
    variants = target.valid()

    def check(random: Random) -> None:
        files = target.change(dict(random.choice(variants)), random)
        outcome = worker.run(files)
        assert outcome.allowed, f"{outcome.kind}\n{outcome.detail}"

    options = settings(
        max_examples=max(1, round(CASES * target.share / _TOTAL)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(st.randoms(use_true_random=False))(check))()
