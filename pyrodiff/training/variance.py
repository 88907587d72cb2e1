r"""A learned variance for a trained model, whose mean stays what it is, bit for bit.

The network gets a head (``networks.VarianceHead``) for the diagonal v of Cov[x_0 | x_t], which is
trained by ``VarianceMatching`` on the train split and judged by the bound of a short chain on the
validation split.  A step then costs one network call, with no product of the Jacobian.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.data import DataSet
from pyrodiff.denoisers import MeanDenoiser
from pyrodiff.networks import VarianceHead
from pyrodiff.objectives import VarianceMatching
from pyrodiff.training.loop import fit
from pyrodiff.training.settings import HoldsTraining, TrainingSettings
from pyrodiff.variances import LearnedPosterior

__all__ = ["fit_variance", "with_variance_head"]

_TIMESTEPS = 30.0  # to which timesteps are scaled: about the range of log-SNRs


def with_variance_head(reverse: ReverseChain, width: int = 32, *, seed: int = 0) -> ReverseChain:
    """The chain with a ``LearnedPosterior`` from a fresh head on a copy of its network.

    Args:
        reverse: the model, which stays as it is.
        width: hidden features of the head.
        seed: of the head's weights.

    Raises:
        ValueError: a model that learns its variance already; a ``MeanDenoiser``, whose x̂_0
            belongs to the steps of its own chain.
    """
    if reverse.variance.learned:
        raise ValueError(
            f"Expected a model without a learned variance to add one; got {reverse.variance!r}."
        )
    parts = reverse.parts()
    if isinstance(parts.denoiser, MeanDenoiser):
        raise ValueError(
            "Expected a denoiser that serves any step for a learned posterior variance; "
            "got a MeanDenoiser, whose output is the mean of a step of its own chain."
        )
    denoiser = copy.deepcopy(parts.denoiser)
    scale = 1.0 if denoiser.time == "log_snr" else _TIMESTEPS / parts.num_steps
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = VarianceHead(denoiser.network, parts.event_shape, width, scale)
    denoiser.network = head.to(reverse.prototype())
    learned = reverse.assemble(replace(parts, denoiser=denoiser, variance=LearnedPosterior()))
    return learned.named(reverse.name) if reverse.name else learned


def fit_variance(
    reverse: ReverseChain,
    data: DataSet,
    settings: TrainingSettings | HoldsTraining,
    folder: str | Path,
    *,
    target: str = "errors",
    width: int = 32,
    num_steps: int = 100,
    resume: bool = False,
    progress: bool = True,
) -> ReverseChain:
    """The model with a learned posterior variance; its mean is that of ``reverse``, bit for bit.

    Writes into ``folder`` what ``fit`` writes.

    Args:
        reverse: the model, which stays as it is.
        data: its train split is learned from, its validation split judged on.
        settings: of the training.
        folder, resume, progress: see ``fit``.
        target: see ``VarianceMatching``.
        width: hidden features of the head.
        num_steps: of the chain, even in λ, whose levels are learned on and whose bound is judged;
            the result has the chain of ``reverse``, and serves any other.

    Raises:
        ValueError: what ``with_variance_head``, ``VarianceMatching`` and ``fit`` refuse.
    """
    check_count("num_steps", num_steps, 2)
    objective = VarianceMatching(target)
    seed = settings.seed if isinstance(settings, TrainingSettings) else settings.training().seed
    learned = with_variance_head(reverse, width, seed=seed)
    short = learned.respaced(num_steps)
    fit(short, objective, data, settings, folder, resume=resume, progress=progress)
    return learned.eval()
