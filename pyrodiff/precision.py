r"""In which precision a chain computes, and up to which log-SNR that precision carries it.

In x_t = α_t x_0 + σ_t ε the noise has the digits of x_0 that lie below σ_t = e^{−λ_t/2}, so that
in a dtype whose numbers are apart by ``eps`` of themselves rounding moves ε by up to

    ½ eps |x_0| e^{λ_t/2},    which is 2⁻⁹ |x_0| at   λ = −2 log(2⁸ eps)

and this λ counts as the largest that the dtype carries: 20.8 for float32, 61.0 for float64.  Half
precision and bfloat16 would carry 4.1 and −0.0: no chain at all.  So there are two precisions,

    the network's    that of its parameters, for its input and output alone;
    the chain's      for x_t, posterior means, x_0 − x̂_0 and every sum: float64 in estimators,
                     else the data's, float32 at least, and float64 where λ_1 asks for it.

What the network loses by rounding its input is part of the model: the bound is that of a denoiser
that rounds, and is still a bound.
"""

import itertools
import math

import torch
from torch import Tensor, nn

__all__ = ["call_network", "chain_dtype", "largest_log_snr", "network_dtype"]

_NOISE_LEVELS = 2**8  # of rounding, in the least noise that a dtype carries
_WITHOUT_FLOAT64 = ("mps",)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def largest_log_snr(dtype: torch.dtype) -> float:
    """The largest λ that data of order 1 in this dtype carry: −2 log(2⁸ eps)."""
    return -2 * math.log(_NOISE_LEVELS * torch.finfo(dtype).eps)


def chain_dtype(
    dtype: torch.dtype, device: torch.device, log_snr: float, exact: bool = False
) -> torch.dtype:
    """What a chain computes in.

    Args:
        dtype, device: of the data.
        log_snr: λ_1, the chain's largest.
        exact: whether float64 is wanted where the device has it.

    Raises:
        ValueError: λ_1 needs float64 and the device has none.
    """
    limit = largest_log_snr(torch.float32)
    if device.type in _WITHOUT_FLOAT64:
        if log_snr > limit:
            raise ValueError(
                f"Expected log-SNRs of at most {limit:.1f}, what float32 carries, on a device "
                f"without float64 ({device.type}); got {log_snr:g}."
            )
        return torch.float32
    if exact or log_snr > limit:
        return torch.float64
    return torch.promote_types(dtype, torch.float32)


def network_dtype(network: nn.Module, default: torch.dtype) -> torch.dtype:
    """That of the network's first floating-point parameter or buffer; else the default."""
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if tensor.dtype in _FLOATS:
            return tensor.dtype
    return default


def call_network(network: nn.Module, x: Tensor) -> Tensor:
    """``network(x)``, its input and output cast to and from the network's own dtype."""
    output: Tensor = network(x.to(network_dtype(network, x.dtype)))
    return output.to(x.dtype)
