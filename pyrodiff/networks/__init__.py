"""Networks that a denoiser may call: small ones, and the U-Net of ``diffusers``.

A network is any module called as ``network(x, time)`` or ``network(x, time, context)`` with

- ``x`` of shape ``(N, *event_shape)``: x_t = α_t x_0 + σ_t ε;
- ``time`` of shape ``(N,)``: the log-SNR λ_t, or a 0-based timestep;
- ``context`` of shape ``(N, *context_shape)``, or None.

It returns ``(N, *event_shape)``: noise, data or velocity, as its denoiser reads it.  With
``learned_variance=True`` the first event axis is doubled and the second half is the raw variance
(the convention of Nichol and Dhariwal, 2021).

Time enters every residual block as a scale and a shift of its features (FiLM; Perez et al., 2018),

    h ← (1 + a(λ, c)) h + b(λ, c),

computed from sines and cosines of ``time_scale * time`` and the context c.  They are computed in
float32 at least, whatever the autocast, because bfloat16 tells only about half of a thousand
timesteps apart.  The default ``time_scale=1`` suits log-SNRs in about [−15, 15]; for timesteps use
about ``30 / num_steps``.

``VarianceHead`` adds that half to a trained network, whose own half stays as it is.

All output layers start at zero: an untrained network predicts zero.
"""

from pyrodiff.networks.conv import ResidualConvNet, expected_level
from pyrodiff.networks.heads import VarianceHead, WithFeatures
from pyrodiff.networks.layers import Features, FourierFeatures
from pyrodiff.networks.mlp import ResidualMLP
from pyrodiff.networks.unet import UNet

__all__ = [
    "Features",
    "FourierFeatures",
    "ResidualConvNet",
    "ResidualMLP",
    "UNet",
    "VarianceHead",
    "WithFeatures",
    "expected_level",
]
