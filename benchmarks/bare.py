"""The hand-written side: DDPM losses as a careful practitioner writes them, without Pyro.

Float32 tables are computed once in float64; a loss makes one draw of t, one of noise, one gather
per table and one network call.  Random numbers are drawn in pyrodiff's order, so that equal seeds
give equal losses: `steps.py` checks that before it measures anything.
"""

import math

import torch
from torch import Tensor, nn


class Tables:
    """Ho's linear betas, and what the losses below read; index 0 is t = 1."""

    def __init__(self, num_steps: int, size: int):
        betas = torch.linspace(0.1 / num_steps, 20.0 / num_steps, num_steps, dtype=torch.float64)
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        alpha_bar, noise_bar = log_alpha_bar.exp(), -torch.expm1(log_alpha_bar)
        before, noise_before = alpha_bar.roll(1), noise_bar.roll(1)
        before[0], noise_before[0] = 1.0, 0.0
        c_0 = before.sqrt() * betas / noise_bar
        small = betas * noise_before / noise_bar
        small[0] = small[1]
        ratio = small / betas
        # with the larger fixed variance: KL_t, and at t = 1 the decoder's -log density
        weight = 0.5 * (c_0**2 * noise_bar / alpha_bar / betas)
        constant = 0.5 * size * (ratio - 1 - ratio.log())
        constant[0] = 0.5 * size * (2 * math.pi * betas[0]).log()
        snr = alpha_bar / noise_bar
        last = noise_bar[-1]
        self.num_steps, self.size = num_steps, size
        self.prior = float(alpha_bar[-1]), float(size * (last - 1 - last.log()))
        self.log_snr, self.alpha, self.sigma = _float(snr.log(), alpha_bar.sqrt(), noise_bar.sqrt())
        self.weight, self.constant = _float(weight, constant)
        self.mean_weight, self.min_snr = _float(c_0**2 / snr, 5.0 / snr)
        self.min_snr.clamp_(max=1.0)
        self.c_0, self.c_t = _float(c_0, (1 - betas).sqrt() * noise_before / noise_bar)
        self.log_small, self.log_large = _float(small.log(), betas.log())
        self.small_std, self.large_std = _float(small.sqrt(), betas.sqrt())

    def prior_kl(self, x_0: Tensor) -> Tensor:
        scale, offset = self.prior
        return 0.5 * (scale * x_0.square().sum() + offset * len(x_0))


def _float(*tables: Tensor) -> list[Tensor]:
    return [table.float() for table in tables]


def _uniform(x_0: Tensor, tables: Tables) -> Tensor:
    return torch.randint(0, tables.num_steps, (len(x_0),))


def _low_discrepancy(x_0: Tensor, tables: Tables) -> Tensor:
    offset = torch.rand((), dtype=torch.float64)
    u = (offset + torch.arange(len(x_0), dtype=torch.float64) / len(x_0)) % 1.0
    return (u * tables.num_steps).long()


def _noise_error(network: nn.Module, tables: Tables, x_0: Tensor, t: Tensor) -> Tensor:
    noise = torch.randn_like(x_0)
    x_t = tables.alpha[t][:, None] * x_0 + tables.sigma[t][:, None] * noise
    return (noise - network(x_t, tables.log_snr[t])).square()


def noise_loss(network: nn.Module, tables: Tables, x_0: Tensor) -> Tensor:
    return _noise_error(network, tables, x_0, _uniform(x_0, tables)).sum()


def mean_loss(network: nn.Module, tables: Tables, x_0: Tensor) -> Tensor:
    t = _uniform(x_0, tables)
    return tables.mean_weight[t] @ _noise_error(network, tables, x_0, t).sum(1)


def weighted_loss(network: nn.Module, tables: Tables, x_0: Tensor) -> Tensor:
    t = _low_discrepancy(x_0, tables)
    return tables.min_snr[t] @ _noise_error(network, tables, x_0, t).sum(1)


def variational_bound(network: nn.Module, tables: Tables, x_0: Tensor) -> Tensor:
    t = _low_discrepancy(x_0, tables)
    terms = tables.weight[t] * _noise_error(network, tables, x_0, t).sum(1) + tables.constant[t]
    return tables.num_steps * terms.sum() + tables.prior_kl(x_0)


def hybrid_loss(network: nn.Module, tables: Tables, x_0: Tensor) -> Tensor:
    """L_simple + 0.001 L_vlb with the learned range of variances."""
    t = _uniform(x_0, tables)
    noise = torch.randn_like(x_0)
    alpha, sigma, c_0 = tables.alpha[t][:, None], tables.sigma[t][:, None], tables.c_0[t][:, None]
    small, large = tables.log_small[t][:, None], tables.log_large[t][:, None]
    output = network(alpha * x_0 + sigma * noise, tables.log_snr[t])
    noise_hat, raw = output.chunk(2, dim=1)
    error = (noise - noise_hat).square()
    log_variance = small + 0.5 * (raw + 1) * (large - small)
    scaled = (c_0 * sigma / alpha) ** 2 * error.detach() * (-log_variance).exp()
    log_ratio = small - log_variance
    kl = scaled + log_ratio.exp() - 1 - log_ratio
    decoder = scaled + log_variance + math.log(2 * math.pi)  # c_0 = 1 at t = 1
    vlb = 0.5 * torch.where((t == 0)[:, None], decoder, kl).sum()
    return error.sum() + 0.001 * (tables.num_steps * vlb + tables.prior_kl(x_0))


def trajectory_bound(network: nn.Module, tables: Tables, x_0: Tensor) -> Tensor:
    """log q(x_1:T | x_0) - log p(x_0:T) along one path drawn from q in denoising order."""
    values = [table.tolist() for table in (tables.alpha, tables.sigma, tables.c_0, tables.c_t)]
    values += [tables.small_std.tolist(), tables.large_std.tolist()]
    alpha, sigma, c_0, c_t, small_std, large_std = values
    last = tables.num_steps - 1
    log_2pi = x_0.numel() * math.log(2 * math.pi)
    noise = torch.randn_like(x_0)
    x_t = alpha[last] * x_0 + sigma[last] * noise
    loss = 0.5 * (x_t.square().sum() - noise.square().sum()) - x_0.numel() * math.log(sigma[last])
    for t in range(last, 0, -1):
        noise = torch.randn_like(x_0)
        x_s = c_0[t] * x_0 + c_t[t] * x_t + small_std[t] * noise
        noise_hat = network(x_t, tables.log_snr[t].expand(len(x_0)))
        mean = c_0[t] / alpha[t] * (x_t - sigma[t] * noise_hat) + c_t[t] * x_t
        log_q = -0.5 * noise.square().sum() - x_0.numel() * math.log(small_std[t])
        log_p = -0.5 * ((x_s - mean) / large_std[t]).square().sum() - x_0.numel() * math.log(
            large_std[t]
        )
        loss = loss + (log_q - log_p)
        x_t = x_s
    x0_hat = (x_t - sigma[0] * network(x_t, tables.log_snr[0].expand(len(x_0)))) / alpha[0]
    log_p = -0.5 * ((x_0 - x0_hat) / large_std[0]).square().sum()
    return loss - (log_p - x_0.numel() * math.log(large_std[0]) - 0.5 * log_2pi)
