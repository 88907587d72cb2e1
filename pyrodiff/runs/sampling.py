"""The command ``sample``: an array in the units of the data as given, and a picture of it.

The picture holds a checksum of the array.  By it the two files are recognised, and no other file is
ever replaced.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrodiff import serialization
from pyrodiff.chains import ReverseChain
from pyrodiff.checks import short
from pyrodiff.data import Affine
from pyrodiff.data.prepare import MAX_CLASSES
from pyrodiff.runs.build import load_model
from pyrodiff.runs.chain_settings import ChainSettings
from pyrodiff.runs.dataset import own_data
from pyrodiff.runs.folder import opened, read_run, say_if_unsealed
from pyrodiff.runs.pictures import png_mark, samples_png
from pyrodiff.runs.respacing import Fits, respacing
from pyrodiff.runs.splits import model_checksum
from pyrodiff.runs.summary import chain_lines
from pyrodiff.runs.terminal import say

__all__ = ["check_output", "one_hot", "sample", "transform"]


class _Draw(NamedTuple):
    """Which samples are drawn; see ``sample``."""

    num_samples: int
    seed: int
    batch_size: int
    label: int | None
    chain: ChainSettings


def sample(
    run: str,
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    label: int | None = None,
    output: str | None = None,
    *,
    steps: int | None = None,
    variance: str | None = None,
    grid: str | None = None,
    probes: int | None = None,
    rank: int | None = None,
) -> Tensor:
    """Draw samples, in the units of the data as given; writes a ``.npy`` file and a picture.

    Args:
        run: the run's folder.
        num_samples: how many.
        seed: of the noise; sample i depends on (seed, i) alone.
        batch_size: samples per network call.
        label: the class of all of them, where the run is conditioned on classes.
        output: the ``.npy`` file; default: ``samples.npy`` in the run.  The picture lies beside it.
            An existing file is replaced only if an earlier call wrote it.
        steps, variance, grid, probes, rank: see ``ChainSettings``.

    Raises:
        ValueError: a label missing, superfluous or out of range; an output of another kind; a
            chain that the run's network cannot serve.
        FileNotFoundError: no run there.
        FileExistsError: an output that an earlier call did not write.
        BlockingIOError: another command writes to the run.
    """
    chain = ChainSettings(steps=steps, variance=variance, grid=grid, probes=probes, rank=rank)
    draw = _Draw(num_samples, seed, batch_size, label, chain)
    if output is None or Path(output).resolve() == (Path(run) / "samples.npy").resolve():
        with opened(run) as (folder, config):
            return _draw(folder, config, folder / "samples.npy", draw, saves=True)
    check_output(Path(output))
    config = read_run(run)
    say_if_unsealed(run, config)
    return _draw(Path(run), config, Path(output), draw, saves=False)


def _draw(folder: Path, config: dict[str, Any], path: Path, draw: _Draw, *, saves: bool) -> Tensor:
    """Draw samples and write them to ``path``; returns them in units of the data as given.

    What is fitted for their chain is saved in the run (``saves``), which is locked then.
    """
    section = serialization.entry(config, "data")
    reverse = _model(folder, section, draw, saves)
    if read_run(folder) != config:
        raise ValueError(f"Expected {folder} to stay as it is; got a run that was replaced.")
    context = one_hot(draw.label, section, draw.num_samples)
    x = reverse.sample(
        draw.num_samples, seed=draw.seed, batch_size=draw.batch_size, context=context
    )
    values = transform(section, reverse.event_shape).inverse(x).numpy()
    _write(x, values, section["levels_found"] is not None, path)
    say(*chain_lines(draw.chain, reverse.event_shape.numel()))
    return torch.as_tensor(values)


def _model(folder: Path, section: dict[str, Any], draw: _Draw, saves: bool) -> ReverseChain:
    """The model, on the chain that was asked for."""
    reverse = load_model(folder)
    if not draw.chain.changes:
        return reverse

    def train() -> tuple[Tensor, Tensor | None]:
        dataset = own_data(folder, section)
        return dataset.train, dataset.train_context

    weights = (folder / "model.safetensors").read_bytes()
    model = model_checksum(folder / "config.yaml", weights)
    fits = Fits(folder, model, train, draw.batch_size, saves)
    return respacing(draw.chain, lambda: reverse, fits).of(reverse)


def _write(x: Tensor, values: np.ndarray, discrete: bool, path: Path) -> None:
    """Write the samples, then their picture, which holds their checksum."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    picture = samples_png(x, discrete, mark=_mark(content.getvalue()))
    serialization.write_bytes(path, content.getvalue())
    serialization.write_bytes(path.with_suffix(".png"), picture)
    say(f"{len(x)} samples -> {path}, {path.with_suffix('.png')}")


def _mark(samples: bytes) -> str:
    return f"pyrodiff samples {hashlib.sha256(samples).hexdigest()}"


def check_output(path: Path) -> None:
    """Refuse to replace files that ``sample`` did not write, and names of another format."""
    if path.suffix != ".npy":
        raise ValueError(f"Expected a name of samples to end in .npy; got {path}.")
    picture = path.with_suffix(".png")
    mark = png_mark(picture)
    if not mark.startswith("pyrodiff samples ") and _exists(picture):
        raise FileExistsError(
            f"Expected no file {picture}, where the picture of the samples is to lie; got one that "
            "pyrodiff sample did not write. Nothing was changed: choose another --output."
        )
    if _exists(path) and (path.is_symlink() or mark != _mark(path.read_bytes())):
        raise FileExistsError(
            f"Expected no file {path}; got one that pyrodiff sample did not write, or did not "
            "finish. Nothing was changed: remove it, or choose another --output."
        )


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def transform(section: Mapping[str, Any], event_shape: torch.Size) -> Affine:
    """The transform of a run's data, for events of this shape.

    Args:
        section: ``data`` of the run's configuration.
        event_shape: of the model.

    Raises:
        ValueError: a transform that does not suit the shape.
    """
    parameters = []
    for name in ("shift", "scale"):
        try:
            parameter = torch.tensor(serialization.entry(section, name), dtype=torch.float64)
            parameter.expand(event_shape)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"Expected a {name} of the data for events of shape {tuple(event_shape)}; "
                f"got {short(section.get(name))}."
            ) from error
        parameters.append(parameter)
    return Affine(*parameters)


def one_hot(label: int | None, section: Mapping[str, Any], num_samples: int) -> Tensor | None:
    """The context of samples of a class, (N, classes), or None without one.

    Args:
        label: the class.
        section: ``data`` of the run's configuration.
        num_samples: N.

    Raises:
        ValueError: a label missing, superfluous or out of range.
    """
    shape = section.get("context_shape")
    if (label is None) != (shape is None):
        got = "none" if label is None else f"label {label}"
        expected = "no label (the run is unconditional)" if shape is None else "a label"
        raise ValueError(f"Expected {expected}; got {got}.")
    if label is None or shape is None:
        return None
    if len(shape) != 1 or not 0 <= label < shape[0] <= MAX_CLASSES:
        raise ValueError(f"Expected a label from 0 to {shape[0] - 1}; got {label}.")
    unit = torch.zeros(shape[0])
    unit[label] = 1.0
    return unit.expand(num_samples, -1)
