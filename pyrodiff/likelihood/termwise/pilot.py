r"""A pilot: what some network calls on *other* data tell about the terms of the bound.

At a few dozen steps t_j, spread over the chain as calls are without a pilot, it draws L_t several
times for each of some samples.  In units of u_t = w_t/(1 + SNR_t), in which terms do not jump where
λ does, it regresses them on the control variates c and the curves b of ``Controls``,

    (L_t − k_t)/u_t ≈ β_t·b_t(x_0) + γ_t·c_t(x_0, ε)

and keeps at each step what helps on held-back samples (``regression``).  Coefficients are
interpolated in λ, and shrunk by draws half way between two nodes.  Nothing of this depends on the
samples to be scored or on their noise: subtracting u γ·c (of mean zero) and u β·b (whose sum over t
is known) leaves the expectation as it is.  Calls then go where the remaining spread is, and a fifth
of them where they would go without a pilot.  The remaining kurtosis tells how reliable an error
from few draws is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.termwise.controls import Controls, Prepared, is_image
from pyrodiff.likelihood.termwise.files import CONTROLS, TABLES, read_pilot, write_pilot
from pyrodiff.likelihood.termwise.known import KnownTerms, known_terms
from pyrodiff.likelihood.termwise.moments import TYPICAL_KURTOSIS, relative_error
from pyrodiff.likelihood.termwise.nodes import interpolation, middles, pilot_nodes, sides
from pyrodiff.likelihood.termwise.regression import Drawn, Regression, regress, scaled
from pyrodiff.likelihood.termwise.sampler import REPEATS, PilotSampler
from pyrodiff.likelihood.termwise.strata import Allocation, Layout, apart, typical_density
from pyrodiff.networks.modes import evaluation_mode

__all__ = ["Pilot"]

_TRUST = 0.8  # the share of calls that goes where the pilot says
_MISFIT = 0.25  # the share of a misfit over samples that varies within a stratum
_FLOOR = 1e-3  # of the mean spread, added to that of every step


def _learn(drawn: Drawn, nodes: Tensor, fitted: Tensor, log_snr: Tensor, affine: int) -> Regression:
    """Coefficients fitted at some of the nodes, and interpolated ones, shrunk, at the others."""
    fit = torch.isin(nodes, fitted)
    inner = Drawn(*(value[fit] for value in drawn))
    at_nodes = regress(inner, affine, apart(log_snr)[fitted - 1])
    if bool(fit.all()):
        return at_nodes
    weights = interpolation(fitted, log_snr)[nodes[~fit] - 1]
    outer = Drawn(*(value[~fit] for value in drawn))
    between = scaled(outer, weights @ at_nodes.controls, weights @ at_nodes.curves)
    tables = []
    for one, other in zip(at_nodes, between, strict=True):
        table = one.new_empty(len(nodes), *one.shape[1:])
        table[fit], table[~fit] = one, other
        tables.append(table)
    return Regression(*tables)


def _nodes(known: KnownTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Where calls go without a pilot, (T,), the steps that are fitted to, and those and middles."""
    density = typical_density(known.log_snr, known.unit)
    fitted = pilot_nodes(density, apart(known.log_snr))
    return density, fitted, torch.cat([fitted, middles(fitted, known.log_snr)]).sort().values


def _check_size(samples: int, calls: int, least_calls: int) -> None:
    if samples < 2 or calls < least_calls:
        raise ValueError(
            f"Expected at least 2 samples and {least_calls} calls for a pilot; "
            f"got {samples} and {calls}."
        )


