r"""The two Pyro programs: the forward chain (guide) and the reverse chain (model).

    guide   q(x_1:T | x_0) = q(x_T | x_0) ∏_{t=2}^T q(x_{t−1} | x_t, x_0)     order="denoising"
                           = ∏_{t=1}^T q(x_t | x_{t−1})                       order="noising"
    model   p_θ(x_0:T)     = N(x_T; 0, I) ∏_{t=2}^T N(x_{t−1}; μ_θ, Σ_θ) p_θ(x_0 | x_1)
                             μ_θ = c_0 x̂_0(x_t) + c_t x_t

Sites are named ``x_1`` … ``x_T`` and ``x_0``, inside one plate ``"data"`` at dimension −1; of
several chains in one program each has a name for a prefix (``names``).  Batch axes stand on the
left, event axes on the right, so that plates added outside (vectorized particles,
``Predictive(parallel=True)``) broadcast.  The two orders of the guide are the same
joint; the denoising order visits the sites as the model does, so each KL of Pyro's
``TraceMeanField_ELBO`` is a term of the bound of Ho et al. (2020, equation 5).  ``NonCentered``
turns the latent sites of the model into noise, for NUTS and Pyro's automatic guides.
"""

from pyrodiff.chains.forward import ForwardChain
from pyrodiff.chains.noncentered import NoiseReparam, NonCentered
from pyrodiff.chains.reverse import ReverseChain

__all__ = ["ForwardChain", "NoiseReparam", "NonCentered", "ReverseChain"]
