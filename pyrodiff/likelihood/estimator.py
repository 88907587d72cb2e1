"""What all estimators share: checks, batches, and what a sample's value may depend on.

A sample's value is a function of (seed, index of the sample), of the sample and of its context
alone.  Batches are for speed: any other partition of the data gives the same values, up to the
rounding of the network's arithmetic.

An estimator of your own is a subclass that says what is done with one batch::

    @dataclass(frozen=True)
    class TrimmedBound(Estimator):
        particles: int = 8

        def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
            log_w = path_weights(reverse, batch, self.particles).sort(1).values[:, 1:]
            calls = self.particles * reverse.calls_per_path
            summary = mean_of_draws(log_w)
            return self.result(reverse, summary, kind="estimate", calls=calls, log_weights=log_w)

It is called as all others are, ``TrimmedBound(16).estimate(reverse, x_0, seed=0)``, and its
``repr`` is kept with its results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.finite import Failures
from pyrodiff.likelihood.result import Kind, LogLikelihood
from pyrodiff.likelihood.samples import sample_checksums
from pyrodiff.likelihood.statistics import Summary
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.serialization import fingerprint
from pyrodiff.streams import derived_seed

__all__ = ["Batch", "Estimator", "noise_seed", "without_failures"]

_NOISE = 1


def noise_seed(seed: int) -> int:
    """The seed of an estimate's noise, which is not that of samples drawn with ``seed``."""
    return derived_seed(seed, _NOISE)


@dataclass(frozen=True)
class Batch:
    """Some samples of a data set and where their randomness comes from.

    Args:
        x_0: shape (n, *event_shape), float64 where the device has it.
        context: shape (n, …) or None.
        indices: the index of each sample in the whole data set.
        seed: of the noise streams: ``NoiseStreams(batch.seed, batch.indices, …)``.
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

    def select(self, rows: Sequence[int]) -> "Batch":
        """The batch of some of these samples, by their positions."""
        rows = list(rows)
        context = None if self.context is None else self.context[rows]
        indices = [self.indices[row] for row in rows]
        return replace(self, x_0=self.x_0[rows], context=context, indices=indices)


def without_failures(result: LogLikelihood, batch: Batch) -> LogLikelihood:
    """The batch's result with NaN for every value that is not finite or whose sample failed."""
    batch.failures.add_values(batch.indices, result.value)
    failed = torch.tensor([index in batch.failures for index in batch.indices])
    return replace(
        result,
        value=result.value.masked_fill(failed, torch.nan),
        std_error=result.std_error.masked_fill(failed, torch.nan),
    )


class Estimator(ABC):
    """Per-sample log-likelihood of a model.

    To override: ``estimate_batch``; where needed also ``check``, ``samples_per_batch``,
    ``unbiased_weights`` and ``review``.
    """

    @abstractmethod
    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        """The result of one batch, in nats; tensors on the CPU, float64.

        Sample i's value may depend on ``batch.seed``, ``batch.indices[i]``, ``batch.x_0[i]`` and
        ``batch.context[i]`` alone: take all noise from ``streams.NoiseStreams``.  Network calls
        have at most ``batch.rows`` rows.  The model is in evaluation mode, and gradients are off.

        A value that is not finite needs no care: ``estimate`` makes it NaN and warns.  Where it is
        known at which step the number arose, note it in ``batch.failures``.  Why a standard error
        is NaN goes into ``remarks``, a sentence that is shown once however many batches say it.
        ``result`` puts a result together from a summary of draws.
        """

    @property
    def unbiased_weights(self) -> bool:
        """Whether exp(value) is unbiased for p_θ(x_0), so that values may be averaged as such."""
        return False

    def check(self, reverse: ReverseChain) -> None:  # noqa: B027  (most have nothing to check)
        """Raise ValueError where the estimator cannot serve this model."""

    def samples_per_batch(self, batch_size: int) -> int:
        """How many samples are worked on together when network calls have ``batch_size`` rows."""
        return batch_size

    def review(self, result: LogLikelihood) -> None:  # noqa: B027  (most have nothing to say)
        """Warn of what only the whole result can show; called once, by ``estimate``."""

    def result(
        self,
        reverse: ReverseChain,
        summary: Summary,
        *,
        kind: Kind,
        calls: int | Tensor,
        log_weights: Tensor | None = None,
    ) -> LogLikelihood:
        """The result of a batch.

        Args:
            reverse: the model.
            summary: of each sample's draws, from ``statistics``.
            kind: what the value's expectation is.
            calls: network calls per sample, one number for all or one each, (n,).
            log_weights: the weights that were summarised, nats, (n, K), if they are such.
        """
        spent = calls if isinstance(calls, Tensor) else torch.full(summary.value.shape, calls)
        return LogLikelihood(
            value=summary.value,
            std_error=summary.std_error,
            kind=kind,
            calls=spent,
            dimensions=reverse.event_shape.numel(),
            estimator=repr(self),
            degrees_of_freedom=summary.degrees_of_freedom,
            log_weights=log_weights,
            remarks=summary.remarks,
        )

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
            reverse: the model; dropout and the like are switched off meanwhile.
            x_0: data, shape (N, *event_shape), N ≥ 1.
            seed: of the noise streams.
            batch_size: rows per network call, at most.
            context: shape (N, …) or None.
            indices: the index of each sample in a larger data set, of which these are a part;
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
        indices = range(len(x_0)) if indices is None else indices
        if len(indices) != len(x_0):
            raise ValueError(f"Expected {len(x_0)} indices, one per sample; got {len(indices)}.")
        noise = noise_seed(seed)

        def estimate_rows(rows: slice, failures: Failures) -> LogLikelihood:
            batch = Batch(
                x_0=reverse.forward_chain.carry(x_0[rows], exact=True),
                context=None if context is None else context[rows],
                indices=indices[rows],
                seed=noise,
                rows=batch_size,
                failures=failures,
            )
            return without_failures(self.estimate_batch(reverse, batch), batch)

        result = replace(
            self.over_batches(
                reverse, estimate_rows, count=len(x_0), batch_size=batch_size, progress=progress
            ),
            unbiased_weights=self.unbiased_weights,
            indices=torch.tensor(list(indices), dtype=torch.int64),
            checksums=sample_checksums(x_0, context),
        )
        self.review(result)
        return result

    def over_batches(
        self,
        reverse: ReverseChain,
        estimate_rows: Callable[[slice, Failures], LogLikelihood],
        *,
        count: int,
        batch_size: int,
        progress: Callable[[int, Tensor], object] | None,
    ) -> LogLikelihood:
        """The results of all batches as one, with the model's checksum.

        Args:
            reverse: the model, in evaluation mode meanwhile.
            estimate_rows: the result of the samples in a slice of 0 … ``count`` − 1, which notes
                failures by their index.
            count: how many samples there are.
            batch_size, progress: as of ``estimate``.
        """
        check_count("batch_size", batch_size)
        self.check(reverse)
        model, size = fingerprint(reverse), self.samples_per_batch(batch_size)
        results: list[LogLikelihood] = []
        failures = Failures()
        with evaluation_mode(reverse):
            for start in range(0, count, size):
                rows = slice(start, min(start + size, count))
                results.append(estimate_rows(rows, failures))
                if progress is not None:
                    progress(rows.stop, torch.cat([result.value for result in results]))
        # the caller is four frames up: estimate, its decorator, and this function's two
        failures.warn(count, "Their values are NaN, and means leave them out.", stacklevel=5)
        return replace(LogLikelihood.concatenate(results), model=model)
