"""A described network, compared with its weights before there is memory for it.

A few bytes of a description can ask for any number of layers of any size; a file of weights has
what it has.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrodiff.serialization.catalogue import OWN
from pyrodiff.serialization.descriptions import build, external_class
from pyrodiff.serialization.weights import check_shapes, shapes

__all__ = ["check_network", "network_shapes"]

_NETWORK = "denoiser.network."  # of names in a state dict


def check_network(config: Any, weights: Mapping[str, Tensor], source: Path) -> None:
    """Compare a described network with its weights, before there is memory for the network.

    Raises:
        ValueError: weights that do not fit; what ``descriptions.build`` raises.
    """
    denoiser = config.get("denoiser") if isinstance(config, dict) else None
    network = denoiser.get("network") if isinstance(denoiser, dict) else None
    if not isinstance(network, dict) or external_class(network) is not None:
        return  # said by ``build_parts``, with whatever else is missing
    got = {name: shape for name, shape in shapes(weights).items() if name.startswith(_NETWORK)}
    expected = network_shapes(network, 2 * len(got) + 100).items()
    check_shapes({f"{_NETWORK}{name}": shape for name, shape in expected}, got, source)


def network_shapes(description: Any, tensors: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a described network's weights by name, without memory for one of them.

    Args:
        description: of a network of pyrodiff's own.
        tensors: how many weights there are; where the network has more, nothing more is made.

    Raises:
        ValueError: what ``build`` raises; more weights than ``tensors``.
    """
    with _at_most(tensors), torch.device("meta"):
        network = build("network", OWN["network"], description)
    return shapes(network.state_dict())


@contextlib.contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Stop a module's construction in this thread when it has more parameters than ``tensors``."""
    thread, count = threading.get_ident(), 0

    def check(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > tensors:
            raise ValueError(
                f"Expected weights that fit the model; got {tensors} of them, and its description "
                "has more."
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()
