"""A reverse chain as a folder: ``config.yaml`` and ``model.safetensors``, and back.

The configuration describes the parts of the chain (``descriptions``).  Reading it looks each class
up among pyrodiff's public classes of that kind; a name in a file is never imported.  A part whose
class is the user's is passed in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Self

from pyrodiff.checks import check_choice, short
from pyrodiff.decoders import Decoder
from pyrodiff.denoisers import Denoiser
from pyrodiff.schedules import Schedule
from pyrodiff.serialization.catalogue import BASES, OWN
from pyrodiff.serialization.config import read_config, write_config
from pyrodiff.serialization.descriptions import (
    build,
    describe,
    described,
    entry,
    external_class,
)
from pyrodiff.serialization.networks import check_network
from pyrodiff.serialization.weights import load_weights, read_weights, write_weights
from pyrodiff.variances import Variance

__all__ = ["Parts", "SavedModel", "build_parts"]

_ORDERS = ("denoising", "noising")
_MAX_STEPS, _MAX_EVENT = 10**6, 2**24  # of a model from a file


@dataclass(frozen=True)
class Parts:
    """What a reverse chain is made of.

    Args:
        schedule, num_steps, order: of its forward chain.
        denoiser: with its network.
        event_shape: the shape of one sample.
        variance: of its transitions.
        decoder: its last factor.
    """

    schedule: Schedule
    num_steps: int
    order: str
    denoiser: Denoiser
    event_shape: tuple[int, ...]
    variance: Variance
    decoder: Decoder


class SavedModel:
    """A model that is saved as plain values and weights; what ``ReverseChain`` inherits."""

    def parts(self) -> Parts:
        """What the model is made of."""
        raise NotImplementedError

    @classmethod
    def assemble(cls, parts: Parts) -> Self:
        """The model of these parts."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The model as plain values: everything but the weights."""
        parts = self.parts()
        return {
            "event_shape": list(parts.event_shape),
            "num_steps": parts.num_steps,
            "order": parts.order,
            "schedule": describe(parts.schedule),
            "denoiser": describe(parts.denoiser),
            "variance": describe(parts.variance),
            "decoder": describe(parts.decoder),
        }

    @classmethod
    def from_config(
        cls,
        config: Any,
        network: nn.Module | None = None,
        *,
        schedule: Schedule | None = None,
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        denoiser: Denoiser | None = None,
    ) -> Self:
        """The chain that ``config()`` describes, with fresh weights.

        Args:
            config: plain values, as ``config()`` gives them.
            network, schedule, variance, decoder, denoiser: the part, where its class is not one of
                pyrodiff's; a denoiser together with its network.

        Raises:
            ValueError: a description of a class that is not pyrodiff's without the part itself, or
                a part that differs from its description.
            TypeError: a part of another kind.
        """
        passed = {"network": network, "schedule": schedule, "variance": variance}
        built = build_parts(config, passed | {"decoder": decoder, "denoiser": denoiser})
        order = config.get("order", "denoising")
        check_choice("order", order, _ORDERS)
        num_steps, event_shape = _read_sizes(config)
        return cls.assemble(
            Parts(num_steps=num_steps, order=order, event_shape=event_shape, **built)
        )

    def save(self, path: str | Path) -> None:
        """Write ``config.yaml`` and ``model.safetensors`` into the folder ``path``, atomically."""
        assert isinstance(self, nn.Module)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / "model.safetensors", self.state_dict())
        write_config(folder / "config.yaml", {"model": self.config()})

    @classmethod
    def load(
        cls,
        path: str | Path,
        network: nn.Module | None = None,
        *,
        schedule: Schedule | None = None,
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        denoiser: Denoiser | None = None,
    ) -> Self:
        """Read what ``save`` wrote; nothing in the files is executed or imported.

        Args:
            path: the folder.
            network, schedule, variance, decoder, denoiser: see ``from_config``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is unreadable, truncated, or not pyrodiff's; weights that do not
                fit the model; what ``from_config`` raises.
            TypeError: what ``from_config`` raises.
        """
        source = Path(path) / "model.safetensors"
        config = entry(read_config(Path(path) / "config.yaml"), "model")
        weights = read_weights(source)
        if network is None and denoiser is None:
            check_network(config, weights, source)
        model = cls.from_config(
            config,
            network,
            schedule=schedule,
            variance=variance,
            decoder=decoder,
            denoiser=denoiser,
        )
        assert isinstance(model, nn.Module)
        dtype = next((v.dtype for v in weights.values() if v.is_floating_point()), None)
        if dtype is not None:
            model.to(dtype)
        load_weights(model, weights, source)
        return model


