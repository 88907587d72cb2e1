"""A model is hashed once while its weights stay as they are, and again after any change of them."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import PathBound
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.serialization import fingerprint


class Network(nn.Module):
    """Its first weight fills two rows of the table of bits, 8192 entries each, and part of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(200, 100)
        self.outer = nn.Linear(100, 2)
        self.register_buffer("table", torch.randn(20_001, dtype=torch.float16))
        self.strength = 1.0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.outer(self.inner(x.repeat(1, 100)))


def model() -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(4.0, -6.0), 3)
    return ReverseChain(NoiseDenoiser(Network()), forward, (2,))


def network(reverse: ReverseChain) -> Network:
    assert isinstance(reverse.denoiser.network, Network)
    return reverse.denoiser.network


def step(reverse: ReverseChain, **options: bool) -> None:
    optimizer = torch.optim.SGD(reverse.parameters(), lr=1e-3, **options)
    network(reverse)(torch.ones(1, 2), torch.ones(1)).sum().backward()
    optimizer.step()


def load(reverse: ReverseChain) -> None:
    reverse.load_state_dict({k: 2 * v for k, v in reverse.state_dict().items()})


def numpy_write(reverse: ReverseChain) -> None:
    network(reverse).inner.weight.detach().numpy()[3, 4] += np.float32(1e-6)


def exchange(first: int, second: int) -> Callable[[ReverseChain], None]:
    """Two weights change places, behind autograd's back: their sum and their set stay."""

    def change(reverse: ReverseChain) -> None:
        flat = network(reverse).inner.weight.data.view(-1)
        flat[[first, second]] = flat[[second, first]]

    return change


def opposite_signs(reverse: ReverseChain) -> None:
    flat = network(reverse).inner.weight.data.view(-1)
    first, second = int((flat > 0).nonzero()[0]), int((flat < 0).nonzero()[0])
    flat[[first, second]] *= -1


def last_bit(reverse: ReverseChain) -> None:
    network(reverse).get_buffer("table").data.view(torch.int16)[-1] ^= 1


def replace(reverse: ReverseChain) -> None:
    network(reverse).outer.bias = nn.Parameter(torch.ones(2))


def reverse_rows(reverse: ReverseChain) -> None:
    weight = network(reverse).inner.weight
    weight.data = weight.data.flip(0)


CHANGES: dict[str, Callable[[ReverseChain], object]] = {
    "an optimizer's step": step,
    "a fused optimizer's step": lambda reverse: step(reverse, fused=True),
    "load_state_dict": load,
    "a write through .data": lambda reverse: network(reverse).outer.bias.data.add_(1e-6),
    "a write through NumPy": numpy_write,
    "an exchange of neighbours": exchange(0, 1),
    "an exchange within a row": exchange(10, 1011),
    "an exchange within a column": exchange(6, 8198),
    "an exchange beyond the rows": exchange(16_390, 16_400),
    "two signs": opposite_signs,
    "one bit of a buffer of odd length": last_bit,
    "another parameter": replace,
    "rows in another order": reverse_rows,
    "an attribute": lambda reverse: setattr(network(reverse), "strength", 2.0),
    "another precision": lambda reverse: reverse.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    reverse = model()
    before = fingerprint(reverse)
    assert before == fingerprint(reverse) == fingerprint(copy.deepcopy(reverse))
    CHANGES[change](reverse)
    after = fingerprint(reverse)
    assert after and after != before
    assert after == fingerprint(copy.deepcopy(reverse))  # which was never hashed before


def test_versions_would_not_do() -> None:
    """Why bits are compared: these writes leave the counter and the address as they are."""
    for change in ("a write through .data", "a write through NumPy"):
        reverse = model()
        key = [(p._version, p.data_ptr()) for p in reverse.parameters()]
        CHANGES[change](reverse)
        assert key == [(p._version, p.data_ptr()) for p in reverse.parameters()]


def test_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[fingerprint.__module__]  # the package has the function under its name
    hashed: list[int] = []
    original = module._finish
    monkeypatch.setattr(module, "_finish", lambda *args: hashed.append(1) or original(*args))
    reverse, x_0 = model(), torch.zeros(3, 2)
    first, again = (PathBound().estimate(reverse, x_0, seed=seed) for seed in (0, 1))
    assert len(hashed) == 1 and first.model == again.model != ""
    network(reverse).inner.weight.data[0, 0] += 1
    assert PathBound().estimate(reverse, x_0).model != first.model and len(hashed) == 2


def test_a_change_that_is_undone_gives_the_first_checksum() -> None:
    reverse = model()
    first = fingerprint(reverse)
    exchange(0, 1)(reverse)
    assert fingerprint(reverse) != first
    exchange(0, 1)(reverse)
    assert fingerprint(reverse) == first


def test_tensors_at_odd_addresses_are_read() -> None:
    reverse = model()
    first, weight = fingerprint(reverse), network(reverse).inner.weight
    shifted = torch.empty(weight.numel() + 1)[1:]
    weight.data = shifted.copy_(weight.data.flatten()).view_as(weight)
    assert fingerprint(reverse) == first


def test_a_model_is_not_kept_alive() -> None:
    reverse = model()
    fingerprint(reverse)
    seen = weakref.ref(reverse)
    del reverse
    gc.collect()
    assert seen() is None
