"""Ways from noise to data: ancestral sampling, DDIM and the probability flow.

    ancestral               x_{t−1} ~ p_θ(x_{t−1} | x_t), what ``ReverseChain.sample`` does
    DDIM(eta)               the steps of another chain with the same marginals; η = 0: no noise
    ProbabilityFlowSampler  the ordinary differential equation, by Heun's method

All start from the same x_T for the same seed, and sample i is a function of (seed, i) alone.
"""

from pyrodiff.samplers.ancestral import SampledChain, ancestral, count_samples, sample
from pyrodiff.samplers.few_steps import DDIM, ProbabilityFlowSampler, Sampler

__all__ = [
    "DDIM",
    "ProbabilityFlowSampler",
    "SampledChain",
    "Sampler",
    "ancestral",
    "count_samples",
    "sample",
]