@dataclass(frozen=True, eq=False)
class Pilot:
    """What was learned at steps t_j, j = 1 … J; made by ``Pilot.fit``.

    Args:
        controls: the functions of (x_0, t, ε) that were regressed on.
        nodes: t_j and the middles between them, increasing from 1 to T, shape (J,).
        unit: u_t, nats, shape (T,).
        density: where calls would go without the pilot, shape (T,).
        baseline: β_j, shape (J, K + 1).
        coefficients: γ_j, shape (J, F).
        scale: the spread of L_t over the noise, in units of u_t, shape (J,).
        spread: what remains of it on held-back samples, shape (J,).
        kurtosis: its excess kurtosis, shape (J,).
        misfit: the spread over samples of what the baseline misses, shape (J,).
        calls: network calls that it took.
    """

    controls: Controls
    nodes: Tensor
    unit: Tensor
    density: Tensor
    baseline: Tensor
    coefficients: Tensor
    scale: Tensor
    spread: Tensor
    kurtosis: Tensor
    misfit: Tensor
    calls: int

    def __repr__(self) -> str:
        return f"Pilot({self.calls} calls, {len(self.nodes)} of {self.num_steps} steps)"

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        reverse: ReverseChain,
        x: Tensor,
        *,
        context: Tensor | None = None,
        seed: int = 0,
        batch_size: int = 256,
        calls: int = 20_000,
        progress: Callable[[int, int], object] | None = None,
    ) -> "Pilot":
        """Learn from data that are not to be scored: the training set, say.

        Args:
            reverse: the model.
            x: shape (N, *event_shape), N ≥ 2.
            context: shape (N, …) or None.
            seed: of the noise.
            batch_size: rows per network call.
            calls: network calls, at most (rows of the network's input).
            progress: called with the network calls done and those in all.

        Raises:
            ValueError: too few data or calls, data that the model cannot explain.
        """
        reverse.check_data(x, context)
        known = known_terms(reverse)
        density, fitted, nodes = _nodes(known)
        per_sample = len(nodes) * REPEATS * reverse.calls_per_step
        samples = calls // per_sample
        _check_size(len(x), calls, least_calls=2 * per_sample)
        controls = Controls.fit(x, known.log_snr)
        sampler = PilotSampler(reverse, controls, x, context, seed)
        with evaluation_mode(reverse):
            drawn = sampler.draw(nodes, samples, batch_size, progress)
        unit, constant = (v[nodes - 1, None, None] for v in (known.unit, known.constant))
        drawn = drawn._replace(terms=(drawn.terms - constant) / unit)
        learned = _learn(drawn, nodes, fitted, known.log_snr, controls.num_affine)
        return cls(
            controls,
            nodes,
            known.unit,
            density,
            baseline=learned.curves,
            coefficients=learned.controls,
            scale=drawn.terms.var(2).mean(1).sqrt(),
            spread=learned.noise,
            kurtosis=learned.kurtosis,
            misfit=learned.misfit,
            calls=samples * per_sample,
        )

    run = fit  # its former name

    @staticmethod
    def least_calls(reverse: ReverseChain) -> int:
        """The fewest network calls that ``fit`` accepts for this model."""
        return 2 * len(_nodes(known_terms(reverse))[2]) * REPEATS * reverse.calls_per_step

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.controls.log_snr)

    @cached_property
    def _alone(self) -> Tensor:
        return apart(self.controls.log_snr)

    @cached_property
    def _weights(self) -> Tensor:
        return interpolation(self.nodes, self.controls.log_snr)

    def allocation(self, start: int) -> Allocation:
        """Where network calls go from step ``start`` on; made once."""
        if start not in self._allocations:
            self._allocations[start] = Allocation(self._mixture(start), self._alone, start)
        return self._allocations[start]

    @cached_property
    def _allocations(self) -> dict[int, Allocation]:
        return {}

    def _between(self, values: Tensor) -> Tensor:
        """Residual values of the nodes, (J,), at every t: the larger of those on either side, (T,).

        Interpolated coefficients leave more than those at the steps they were fitted to.
        """
        left, right = sides(self.nodes, self.num_steps)
        return values[left].maximum(values[right])

    @cached_property
    def noise(self) -> Tensor:
        """The remaining spread of L_t over the noise, nats, shape (T,)."""
        return self.unit * self._between(self.spread)

    @cached_property
    def missed(self) -> Tensor:
        """The spread within a stratum of what the curves miss of a sample, nats, shape (T,)."""
        return _MISFIT * self.unit * self._between(self.misfit)

    def _mixture(self, start: int) -> Tensor:
        """μ: mostly in proportion to the remaining spread, else as without a pilot."""
        spread = (self.noise.square() + self.missed.square()).sqrt()
        drawn = spread[start - 1 :]
        if len(drawn) == 0 or float(drawn.sum()) == 0:
            return self.density
        spread = spread + _FLOOR * drawn.mean()
        shares = [v / v[start - 1 :].sum() for v in (spread, self.density)]
        return _TRUST * shares[0] + (1 - _TRUST) * shares[1]

    def knows_curves(self, start: int) -> bool:
        """Whether the curves miss less within strata than the noise of an estimate is."""
        density = self.allocation(start).density[start - 1 :]
        noise, missed = (v[start - 1 :].square() / density for v in (self.noise, self.missed))
        return float(missed.sum()) <= float(noise.sum())

    def tails(self, layout: Layout, start: int) -> tuple[Tensor, float]:
        """Excess kurtosis of each stratum's draws f y, (S,), and expected degrees of freedom.

        With t ~ μ_t/μ(s), f = μ(s)/μ_t and D, κ the spread and excess kurtosis at t,

            E (f y)² = Σ_t f D²,   E (f y)⁴ = Σ_t f³ D⁴ (κ + 3).
        """
        density = self.allocation(start).density.clamp(min=1e-300)
        mass = layout.sums(density)
        kurtosis = self._between(self.kurtosis).clamp(min=TYPICAL_KURTOSIS)
        second = layout.sums(self.noise.square() / density) * mass
        fourth = layout.sums(self.noise.pow(4) * (kurtosis + 3) / density.pow(3)) * mass.pow(3)
        excess = torch.where(second > 0, fourth / second.square().clamp(min=1e-300) - 3, 0.0)
        variance = second / layout.draws
        errors = (variance.square() * relative_error(layout.draws, excess)).sum()
        freedom = 2 * float(variance.sum().square() / errors) if float(errors) > 0 else math.inf
        return excess, freedom

    @cached_property
    def gamma(self) -> Tensor:
        """u_t γ_t: the controls' coefficients in nats at every t, shape (T, F)."""
        return self.unit[:, None] * (self._weights @ self.coefficients)

    @cached_property
    def beta(self) -> Tensor:
        """u_t β_t: the curves' coefficients in nats at every t, shape (T, K + 1)."""
        return self.unit[:, None] * (self._weights @ self.baseline)

    def baseline_at(self, prepared: Prepared) -> Tensor:
        """b: the expected L_t − k_t at every t, nats, shape (n, T), float64."""
        hats, expected = self.controls.curves(prepared)
        return hats @ self.beta[:, :-1].mT + expected * self.beta[:, -1]

    def check(self, reverse: ReverseChain) -> None:
        """Raise ValueError unless the pilot was run on a chain of these steps and events."""
        chain, size = reverse.forward_chain, reverse.event_shape.numel()
        same = torch.equal(self.controls.log_snr, chain.log_snr.cpu())
        image = len(self.controls.knots) > 1
        if not same or len(self.controls.mean) != size or image != is_image(reverse.event_shape):
            raise ValueError(
                f"Expected a pilot of this model ({chain.num_steps} steps, events of shape "
                f"{tuple(reverse.event_shape)}); got one of {self.num_steps} steps and "
                f"{len(self.controls.mean)} dimensions, {'images' if image else 'no images'}"
                f"{'' if same else ', with other log-SNRs'}."
            )

    def save(self, path: str | Path) -> None:
        """Write the pilot as safetensors, atomically."""
        tensors = {name: getattr(self, name) for name in TABLES}
        tensors |= {name: getattr(self.controls, name) for name in CONTROLS}
        write_pilot(Path(path), tensors | {"calls": torch.tensor(self.calls)})

    @classmethod
    def load(cls, path: str | Path) -> "Pilot":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a pilot.
        """
        tensors = read_pilot(Path(path))
        controls = Controls(**{name: tensors[name] for name in CONTROLS})
        tables = {name: tensors[name] for name in TABLES}
        pilot = cls(controls, calls=int(tensors["calls"]), **tables)
        sizes = pilot.baseline.shape[1] - 1, pilot.coefficients.shape[1]
        if sizes != (controls.num_hats, controls.num_controls):
            raise ValueError(
                f"Expected {controls.num_hats} curves and {controls.num_controls} controls of the "
                f"pilot in {path}; got coefficients of {sizes[0]} and {sizes[1]}."
            )
        return pilot