def build_parts(config: Any, passed: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule, denoiser, variance and decoder of a model's configuration.

    Args:
        config: as ``ReverseChain.config`` gives it.
        passed: what the caller passes in, or None, for "network" and these four.

    Raises:
        ValueError: a description of a class that is not pyrodiff's where nothing is passed in; a
            part that differs from its description; a network beside a denoiser, which holds one.
    """
    kinds = [kind for kind in BASES if kind != "network"]
    descriptions: dict[str, Any] = {kind: described(entry(config, kind)) for kind in kinds}
    for kind, description in descriptions.items():
        if passed.get(kind) is not None:
            _check_same(kind, passed[kind], description)
    denoiser = descriptions["denoiser"]
    if passed.get("denoiser") is None and not denoiser.get("external"):
        descriptions["network"] = denoiser.get("network")
        if passed.get("network") is None:
            described(descriptions["network"])
    elif passed.get("denoiser") is not None and passed.get("network") is not None:
        raise ValueError("Expected a network or a denoiser, which holds one; got both.")
    missing = {
        kind: name
        for kind, description in descriptions.items()
        if passed.get(kind) is None and (name := _external(kind, description)) is not None
    }
    if missing:
        raise _not_handed_in(missing)
    built = {kind: passed.get(kind) for kind in kinds}
    for kind in ("schedule", "variance", "decoder"):
        if built[kind] is None:
            built[kind] = build(kind, OWN[kind], descriptions[kind])
    if built["denoiser"] is None:
        network = passed.get("network")
        if network is None:
            network = build("network", OWN["network"], descriptions["network"])
        arguments = {name: value for name, value in denoiser.items() if name != "network"}
        built["denoiser"] = build("denoiser", OWN["denoiser"], arguments, network=network)
    return built


def _external(kind: str, description: Mapping[str, Any]) -> str | None:
    """The class that has to be handed in, or None; a denoiser's network is a part of its own."""
    own = {name: value for name, value in description.items() if name != "network"}
    return external_class(own if kind == "denoiser" else description)


def _read_sizes(config: Any) -> tuple[int, tuple[int, ...]]:
    """T and the event shape of a configuration from a file."""
    num_steps, shape = (entry(config, key) for key in ("num_steps", "event_shape"))
    if type(num_steps) is not int or not 1 <= num_steps <= _MAX_STEPS:
        raise ValueError(
            f"Expected num_steps to be an integer >= 1 and at most {_MAX_STEPS} in a file; "
            f"got {short(num_steps)}."
        )
    if not isinstance(shape, list) or not all(type(v) is int and v > 0 for v in shape):
        raise ValueError(
            f"Expected event_shape to be a list of positive integers; got {short(shape)}."
        )
    if math.prod(shape) > _MAX_EVENT:
        raise ValueError(
            f"Expected events of at most {_MAX_EVENT} values in a file; got {short(shape)}."
        )
    return num_steps, tuple(shape)


def _not_handed_in(names: Mapping[str, str]) -> ValueError:
    """The error for parts ("schedule", …) of these classes, which are the user's own."""
    parts = " and ".join(f"the {kind} {name[:80]}" for kind, name in names.items())
    verb, call = "is" if len(names) == 1 else "are", ", ".join(f"{kind}=…" for kind in names)
    return ValueError(
        f"Expected {parts}, which {verb} not pyrodiff's own, to be handed in: load(path, {call}). "
        "A class that a file names is never imported."
    )


def _check_same(kind: str, part: Any, description: dict[str, Any]) -> None:
    """Refuse a part that is not the one that the file describes."""
    if not isinstance(part, BASES[kind]):
        raise TypeError(f"Expected {kind} to be a {BASES[kind].__name__}; got {short(part)}.")
    if describe(part) != description:
        raise ValueError(
            f"Expected the {kind} that the file describes, {short(description)}; "
            f"got {short(describe(part))}."
        )
