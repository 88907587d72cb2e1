r"""Oracles: models whose log p(x_0) is known exactly, to test and to calibrate everything else.

    Gaussian, GaussianMixture   data laws with their density, samples and Bayes-optimal network
    linear_log_prob             log p_θ(x_0) of a chain whose denoiser is affine in x_t
    linear_bound                the variational bound of such a chain, term by term
    GridOracle                  log p_θ(x_0) of a chain over one dimension, whatever its network
    Product, ProductNetwork     independent blocks of dimensions

All of it is in nats and computed in float64.
"""

from pyrodiff.oracles.bayes import BayesNetwork
from pyrodiff.oracles.grid import GridOracle
from pyrodiff.oracles.linear import LinearBound, linear_bound, linear_log_prob
from pyrodiff.oracles.mixture import Gaussian, GaussianMixture
from pyrodiff.oracles.product import Product, ProductNetwork

__all__ = [
    "BayesNetwork",
    "Gaussian",
    "GaussianMixture",
    "GridOracle",
    "LinearBound",
    "Product",
    "ProductNetwork",
    "linear_bound",
    "linear_log_prob",
]
