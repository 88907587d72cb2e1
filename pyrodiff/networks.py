r"""Networks that a denoiser may call: small ones of our own, and the U-Net of `diffusers`.

A network is any module called as ``network(x, time)`` or ``network(x, time, context)`` with

- ``x`` of shape ``(N, *event_shape)``: :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`;
- ``time`` of shape ``(N,)``: the log-SNR :math:`\lambda_t`, or a 0-based timestep;
- ``context`` of shape ``(N, *context_shape)``, or None.

It returns ``(N, *event_shape)``: noise, data or velocity, as its denoiser reads it. With
``learned_variance=True`` the first event axis is doubled, and the second half is the raw variance,
the convention of Nichol & Dhariwal (2021).

Time enters every residual block as a scale and a shift of its features (FiLM, Perez et al. 2018),
:math:`h \leftarrow (1 + a(\lambda, c)) \, h + b(\lambda, c)`, from sines and cosines of
``time_scale * time`` and the context :math:`c`. They are computed in float32 or wider whatever the
autocast, because bfloat16 keeps only about half of a thousand timesteps apart. The default
``time_scale=1`` suits log-SNRs in about [-15, 15]; for timesteps take about ``30 / num_steps``.

All output layers start at zero: an untrained network predicts zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FourierFeatures", "ResidualConvNet", "ResidualMLP", "UNet", "expected_level"]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class FourierFeatures(nn.Module):
    r"""Append sines and cosines of the input, so that a network sees its least significant bits.

    :math:`x \mapsto (x, \sin(\pi f_1 x), \cos(\pi f_1 x), \ldots)` for the frequencies :math:`f_i`
    (Kingma et al. 2021, "Variational Diffusion Models", appendix C).

    Args:
        frequencies: multiples of π; ``(2, 4, 8)`` stands for 2π, 4π and 8π. Empty: the identity.

    Shape: ``(N, C, *)`` to ``(N, C * expansion, *)``, with expansion ``1 + 2 * len(frequencies)``.
    """

    def __init__(self, frequencies: Sequence[float] = (2.0, 4.0, 8.0)) -> None:
        super().__init__()
        self.frequencies = tuple(frequencies)
        self.expansion = 1 + 2 * len(self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        if not self.frequencies:
            return x
        angles = [math.pi * frequency * x for frequency in self.frequencies]
        return torch.cat([x, *map(torch.sin, angles), *map(torch.cos, angles)], dim=1)


class _Conditioning(nn.Module):
    """Embed time ``(N,)`` and context ``(N, *context_shape)`` as one ``(N, width)`` tensor."""

    frequencies: Tensor

    def __init__(self, width: int, context_size: int, time_scale: float) -> None:
        super().__init__()
        self.context_size, self.time_scale = context_size, time_scale
        # Periods from four times the range of log-SNRs down to about three units of it.
        frequencies = torch.logspace(math.log10(0.05), math.log10(2.0), width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.hidden = nn.Linear(2 * (width // 2), width)
        self.context = nn.Linear(context_size, width, bias=False) if context_size else None

    def forward(self, time: Tensor, context: Tensor | None) -> Tensor:
        wide = torch.promote_types(time.dtype, torch.float32)
        angles = (self.time_scale * time.to(wide))[:, None] * self.frequencies.to(wide)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedding = self.hidden(waves.to(self.hidden.weight.dtype))
        features = _flat_context(context, len(time), self.context_size)
        if features is not None and self.context is not None:
            embedding = embedding + self.context(features.to(self.hidden.weight.dtype))
        return F.silu(embedding)


class ResidualMLP(nn.Module):
    r"""Time-conditioned residual perceptron for events of any shape, flattened inside.

    Each block is :math:`h \leftarrow h + W_2 \, \mathrm{silu}((1 + a) W_1 \mathrm{LN}(h) + b)`
    with :math:`a, b` functions of time and context.

    Args:
        event_shape: shape of one sample, without the batch axis.
        width: hidden features.
        blocks: residual blocks.
        context_size: context features per sample, flattened; 0 for no context.
        learned_variance: double the first event axis of the output.
        fourier: multiples of π for `FourierFeatures` of the input; empty for none. ``(1, 2, 4)``
            sharpens densities with fine structure in two dimensions.
        time_scale: factor applied to ``time`` first; see the module's docstring.
        dropout: probability of dropping a hidden feature.

    Shape: ``(N, *event_shape)``, ``(N,)``, ``(N, *context_shape)`` to ``(N, *event_shape)``.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 256,
        blocks: int = 4,
        context_size: int = 0,
        learned_variance: bool = False,
        fourier: Sequence[float] = (),
        time_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.event_shape = _checked_event_shape(event_shape)
        _check_positive(width=width, blocks=blocks)
        _check_dropout(dropout)
        self.width, self.blocks, self.context_size = width, blocks, context_size
        self.learned_variance, self.fourier = learned_variance, tuple(fourier)
        self.time_scale, self.dropout = time_scale, dropout
        self.output_shape = _output_shape(self.event_shape, learned_variance)

        embedding = min(width, 32 + context_size)  # one small linear map conditions all blocks
        self.features = FourierFeatures(fourier)
        self.conditioning = _Conditioning(embedding, context_size, time_scale)
        self.film = nn.Linear(embedding, 2 * blocks * width)
        self.first = nn.Linear(math.prod(self.event_shape) * self.features.expansion, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.enter = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.leave = nn.ModuleList(_zeroed(nn.Linear(width, width)) for _ in range(blocks))
        self.last = _zeroed(nn.Linear(width, math.prod(self.output_shape)))

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(x, self.event_shape)
        film = self.film(self.conditioning(time, context)).chunk(2 * self.blocks, dim=1)
        h = self.first(self.features(x.flatten(1)))
        layers = zip(self.norms, self.enter, self.leave, film[::2], film[1::2], strict=True)
        for norm, enter, leave, scale, shift in layers:
            hidden = F.silu(torch.addcmul(shift, enter(norm(h)), 1 + scale))
            if self.dropout:
                hidden = F.dropout(hidden, self.dropout, self.training)
            h = h + leave(hidden)
        return self.last(F.silu(h)).unflatten(1, self.output_shape)


class _ResidualConv(nn.Module):
    """Two 3×3 convolutions with FiLM between them, added to the input, ``(N, C, H, W)``.

    Not normalised: with the last convolution starting at zero, normalisation made each step
    slower by an eighth and nothing better (handwritten digits).
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.enter = nn.Conv2d(channels, channels, 3, padding=1)
        self.leave = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))

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
        self.leave = _zeroed(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).mT  # (N, H * W, C): a view where the memory format is channels last
        joint = self.enter(self.norm(pixels)).unflatten(2, (3, self.heads, -1))
        query, key, value = joint.permute(2, 0, 3, 1, 4)  # each (N, heads, H * W, C / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return h + self.leave(mixed).mT.reshape(h.shape)


class ResidualConvNet(nn.Module):
    r"""Residual convolutional network at one resolution, for images of a few dozen pixels.

    The input, its `FourierFeatures` and a learned map of positions go through 3×3 residual blocks,
    with self-attention over all pixels after every ``attention_every``-th (the U-Net of
    Kingma et al. 2021, "Variational Diffusion Models", does not downsample either).

    Its weights lie in the channels-last memory format, in which it is fastest.

    Args:
        event_shape: ``(channels, height, width)`` of one image.
        channels: hidden channels, a multiple of ``heads``.
        blocks: residual blocks.
        attention_every: blocks per attention layer; 0 for no attention.
        heads: attention heads.
        levels: 0, or the number of values, equally spaced on [-1, 1], that the data take. Then
            the network also sees each entry's own evidence for every level, and its output is
            their posterior mean, `expected_level`: use it with a denoiser that reads the output
            as data and gives the log-SNR as time. Fourier features are no use then.
        context_size: context features per sample, flattened; 0 for no context.
        learned_variance: double the first event axis of the output.
        fourier: multiples of π for the `FourierFeatures` of the input; empty for none.
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
        self.event_shape = _checked_event_shape(event_shape, axes=3)
        _check_positive(channels=channels, blocks=blocks, heads=heads)
        _check_dropout(dropout)
        _check_multiple("channels", channels, heads)
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
        self.conditioning = _Conditioning(4 * channels, context_size, time_scale)
        self.film = nn.Linear(4 * channels, 2 * blocks * channels)
        entering = image * (self.features.expansion + levels) + position_channels
        means = image * max(levels, 1)
        self.first = nn.Conv2d(entering, channels, 3, padding=1)
        self.residual = nn.ModuleList(_ResidualConv(channels, dropout) for _ in range(blocks))
        attends = range(attention_every, blocks + 1, attention_every) if attention_every else ()
        self.attention = nn.ModuleDict({str(i): _Attention(channels, heads) for i in attends})
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.last = _zeroed(nn.Conv2d(channels, means + image * learned_variance, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(x, self.event_shape)
        film = self.film(self.conditioning(time, context)).chunk(2 * self.blocks, dim=1)
        h = self.first(self._entering(x, time))
        blocks = zip(self.residual, film[::2], film[1::2], strict=True)
        for i, (block, scale, shift) in enumerate(blocks, start=1):
            h = block(h, scale, shift)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        output = self.last(F.silu(self.norm(h)))
        if not self.levels:
            return output
        logits, raw_variance = output.tensor_split([self.event_shape[0] * self.levels], dim=1)
        logits = logits.unflatten(1, (-1, self.levels)).movedim(2, -1)
        return torch.cat([expected_level(logits, x, time), raw_variance], dim=1)

    def _entering(self, x: Tensor, time: Tensor) -> Tensor:
        """The input, its features, its own evidence for each level, and the map of positions."""
        parts = [self.features(x), self.position.expand(len(x), -1, -1, -1)]
        if self.levels:
            evidence = _level_probabilities(x.new_zeros(self.levels), x, time)
            parts.append(evidence.movedim(-1, 2).flatten(1, 2).to(x.dtype))
        return torch.cat(parts, dim=1)


class UNet(nn.Module):
    r"""`diffusers.UNet2DModel` with the call of this module, for larger images.

    The context is mapped linearly to the width of the time embedding and added to it.

    Args:
        event_shape: ``(channels, height, width)``; height and width must be multiples of
            ``2 ** (len(channels) - 1)``, as every resolution but the last halves them.
        channels: hidden channels at each resolution, multiples of ``norm_groups`` and, where there
            is attention (always at the last), of ``head_size``.
        layers: residual blocks at each resolution.
        attention: whether each resolution has self-attention; None for the last one alone.
        head_size: channels of one attention head.
        norm_groups: groups of the group normalisation.
        context_size: context features per sample, flattened; 0 for no context.
        learned_variance: double the first event axis of the output.
        time_scale: factor applied to ``time`` first. The library's embedding expects timesteps up
            to about 1000: the default maps log-SNRs to that range, and 1 suits timesteps.
        dropout: probability of dropping a hidden feature.

    Shape: ``(N, *event_shape)``, ``(N,)``, ``(N, *context_shape)`` to ``(N, *event_shape)``.

    Raises:
        ImportError: if `diffusers` is not installed.
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (64, 128),
        layers: int = 2,
        attention: Sequence[bool] | None = None,
        head_size: int = 32,
        norm_groups: int = 32,
        context_size: int = 0,
        learned_variance: bool = False,
        time_scale: float = 32.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.event_shape = _checked_event_shape(event_shape, axes=3)
        self.channels, self.layers = tuple(channels), layers
        self.attention = None if attention is None else tuple(attention)
        self.head_size, self.norm_groups, self.context_size = head_size, norm_groups, context_size
        self.learned_variance, self.time_scale, self.dropout = learned_variance, time_scale, dropout
        _check_dropout(dropout)
        attends = self._checked_sizes()
        from diffusers import UNet2DModel  # heavy: only where a U-Net is built

        model = UNet2DModel(
            in_channels=self.event_shape[0],
            out_channels=_output_shape(self.event_shape, learned_variance)[0],
            block_out_channels=self.channels,
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=head_size,
            norm_num_groups=norm_groups,
            dropout=dropout,
            class_embed_type="identity" if context_size else None,
        )
        self.model = cast(nn.Module, model)
        _zeroed(cast(nn.Conv2d, self.model.conv_out))
        self.project = nn.Linear(context_size, 4 * self.channels[0]) if context_size else None

    def _checked_sizes(self) -> tuple[bool, ...]:
        """Return whether each resolution attends; raise ValueError where sizes do not fit."""
        _check_positive(layers=self.layers, head_size=self.head_size, norm_groups=self.norm_groups)
        if not self.channels:
            raise ValueError("Expected channels for one resolution or more; got none.")
        for channels in self.channels:
            _check_multiple("channels", channels, self.norm_groups)
        for side in self.event_shape[1:]:
            _check_multiple("height and width", side, 2 ** (len(self.channels) - 1))
        attends = self.attention or (False,) * (len(self.channels) - 1) + (True,)
        if len(attends) != len(self.channels):
            wanted = f"attention for {len(self.channels)} resolutions"
            raise ValueError(f"Expected {wanted}; got {len(attends)}.")
        # The middle of the library's U-Net attends in any case.
        for channels, attend in zip(self.channels, (*attends[:-1], True), strict=True):
            if attend:
                _check_multiple("channels", channels, self.head_size)
        return attends

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(x, self.event_shape)
        features = _flat_context(context, len(x), self.context_size)
        if features is not None and self.project is not None:
            features = self.project(features.to(self.project.weight.dtype))
        wide = torch.promote_types(time.dtype, torch.float32)
        scaled = self.time_scale * time.to(wide)
        return self.model(x, scaled, class_labels=features, return_dict=False)[0]


def expected_level(logits: Tensor, x: Tensor, log_snr: Tensor) -> Tensor:
    r"""Posterior mean of data on K equally spaced levels, given the noisy value of each entry.

    .. math::
        \hat x_0 = \sum_k p_k \ell_k, \qquad
        p_k \propto \exp(a_k) \, \mathcal N(x_t; \alpha_t \ell_k, \sigma_t^2), \qquad
        \ell_k = -1 + 2k/(K - 1).

    The exact :math:`E[x_0 | x_t]` of discrete data has this form, with :math:`\exp(a_k)` the
    probability of the level given all *other* entries. So the network has only the dependence
    between entries to learn; the staircase that :math:`\hat x_0` becomes at high SNR is built in.

    Args:
        logits: the :math:`a_k`, shape ``(N, *event_shape, K)``.
        x: :math:`x_t`, shape ``(N, *event_shape)``.
        log_snr: :math:`\lambda_t`, shape ``(N,)``.

    Returns:
        Shape ``(N, *event_shape)``, within [-1, 1], in the dtype of ``x``.
    """
    probabilities = _level_probabilities(logits, x, log_snr)
    # Not a matrix product: autocast would round it to bfloat16.
    return (probabilities * _levels(logits.shape[-1], probabilities)).sum(-1).to(x.dtype)


def _level_probabilities(logits: Tensor, x: Tensor, log_snr: Tensor) -> Tensor:
    """The p_k of `expected_level`, of shape ``(N, *event_shape, K)``, in float32 or wider."""
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


def _checked_event_shape(event_shape: Sequence[int], axes: int | None = None) -> tuple[int, ...]:
    shape = tuple(int(size) for size in event_shape)
    if not shape or min(shape) < 1 or (axes is not None and len(shape) != axes):
        wanted = "(channels, height, width)" if axes == 3 else "one positive size or more"
        raise ValueError(f"Expected an event_shape of {wanted}; got {shape}.")
    return shape


def _output_shape(event_shape: tuple[int, ...], learned_variance: bool) -> tuple[int, ...]:
    return (event_shape[0] * (1 + learned_variance), *event_shape[1:])


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Expected {name} to be 1 or more; got {size}.")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected 0 <= dropout < 1; got {dropout}.")


def _check_multiple(name: str, value: int, factor: int) -> None:
    if value < 1 or value % factor:
        raise ValueError(f"Expected {name} to be a positive multiple of {factor}; got {value}.")


def _check_input(x: Tensor, event_shape: tuple[int, ...]) -> None:
    if x.shape[1:] != event_shape:
        raise ValueError(f"Expected x of shape (N, *{event_shape}); got {tuple(x.shape)}.")


def _flat_context(context: Tensor | None, batch: int, size: int) -> Tensor | None:
    """Return the context as ``(batch, size)``, or None where the network takes none."""
    if context is None and not size:
        return None
    got = None if context is None else tuple(context.shape)
    if context is None or not size or len(context) != batch or context.numel() != batch * size:
        wanted = f"a context of {size} features for each of {batch} samples"
        raise ValueError(f"Expected {wanted}; got {got}.")
    return context.reshape(batch, size)


def _groups(channels: int) -> int:
    """The largest number of groups up to 8 that divides the channels."""
    return max(groups for groups in range(1, 9) if channels % groups == 0)


def _zeroed(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
