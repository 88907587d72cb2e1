r"""Exact answers for a chain whose denoiser is affine in x_t: x̂_0(x_t) = A_t x_t + b_t.

With a Gaussian decoder and variances Σ_t that do not depend on x_t, p_θ(x_t) is Gaussian at
every t and its moments follow

    m_T = 0, P_T = I,   M_t = c_0 A_t + c_t I,
    m_{t−1} = M_t m_t + c_0 b_t,   P_{t−1} = M_t P_t M_tᵀ + Σ_t   (t = T … 2),
    log p_θ(x_0) = log N(x_0; A_1 m_1 + b_1, A_1 P_1 A_1ᵀ + s² I).

The bound (Ho et al., 2020, equation 5) is closed too, as x_0 − x̂_0(x_t) is affine in ε:

    E ‖x_0 − x̂_0‖²_W = ‖(I − α A) x_0 − b‖²_W + σ² tr(Aᵀ W A)
    t ≥ 2:  ½ Σ_i (ρ_i − 1 − log ρ_i) + ½ c_0² E ‖x_0 − x̂_0‖²_W,   ρ = σ̃²/Σ_t,  W = Σ_t⁻¹
    t = 1:  ½ E ‖x_0 − x̂_0‖²_W + ½ Σ_i log 2π s_i²,                W = s⁻².

A_t and b_t are read off the network, at 0 and at the unit vectors.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyrodiff.chains import ReverseChain
from pyrodiff.decoders import GaussianDecoder

__all__ = ["LinearBound", "linear_bound", "linear_log_prob"]


class LinearBound(NamedTuple):
    """The bound of an affine chain, nats per sample; elbo = −prior − Σ_t terms.

    ``prior`` is KL(q(x_T | x_0) ‖ N(0, I)); ``terms[:, t − 1]`` is E KL(q ‖ p_θ) at step t for
    t ≥ 2, and −E log p_θ(x_0 | x_1) for t = 1.
    """

    prior: Float[Tensor, " n"]
    terms: Float[Tensor, "n T"]
    elbo: Float[Tensor, " n"]


class _Affine(NamedTuple):
    """x̂_0 = matrix · x_t + offset, and the variance of p_θ(x_{t−1} | x_t), shape (d,)."""

    matrix: Tensor
    offset: Tensor
    variance: Tensor


def network_tensor(reverse: ReverseChain) -> Tensor:
    """A float tensor like the network's; float64 on the CPU where it has none."""
    for tensor in (*reverse.parameters(), *reverse.buffers()):
        if tensor.dtype.is_floating_point:
            return tensor.detach()
    return torch.empty((), dtype=torch.float64)


def _check_chain(reverse: ReverseChain) -> None:
    if not isinstance(reverse.decoder, GaussianDecoder):
        raise TypeError(f"Expected a chain with a GaussianDecoder; got {reverse.decoder!r}.")
    if reverse.variance.depends_on_x:
        raise ValueError(f"Expected a fixed variance; got {reverse.variance!r}.")
    clip = reverse.denoiser.clip
    if clip is not None:
        raise ValueError(f"Expected a denoiser that is affine in x_t; got clip={clip}.")


