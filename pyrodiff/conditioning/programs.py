"""A Pyro program that calls a reverse chain once and observes something, with its arguments.

The chain's call is answered with particles of x_0, and the log-densities of the observed sites are
summed.  The program is written for one x_0, of shape (1, *event_shape); all particles go through it
at once by ``torch.func.vmap``, or one by one where its control flow depends on values.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.chains.calls import AnsweredChain

__all__ = ["ObservedSite", "Program"]


class ObservedSite(NamedTuple):
    """An observed site of one run of the program: its Pyro distribution and its value.

    ``weighted`` says whether a handler or a plate scales or masks it.
    """

    law: Any
    value: Tensor
    weighted: bool


@contextmanager
def _unchecked() -> Iterator[None]:
    """No validation of arguments, which reads values; no gradients of what a program looks up."""
    with pyro.validation_enabled(False):
        yield


class Program:
    """The log-likelihood of x_0 that a Pyro program holds.

    Args:
        function: the program.
        reverse: the chain that it calls, once, without data.
        args, kwargs: the program's arguments.

    Attributes:
        context: what the program hands to the chain, or None.
        observed: the names of the observed sites.
        at_once: whether all particles go through the program together.

    Raises:
        ValueError: a program that does not call the chain exactly once for one x_0, observes
            nothing, or has other latent sites.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        reverse: ReverseChain,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ):
        self.function, self.reverse = function, reverse
        self.args, self.kwargs = args, dict(kwargs or {})
        prototype = reverse.prototype()
        x_0 = prototype.new_zeros(1, *reverse.event_shape)
        with torch.no_grad(), AnsweredChain(reverse, x_0) as answered:
            trace = poutine.trace(self.function).get_trace(*self.args, **self.kwargs)
        self.context = _one_call(answered.calls)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        latent = [
            str(site["name"])
            for site in sites
            if not site["is_observed"] and not poutine.util.site_is_subsample(site)
        ]
        if latent:
            raise ValueError(
                f"Expected no latent sites beside the chain's; got {', '.join(latent)}. Condition "
                "the program on them."
            )
        self.observed = tuple(
            str(site["name"])
            for site in sites
            if site["is_observed"] and not poutine.util.site_is_subsample(site)
        )
        if not self.observed:
            raise ValueError("Expected a program with an observed site; got none.")
        self.at_once = self._maps(x_0)

    def sites(self, x_0: Tensor) -> list[ObservedSite]:
        """The observed sites where the chain returns ``x_0``, shape (1, *event_shape)."""
        trace = self._trace(x_0)
        sites = []
        for site in (trace.nodes[name] for name in self.observed):
            value, weighted = site["value"], site["mask"] is not None or not _is_one(site["scale"])
            assert isinstance(value, Tensor)
            sites.append(ObservedSite(site["fn"], value, weighted))
        return sites

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """The sum of the log-densities of what is observed, nats, float64, shape (rows,).

        Args:
            x_0: shape (rows, *event_shape).
        """
        return self.map(self._log_likelihood, x_0).double()

    def map(self, function: Callable[[Tensor], Any], x_0: Tensor) -> Any:
        """A function of one x_0, of shape (1, *event_shape), at each row."""
        if self.at_once:
            return torch.func.vmap(function)(x_0.unsqueeze(1))
        values = [function(row) for row in x_0.unsqueeze(1)]
        if isinstance(values[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*values, strict=True))
        return torch.stack(values)

    def _trace(self, x_0: Tensor) -> poutine.Trace:
        with _unchecked(), AnsweredChain(self.reverse, x_0):
            return poutine.trace(self.function).get_trace(*self.args, **self.kwargs)

    def _log_likelihood(self, x_0: Tensor) -> Tensor:
        # not the trace's own sum, which looks at values to warn
        trace, total = self._trace(x_0), x_0.new_zeros(())
        for site in (trace.nodes[name] for name in self.observed):
            law: Any = site["fn"]
            log_prob = law.log_prob(site["value"])
            total = total + scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
        return total

    def _maps(self, x_0: Tensor) -> bool:
        """Whether particles go through the program at once."""
        self.at_once = True
        with torch.no_grad():
            try:
                self.log_likelihood(x_0.expand(2, *x_0.shape[1:]))
            except RuntimeError:
                self._log_likelihood(x_0)  # a fault of the program itself is its own message
                return False
        return True


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, Tensor) and scale == 1


def _one_call(calls: list[tuple[Tensor | None, Tensor | None, int | None]]) -> Tensor | None:
    """The context of the only call of the chain."""
    if len(calls) != 1:
        raise ValueError(f"Expected a program that calls the chain once; got {len(calls)} calls.")
    ((x_0, context, num_samples),) = calls
    if x_0 is not None:
        raise ValueError("Expected a program that calls the chain without data; got x_0.")
    count = num_samples if num_samples is not None else 1 if context is None else len(context)
    if count != 1:
        raise ValueError(f"Expected the chain to be called for one sample; got {count}.")
    return context
