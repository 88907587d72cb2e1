r"""The density that the probability-flow ODE gives to data (Song et al., 2021, section 4.3).

With x̂_0 the model's denoiser and so the score s = (α x̂_0 − x)/σ², and in the log-SNR λ the drift
f = d log α/dλ = ½ σ² and g² = dσ²/dλ − 2 f σ² = −σ² (noise grows as λ falls), the flow
dx/dλ = f x − ½ g² s and its divergence are

    dx/dλ = ½ α (x̂_0(x, λ) − α x),    div = ½ α (∇·x̂_0 − α d),

    log p_1(x_1) = log N(x_T; 0, I) + ∫_{λ_1}^{λ_T} div dλ                       (appendix D.2)

from the chain's first latent to its last.  That is a density of x_1, never of the data.  Either

    "variational"   mean of log p_1(x_1) + log p_θ(x_0 | x_1) − log q(x_1 | x_0),  x_1 ~ q
    "scaled"        log p_1(α_1 x_0) + d log α_1

turns it into one of x_0.  The former, for any decoder, is at most log ∫ p_1(x_1) p_θ(x_0 | x_1)
dx_1, up to the solver's error; the latter is the density of x_1/α_1 = x_0 + e^{−λ_1/2} ε at x_0,
which is that of continuous data up to O(e^{−λ_1}).

∇· is Σ_i ∂_i in few dimensions, and vᵀ (∂/∂x) v with v = ±1 else (Hutchinson, 1990), of one v
for a whole path, so that the slope is a smooth function of λ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_choice, check_count, check_positive, renamed
from pyrodiff.denoisers import MeanDenoiser
from pyrodiff.finite import failed_at
from pyrodiff.kernels import marginal_coefficients
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.flow.solver import solve
from pyrodiff.likelihood.paths.weights import last, path_rows, predict
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_of_weights, mean_of_draws
from pyrodiff.streams import NoiseStreams

__all__ = ["ProbabilityFlow", "divergence"]

_OFFSETS = ("variational", "scaled")


def divergence(y: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """Σ_i ∂y_i/∂x_i, shape (n,), exact (d backward passes) or vᵀ (∂y/∂x) v (one).

    Args:
        y, x: shape (n, *event_shape); y depends on x.
        probe: v, of the same shape; None for the exact sum.
    """
    if probe is None:
        size = x[0].numel()
        units = torch.eye(size, dtype=x.dtype, device=x.device)
        probes = list(units.reshape(size, *x.shape[1:]))
    else:
        probes = [probe]
    total = x.new_zeros(len(x))
    for v in probes:
        (product,) = torch.autograd.grad(y, x, v.expand_as(y), retain_graph=True)
        total += (product * v).flatten(1).sum(1)
    return total


class _Flow(NamedTuple):
    """The slope of (x, ∫ div dλ), a row's state of d + 1 numbers in float64."""

    reverse: ReverseChain
    context: Tensor | None
    probe: Tensor | None

    def drift(self, x: Tensor, log_snr: Tensor, context: Tensor | None) -> Tensor:
        """dx/dλ at x of shape (n, *event_shape) and λ of shape (n,), by one network call."""
        level = self.reverse.level(log_snr, x)
        x0_hat = self.reverse.predict(x, level, context, mean_only=True).x0_hat
        return 0.5 * level.alpha * (x0_hat - level.alpha * x)

    def slope(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The solver's f(λ, state, rows), with the network's arithmetic in ``dtype``."""

        def slope(log_snr: Tensor, state: Tensor, rows: Tensor) -> Tensor:
            event_shape = self.reverse.event_shape
            with torch.inference_mode(False), torch.enable_grad():
                # copies: what was made in inference mode has no gradient
                x = state[:, :-1].to(dtype).clone().reshape(-1, *event_shape)
                context = None if self.context is None else self.context[rows].clone()
                probe = None if self.probe is None else self.probe[rows].clone()
                drift = self.drift(x.requires_grad_(), log_snr.clone(), context)
                rate = divergence(drift, x, probe)
            return torch.cat([drift.detach().flatten(1), rate.unsqueeze(1)], 1).double()

        return slope


class _Start(NamedTuple):
    """x_1, what turns log p_1(x_1) into log p(x_0), nats, (n,), and the network calls it took."""

    x_1: Tensor
    log_ratio: Tensor
    calls: int


class _Solves(NamedTuple):
    """log p or log w of each row, nats, float64, its calls, and the step where it failed; (n,)."""

    log_w: Tensor
    calls: Tensor
    failed: Tensor


def _start(
    reverse: ReverseChain, x_0: Tensor, noise: Tensor | None, context: Tensor | None
) -> _Start:
    """The offset at the data end: variational for given noise, scaled without."""
    chain, size = reverse.forward_chain, reverse.event_shape.numel()
    alpha, sigma = marginal_coefficients(chain.log_snr[0])
    if noise is None:
        log_ratio = x_0.new_full((len(x_0),), size * float(alpha.log()), dtype=torch.float64)
        return _Start(float(alpha) * x_0, log_ratio, 0)
    x_1 = chain.sample(x_0, 1, noise)
    log_q = -0.5 * (noise.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
    log_q -= size * float(sigma.log())
    return _Start(x_1, last(reverse, x_1, x_0, predict(reverse, x_1, 1, context)) - log_q, 1)


def _signs(noise: Tensor) -> Tensor:
    """±1 each, from normals."""
    return torch.where(noise < 0, -1.0, 1.0).to(noise)


@renamed(draws="particles")
@dataclass(frozen=True)
class ProbabilityFlow(Estimator):
    """log p of the model's ODE, an estimate; steps are as many as each sample's path needs.

    ``calls`` counts forward passes of the network: 1 + 6 a step, and one for the decoder.  All but
    the decoder's come with a backward pass, or d of them where the divergence is exact.

    Args:
        offset: ``"variational"``, or ``"scaled"`` for continuous data (formulas above).
        particles: solves of a sample, each from an x_1 and a v of its own; the standard error is
            their spread, NaN for one.  Where nothing is random, scaled with the exact
            divergence, there is one solve, with error 0 (the solver's is not counted).
        importance: the log of the solves' mean, not the mean of their logs: tighter, and its
            exponential is unbiased; needs the variational offset and the exact divergence.  A
            model with much of its x_1 off q(x_1 | x_0) of any data has weights too heavy for it:
            their standard error is NaN then, as for fewer than 8 solves.
        exact_up_to: dimensions up to which the divergence is exact.
        rtol, atol: the solver's tolerances for a step, of x and of log p in nats; the error of
            the value is some ten to a hundred times larger.
        max_steps: of one solve.

    Raises:
        ValueError: an unknown offset, counts or tolerances out of range; on ``estimate``, a
            ``MeanDenoiser``, the scaled offset with a discrete decoder, importance weights from
            random divergences, a solve that needs more than ``max_steps``.
    """

    offset: str = "variational"
    particles: int = 2
    importance: bool = False
    exact_up_to: int = 16
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_choice("offset", self.offset, _OFFSETS)
        check_count("particles", self.particles)
        check_count("exact_up_to", self.exact_up_to, 0)
        check_count("max_steps", self.max_steps)
        for name in ("rtol", "atol"):
            check_positive(name, getattr(self, name))
        if self.importance and self.offset != "variational":
            raise ValueError(f"Expected offset='variational' for importance; got {self.offset!r}.")

    def check(self, reverse: ReverseChain) -> None:
        if isinstance(reverse.denoiser, MeanDenoiser):
            raise ValueError(
                "Expected a denoiser with a meaning at every log-SNR (noise, data or velocity); "
                "got a MeanDenoiser, whose mean is that of one step of the chain."
            )
        if self.offset == "scaled" and reverse.decoder.discrete:
            raise ValueError(
                "Expected a decoder with a density for offset='scaled'; got "
                f"{reverse.decoder!r}, which gives probabilities: use offset='variational'."
            )
        if self.importance and not self._exact(reverse):
            raise ValueError(
                f"Expected at most exact_up_to={self.exact_up_to} dimensions for importance; got "
                f"{reverse.event_shape.numel()}: the mean weight is biased upwards by the "
                "noise of a random divergence."
            )

    @property
    def unbiased_weights(self) -> bool:
        return self.importance

    def samples_per_batch(self, batch_size: int) -> int:
        # a scaled sample may need one solve only; where not, its solves are split over batches
        return batch_size if self.offset == "scaled" else max(1, batch_size // self.particles)

    def _exact(self, reverse: ReverseChain) -> bool:
        return reverse.event_shape.numel() <= self.exact_up_to

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        certain = self.offset == "scaled" and self._exact(reverse)
        count = 1 if certain else self.particles
        rows = path_rows(batch, count, reverse.event_shape)
        solves = [self._solves(reverse, *call) for call in rows]
        log_w, calls, failed = (
            torch.cat(values).reshape(len(batch), count) for values in zip(*solves, strict=True)
        )
        batch.failures.add(batch.indices, failed.amax(1))
        summary = log_mean_of_weights(log_w) if self.importance else mean_of_draws(log_w)
        weights = log_w if self.offset == "variational" else None
        result = self.result(
            reverse, summary, kind="estimate", calls=calls.sum(1), log_weights=weights
        )
        if not certain:
            return result
        no_error = torch.zeros_like(result.value)
        return replace(result, std_error=no_error, degrees_of_freedom=None, remarks="")

    def _solves(
        self, reverse: ReverseChain, x_0: Tensor, context: Tensor | None, streams: NoiseStreams
    ) -> _Solves:
        noise = streams.normal(x_0) if self.offset == "variational" else None
        probe = None if self._exact(reverse) else _signs(streams.normal(x_0))
        start = _start(reverse, x_0, noise, context)
        log_p, calls, failed = self._log_p_1(_Flow(reverse, context, probe), start.x_1)
        failed = failed_at(failed, 1, start.log_ratio)
        return _Solves((log_p + start.log_ratio).cpu(), calls + start.calls, failed.cpu())

    def _log_p_1(self, flow: _Flow, x_1: Tensor) -> _Solves:
        """log N(x_T; 0, I) + ∫ div dλ from λ_1 to λ_T, its calls, and the step where it failed."""
        state = torch.cat([x_1.flatten(1), x_1.new_zeros(len(x_1), 1)], 1).double()
        log_snr = flow.reverse.forward_chain.log_snr
        y, calls, lost_at = solve(
            flow.slope(x_1.dtype),
            state,
            start=float(log_snr[0]),
            end=float(log_snr[-1]),
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )
        log_p_T = -0.5 * (y[:, :-1].square() + math.log(2 * math.pi)).sum(1)
        t = flow.reverse.forward_chain.times(lost_at).ceil()
        failed = torch.where(lost_at.isnan(), 0.0, t).long()
        return _Solves(log_p_T + y[:, -1], calls, failed)
