"""What all estimators share: checks, batches, and the order in which samples are asked for.

A subclass says what is to be done with one batch.  What it returns for sample i must be a function
of (seed, index of i) and x_0[i] alone: the batches are for speed, and any other partition gives the
same values, up to the rounding of the network's arithmetic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.finite import Failures
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.samples import sample_checksums
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.serialization import fingerprint
from pyrodiff.streams import derived_seed

__all__ = ["Batch", "Estimator", "noise_seed", "without_failures"]

_NOISE = 1


def noise_seed(seed: int) -> int:
    """The seed of an estimate's noise: samples drawn with ``seed`` were made of what it gives."""
    return derived_seed(seed, _NOISE)


@dataclass(frozen=True)
class Batch:
    """Some samples of a data set and where their randomness comes from.

    Args:
        x_0: shape (n, *event_shape), float64 where the device has it.
        context: shape (n, …) or None.
        indices: the index of each sample in the whole data set.
        seed: of the noise streams.
        rows: how many rows a network call may have.
        failures: where samples whose numbers are not finite are noted, with their step.
    """

    x_0: Tensor
    context: Tensor | None
    indices: Sequence[int]
    seed: int
    rows: int
    failures: Failures = field(default_factory=Failures)

    def __len__(self) -> int:
        return len(self.x_0)


def without_failures(result: LogLikelihood, batch: Batch) -> LogLikelihood:
    """The batch's result with NaN for every value that is not finite or whose sample failed."""
    batch.failures.add_values(batch.indices, result.value)
    lost = torch.tensor([index in batch.failures for index in batch.indices])
    return replace(
        result,
        value=result.value.masked_fill(lost, torch.nan),
        std_error=result.std_error.masked_fill(lost, torch.nan),
    )


class Estimator(ABC):
    """Per-sample log-likelihood of a model."""

    @property
    def unbiased_weights(self) -> bool:
        """Whether exp(value) is unbiased for p_θ(x_0), so that values may be averaged as such."""
        return False

    @abstractmethod
    def _batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        """The result of one batch; tensors on the CPU, float64.

        A value that is not finite is made NaN by ``estimate``, and counted; where it is known at
        which step it arose, that goes into ``batch.failures``.
        """

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

        The chain's arithmetic is in float64 whatever the precision of data and network, which is
        called in its own.

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
            TypeError: data that are no tensor.
            ValueError: no data, data that the model cannot explain, indices that are not one per
                sample, a model that the estimator cannot serve.

        Warns:
            UserWarning: samples for which the network returned NaN or infinity, or numbers too
                large for float64; it names them and the step.  Their values are NaN.
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
        failures = Failures()
        with evaluation_mode(reverse):
            for start in range(0, len(x_0), step):
                some = slice(start, min(start + step, len(x_0)))
                part = context if context is None else context[some]
                exact = reverse.forward_chain.carry(x_0[some], exact=True)
                batch = Batch(exact, part, indices[some], noise, batch_size, failures)
                parts.append(without_failures(self._batch(reverse, batch), batch))
                if progress is not None:
                    progress(some.stop, torch.cat([part.value for part in parts]))
        failures.warn(len(x_0), "Their values are NaN, and means leave them out.")
        return replace(
            LogLikelihood.concatenate(parts),
            model=model,
            unbiased_weights=self.unbiased_weights,
            indices=torch.tensor(list(indices), dtype=torch.int64),
            checksums=sample_checksums(x_0, context),
        )
