"""The U-Net of ``diffusers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyrodiff.networks.layers import (
    Features,
    check_dropout,
    check_input,
    check_multiple,
    check_sizes,
    checked_event_shape,
    flat_context,
    output_shape,
    zeroed,
)

__all__ = ["UNet"]


class UNet(nn.Module):
    """``diffusers.UNet2DModel`` with the call shape of this package, for larger images.

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
        ImportError: if ``diffusers`` is not installed.
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
        self.event_shape = checked_event_shape(event_shape, axes=3)
        self.channels, self.layers = tuple(channels), layers
        self.attention = None if attention is None else tuple(attention)
        self.head_size, self.norm_groups, self.context_size = head_size, norm_groups, context_size
        self.learned_variance, self.time_scale, self.dropout = learned_variance, time_scale, dropout
        check_dropout(dropout)
        attends = self._checked_sizes()
        from diffusers import UNet2DModel  # heavy: only where a U-Net is built

        model = UNet2DModel(
            in_channels=self.event_shape[0],
            out_channels=output_shape(self.event_shape, learned_variance)[0],
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
        zeroed(cast(nn.Conv2d, self.model.conv_out))
        self.project = nn.Linear(context_size, 4 * self.channels[0]) if context_size else None

    def _checked_sizes(self) -> tuple[bool, ...]:
        """Return whether each resolution attends; raise ValueError where sizes do not fit."""
        check_sizes(layers=self.layers, head_size=self.head_size, norm_groups=self.norm_groups)
        if not self.channels:
            raise ValueError("Expected channels for one resolution or more; got none.")
        for channels in self.channels:
            check_multiple("channels", channels, self.norm_groups)
        for side in self.event_shape[1:]:
            check_multiple("height and width", side, 2 ** (len(self.channels) - 1))
        attends = self.attention or (False,) * (len(self.channels) - 1) + (True,)
        if len(attends) != len(self.channels):
            expected = f"attention for {len(self.channels)} resolutions"
            raise ValueError(f"Expected {expected}; got {len(attends)}.")
        # The middle of the library's U-Net attends in any case.
        for channels, attend in zip(self.channels, (*attends[:-1], True), strict=True):
            if attend:
                check_multiple("channels", channels, self.head_size)
        return attends

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Of what ``with_features`` gives for one sample."""
        return (self.channels[0], *self.event_shape[1:])

    @property
    def has_variance(self) -> bool:
        """Whether ``with_features`` gives a log-variance."""
        return False

    def with_features(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Features:
        """The output and what the last layer reads."""
        read: list[Tensor] = []
        last = cast(nn.Conv2d, self.model.conv_out)
        handle = last.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
        try:
            output = self(x, time, context)
        finally:
            handle.remove()
        return Features(output, read[0])

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        check_input(x, self.event_shape)
        features = flat_context(context, len(x), self.context_size)
        if features is not None and self.project is not None:
            features = self.project(features.to(self.project.weight.dtype))
        wide = torch.promote_types(time.dtype, torch.float32)
        scaled = self.time_scale * time.to(wide)
        return self.model(x, scaled, class_labels=features, return_dict=False)[0]
