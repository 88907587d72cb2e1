"""What every test shares: shape checks on all of pyrodiff, one thread, a seed, a clean Pyro.

The import hook has to be in place before any module of pyrodiff is imported: from then on beartype
checks jaxtyping's annotations, and all others, whenever a function of pyrodiff is called.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype
from typing_extensions import Self

if any(name.partition(".")[0] == "pyrodiff" for name in sys.modules):
    raise RuntimeError("Expected tests/conftest.py to run before pyrodiff is imported")

# As static type checkers have it, an int is a float, and the files of a zip archive are IO[bytes].
# `Self` means nothing to a checker that sees one method at a time.
_RULES = BeartypeConf(
    is_pep484_tower=True, hint_overrides=FrozenDict({IO[bytes]: io.IOBase, Self: object})
)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked at every call."""
    return beartype(conf=_RULES)(function)


jaxtyping.install_import_hook("pyrodiff", f"{__name__}.checked")

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SEED = 0

# Tests of numbers, which have to pass in the arithmetic of every processor:
# `ATEN_CPU_CAPABILITY=default pytest -m numeric` takes PyTorch's plainest.
NUMERIC = {
    *("schedules", "kernels", "decoders", "variances", "denoisers", "chains", "streams", "vae"),
    *("objectives", "timesteps", "precision", "finite", "networks", "oracles", "likelihood"),
    *("termwise", "termwise_parts", "importance", "particle", "probability_flow", "sandwich"),
    "dequantization",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of numbers."""
    for item in items:
        if item.path.stem.removeprefix("test_") in NUMERIC:
            item.add_marker(pytest.mark.numeric)


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Seed all generators, empty Pyro's parameter store, and leave no state to the next test."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.set_num_threads(1)  # on small networks more threads cost 10 to 50 times the work
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture
def seed() -> int:
    """The seed of the test's generators, for code that takes one."""
    return SEED
