r"""The densities of the reverse chain: p_θ(x_{t−1} | x_t) and p_θ(x_0 | x_1), by network calls."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from pyrodiff.chains.forward import ForwardChain
from pyrodiff.chains.names import NamedSites
from pyrodiff.decoders import Decoder, GaussianDecoder
from pyrodiff.denoisers import Denoiser, Prediction
from pyrodiff.distributions import Law, Normal, StructuredNormal
from pyrodiff.kernels import Level, Step
from pyrodiff.variances import Variance

__all__ = ["Transitions", "join_contexts"]


def _repeat(batch: torch.Size, context: Tensor | None, level: Level) -> tuple[Tensor | None, Level]:
    """Context and level of each row of a flattened batch; a context may have such rows already."""

    def flatten(value: Tensor) -> Tensor:
        return value.expand(*batch, *value.shape[1:]).reshape(-1, *value.shape[1:])

    if level.log_snr.dim():
        level = level.map(flatten)
    if context is None or len(context) == batch.numel():
        return context, level
    return flatten(context), level


def join_contexts(
    x_t: Tensor, event_dim: int, context: Tensor | None, context_dim: int | None
) -> tuple[Tensor, Tensor | None]:
    """x_t in the batch that it has with its contexts, and these as rows of the flattened batch.

    Args:
        x_t: shape (*batch, *event_shape).
        event_dim: how many axes an event has.
        context: None, or shape (N, …), which is returned; with ``context_dim``, (*batch', …).
        context_dim: how many axes the context of one sample has, or None.

    Raises:
        ValueError: batches that do not broadcast.
    """
    if context is None or context_dim is None:
        return x_t, context
    batch, event = x_t.shape[: x_t.dim() - event_dim], x_t.shape[x_t.dim() - event_dim :]
    first = context.dim() - context_dim
    try:
        joint = torch.broadcast_shapes(batch, context.shape[:first])
    except RuntimeError as error:
        raise ValueError(
            f"Expected contexts whose batch axes go with {tuple(batch)}, those of the samples; "
            f"got {tuple(context.shape[:first])}."
        ) from error
    rows = context.expand(*joint, *context.shape[first:]).reshape(-1, *context.shape[first:])
    return x_t.expand(*joint, *event), rows


class Transitions(NamedSites):
    """What ``ReverseChain`` is made of, as densities."""

    event_shape: torch.Size
    event_dim: int
    forward_chain: ForwardChain
    variance: Variance
    decoder: Decoder

    def step(self, t: Tensor | int, x: Tensor) -> Step:
        """The steps ``t`` (1 … T), an integer or shape (N,), cast and shaped like ``x``."""
        return self.forward_chain.steps.at(t, x, self.event_dim)

    def level(self, log_snr: Tensor, x: Tensor) -> Level:
        """The level of any log-SNR, shape () or (N,), float64, cast and shaped like ``x``."""
        return self.forward_chain.steps.between(log_snr, x, self.event_dim)

    @property
    def log_snrs(self) -> Tensor:
        """λ_1 … λ_T, float64, on the CPU."""
        return self.forward_chain.log_snr

    @property
    def calls_per_step(self) -> int:
        """Network calls in a step: one, and the variance's products with the Jacobian."""
        return 1 + self.variance.products(self.event_shape.numel())

    @property
    def calls_per_path(self) -> int:
        """Network calls of one pass over the chain."""
        return self.num_steps * self.calls_per_step

    def predict(
        self,
        x_t: Float[Tensor, "..."],
        level: Level,
        context: Tensor | None = None,
        *,
        mean_only: bool = False,
    ) -> Prediction:
        """x̂_0 and what the variance needs, at x_t of shape (*batch, *event_shape).

        One network call, and the variance's products with the denoiser's Jacobian unless
        ``mean_only``.  ``level`` and ``context`` belong to the rightmost batch axis; further batch
        axes on the left (particles) share them, unless ``context`` has a row for each.
        """
        batch = x_t.shape[: x_t.dim() - self.event_dim]
        flat = x_t.reshape(-1, *self.event_shape)
        if len(batch) > 1:
            context, level = _repeat(batch, context, level)
        # Not `self.denoiser`: inside a Pyro program that access registers every parameter anew.
        denoiser = cast(Denoiser, self._modules["denoiser"])
        if self.variance.differentiates and not mean_only:
            if torch.is_inference_mode_enabled():  # what is made there has no gradient
                with torch.inference_mode(False):
                    flat, level = flat.clone(), level.map(Tensor.clone)
                    context = None if context is None else context.clone()

            def denoise(x: Tensor) -> Prediction:
                return denoiser(x, level, context, self.variance.learned)

            prediction = self.variance.predict(denoise, flat, level)
        else:
            prediction = denoiser(flat, level, context, self.variance.learned)
        if len(batch) == 1:
            return prediction
        return prediction.map(lambda value: value.reshape((*batch, *value.shape[1:])))

    def log_variance(self, step: Step, prediction: Prediction) -> Tensor:
        """log Σ_θ of p_θ(x_{t−1} | x_t), isotropic or of the shape of x_t."""
        return self.variance.log_variance(step, prediction.raw_variance)

    def transition(self, x_t: Tensor, t: int, context: Tensor | None = None) -> Law:
        """p_θ(x_{t−1} | x_t) for t = 2 … T, x_t of shape (*batch, *event_shape)."""
        step = self.step(t, x_t)
        prediction = self.predict(x_t, step, context)
        if self.variance.differentiates:
            covariance = self.variance.covariance(step, prediction, self.event_dim)
            mean = step.mean(prediction.x0_hat, x_t)
            return StructuredNormal(mean, covariance, self.event_dim)
        scale = (0.5 * self.log_variance(step, prediction)).exp()
        mean = step.mean(prediction.x0_hat, x_t)
        normal = Normal(mean, scale.expand(mean.shape), validate_args=False)
        return normal.to_event(self.event_dim)

    def decode(
        self, x_1: Tensor, context: Tensor | None = None, prediction: Prediction | None = None
    ) -> Law:
        """p_θ(x_0 | x_1), x_1 of shape (*batch, *event_shape); by one network call, or none.

        Args:
            x_1: shape (*batch, *event_shape).
            context: shape (N, …) or None.
            prediction: the denoiser's at (x_1, 1), where it is known.
        """
        step = self.step(1, x_1)
        if prediction is None:
            prediction = self.predict(x_1, step, context)
        return self.reconstruction(x_1, step, prediction)

    def reconstruction(self, x_1: Tensor, step: Step, prediction: Prediction) -> Law:
        """p_θ(x_0 | x_1) from the denoiser's prediction there; ``step`` is that of t = 1."""
        if not self.variance.differentiates:
            log_variance = self.variance.log_variance(step, prediction.raw_variance)
        else:
            covariance = self.variance.covariance(step, prediction, self.event_dim)
            if isinstance(self.decoder, GaussianDecoder) and self.decoder.scale is None:
                return StructuredNormal(prediction.x0_hat, covariance, self.event_dim)
            log_variance = covariance.log_marginal(self.event_dim)
            if covariance.factor is not None:
                log_variance = log_variance.reshape(x_1.shape)
        law = self.decoder.distribution(x_1, prediction.x0_hat, log_variance, step)
        return law.to_event(self.event_dim)
