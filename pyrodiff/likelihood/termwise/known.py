r"""What is known of the terms of the bound before the network is asked.

Where the variance Σ_t is fixed, a term is a multiple of one square, and a number,

    L_t = k_t + w_t ‖x_0 − x̂_0(x_t)‖²
    w_t = c_0²/(2Σ_t),   k_t = ½ Σ_i (β̃_t/Σ_t − 1 − log β̃_t/Σ_t)        for t ≥ 2
    w_1 = 1/(2 s²),      k_1 = ½ Σ_i log 2π s²                           with a Gaussian decoder

(Ho et al., 2020, equation 8).  The square is about d at most and changes slowly with λ; whatever
jumps, as at t = 1 and at the end of a cosine schedule, is in w and k.  For a learned variance k is
0 and w that of a raw output of 0, which serves as a scale alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.decoders import GaussianDecoder

__all__ = ["KnownTerms", "known_terms"]


class KnownTerms(NamedTuple):
    """k, w and λ at t = 1 … T, float64 on the CPU, shape (T,) each."""

    constant: Tensor
    weight: Tensor
    log_snr: Tensor

    @property
    def unit(self) -> Tensor:
        """w_t/(1 + SNR_t): L_t − k_t per dimension for standard normal data, but for a factor."""
        return self.weight * torch.sigmoid(-self.log_snr)


def known_terms(reverse: ReverseChain) -> KnownTerms:
    """k_t and w_t of a model."""
    chain, shape = reverse.forward_chain, reverse.event_shape
    t = torch.arange(1, chain.num_steps + 1)
    like = torch.zeros((), dtype=torch.float64).expand(chain.num_steps, *shape)
    step = chain.step(t, like, len(shape))
    variance, decoder = reverse.variance, reverse.decoder
    raw = torch.zeros_like(like) if variance.learned else None
    log_variance = variance.log_variance(step, raw)
    log_variance = log_variance.double().cpu().expand_as(like).flatten(1)
    small, c_0 = (v.double().cpu().reshape(-1, 1) for v in (step.log_small, step.c_0))
    weight = 0.5 * (c_0.square() * (-log_variance).exp()).mean(1)
    log_ratio = small - log_variance
    constant = 0.5 * (torch.expm1(log_ratio) - log_ratio).sum(1)
    at_one = log_variance[0]
    scale = getattr(decoder, "scale", None)
    if scale is not None:
        at_one = torch.full_like(at_one, 2 * math.log(scale))
    weight[0] = 0.5 * (-at_one).exp().mean()
    constant[0] = 0.5 * (at_one + math.log(2 * math.pi)).sum()
    if variance.depends_on_x:
        constant[1:] = 0
    if not isinstance(decoder, GaussianDecoder) or (variance.depends_on_x and scale is None):
        constant[0] = 0
    return KnownTerms(constant, weight, chain.log_snr.cpu())
