"""A residual convolutional network, with a special output for data on a few levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrodiff.networks.layers import (
    Conditioning,
    Features,
    FourierFeatures,
    check_dropout,
    check_input,
    check_multiple,
    check_sizes,
    checked_event_shape,
    zeroed,
)

__all__ = ["ResidualConvNet", "expected_level", "level_log_variance"]

_LEAST_VARIANCE = 1e-12


class _ResidualConv(nn.Module):
    """Two 3×3 convolutions with FiLM between them, added to the input, ``(N, C, H, W)``.

    Not normalised: with the last convolution starting at zero, normalisation made each step
    slower by an eighth and nothing better (handwritten digits).
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.enter = nn.Conv2d(channels, channels, 3, padding=1)
        self.leave = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        hidden = self.enter(F.silu(h))
        hidden = F.silu(torch.addcmul(shift[..., None, None], hidden, 1 + scale[..., None, None]))
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return h + self.leave(hidden)


class _Attention(nn.Module):
    """Self-attention over the pixels of ``(N, C, H, W)``, added to the input."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.enter = nn.Linear(channels, 3 * channels, bias=False)
        self.leave = zeroed(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).mT  # (N, H * W, C): a view where the memory format is channels last
        joint = self.enter(self.norm(pixels)).unflatten(2, (3, self.heads, -1))
        query, key, value = joint.permute(2, 0, 3, 1, 4)  # each (N, heads, H * W, C / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return h + self.leave(mixed).mT.reshape(h.shape)


class ResidualConvNet(nn.Module):
    """Residual convolutional network at one resolution, for images of a few dozen pixels.

    The input, its ``FourierFeatures`` and a learned map of positions go through 3×3 residual
    blocks, with self-attention over all pixels after every ``attention_every``-th (the U-Net of
    Kingma et al., 2021, "Variational Diffusion Models", does not downsample either).

    Its weights lie in the channels-last memory format, in which it is fastest.

    Args:
        event_shape: ``(channels, height, width)`` of one image.
        channels: hidden channels, a multiple of ``heads``.
        blocks: residual blocks.
        attention_every: blocks per attention layer; 0 for no attention.
        heads: attention heads.
        levels: 0, or the number of values, equally spaced on [-1, 1], that the data take. Then
            the network also sees what each noisy entry says of every level, and its output is
            the posterior mean ``expected_level``: use it with a ``DataDenoiser`` and the log-SNR as
            time.  Fourier features add nothing then.
        context_size: context features per sample, flattened; 0 for no context.
        learned_variance: double the first event axis of the output.
        fourier: multiples of π for the ``FourierFeatures`` of the input; empty for none.
        position_channels: channels of the learned map of positions.
        time_scale: factor applied to ``time`` first; see the module's docstring.
        dropout: probability of dropping a hidden feature.

    Shape: ``(N, *event_shape)``, ``(N,)``, ``(N, *context_shape)`` to ``(N, *event_shape)``.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: int = 48,
        blocks: int = 4,
        attention_every: int = 2,
        heads: int = 1,
        levels: int = 0,
        context_size: int = 0,
        learned_variance: bool = False,
        fourier: Sequence[float] = (2.0, 4.0, 8.0),
        position_channels: int = 8,
        time_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.event_shape = checked_event_shape(event_shape, axes=3)
        check_sizes(channels=channels, blocks=blocks, heads=heads)
        check_dropout(dropout)
        check_multiple("channels", channels, heads)
        if levels < 0 or levels == 1:
            raise ValueError(f"Expected levels to be 0 or at least 2; got {levels}.")
        self.channels, self.blocks, self.attention_every = channels, blocks, attention_every
        self.heads, self.levels, self.context_size = heads, levels, context_size
        self.learned_variance, self.fourier = learned_variance, tuple(fourier)
        self.position_channels, self.time_scale = position_channels, time_scale
        self.dropout = dropout

        image, height, width = self.event_shape
        self.features = FourierFeatures(fourier)
        self.position = nn.Parameter(torch.randn(position_channels, height, width))
        self.conditioning = Conditioning(4 * channels, context_size, time_scale)
        self.film = nn.Linear(4 * channels, 2 * blocks * channels)
        entering = image * (self.features.expansion + levels) + position_channels
        means = image * max(levels, 1)
        self.first = nn.Conv2d(entering, channels, 3, padding=1)
        self.residual = nn.ModuleList(_ResidualConv(channels, dropout) for _ in range(blocks))
        attends = range(attention_every, blocks + 1, attention_every) if attention_every else ()
        self.attention = nn.ModuleDict({str(i): _Attention(channels, heads) for i in attends})
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.last = zeroed(nn.Conv2d(channels, means + image * learned_variance, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Of what ``with_features`` gives for one sample."""
        return (self.channels, *self.event_shape[1:])

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        output = self.last(self._hidden(x, time, context))
        if not self.levels:
            return output
        logits, raw_variance = self._split(output)
        return torch.cat([expected_level(logits, x, time), raw_variance], dim=1)

    @property
    def has_variance(self) -> bool:
        """Whether ``with_features`` gives a log-variance."""
        return self.levels > 0

    def with_features(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Features:
        """The output and what the last layer reads; with ``levels``, their log-variance, too."""
        hidden = self._hidden(x, time, context)
        output = self.last(hidden)
        if not self.levels:
            return Features(output, hidden)
        logits, raw_variance = self._split(output)
        output = torch.cat([expected_level(logits, x, time), raw_variance], dim=1)
        return Features(output, hidden, level_log_variance(logits, x, time))

    def _hidden(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """What the last layer reads."""
        check_input(x, self.event_shape)
        film = self.film(self.conditioning(time, context)).chunk(2 * self.blocks, dim=1)
        h = self.first(self._entering(x, time))
        blocks = zip(self.residual, film[::2], film[1::2], strict=True)
        for i, (block, scale, shift) in enumerate(blocks, start=1):
            h = block(h, scale, shift)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return F.silu(self.norm(h))

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the levels, ``(N, *event_shape, levels)``, and the raw variance."""
        logits, raw_variance = output.tensor_split([self.event_shape[0] * self.levels], dim=1)
        return logits.unflatten(1, (-1, self.levels)).movedim(2, -1), raw_variance

    def _entering(self, x: Tensor, time: Tensor) -> Tensor:
        """The input, its features, its evidence for each level, and the map of positions."""
        inputs = [self.features(x), self.position.expand(len(x), -1, -1, -1)]
        if self.levels:
            evidence = _level_probabilities(x.new_zeros(self.levels), x, time)
            inputs.append(evidence.movedim(-1, 2).flatten(1, 2).to(x.dtype))
        return torch.cat(inputs, dim=1)


def expected_level(logits: Tensor, x: Tensor, log_snr: Tensor) -> Tensor:
    """Posterior mean of data on K equally spaced levels, given the noisy value of each entry.

        x̂_0 = Σ_k p_k l_k,   p_k ∝ exp(a_k) N(x_t; α_t l_k, σ_t²),   l_k = −1 + 2k/(K − 1)

    The exact E[x_0 | x_t] of discrete data has this form, with exp(a_k) the probability of the
    level given all *other* entries.  So the network has only the dependence between entries to
    learn; the staircase that x̂_0 becomes at high SNR is built in.

    Args:
        logits: a_k, shape ``(N, *event_shape, K)``.
        x: x_t, shape ``(N, *event_shape)``.
        log_snr: λ_t, shape ``(N,)``.

    Returns:
        Shape ``(N, *event_shape)``, within [−1, 1], in the dtype of ``x``.
    """
    probabilities = _level_probabilities(logits, x, log_snr)
    # Not a matrix product: autocast would round it to bfloat16.
    return (probabilities * _levels(logits.shape[-1], probabilities)).sum(-1).to(x.dtype)


def level_log_variance(logits: Tensor, x: Tensor, log_snr: Tensor) -> Tensor:
    """log Σ_k p_k (l_k − x̂_0)² for the p_k and x̂_0 of ``expected_level``, of the shape of ``x``.

    That of x_0 given x_t if the p_k were right; a network trained on x̂_0 alone is told nothing of
    them but their mean.

    Args:
        logits, x, log_snr: see ``expected_level``.
    """
    probabilities = _level_probabilities(logits, x, log_snr)
    levels = _levels(logits.shape[-1], probabilities)
    mean = (probabilities * levels).sum(-1, keepdim=True)
    variance = (probabilities * (levels - mean).square()).sum(-1)
    return variance.clamp(min=_LEAST_VARIANCE).log().to(x.dtype)


def _level_probabilities(logits: Tensor, x: Tensor, log_snr: Tensor) -> Tensor:
    """The p_k of ``expected_level``, of shape ``(N, *event_shape, K)``, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    log_snr = log_snr.to(wide).reshape(-1, *[1] * x.dim())
    levels = _levels(logits.shape[-1], log_snr)
    # log N(x; αℓ, σ²) up to a constant in ℓ is (αx − α²ℓ/2) ℓ / σ².
    slope = (0.5 * (log_snr + F.softplus(log_snr))).exp()  # α/σ²
    evidence = slope * x.to(wide)[..., None] - 0.5 * log_snr.exp() * levels
    scores = logits.to(wide) + levels * evidence
    # Below e⁻³⁰ products of probabilities become denormal: training is slower by a third on a CPU.
    return (scores - scores.detach().amax(-1, keepdim=True)).clamp(min=-30.0).softmax(-1)


def _levels(count: int, like: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, count, dtype=like.dtype, device=like.device)


def _groups(channels: int) -> int:
    """The largest number of groups up to 8 that divides the channels."""
    return max(groups for groups in range(1, 9) if channels % groups == 0)
