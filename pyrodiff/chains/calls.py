"""The call of a reverse chain inside a Pyro program, as an effect that a handler may answer.

Particles of x_0 that come from elsewhere take the chain's place, and its sites are not visited:

    with AnsweredChain(reverse, x_0):
        program(y)          # reverse(...) in it returns x_0
"""

from typing import Any, Protocol, runtime_checkable

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor

from pyrodiff.chains.names import enclosing_size

__all__ = ["AnsweredChain", "run_chain"]


@runtime_checkable
class CalledChain(Protocol):
    """A chain with a Pyro program."""

    def visit_sites(
        self,
        x_0: Tensor | None,
        context: Tensor | None,
        num_samples: int | None,
        context_dim: int | None,
    ) -> Tensor:
        """The sites x_T … x_0."""


@effectful(type="reverse_chain")
def run_chain(
    chain: CalledChain,
    x_0: Tensor | None,
    context: Tensor | None,
    num_samples: int | None,
    context_dim: int | None,
) -> Tensor:
    """The chain's program, or what a handler puts in its place."""
    return chain.visit_sites(x_0, context, num_samples, context_dim)


class AnsweredChain(Messenger):
    """Answers the calls of one chain with a value.

    Args:
        chain: whose calls.
        value: what they return.

    Attributes:
        calls: the arguments x_0, context and num_samples of each call so far, the last that of the
            enclosing plate where it is not given.
    """

    def __init__(self, chain: CalledChain, value: Tensor):
        super().__init__()
        self.chain, self.value = chain, value
        self.calls: list[tuple[Tensor | None, Tensor | None, int | None]] = []

    def _pyro_reverse_chain(self, msg: dict[str, Any]) -> None:
        chain, *arguments = msg["args"]
        if chain is self.chain:
            x_0, context, num_samples, _ = arguments
            num_samples = enclosing_size() if num_samples is None else num_samples
            self.calls.append((x_0, context, num_samples))
            msg["value"], msg["done"] = self.value, True
