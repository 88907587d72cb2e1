r"""The Bayes-optimal network for Gaussian-mixture data, at every log-SNR.

Let x_0 ~ Σ_k w_k N(m_k, C_k) with C_k = Q_k diag(e_k) Q_kᵀ, and x_t = α x_0 + σ ε.  With
z_k = Q_kᵀ(x_t − α m_k) and v_k = α² e_k + σ² (per eigenvalue),

    r_k(x_t)        ∝ w_k N(z_k; 0, diag v_k)               the posterior weight of component k
    E[ε   | x_t, k] = Q_k (σ z_k / v_k)
    E[x_0 | x_t, k] = m_k + Q_k (α e_k z_k / v_k)
    E[v   | x_t, k] = −σ m_k + Q_k (α σ (1 − e_k) z_k / v_k)    velocity α ε − σ x_0

and the optimum is Σ_k r_k E[· | x_t, k].  Each of the three is computed on its own, as deriving one
from another cancels digits at one end of the log-SNR range.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrodiff.checks import check_choice
from pyrodiff.kernels import marginal_coefficients

__all__ = ["BayesNetwork", "Components"]

_PREDICTIONS = ("noise", "data", "velocity")


class Components(NamedTuple):
    """K Gaussians in their eigenbases; ``eigenvectors`` is None where the axes are the basis."""

    log_weights: Float[Tensor, " K"]
    means: Float[Tensor, "K d"]
    eigenvalues: Float[Tensor, "K d"]
    eigenvectors: Float[Tensor, "K d d"] | None

    def rotate(self, centered: Float[Tensor, "n K d"]) -> Float[Tensor, "n K d"]:
        """Q_kᵀ y for each component."""
        if self.eigenvectors is None:
            return centered
        return torch.einsum("kij,nki->nkj", self.eigenvectors, centered)

    def rotate_back(self, z: Float[Tensor, "n K d"]) -> Float[Tensor, "n K d"]:
        """Q_k z for each component."""
        if self.eigenvectors is None:
            return z
        return torch.einsum("kij,nkj->nki", self.eigenvectors, z)

    def joint_log_prob(self, z: Tensor, variances: Tensor) -> Float[Tensor, "n K"]:
        """log w_k + log N(z_k; 0, diag v_k), for z already in the eigenbasis."""
        quadratic = (z.square() / variances + variances.log()).sum(-1)
        return self.log_weights - 0.5 * (quadratic + z.shape[-1] * math.log(2 * math.pi))


class BayesNetwork(nn.Module):
    """The optimal network, called as ``network(x, log_snr)`` or ``network(x, log_snr, context)``.

    Made by ``Gaussian.network`` and ``GaussianMixture.network``.  It has no parameters; the
    arithmetic is in float64 (as long as its buffers are), the output in the dtype of ``x``.

    Shape: ``(N, d)``, ``(N,)`` or ``()``, any context (ignored) to ``(N, d)``.

    Raises:
        ValueError: an unknown prediction, or x of another event shape.
    """

    def __init__(self, components: Components, prediction: str = "noise"):
        super().__init__()
        check_choice("prediction", prediction, _PREDICTIONS)
        self.prediction = prediction
        for name, value in components._asdict().items():
            self.register_buffer(name, None if value is None else value.clone())

    def _components(self) -> Components:
        return Components(*(getattr(self, name) for name in Components._fields))

    def forward(self, x: Tensor, log_snr: Tensor, context: Tensor | None = None) -> Tensor:
        components = self._components()
        size = components.means.shape[1]
        if x.dim() != 2 or x.shape[1] != size:
            raise ValueError(f"Expected x of shape (N, {size}); got {tuple(x.shape)}.")
        alpha, sigma = marginal_coefficients(log_snr.to(components.means).reshape(-1, 1, 1))
        z = components.rotate(x.to(components.means).unsqueeze(1) - alpha * components.means)
        variances = alpha.square() * components.eigenvalues + sigma.square()
        weights = components.joint_log_prob(z, variances).softmax(-1).unsqueeze(-1)
        if self.prediction == "noise":
            output = components.rotate_back(sigma * z / variances)
        elif self.prediction == "data":
            output = components.means + components.rotate_back(
                alpha * components.eigenvalues * z / variances
            )
        else:
            gain = alpha * sigma * (1 - components.eigenvalues) / variances
            output = components.rotate_back(gain * z) - sigma * components.means
        return (weights * output).sum(1).to(x.dtype)
