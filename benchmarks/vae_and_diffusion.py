"""A VAE and a diffusion model of the digits under one bound, in one table.

    python benchmarks/vae_and_diffusion.py runs/digits

The run is what ``pyrodiff fit digits`` wrote; the VAE is trained here, by Pyro's ``Trace_ELBO``
through ``ELBOModule``, on the same training images, stopped at its best validation bound.  Both
give −ELBO of the same 500 test images, as probabilities over the 17 levels, in bits per dimension.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from rich.console import Console
from rich.table import Table

from pyrodiff.data import load
from pyrodiff.decoders import CategoricalDecoder
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.serialization import write_atomically
from pyrodiff.vae import VAE

UNIT = 64 * math.log(2)


def summary(value: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error over samples, bits per dimension."""
    bits = -value.double() / UNIT
    return float(bits.mean()), float(bits.std() / len(bits) ** 0.5)


def train_vae(steps: int) -> VAE:
    """The VAE with the best validation bound along ``steps`` steps."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    data = load("digits")
    vae = VAE(data.event_shape, decoder=CategoricalDecoder(17))
    loss = TraceMeanField_ELBO()(vae.model, vae.guide)
    loss(data.train[:2])  # Pyro's modules settle on their first call
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.1)
    best, kept = math.inf, copy.deepcopy(vae.state_dict())
    for step in range(1, steps + 1):
        batch = data.train[torch.randint(len(data.train), (64,))]
        optimizer.zero_grad()
        (loss(batch) / len(batch)).backward()
        optimizer.step()
        if step % 250 == 0:
            bound, _ = summary(vae.bound(data.validation, particles=8, seed=0).value)
            if bound < best:
                best, kept = bound, copy.deepcopy(vae.state_dict())
    vae.load_state_dict(kept)
    return vae


def main() -> None:
    """Print the table and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusion = summary(LogLikelihood.load(options.run / "evaluation.nc").value)
    vae = train_vae(options.steps)
    test = load("digits").test
    rows = {
        "VAE (16 latents)": summary(vae.bound(test, particles=64, seed=1).value),
        f"diffusion ({options.run.name})": diffusion,
    }
    table = Table("model", "bits/dim (upper bound)", "± standard error", title="digits, test")
    for name, (value, error) in rows.items():
        table.add_row(name, f"{value:.4f}", f"{error:.4f}")
    Console().print(table)
    if options.output is not None:
        text = json.dumps({"unit": "bits/dim", "rows": rows}, indent=2) + "\n"
        write_atomically(options.output, lambda name: name.write_text(text))


if __name__ == "__main__":
    main()