def _affine(reverse: ReverseChain, t: int, like: Tensor) -> _Affine:
    """A_t, b_t and Σ_t, with a check at two random points that the denoiser is affine."""
    shape, size = reverse.event_shape, reverse.event_shape.numel()
    generator = torch.Generator().manual_seed(t)
    # a near point and a far one: a denoiser may be affine around 0 only (a clipped one, say)
    random = torch.randn(2, size, generator=generator, dtype=torch.float64)
    wide = reverse.forward_chain.carry(like, exact=True)
    random = (random * torch.tensor([[1.0], [8.0]], dtype=torch.float64)).to(wide)
    zero, units = wide.new_zeros(1, size), torch.eye(size).to(wide)
    points = torch.cat([zero, units, random]).reshape(-1, *shape)
    step = reverse.step(t, points)
    values = reverse.predict(points, step).x0_hat.reshape(-1, size).to("cpu", torch.float64)
    offset, matrix = values[0], (values[1 : size + 1] - values[0]).T
    expected = random.to("cpu", torch.float64) @ matrix.T + offset
    error = float((values[size + 1 :] - expected).abs().max())
    # rounding of ε̂ is divided by α in x̂_0
    slack = 1e3 * torch.finfo(like.dtype).eps * math.sqrt(size) / float(step.alpha)
    if not error <= slack * max(1.0, float(values.abs().max())):
        raise ValueError(
            "Expected a denoiser that is affine in x_t; got one that differs from its affine map "
            f"by {error:g} at a random point at t = {t}."
        )
    if t == 1:
        variance = reverse.decode(points[:1]).variance.reshape(size)
        return _Affine(matrix, offset, variance.to("cpu", torch.float64))
    log_variance = reverse.variance.log_variance(step, None).to("cpu", torch.float64)
    return _Affine(matrix, offset, log_variance.exp().expand(1, *shape).reshape(size))


def _flat(reverse: ReverseChain, x_0: Tensor) -> Tensor:
    reverse.check_data(x_0)
    return x_0.detach().to("cpu", torch.float64).flatten(1)


@torch.no_grad()
def linear_log_prob(reverse: ReverseChain, x_0: Tensor) -> Float[Tensor, " n"]:
    """log p_θ(x_0) in nats, exactly (formulas above).

    Args:
        reverse: a chain with a denoiser affine in x_t, a fixed variance, a Gaussian decoder.
        x_0: shape (N, *event_shape).

    Returns:
        shape (N,), float64.

    Raises:
        ValueError: a denoiser that is not affine, a learned variance, data of another shape.
        TypeError: another decoder.
    """
    _check_chain(reverse)
    data, like, chain = _flat(reverse, x_0), network_tensor(reverse), reverse.forward_chain
    eye = torch.eye(data.shape[1], dtype=torch.float64)
    mean, covariance = eye.new_zeros(len(eye)), eye
    for t in range(reverse.num_steps, 1, -1):
        affine = _affine(reverse, t, like)
        step = chain.exact_step(t)
        matrix = step.mean(affine.matrix, eye)
        mean = matrix @ mean + step.c_0 * affine.offset
        covariance = matrix @ covariance @ matrix.T + affine.variance.diag()
    affine = _affine(reverse, 1, like)
    covariance = affine.matrix @ covariance @ affine.matrix.T + affine.variance.diag()
    covariance = 0.5 * (covariance + covariance.T)
    return MultivariateNormal(affine.matrix @ mean + affine.offset, covariance).log_prob(data)


@torch.no_grad()
def linear_bound(reverse: ReverseChain, x_0: Tensor) -> LinearBound:
    """The variational bound in closed form, term by term (formulas above).

    Arguments and errors are those of ``linear_log_prob``.

    Returns:
        ``prior`` (N,), ``terms`` (N, T) with index t − 1, ``elbo`` (N,); nats, float64.
    """
    _check_chain(reverse)
    data, like, chain = _flat(reverse, x_0), network_tensor(reverse), reverse.forward_chain
    terms = []
    for t in range(1, reverse.num_steps + 1):
        affine = _affine(reverse, t, like)
        step = chain.exact_step(t)
        bias = data - step.alpha * data @ affine.matrix.T - affine.offset
        square = bias.square() + step.sigma.square() * affine.matrix.square().sum(1)
        error = 0.5 * (square / affine.variance).sum(1)
        if t == 1:
            terms.append(error + 0.5 * (2 * math.pi * affine.variance).log().sum())
            continue
        log_ratio = step.log_small - affine.variance.log()
        excess = 0.5 * (torch.expm1(log_ratio) - log_ratio).sum()
        terms.append(excess + step.c_0.square() * error)
    prior, stacked = chain.prior_kl(data), torch.stack(terms, dim=1)
    return LinearBound(prior, stacked, -prior - stacked.sum(1))
