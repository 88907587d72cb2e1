"""What all estimators share: checks, batches, and the order in which samples are asked for.

A subclass says what is to be done with one batch.  What it returns for sample i must be a function
of (seed, index of i) and x_0[i] alone: the batches are for speed, and any other partition gives the
same values, up to the rounding of the network's arithmetic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.result import LogLikelihood, sample_checksums
from pyrodiff.serialization import fingerprint
from pyrodiff.streams import derived_seed

__all__ = ["Batch", "Estimator", "noise_seed"]

_NOISE = 1


def noise_seed(seed: int) -> int:
    """The seed of an estimate's noise: samples drawn with ``seed`` were made of what it gives."""
    return derived_seed(seed, _NOISE)


@dataclass(frozen=True)
class Batch:
    """Some samples of a data set and where their randomness comes from.

    Args:
        x_0: shape (n, *event_shape).
        context: shape (n, …) or None.
        indices: the index of each sample in the whole data set.
        seed: of the noise streams.
        rows: how many rows a network call may have.
    """

    x_0: Tensor
    context: Tensor | None
    indices: Sequence[int]
    seed: int
    rows: int

    def __len__(self) -> int:
        return len(self.x_0)


class Estimator(ABC):
    """Per-sample log-likelihood of a model."""

    @property
    def unbiased_weights(self) -> bool:
        """Whether exp(value) is unbiased for p_θ(x_0), so that values may be averaged as such."""
        return False

    @abstractmethod
    def _batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        """The result of one batch; tensors on the CPU, float64."""

    def _check(self, reverse: ReverseChain) -> None:  # noqa: B027  (most have nothing to check)
        """Raise ValueError where the estimator cannot serve this model."""

    def samples_per_batch(self, batch_size: int) -> int:
        """How many samples are worked on together when network calls have ``batch_size`` rows."""
        return batch_size

    @torch.no_grad()
    def estimate(
        self,
        reverse: ReverseChain,
        x_0: Tensor,
        *,
        seed: int = 0,
        batch_size: int = 256,
        context: Tensor | None = None,
        indices: Sequence[int] | None = None,
        progress: Callable[[int, Tensor], object] | None = None,
    ) -> LogLikelihood:
        """log p_θ of each sample; a value depends on (seed, index) and the sample alone.

        Args:
            reverse: the model; dropout and the like are switched off while it is asked.
            x_0: data, shape (N, *event_shape), N ≥ 1.
            seed: of the noise streams.
            batch_size: rows per network call, at most.
            context: shape (N, …) or None.
            indices: the place of each sample in a larger data set, of which these are a part;
                default 0 … N − 1.
            progress: called after each batch with the number of samples done and their values.

        Raises:
            ValueError: no data, data that the model cannot explain, indices that are not one per
                sample, a model that the estimator cannot serve.
        """
        reverse.check_data(x_0, context)
        if len(x_0) == 0:
            raise ValueError("Expected at least one sample; got none.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1; got {batch_size}.")
        indices = range(len(x_0)) if indices is None else indices
        if len(indices) != len(x_0):
            raise ValueError(f"Expected {len(x_0)} indices, one per sample; got {len(indices)}.")
        self._check(reverse)
        model = fingerprint(reverse)
        step, parts, noise = self.samples_per_batch(batch_size), [], noise_seed(seed)
        training = reverse.training
        reverse.eval()
        try:
            for start in range(0, len(x_0), step):
                some = slice(start, min(start + step, len(x_0)))
                part = context if context is None else context[some]
                batch = Batch(x_0[some], part, indices[some], noise, batch_size)
                parts.append(self._batch(reverse, batch))
                if progress is not None:
                    progress(some.stop, torch.cat([part.value for part in parts]))
        finally:
            reverse.train(training)
        return replace(
            LogLikelihood.concatenate(parts),
            model=model,
            unbiased_weights=self.unbiased_weights,
            indices=torch.tensor(list(indices), dtype=torch.int64),
            checksums=sample_checksums(x_0, context),
        )
