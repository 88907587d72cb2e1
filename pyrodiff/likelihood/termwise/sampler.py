"""The draws that a pilot learns from: terms, controls and curves at its nodes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.termwise.controls import Controls
from pyrodiff.likelihood.termwise.regression import Drawn
from pyrodiff.objectives import unchecked_term
from pyrodiff.streams import NoiseStreams, derived_seed

__all__ = ["REPEATS", "PilotSampler"]

REPEATS = 4  # draws of the noise for each sample at a node

_NOISE = 2  # neither that of samples nor that of estimates


@dataclass(frozen=True)
class PilotSampler:
    """Draws terms, controls and curves at the nodes.

    Args:
        reverse: the model.
        controls: the functions of (x_0, t, ε) to regress on.
        x: data, shape (N, *event_shape).
        context: shape (N, …) or None.
        seed: of the noise.
    """

    reverse: ReverseChain
    controls: Controls
    x: Tensor
    context: Tensor | None
    seed: int

    def draw(
        self,
        nodes: Tensor,
        samples: int,
        batch_size: int,
        progress: Callable[[int, int], object] | None,
    ) -> Drawn:
        """Terms (J, M, R), controls (J, M, R, F) and curves (J, M, K + 1); float64.

        Args:
            nodes: steps, shape (J,).
            samples: M at each of them; all N in turn, across the nodes.
            batch_size: rows per network call.
            progress: called with the network calls done and those in all.
        """
        total, batches = len(nodes) * samples, []
        for start in range(0, total, batch_size):
            rows = torch.arange(start, min(start + batch_size, total))
            batches.append(self._batch(rows, nodes[rows // samples]))
            if progress is not None:
                progress(REPEATS * (start + len(rows)), REPEATS * total)
        tables = (torch.cat(values) for values in zip(*batches, strict=True))
        return Drawn(*(table.unflatten(0, (len(nodes), samples)) for table in tables))

    def _batch(self, rows: Tensor, t: Tensor) -> Drawn:
        """Terms (n, R), controls (n, R, F) and curves (n, K + 1) of n rows at steps t, (n,)."""
        samples = rows % len(self.x)
        x_0 = self.reverse.forward_chain.carry(self.x[samples], exact=True)
        context = None if self.context is None else self.context[samples]
        seed = derived_seed(self.seed, _NOISE)
        streams = NoiseStreams(seed, rows.tolist(), self.reverse.event_shape)
        prepared = self.controls.prepare(x_0)
        hats, expected = self.controls.curves(prepared)
        curves = torch.cat([hats, expected.gather(1, t[:, None] - 1)], 1)
        noise = torch.stack([streams.normal(x_0) for _ in range(REPEATS)], 1)
        terms = [unchecked_term(self.reverse, x_0, t, noise[:, r], context) for r in range(REPEATS)]
        controls = self.controls.noise(prepared, t[:, None].expand(-1, REPEATS), noise)
        return Drawn(torch.stack(terms, 1).double().cpu(), controls.double().cpu(), curves)
