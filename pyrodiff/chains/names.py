r"""What the sites of a chain are called, and the plate that they stand in.

    no name         x_T … x_1, x_0           in the plate  data
    named "prior"   prior.x_T … prior.x_0    in the plate  prior.data

as Pyro names the ``PyroSample`` attributes of a ``PyroModule``.  Chains with different names, and
one chain under several names (``named``), stand in one program.  The guide of a chain that has a
name is its ``forward_chain``, which has the same one.

The plate is at dimension −1.  Inside a plate of the program's own at that dimension a chain opens
none: its samples are one for each index of that plate.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates
from pyro.util import ignore_jit_warnings
from typing_extensions import Self

__all__ = ["NamedSites", "enclosing_size", "unique_name"]

_counter = itertools.count()
# Of particles and samples: where they are wrongly put at −1, Pyro says so.
_PYROS_PLATES = ("num_particles_vectorized", "_num_predictive_samples")


def unique_name(kind: str) -> str:
    """A name that no other chain of this process has.

    Pyro's parameter store is one per process: chains of equal names would share parameters.
    """
    return f"{kind}_{next(_counter)}"


def enclosing_size() -> int | None:
    """The size of the program's plate at dimension −1 around here, or None where there is none."""
    frames = (frame for frame in get_plates() if frame.dim == -1)
    size = next((frame.size for frame in frames if frame.name not in _PYROS_PLATES), None)
    with ignore_jit_warnings():  # while a program is compiled, the sizes of plates are tensors
        return None if size is None else int(size)


class NamedSites(PyroModule):
    """A chain as a Pyro program whose sites and plate have names.

    Args:
        kind: of chain, for the prefix of its parameters in Pyro's parameter store.
        name: the prefix of its sites and plate, and of its parameters where it is given; None for
            short names and a prefix of the parameters that no other chain has.

    Attributes:
        name: the prefix of its sites and plate; ``""`` for short names.
        num_steps: T.
    """

    num_steps: int

    def __init__(self, kind: str, name: str | None = None):
        super().__init__(name=name or unique_name(kind))
        self.name = name or ""
        self._kind = kind

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy (a moving average, say) must not share Pyro parameters with its original.
        super().__setstate__(state)
        self._pyro_name = unique_name(self._kind)

    def named(self, name: str) -> Self:
        """The same chain with its sites under another name; parameters are shared, not copied.

        Args:
            name: ``"left"`` for the sites ``left.x_0`` …; ``""`` for the short names.
        """
        chain = copy.copy(self)
        chain._pyro_name = self._pyro_name  # of the parameters, which are the same
        chain.name = name
        return chain

    def site(self, t: int) -> str:
        """The name of the site of x_t, t = 0 … T."""
        if not 0 <= t <= self.num_steps:
            raise ValueError(f"Expected t in 0 … {self.num_steps}; got {t}.")
        return self._full(f"x_{t}")

    @property
    def plate_name(self) -> str:
        """The name of the plate over samples."""
        return self._full("data")

    def plate(self, size: int) -> AbstractContextManager[object]:
        """The plate over ``size`` samples, at dimension −1; nothing inside a plate that is there.

        For a guide that draws x_0 itself, at ``reverse.site(0)``, before it calls the other chain.

        Raises:
            ValueError: inside a plate at dimension −1 of another size.
        """
        enclosing = enclosing_size()
        if enclosing is None:
            return pyro.plate(self.plate_name, size, dim=-1)
        if enclosing != size:
            raise ValueError(
                f"Expected {enclosing} samples, one for each index of the enclosing plate at "
                f"dimension -1; got {size}. A plate of {size} samples for each index needs the "
                "enclosing plate at dim=-2."
            )
        return nullcontext()

    @contextmanager
    def program(self, size: int) -> Iterator[None]:
        """The plate around the sites of one call.

        Raises:
            RuntimeError: a second call in one program under the same name.
        """
        try:
            with self.plate(size):
                yield
        except RuntimeError as error:
            if not str(error).startswith(f"Multiple sample sites named '{self._full('')}"):
                raise
            raise RuntimeError(
                "Expected another name for every chain of a program and for every call of it; got "
                f"a second site of the name {str(error).split(chr(39))[1]!r}. Name it, "
                "ReverseChain(..., name='prior') or chain.named('prior'), draw several samples in "
                "one call, or call the chain inside the plate that is there."
            ) from error

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name
