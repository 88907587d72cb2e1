r"""A plain variational autoencoder, to stand beside a diffusion model in the same table.

    model   p_θ(x_0, z) = N(z; 0, I) p_θ(x_0 | z)                        site ``z``, then ``x_0``
    guide   q_φ(z | x_0) = N(z; μ_φ(x_0), diag exp(v_φ(x_0)))            site ``z``
    bound   log p_θ(x_0) ≥ E_q[log p_θ(x_0 | z) + log p(z) − log q_φ(z | x_0)]

(Kingma and Welling, 2014, equations 2 and 9; Rezende, Mohamed and Wierstra, 2014.)  It is the
hierarchy of one latent variable whose guide is learned, where a diffusion model has T and a fixed
one.  p_θ(x_0 | z) is of the kind of a decoder of ``pyrodiff.decoders``, so that both bounds are
nats of the same thing: a density for continuous data, a probability of the level for discrete.

>>> from pyro.infer import SVI, TraceMeanField_ELBO
>>> from pyro.optim import Adam
>>> vae = VAE((1, 8, 8), decoder=CategoricalDecoder(17))
>>> svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=TraceMeanField_ELBO())
>>> loss = TraceMeanField_ELBO()(vae.model, vae.guide)       # or as a module, for torch's own
>>> bool(svi.step(-torch.ones(4, 1, 8, 8)) > 0)
True
"""

import itertools
import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrodiff.decoders import (
    CategoricalDecoder,
    Decoder,
    DiscretizedGaussianDecoder,
    GaussianDecoder,
    check_data,
)
from pyrodiff.distributions import DiscretizedNormal, GridCategorical, Normal
from pyrodiff.precision import call_network
from pyrodiff.streams import NoiseStreams

__all__ = ["VAE", "VAEBound"]

_counter = itertools.count()


class VAEBound(NamedTuple):
    """The bound per sample and its Monte Carlo standard error, both (N,), nats."""

    value: Tensor
    std_error: Tensor


class _Model(PyroModule):
    """The program p_θ(x_0, z): sites ``z`` and ``x_0``, observed where data is given."""

    def __init__(self, network: nn.Module, vae: "VAE"):
        super().__init__()
        self.network = network
        self.__dict__["vae"] = vae  # not a submodule: the VAE holds this one

    def forward(self, x_0: Tensor | None = None, num_samples: int = 1) -> Tensor:
        like = next(self.parameters(), torch.empty(())) if x_0 is None else x_0
        network = self.network  # the access registers the parameters with Pyro
        with pyro.plate("data", num_samples if x_0 is None else len(x_0), dim=-1):
            standard = dist.Normal(like.new_zeros(()), like.new_ones(()))
            z = pyro.sample("z", standard.expand((self.vae.latent_size,)).to_event(1))
            return pyro.sample("x_0", self.vae.likelihood(network, z), obs=x_0)


