"""A reverse chain as the prior of a Pyro program, conditioned: weighted samples and the evidence.

def program(y=None):
    x = reverse(num_samples=1)                                 # x_0, shape (1, *event_shape)
    return pyro.sample("y", dist.Normal(x @ A.T, 0.1).to_event(1), obs=y)

posterior = TwistedSMC(program, reverse, particles=1024).run(y, seed=0)
posterior.samples, posterior.log_weights, posterior.log_evidence, posterior.std_error
"""

from pyrodiff.conditioning.likelihoods import Blind, Gradient, Likelihood, LinearGaussian, Moments
from pyrodiff.conditioning.posterior import History, Posterior
from pyrodiff.conditioning.smc import TwistedSMC

__all__ = [
    "Blind",
    "Gradient",
    "History",
    "Likelihood",
    "LinearGaussian",
    "Moments",
    "Posterior",
    "TwistedSMC",
]
