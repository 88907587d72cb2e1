r"""Data laws with exact answers: a Gaussian, and a mixture of Gaussians.

    log p(x) = log Σ_k w_k N(x; m_k, C_k)

Under a linear measurement y = A x + s ε the posterior of a mixture is a mixture again,

    S_k = A C_k Aᵀ + s² I,   G_k = C_k Aᵀ S_k⁻¹,
    m_k' = m_k + G_k (y − A m_k),   C_k' = (I − G_k A) C_k (I − G_k A)ᵀ + s² G_k G_kᵀ,
    w_k' ∝ w_k N(y; A m_k, S_k),

with C_k' in Joseph's form, which stays positive in floating point.
"""

from copy import copy

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyrodiff.kernels import marginal_coefficients
from pyrodiff.oracles.bayes import BayesNetwork, Components

__all__ = ["Gaussian", "GaussianMixture"]


def _float64(value: object) -> Tensor:
    dtype = None if isinstance(value, Tensor) else torch.float64  # numbers are not rounded
    return torch.as_tensor(value, dtype=dtype).detach().to("cpu", torch.float64)


def _check_points(x: Tensor, size: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != size:
        raise ValueError(f"Expected x of shape (N, {size}); got {tuple(x.shape)}.")
    return x.to("cpu", torch.float64)


def _eigen(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (K, d) and eigenvectors (K, d, d) of symmetric positive definite matrices."""
    asymmetry = float((covariances - covariances.mT).abs().max())
    if not asymmetry <= 1e-8 * float(covariances.abs().max()):
        raise ValueError(f"Expected a symmetric covariance; got asymmetry {asymmetry:g}.")
    eigenvalues, eigenvectors = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
    if not bool((eigenvalues > 0).all()):
        least = float(eigenvalues.min())
        raise ValueError(f"Expected a positive definite covariance; got eigenvalue {least:g}.")
    return eigenvalues, eigenvectors


class _ComponentLaw:
    """A law of Gaussian components: its density, its samples and its optimal network."""

    _components: Components

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """log p(x) in nats, (N, d) to (N,)."""
        components = self._components
        x = _check_points(x, components.means.shape[1])
        z = components.rotate(x.unsqueeze(1) - components.means)
        return components.joint_log_prob(z, components.eigenvalues).logsumexp(-1)

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d"]:
        """n samples, float64; torch's global generator is neither read nor moved."""
        log_weights, means, eigenvalues, eigenvectors = self._components
        generator = torch.Generator().manual_seed(seed)
        index = torch.multinomial(log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, means.shape[1], generator=generator, dtype=torch.float64)
        z = eigenvalues.sqrt()[index] * noise
        if eigenvectors is not None:
            z = torch.einsum("nij,nj->ni", eigenvectors[index], z)
        return means[index] + z

    def network(self, prediction: str = "noise") -> BayesNetwork:
        """The optimal ``"noise"``, ``"data"`` or ``"velocity"`` network.

        That of a single Gaussian is affine: E[x_0 | x_t] = m + α C (α² C + σ² I)⁻¹ (x_t − α m).
        """
        return BayesNetwork(self._components, prediction)


class Gaussian(_ComponentLaw):
    """Data x_0 ~ N(m, C) in d dimensions.

    Args:
        mean: m, shape (d,).
        covariance: C, shape (d, d), symmetric positive definite.

    Raises:
        ValueError: shapes that do not fit, or a covariance that is not one.
    """

    def __init__(self, mean: Tensor, covariance: Tensor):
        self.mean, self.covariance = _float64(mean), _float64(covariance)
        size = self.mean.shape[0] if self.mean.dim() == 1 else 0
        if size == 0 or self.covariance.shape != (size, size):
            raise ValueError(
                "Expected mean of shape (d,) and covariance of shape (d, d); "
                f"got {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}."
            )
        self.event_shape = torch.Size([size])
        eigenvalues, eigenvectors = _eigen(self.covariance[None])
        log_weights = self.mean.new_zeros(1)
        self._components = Components(log_weights, self.mean[None], eigenvalues, eigenvectors)


class GaussianMixture(_ComponentLaw):
    """Data x_0 ~ Σ_k w_k N(m_k, C_k), K components in d dimensions.

    Args:
        weights: w, shape (K,), non-negative, of sum 1.
        means: m, shape (K, d).
        scales_or_covariances: standard deviations, shape () or (K,) (isotropic) or (K, d) (one
            per axis), or covariances, shape (K, d, d).

    Raises:
        ValueError: shapes that do not fit, weights that are not probabilities, a scale or a
            covariance that is not positive.

    Examples:
        >>> law = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.3)
        >>> law.log_prob(torch.tensor([[1.0], [0.0]])).round(decimals=3)
        tensor([-0.4080, -5.2710], dtype=torch.float64)
        >>> law.sample(4, seed=0).shape  # and law.network() is its exact denoiser
        torch.Size([4, 1])
    """

    def __init__(self, weights: Tensor, means: Tensor, scales_or_covariances: Tensor | float):
        self.weights, self.means = _float64(weights), _float64(means)
        if self.means.dim() != 2 or self.weights.shape != self.means.shape[:1]:
            raise ValueError(
                "Expected weights of shape (K,) and means of shape (K, d); "
                f"got {tuple(self.weights.shape)} and {tuple(self.means.shape)}."
            )
        total = float(self.weights.sum())
        if not bool((self.weights >= 0).all()) or not abs(total - 1) < 1e-6:
            raise ValueError(
                f"Expected non-negative weights that sum to 1; got {self.weights.tolist()}."
            )
        self.event_shape = self.means.shape[1:]
        log_weights = (self.weights / total).log()
        self._components = Components(
            log_weights, self.means, *self._spread(_float64(scales_or_covariances))
        )

    def _spread(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        count, size = self.means.shape
        if value.shape == (count, size, size):
            return _eigen(value)
        if value.shape not in ((), (count,), (count, size)):
            raise ValueError(
                f"Expected scales of shape (), ({count},) or ({count}, {size}), or covariances of "
                f"shape ({count}, {size}, {size}); got {tuple(value.shape)}."
            )
        if not bool((value > 0).all()):
            raise ValueError(f"Expected positive scales; got {float(value.min()):g}.")
        value = value if value.dim() == 2 else value.reshape(-1, 1)
        return value.square().expand(count, size), None

    @property
    def covariances(self) -> Float[Tensor, "K d d"]:
        """C_k, shape (K, d, d)."""
        eigenvalues, eigenvectors = self._components.eigenvalues, self._components.eigenvectors
        if eigenvectors is None:
            return torch.diag_embed(eigenvalues)
        return (eigenvectors * eigenvalues.unsqueeze(-2)) @ eigenvectors.mT

    def noised(self, log_snr: Tensor | float) -> "GaussianMixture":
        """The law of x_t = α x_0 + σ ε at log-SNR λ: components N(α m_k, α² C_k + σ² I).

        The eigenvectors are those of C_k: nothing is decomposed again.
        """
        alpha, sigma = marginal_coefficients(torch.as_tensor(log_snr, dtype=torch.float64))
        components, law = self._components, copy(self)
        law.means = alpha * self.means
        eigenvalues = alpha.square() * components.eigenvalues + sigma.square()
        law._components = components._replace(means=law.means, eigenvalues=eigenvalues)
        return law

    def posterior(self, A: Tensor, y: Tensor, noise_scale: float) -> "GaussianMixture":
        """The law of x given y = A x + s ε, ε ~ N(0, I) (formulas above).

        Args:
            A: shape (m, d).
            y: shape (m,).
            noise_scale: s > 0.

        Raises:
            ValueError: shapes that do not fit, or a scale that is not positive.
        """
        A, y, size = _float64(A), _float64(y), self.means.shape[1]
        if A.dim() != 2 or A.shape[1] != size or y.shape != A.shape[:1]:
            raise ValueError(
                f"Expected A of shape (m, {size}) and y of shape (m,); "
                f"got {tuple(A.shape)} and {tuple(y.shape)}."
            )
        if not noise_scale > 0:
            raise ValueError(f"Expected noise_scale > 0; got {noise_scale!r}.")
        C = self.covariances
        S = A @ C @ A.mT + noise_scale**2 * torch.eye(len(y), dtype=torch.float64)
        S = 0.5 * (S + S.mT)
        gain = torch.linalg.solve(S, A @ C).mT  # C Aᵀ S⁻¹, (K, d, m)
        predicted = self.means @ A.mT
        rest = torch.eye(size, dtype=torch.float64) - gain @ A
        covariances = rest @ C @ rest.mT + noise_scale**2 * gain @ gain.mT
        evidence = MultivariateNormal(predicted, S).log_prob(y)
        return GaussianMixture(
            (self._components.log_weights + evidence).softmax(0),
            self.means + torch.einsum("kdm,km->kd", gain, y - predicted),
            0.5 * (covariances + covariances.mT),
        )
