r"""Rényi's bound and the importance-weighted bound of each datum, as a Pyro ELBO.

With log-weights log w_kn = log p_θ(x_n, z_kn) − log q(z_kn | x_n) of K particles,

    L_α = Σ_n 1/(1 − α) log (1/K) Σ_k w_kn^{1−α}

(Li and Turner, 2016, equation 4 with K draws; α = 0: Burda et al., 2016, equation 8).  Each datum
has a mean of weights of its own.  One weight for the batch,

    1/(1 − α) log (1/K) Σ_k ∏_n w_kn^{1−α},

is a bound as well, but one whose gain over the ELBO is lost as N grows, since the variance of
Σ_n log w_kn grows with it.

``pyro.infer.RenyiELBO`` has the former on a chain and its data, and on any model all of whose sites
stand in one plate.  It has the latter as soon as one site stands outside, a ``pyro.deterministic``
for one.  Of a plate that is subsampled, n of N, it takes the weights to the power N/n, which is the
bound of another α, 1 − (1 − α) N/n, and for α = 0 no lower bound.  And it has no
``differentiable_loss``, so that it is no module.
"""

import math
from typing import Any, cast

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from torch import Tensor

from pyrodiff.checks import check_count, short

__all__ = ["RenyiBound"]

_PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate

Plate = tuple[str, int]


def _sample_sites(trace: Trace) -> list[dict[str, Any]]:
    """All but what ``pyro.deterministic`` made."""
    nodes = cast("list[dict[str, Any]]", list(trace.nodes.values()))
    sites = [site for site in nodes if site["type"] == "sample"]
    return [site for site in sites if not site["infer"].get("_deterministic")]


def _data_plates(sites: list[dict[str, Any]]) -> dict[Plate, float]:
    """The plates that all sites stand in, by name and dimension, with their N/n."""
    shared: dict[Plate, float] | None = None
    for site in sites:
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != _PARTICLES]
        own = {(f.name, f.dim): (f.full_size or f.size) / f.size for f in frames}
        shared = own if shared is None else {key: own[key] for key in shared if key in own}
    return shared or {}


def _log_prob(site: dict[str, Any], scale: float, kept: set[int]) -> Tensor:
    """log p of a site, summed over all dimensions but those kept; divided by ``scale``."""
    value = scale_and_mask(site["unscaled_log_prob"], site["scale"] / scale, site["mask"])
    summed = [dim for dim in range(-value.dim(), 0) if dim not in kept]
    return value.sum(summed, keepdim=True) if summed else value


class RenyiBound(ELBO):
    r"""The bound L_α with weights of each datum (formulas above), in nats, summed over the data.

    A datum is one index of the plates that every site stands in, such as ``"data"`` of a chain; a
    program with a latent outside them is one datum.  For any model and guide with reparametrized
    sites; the gradient is that of the estimate itself.

    In expectation L_α is at most log p(x) for α in [0, 1], and grows with K for α < 1; α = 0 is the
    importance-weighted bound, α = 1 the ELBO.  For α < 0 it may exceed log p(x).

    Args:
        alpha: α.
        num_particles: K.
        vectorize_particles: draw all particles at once, by one plate on the left (Pyro's).
        max_plate_nesting: how many dimensions the program's plates take; found by a run where it
            is not given.

    Raises:
        ValueError: an α that is not finite; K < 1.
        NotImplementedError: a guide with parameters in sites that are not reparametrized.
    """

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 8,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
    ):
        check_count("num_particles", num_particles)
        if not math.isfinite(alpha):
            raise ValueError(f"Expected a finite alpha; got {short(alpha)}.")
        self.alpha = alpha
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles and num_particles > 1,
            max_plate_nesting=max_plate_nesting,
        )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = get_importance_trace(
            "flat", self.max_plate_nesting, model, guide, args=args, kwargs=kwargs
        )
        for site in _sample_sites(guide_trace):
            score = site["score_parts"].score_function
            if not is_identically_zero(score) and score.requires_grad:
                raise NotImplementedError(
                    "Expected a guide whose sites with parameters are reparametrized (has_rsample);"
                    f" got the site {site['name']!r}."
                )
        return model_trace, guide_trace

    def _log_weights(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, float]:
        """log w, a dimension for each plate of the data and one for vectorized particles; N/n."""
        of_model, of_guide = _sample_sites(model_trace), _sample_sites(guide_trace)
        plates = _data_plates([*of_model, *of_guide])
        kept = {dim for _, dim in plates}
        if self.vectorize_particles:
            kept.add(-int(self.max_plate_nesting))
        scale = math.prod(plates.values())
        log_p = sum(_log_prob(site, scale, kept) for site in of_model)
        log_q = sum(_log_prob(site, scale, kept) for site in of_guide)
        return torch.as_tensor(log_p - log_q), scale

    def bounds(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each datum, nats; the shape of the plates of the data, (N,) for a chain."""
        return self._bounds(model, guide, args, kwargs)[0]

    def _bounds(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, float]:
        pairs = [
            self._log_weights(*traces) for traces in self._get_traces(model, guide, args, kwargs)
        ]
        scale = pairs[0][1]
        if self.vectorize_particles:
            log_w = pairs[0][0].movedim(-int(self.max_plate_nesting), 0)
        else:
            log_w = torch.stack([log_w for log_w, _ in pairs])
        order = 1 - self.alpha
        if order == 0:
            return log_w.mean(0), scale
        return ((order * log_w).logsumexp(0) - math.log(len(log_w))) / order, scale

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """−L_α, summed over the data (of a subsampled plate, scaled to all of them)."""
        bounds, scale = self._bounds(model, guide, args, kwargs)
        return -scale * bounds.sum()

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; gradients are added to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())
