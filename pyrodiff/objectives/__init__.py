r"""Objectives: Pyro ELBOs over the pair (reverse chain, forward chain).

Every one of them is a weighted sum over t of the same squared errors,

    ‖ε − ε̂‖² = (α_t²/σ_t²) ‖x_0 − x̂_0‖²,    x_t = α_t x_0 + σ_t ε,

    VariationalBound   a bound: −ELBO = KL_T + Σ_{t≥2} KL_t + reconstruction, where with a fixed
                       variance KL_t = c_0² σ_t² / (2 α_t² σ_θ²) ‖ε − ε̂‖² + const
    NoiseLoss          not a bound: weight 1 at every t                     (L_simple)
    MeanLoss           not a bound: weight c_0² σ_t²/α_t², ‖μ̃ − μ_θ‖²
    WeightedLoss       not a bound (unless the weights are the bound's): weight w(step)
    HybridLoss         not a bound: NoiseLoss + a small share of the bound, for the variance
    VarianceMatching   not a bound: KLs as a function of the variance, the mean left alone

(Ho et al., 2020, equations 5, 8, 12 and 14; Nichol and Dhariwal, 2021, equation 16).

    RenyiBound         a bound tighter than these, from whole paths; importance-weighted for α = 0

Losses are
summed over the batch as in Pyro, in nats for the bounds.  The subsampled objectives call the
network once, on the whole batch, without Pyro's handlers; they work with ``SVI``, with
``ELBOModule`` (``objective(reverse, forward)``) and so with Lightning.
"""

from pyrodiff.objectives.losses import (
    HybridLoss,
    MeanLoss,
    MinSNR,
    NoiseLoss,
    SigmoidWeighting,
    VariationalBound,
    WeightedLoss,
)
from pyrodiff.objectives.matching import VarianceMatching
from pyrodiff.objectives.objective import Objective
from pyrodiff.objectives.renyi import RenyiBound
from pyrodiff.objectives.visit import Visit, unchecked_term, variational_term

__all__ = [
    "HybridLoss",
    "MeanLoss",
    "MinSNR",
    "NoiseLoss",
    "Objective",
    "RenyiBound",
    "SigmoidWeighting",
    "VarianceMatching",
    "VariationalBound",
    "Visit",
    "WeightedLoss",
    "unchecked_term",
    "variational_term",
]