class _Guide(PyroModule):
    """The program q_φ(z | x_0): site ``z``."""

    def __init__(self, network: nn.Module, vae: "VAE"):
        super().__init__()
        self.network = network
        self.__dict__["vae"] = vae

    def forward(self, x_0: Tensor, num_samples: int = 1) -> Tensor:
        self.vae.check_data(x_0)
        with pyro.plate("data", len(x_0), dim=-1):
            return pyro.sample("z", self.vae.posterior(self.network, x_0))


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class VAE(PyroModule):
    r"""A Gaussian encoder and a decoder network, as two Pyro programs ``model`` and ``guide``.

    Both are ``PyroModule``s of their own (a bound method would register no parameter with Pyro),
    to be handed to ``SVI``, ``Predictive`` or an ELBO.  Parameters have a name of their own in
    Pyro's store for each VAE, as the chains do.

    Args:
        event_shape: the shape of one sample.
        latent_size: the size of z.
        hidden: widths of the hidden layers of the encoder, reversed in the decoder.
        decoder: the kind of p_θ(x_0 | z).  ``GaussianDecoder`` and ``DiscretizedGaussianDecoder``
            take mean and log scale from the network, or have a ``scale`` of their own;
            for ``CategoricalDecoder`` the network gives one logit per level.
        encoder_network: (N, *event_shape) to (N, 2 · latent_size), mean and log variance;
            default an MLP.
        decoder_network: (N, latent_size) to (N, D · k), D the size of an event and k the outputs
            per dimension (1, 2 or the number of levels); default an MLP.

    Raises:
        TypeError: a decoder of another kind.
        ValueError: an empty event shape or latent.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latent_size: int = 16,
        hidden: tuple[int, ...] = (256, 256),
        decoder: Decoder | None = None,
        encoder_network: nn.Module | None = None,
        decoder_network: nn.Module | None = None,
    ):
        super().__init__(name=f"vae_{next(_counter)}")
        self.event_shape = torch.Size(event_shape)
        size = self.event_shape.numel()
        if len(self.event_shape) == 0 or size == 0 or latent_size < 1:
            raise ValueError(
                "Expected a non-empty event_shape and latent_size >= 1; "
                f"got {tuple(event_shape)} and {latent_size}."
            )
        self.latent_size = latent_size
        self.decoder = GaussianDecoder() if decoder is None else decoder
        if isinstance(self.decoder, CategoricalDecoder):
            self._outputs = self.decoder.levels
        elif isinstance(self.decoder, GaussianDecoder | DiscretizedGaussianDecoder):
            self._outputs = 1 if self.decoder.scale is not None else 2
        else:
            raise TypeError(f"Expected a decoder of pyrodiff.decoders; got {decoder!r}.")
        encoder = nn.Sequential(nn.Flatten(), _mlp([size, *hidden, 2 * latent_size]))
        generator = _mlp([latent_size, *hidden[::-1], size * self._outputs])
        self.model = _Model(decoder_network or generator, self)
        self.guide = _Guide(encoder_network or encoder, self)

    def posterior(self, network: nn.Module, x_0: Tensor) -> dist.Independent:
        """q_φ(z | x_0) from the encoder network."""
        loc, log_variance = call_network(network, x_0).chunk(2, dim=-1)
        return dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1)

    def likelihood(self, network: nn.Module, z: Tensor) -> dist.Independent:
        """p_θ(x_0 | z) from the decoder network; z of shape (*batch, latent_size)."""
        output = call_network(network, z.reshape(-1, self.latent_size))
        output = output.reshape(*z.shape[:-1], *self.event_shape, self._outputs)
        return self._law(output).to_event(len(self.event_shape))

    def _law(self, output: Tensor) -> Normal | DiscretizedNormal | GridCategorical:
        kind: Any = self.decoder
        if isinstance(kind, CategoricalDecoder):
            return GridCategorical(output, kind.low, kind.high)
        mean = output[..., 0]
        scale = torch.full_like(mean, kind.scale) if kind.scale else output[..., 1].exp()
        if isinstance(kind, DiscretizedGaussianDecoder):
            return DiscretizedNormal(mean, scale, kind.bin_width, kind.low, kind.high)
        return Normal(mean, scale, validate_args=False)

    def check_data(self, x_0: Tensor) -> None:
        """Raise ValueError unless ``x_0`` is finite data (N, *event_shape) for the decoder."""
        check_data(x_0, self.event_shape, self.decoder)

    @torch.no_grad()
    def bound(
        self, x_0: Tensor, num_particles: int = 16, seed: int = 0, batch_size: int = 256
    ) -> VAEBound:
        """E_q[log p_θ(x_0, z) − log q_φ(z | x_0)] per sample: a lower bound on log p_θ(x_0), nats.

        Sample i's draws are a function of (seed, i): its value depends on no batch-mate.  With
        one particle the standard error is NaN.

        Raises:
            ValueError: ``num_particles`` < 1, or data that the model cannot explain.
        """
        if num_particles < 1:
            raise ValueError(f"Expected num_particles >= 1; got {num_particles}.")
        self.check_data(x_0)
        weights = [x_0.new_empty(num_particles, 0)]
        for start in range(0, len(x_0), batch_size):
            part = x_0[start : start + batch_size]
            indices = range(start, start + len(part))
            streams = NoiseStreams(seed, indices, torch.Size([self.latent_size]))
            q = self.posterior(self.guide.network, part)
            prior = dist.Normal(torch.zeros_like(q.mean), 1.0).to_event(1)
            log_weights = []
            for _ in range(num_particles):
                z = q.base_dist.loc + q.base_dist.scale * streams.normal(q.mean)
                log_joint = self.likelihood(self.model.network, z).log_prob(part)
                log_weights.append(log_joint + prior.log_prob(z) - q.log_prob(z))
            weights.append(torch.stack(log_weights))
        total = torch.cat(weights, dim=1)
        spread = total.std(0) if num_particles > 1 else torch.full_like(total[0], math.nan)
        return VAEBound(total.mean(0), spread / math.sqrt(num_particles))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy must not share Pyro parameters with its original.
        super().__setstate__(state)
        self._pyro_name = f"vae_{next(_counter)}"
        for key, program in self._modules.items():
            if isinstance(program, PyroModule):
                program._pyro_name = f"{self._pyro_name}.{key}"
