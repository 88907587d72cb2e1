r"""The reverse chain in its non-centred form: the sites are noise, the states follow from them.

    centred        x_{t−1} ~ N(μ_θ(x_t), Σ_θ(x_t))
    non-centred    ε_{t−1} ~ N(0, I),   x_{t−1} = μ_θ(x_t) + Σ_θ(x_t)^½ ε_{t−1}

(Papaspiliopoulos, Roberts and Sköld, 2007; Gorinova, Moore and Hoffman, 2020.)  It is the same
joint.  Neighbours in the centred form are nearly equal, x_{t−1} ≈ x_t, which leaves samplers such
as NUTS and guides that take the sites apart no room; the noises are independent under the model.

The site ``x_3`` becomes ``x_3_noise``, and ``x_3`` a deterministic one.  x_T is noise as it is.
"""

from typing import cast

import pyro
import pyro.distributions as dist
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult
from pyro.infer.reparam.strategies import Strategy

from pyrodiff.distributions import DiscretizedNormal, GridCategorical, Normal, StructuredNormal

__all__ = ["NoiseReparam", "NonCentered"]


def _base(fn: object) -> object:
    """The distribution of one number, or of an event that is no product."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


class NoiseReparam(Reparam):
    """One latent site of a chain as noise: for ``poutine.reparam(program, {"x_3": …})``.

    Raises:
        TypeError: a site that is not normal, as x_0 is not under a decoder over discrete values.
    """

    def apply(self, msg: ReparamMessage) -> ReparamResult:
        fn, value = cast(dist.TorchDistribution, msg["fn"]), msg["value"]
        event_dim, law = fn.event_dim, _base(fn)
        if not isinstance(law, Normal | StructuredNormal):
            raise TypeError(
                f"Expected a normal distribution at the site {msg['name']!r} for its non-centred "
                f"form; got {type(law).__name__}."
            )
        zero = law.loc.new_zeros(())
        standard = dist.Normal(zero, zero + 1, validate_args=False)
        noise = pyro.sample(
            f"{msg['name']}_noise",
            standard.expand(fn.shape()).to_event(event_dim),
            obs=None if value is None else law.to_noise(value),
            infer={"is_observed": False},
        )
        if value is None:
            value = law.from_noise(noise)
        # what pyro.deterministic makes
        return {
            "fn": dist.Delta(value, event_dim=event_dim).mask(False),
            "value": value,
            "is_observed": True,
        }


class NonCentered(Strategy):
    """All latent sites of the chains in a program as noise: ``NonCentered()(program)``.

    A strategy of Pyro's, also for ``poutine.reparam(program, config=NonCentered())``.  Observed
    sites stay as they are: condition the program first, ``NonCentered()(pyro.condition(…))``.

    Raises:
        TypeError: a latent x_0 under a decoder over discrete values.

    Examples:
        >>> import torch
        >>> from pyro import poutine
        >>> from pyrodiff import DataDenoiser, ForwardChain, LogSNRSchedule, ReverseChain
        >>> from pyrodiff.networks import ResidualMLP
        >>> forward = ForwardChain(LogSNRSchedule(), num_steps=2)
        >>> reverse = ReverseChain(DataDenoiser(ResidualMLP((2,))), forward, event_shape=(2,))
        >>> trace = poutine.trace(NonCentered()(reverse)).get_trace()
        >>> [site for site in trace.stochastic_nodes if "x_" in site]
        ['x_2', 'x_1_noise', 'x_0_noise']
    """

    def configure(self, msg: dict) -> Reparam | None:
        kinds = (Normal, StructuredNormal, DiscretizedNormal, GridCategorical)
        if msg["is_observed"] or not isinstance(_base(msg["fn"]), kinds):
            return None
        return NoiseReparam()
