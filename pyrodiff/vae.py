r"""A plain variational autoencoder, to be compared with a diffusion model in the same units.

    model   p_θ(x_0, z) = N(z; 0, I) p_θ(x_0 | z)                        site ``z``, then ``x_0``
    guide   q_φ(z | x_0) = N(z; μ_φ(x_0), diag exp(v_φ(x_0)))            site ``z``
    bound   log p_θ(x_0) ≥ E_q[log p_θ(x_0 | z) + log p(z) − log q_φ(z | x_0)]

(Kingma and Welling, 2014, equations 2 and 9; Rezende, Mohamed and Wierstra, 2014.)  It has one
latent variable and a learned guide, where a diffusion model has T and a fixed guide.
p_θ(x_0 | z) is of the kind of a decoder of ``pyrodiff.decoders``, so that both bounds are on the
same quantity, in nats: a density of continuous data, a probability of discrete levels.

>>> from pyro.infer import SVI, TraceMeanField_ELBO
>>> from pyro.optim import Adam
>>> vae = VAE((1, 8, 8), decoder=CategoricalDecoder(17))
>>> svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=TraceMeanField_ELBO())
>>> loss = TraceMeanField_ELBO()(vae.model, vae.guide)  # or a module, for optimizers of torch
>>> bool(svi.step(-torch.ones(4, 1, 8, 8)) > 0)
True
"""

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrodiff.checks import check_count
from pyrodiff.decoders import (
    CategoricalDecoder,
    Decoder,
    DiscretizedGaussianDecoder,
    GaussianDecoder,
    check_data,
)
from pyrodiff.distributions import DiscretizedNormal, GridCategorical, Normal
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.samples import sample_checksums
from pyrodiff.likelihood.statistics import log_mean_of_weights, mean_of_draws
from pyrodiff.precision import call_network
from pyrodiff.serialization import describe, fingerprint
from pyrodiff.streams import NoiseStreams

__all__ = ["VAE"]

_counter = itertools.count()


class _Model(PyroModule):
    """The program p_θ(x_0, z): sites ``z`` and ``x_0``, which is observed if it is not None."""

    def __init__(self, network: nn.Module, vae: "VAE"):
        super().__init__()
        self.network = network
        self.__dict__["vae"] = vae  # not as a submodule: this module is one of the VAE's

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

    Both are ``PyroModule``s (a bound method would register no parameter with Pyro), to be passed to
    ``SVI``, ``Predictive`` or an ELBO.  In Pyro's store the parameters of each VAE have names of
    their own, as those of chains do.

    Args:
        event_shape: the shape of one sample.
        latent_size: the size of z.
        hidden: widths of the hidden layers of the encoder, reversed in the decoder.
        decoder: the kind of p_θ(x_0 | z).  ``GaussianDecoder`` and ``DiscretizedGaussianDecoder``
            take mean and log scale from the network, or use their own ``scale``;
            for ``CategoricalDecoder`` the network outputs one logit per level.
        encoder_network: (N, *event_shape) to (N, 2 · latent_size), mean and log variance;
            default an MLP.
        decoder_network: (N, latent_size) to (N, D · k), D the size of an event and k the outputs
            per dimension (1, 2 or the number of levels); default an MLP.

    Raises:
        TypeError: a decoder of any other kind.
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
        return self._distribution(output).to_event(len(self.event_shape))

    def _distribution(self, output: Tensor) -> Normal | DiscretizedNormal | GridCategorical:
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

    def config(self) -> dict[str, Any]:
        """The model as plain values: everything but the weights."""
        return {
            "event_shape": list(self.event_shape),
            "latent_size": self.latent_size,
            "decoder": describe(self.decoder),
            "encoder_network": describe(self.guide.network),
            "decoder_network": describe(self.model.network),
        }

    @torch.no_grad()
    def bound(
        self,
        x_0: Tensor,
        particles: int = 16,
        seed: int = 0,
        batch_size: int = 256,
        *,
        importance: bool = False,
        num_particles: int | None = None,
    ) -> LogLikelihood:
        """A lower bound on log p_θ(x_0) of each sample, from K draws z_k of the latent.

            (1/K) Σ_k log w_k           the ELBO, or with ``importance``
            log (1/K) Σ_k w_k           (Burda et al., 2016, equation 8),
            w_k = p_θ(x_0, z_k) / q_φ(z_k | x_0)

        The draws of sample i are a function of (seed, i): its value does not depend on the other
        samples of its batch.  A draw costs a call of the decoder network, and the encoder network
        is called once.

        Args:
            x_0: data, shape (N, *event_shape).
            particles: K.  The standard error of the mean of log weights is NaN for one draw, that
                of the log of the mean weight for fewer than 8.
            seed: of the noise streams.
            batch_size: samples per network call, at most.
            importance: whether the log of the mean weight is taken, a tighter bound.
            num_particles: the former name of ``particles``.

        Raises:
            ValueError: ``particles`` < 1, or data that the model cannot explain.
        """
        particles = particles if num_particles is None else num_particles
        check_count("particles", particles)
        self.check_data(x_0)
        log_weights = [x_0.new_empty(particles, 0)]
        for start in range(0, len(x_0), batch_size):
            batch = x_0[start : start + batch_size]
            indices = range(start, start + len(batch))
            streams = NoiseStreams(seed, indices, torch.Size([self.latent_size]))
            log_weights.append(self._log_weights(batch, streams, particles))
        return self._result(x_0, torch.cat(log_weights, dim=1).T, importance)

    def _log_weights(self, x_0: Tensor, streams: NoiseStreams, particles: int) -> Tensor:
        """log p_θ(x_0, z) − log q_φ(z | x_0) of draws from the guide, (K, n), nats."""
        q = self.posterior(self.guide.network, x_0)
        prior = dist.Normal(torch.zeros_like(q.mean), 1.0).to_event(1)
        log_weights = []
        for _ in range(particles):
            z = q.base_dist.loc + q.base_dist.scale * streams.normal(q.mean)
            log_joint = self.likelihood(self.model.network, z).log_prob(x_0)
            log_weights.append(log_joint + prior.log_prob(z) - q.log_prob(z))
        return torch.stack(log_weights)

    def _result(self, x_0: Tensor, log_w: Tensor, importance: bool) -> LogLikelihood:
        """The result of log weights (N, K): tensors on the CPU, float64."""
        count, particles = log_w.shape
        summary = log_mean_of_weights(log_w) if importance else mean_of_draws(log_w)
        option = ", importance=True" if importance else ""
        return LogLikelihood(
            value=summary.value.cpu().double(),
            std_error=summary.std_error.cpu().double(),
            kind="lower bound",
            calls=torch.full((count,), particles + 1),
            dimensions=self.event_shape.numel(),
            estimator=f"VAE.bound(particles={particles}{option})",
            degrees_of_freedom=summary.degrees_of_freedom.cpu().double(),
            log_weights=log_w.cpu().double(),
            model=fingerprint(self),
            remarks=summary.remarks,
            unbiased_weights=importance or particles == 1,
            indices=torch.arange(count),
            checksums=sample_checksums(x_0),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy must not share Pyro parameters with its original
        super().__setstate__(state)
        self._pyro_name = f"vae_{next(_counter)}"
        for key, program in self._modules.items():
            if isinstance(program, PyroModule):
                program._pyro_name = f"{self._pyro_name}.{key}"
