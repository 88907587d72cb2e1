r"""A pilot: what some network calls on *other* data say of the terms of the bound.

At a few dozen steps t_j it draws L_t several times for each of some samples and regresses it, in
units of its spread s_j over the noise, on the control variates c and the curves b of ``Controls``:

    L_t / s_t ≈ β_t·b_t(x_0) + γ_t·c_t(x_0, ε)

Coefficients and spreads between the t_j are interpolated over log t.  As none of it has seen the
samples to be scored nor their noise, any estimate that subtracts γ·c (of mean zero) and s β·b
(whose sum over t is known) has the same expectation as without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pyrodiff import serialization
from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.controls import Controls, Prepared, is_image
from pyrodiff.likelihood.layout import Allocation
from pyrodiff.modes import evaluation_mode
from pyrodiff.objectives import unchecked_term
from pyrodiff.streams import NoiseStreams, derived_seed

__all__ = ["Pilot"]

_NODES = 32  # steps that are looked at
_NOISE = 2  # neither that of samples nor that of estimates
_REPEATS = 4  # draws of the noise for each sample there
_RIDGE = 1e-3  # relative to each regressor's mean square


def _nodes(num_steps: int) -> Tensor:
    """1, 2, … T: even in log t, each integer once."""
    places = torch.logspace(0, 1, _NODES, base=float(num_steps), dtype=torch.float64)
    return torch.cat([places.round().long(), torch.arange(1, min(4, num_steps) + 1)]).unique()


def _interpolation(nodes: Tensor, num_steps: int) -> Tensor:
    """Weights over the nodes for each t = 1 … T, linear in log t, shape (T, J)."""
    t = torch.arange(1, num_steps + 1)
    right = torch.searchsorted(nodes, t)
    left = torch.where(nodes[right] == t, right, right - 1)
    place, ends = t.double().log(), nodes.double().log()
    gap = ends[right] - ends[left]
    share = torch.where(gap > 0, (place - ends[left]) / gap.clamp(min=1e-12), 0.0)
    weights = torch.zeros(num_steps, len(nodes), dtype=torch.float64)
    weights.scatter_(1, left[:, None], 1 - share[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])


@dataclass(frozen=True, eq=False)
class Pilot:
    """What was learned at steps t_j, j = 1 … J; made by ``Pilot.run``.

    Args:
        controls: the functions of (x_0, t, ε) that were regressed on.
        nodes: t_j, increasing from 1 to T, shape (J,).
        scale: s_j, the spread of L_t over the noise, nats, shape (J,).
        baseline: β_j, shape (J, K + 1).
        coefficients: γ_j, shape (J, F).
        spread: the spread over the noise that is left, nats, shape (J,).
        misfit: the spread over samples of what the baseline misses, nats, shape (J,).
        calls: network calls that were made.
    """

    controls: Controls
    nodes: Tensor
    scale: Tensor
    baseline: Tensor
    coefficients: Tensor
    spread: Tensor
    misfit: Tensor
    calls: int

    def __repr__(self) -> str:
        return f"Pilot({self.calls} calls, {len(self.nodes)} of {self.num_steps} steps)"

    @classmethod
    @torch.no_grad()
    def run(
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
        """Look at the terms of data that are not to be scored: the training set, say.

        Args:
            reverse: the model.
            x: shape (N, *event_shape), N ≥ 2.
            context: shape (N, …) or None.
            seed: of the noise.
            batch_size: rows per network call.
            calls: network calls, at most (rows that the network is asked about).
            progress: told the calls done and the calls in all.

        Raises:
            ValueError: too few data or calls, data that the model cannot explain.
        """
        reverse.check_data(x, context)
        nodes = _nodes(reverse.num_steps)
        slots = calls // (len(nodes) * _REPEATS)
        if len(x) < 2 or slots < 2:
            least = 2 * len(nodes) * _REPEATS
            raise ValueError(
                f"Expected at least 2 samples and {least} calls for a pilot; "
                f"got {len(x)} and {calls}."
            )
        controls = Controls.fit(x, reverse.forward_chain.log_snr)
        sampler = _Sampler(reverse, controls, x, context, seed)
        with evaluation_mode(reverse):
            drawn = sampler.draw(nodes, slots, batch_size, progress)
        scale, baseline, coefficients, spread, misfit = _regress(*drawn)
        made = len(nodes) * slots * _REPEATS
        return cls(controls, nodes, scale, baseline, coefficients, spread, misfit, made)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.controls.log_snr)

    @cached_property
    def _weights(self) -> Tensor:
        return _interpolation(self.nodes, self.num_steps)

    def allocation(self, start: int) -> Allocation:
        """Where network calls go from step ``start`` on; made once."""
        if start not in self._allocations:
            spread, misfit = (self._between(v) for v in (self.spread, self.misfit))
            self._allocations[start] = Allocation(spread, misfit, start)
        return self._allocations[start]

    @cached_property
    def _allocations(self) -> dict[int, Allocation]:
        return {}

    def _between(self, values: Tensor) -> Tensor:
        """Positive values at the nodes, interpolated in the log to every t, (J,) to (T,)."""
        return (self._weights @ values.clamp(min=1e-30).log()).exp()

    @cached_property
    def gamma(self) -> Tensor:
        """s_t γ_t: the controls' coefficients in nats at every t, shape (T, F)."""
        return self._scales * (self._weights @ self.coefficients)

    @cached_property
    def beta(self) -> Tensor:
        """s_t β_t: the curves' coefficients in nats at every t, shape (T, K + 1)."""
        return self._scales * (self._weights @ self.baseline)

    def baseline_at(self, prepared: Prepared) -> Tensor:
        """b: what is expected of L_t at every t, nats, shape (n, T), float64."""
        hats, expected = self.controls.curves(prepared)
        return hats @ self.beta[:, :-1].mT + expected * self.beta[:, -1]

    @cached_property
    def _scales(self) -> Tensor:
        return self._between(self.scale)[:, None]

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
        tensors = {name: getattr(self, name) for name in _OWN}
        tensors |= {name: getattr(self.controls, name) for name in _CONTROLS}
        tensors["calls"] = torch.tensor(self.calls)
        serialization.write_weights(Path(path), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Pilot":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a pilot.
        """
        tensors = serialization.read_weights(Path(path))
        missing = sorted({*_OWN, *_CONTROLS, "calls"} - tensors.keys())
        if missing:
            raise ValueError(f"Expected a pilot in {path}; got a file without {missing[0]!r}.")
        _check_tensors(tensors, Path(path))
        controls = Controls(*(tensors[name] for name in _CONTROLS))
        own = {name: tensors[name] for name in _OWN}
        pilot = cls(controls, calls=int(tensors["calls"]), **own)
        sizes = pilot.baseline.shape[1] - 1, pilot.coefficients.shape[1]
        if sizes != (controls.num_hats, controls.num_controls):
            raise ValueError(
                f"Expected {controls.num_hats} curves and {controls.num_controls} controls of the "
                f"pilot in {path}; got coefficients of {sizes[0]} and {sizes[1]}."
            )
        return pilot


_OWN = {
    "nodes": "J",
    "scale": "J",
    "baseline": "JK",
    "coefficients": "JF",
    "spread": "J",
    "misfit": "J",
}
_CONTROLS = {"log_snr": "T", "knots": "RH", "mean": "d", "eigenvalues": "r", "basis": "dr"}
_SPREADS = ("scale", "spread", "misfit", "eigenvalues")


def _check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse a file whose tensors are no pilot's: axes of equal letters have equal sizes."""
    sizes: dict[str, int] = {}
    for name, axes in ({"calls": ""} | _OWN | _CONTROLS).items():
        value = tensors[name]
        same = value.dim() == len(axes) and all(
            sizes.setdefault(axis, n) == n > 0 for axis, n in zip(axes, value.shape, strict=True)
        )
        whole = name in ("calls", "nodes")
        if not same or value.dtype != (torch.int64 if whole else torch.float64):
            raise ValueError(
                f"Expected a pilot in {path}; got {name!r} of shape {tuple(value.shape)} and type "
                f"{value.dtype}."
            )
        finite = value.isfinite() | (value.isnan() & (name == "knots"))
        if not bool(finite.all()) or (name in _SPREADS and bool((value < 0).any())):
            raise ValueError(f"Expected a pilot in {path}; got a {name} that is out of range.")
    nodes, log_snr = tensors["nodes"], tensors["log_snr"]
    ends = (int(nodes[0]), int(nodes[-1])) == (1, len(log_snr))
    if not ends or not bool((nodes.diff() > 0).all()) or not bool((log_snr.diff() < 0).all()):
        raise ValueError(
            f"Expected steps of the pilot in {path} to grow from 1 to {len(log_snr)}, and log-SNRs "
            "to fall; got others."
        )


@dataclass(frozen=True)
class _Sampler:
    """Draws terms, controls and curves at the nodes."""

    reverse: ReverseChain
    controls: Controls
    x: Tensor
    context: Tensor | None
    seed: int

    def draw(
        self,
        nodes: Tensor,
        slots: int,
        batch_size: int,
        progress: Callable[[int, int], object] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Terms (J, M, R), controls (J, M, R, F) and curves (J, M, K + 1); float64."""
        total, repeats = len(nodes) * slots, _REPEATS
        seed = derived_seed(self.seed, _NOISE)
        terms = torch.empty(total, repeats, dtype=torch.float64)
        controls = torch.empty(total, repeats, self.controls.num_controls, dtype=torch.float64)
        curves = torch.empty(total, self.controls.num_hats + 1, dtype=torch.float64)
        for start in range(0, total, batch_size):
            some = torch.arange(start, min(start + batch_size, total))
            rows, t = some % len(self.x), nodes[some // slots]
            x_0 = self.reverse.forward_chain.carry(self.x[rows], exact=True)
            context = None if self.context is None else self.context[rows]
            streams = NoiseStreams(seed, some.tolist(), self.reverse.event_shape)
            prepared = self.controls.prepare(x_0)
            hats, expected = self.controls.curves(prepared)
            curves[some] = torch.cat([hats, expected.gather(1, t[:, None] - 1)], 1)
            noise = torch.stack([streams.normal(x_0) for _ in range(repeats)], 1)
            for repeat in range(repeats):
                term = unchecked_term(self.reverse, x_0, t, noise[:, repeat], context)
                terms[some, repeat] = term.double().cpu()
            every = t[:, None].expand(-1, repeats)
            controls[some] = self.controls.noise(prepared, every, noise).double().cpu()
            if progress is not None:
                progress(repeats * (int(some[-1]) + 1), repeats * total)
        shape = (len(nodes), slots)
        return (
            terms.reshape(*shape, repeats),
            controls.reshape(*shape, repeats, -1),
            curves.reshape(*shape, -1),
        )


def _regress(
    terms: Tensor, controls: Tensor, curves: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scales, baselines, coefficients, spreads left and misfits at each node."""
    scale = terms.var(2).mean(1).sqrt().clamp(min=1e-12)
    target = terms / scale[:, None, None]
    # Within a sample its own level does not count: it varies more than the noise makes L_t vary.
    coefficients = _ridge(_centred(controls), _centred(target))
    rest = target - torch.einsum("jmrf,jf->jmr", controls, coefficients)
    baseline = _with_intercept(curves, rest.mean(2))
    left = rest.var(2).mean(1)
    spread = left.sqrt() * scale
    between = (rest.mean(2) - torch.einsum("jmf,jf->jm", curves, baseline)).square().mean(1)
    misfit = (between - left / terms.shape[2]).clamp(min=0).sqrt() * scale
    return scale, baseline, coefficients, spread, misfit


def _with_intercept(curves: Tensor, target: Tensor) -> Tensor:
    """Coefficients (J, K + 1) whose constant is free of the penalty.

    Hat functions add up to the same for every sample: a constant is a constant on all of them.
    """
    middle, level = curves.mean(1, keepdim=True), target.mean(1, keepdim=True)
    slopes = _ridge(curves - middle, target - level)
    constant = level[:, 0] - (middle[:, 0] * slopes).sum(1)
    total = middle[:, 0, :-1].sum(1)
    slopes[:, :-1] += (constant / total)[:, None]
    return slopes


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(2, keepdim=True)


def _ridge(known: Tensor, target: Tensor) -> Tensor:
    """Coefficients at each node, (J, …, F) and (J, …) to (J, F).

    Nodes beside it count half.  The reconstruction, t = 1, is of another kind than the KL terms
    and stands alone.
    """
    rows, y = known.flatten(1, -2), target.flatten(1)
    gram, moment = rows.mT @ rows, (rows.mT @ y[..., None])[..., 0]
    solutions = []
    for j in range(len(rows)):
        beside = [i for i in (j - 1, j + 1) if min(i, j) >= 1 and i < len(rows)]
        own = gram[j] + 0.5 * gram[beside].sum(0)
        diagonal = own.diagonal()
        # a regressor that the pilot hardly saw, though others may, gets no large coefficient
        rare = diagonal.max() / rows.shape[1] + 1e-300
        own = own + torch.diag(_RIDGE * diagonal + rare)
        solutions.append(torch.linalg.solve(own, moment[j] + 0.5 * moment[beside].sum(0)))
    return torch.stack(solutions)
