"""Objects as plain values and back: a class name and the constructor's arguments.

Every class here keeps its constructor's arguments under their own names.  Reading a description
looks the name up among pyrodiff's own public classes of that kind; a name found in a file is never
imported.  What is the user's own is described by its class name alone, and handed in again.

Descriptions come from files, which may hold anything: arguments have to be of the types that the
constructor's annotations name, and integers of a size that a model may need.
"""

import contextlib
import importlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrodiff.checks import check_types, reason, short

__all__ = ["build", "build_parts", "describe", "entry", "network_shapes"]

_KINDS = ("schedules", "denoisers", "variances", "decoders", "networks")
_MESSAGE = 500  # characters of an error that is passed on whole
_PARTS = {"schedule": "Schedule", "variance": "Variance", "decoder": "Decoder"}
MAX_INTEGER = 2**20
"""The largest integer that a description may hold."""


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, nn.Module) or hasattr(type(value), "__dataclass_fields__"):
        return describe(value)
    raise TypeError(f"Expected plain values in a description; got {type(value).__name__}.")


def describe(value: Any) -> dict[str, Any]:
    """An object as plain values: its class name and constructor arguments.

    A class that is not pyrodiff's own is described by its name alone and marked ``external``.
    """
    kind = type(value)
    package, *names = kind.__module__.split(".")
    if package != "pyrodiff" or not names or names[0] not in _KINDS:
        return {"class": kind.__name__, "external": True}
    parameters = inspect.signature(kind).parameters
    return {"class": kind.__name__} | {name: _plain(getattr(value, name)) for name in parameters}


def entry(config: Any, key: str) -> Any:
    """``config[key]``, or a ValueError that says what is missing."""
    if not isinstance(config, dict) or key not in config:
        got = short(sorted(map(str, config))) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"Expected an entry {key!r} in the configuration; got {got}.")
    return config[key]


def build(kind: str, description: Any, **parts: Any) -> Any:
    """The object of ``kind`` ("schedules", "networks", …) that ``describe`` described.

    Args:
        kind: the module of pyrodiff that holds the class.
        description: from a file.
        parts: arguments that the description does not hold.

    Raises:
        ValueError: an unknown class or argument, an argument of a wrong type, or an external class.
    """
    assert kind in _KINDS
    arguments = dict(_described(description))
    name = arguments.pop("class")
    if arguments.pop("external", False):
        raise _not_handed_in({kind.removesuffix("s"): name})
    known = _own_classes(kind)
    if name not in known:
        raise ValueError(f"Expected one of pyrodiff's {kind} ({', '.join(known)}); got {name!r}.")
    unknown = set(arguments) - set(inspect.signature(known[name]).parameters)
    if unknown:
        raise ValueError(
            f"Expected arguments of {name}; got unknown {short(sorted(unknown))}. "
            "Was the file written by a newer version?"
        )
    _check_sizes(name, arguments)
    check_types(known[name], arguments)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        return known[name](**arguments, **parts)
    except Exception as error:  # values from a file can make a constructor raise nearly anything
        ours = isinstance(error, ValueError) and str(error).startswith("Expected")
        if ours and len(str(error)) < _MESSAGE:
            raise
        message = f"Expected a valid description of {name}; got {reason(error)}."
        raise ValueError(message) from error


def build_parts(config: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule, denoiser, variance and decoder of a model's configuration.

    Args:
        config: as ``ReverseChain.config`` gives it.
        parts: what the caller hands in, or None, for "network" and these four.

    Raises:
        ValueError: a description of anything but pyrodiff's own classes where nothing is handed
            in; another description than that of what is; a network beside a denoiser, which holds
            one.
    """
    kinds = (*_PARTS, "denoiser")
    descriptions: dict[str, Any] = {kind: _described(entry(config, kind)) for kind in kinds}
    for kind, description in descriptions.items():
        if parts.get(kind) is not None:
            _check_same(kind, parts[kind], description)
    if parts.get("denoiser") is None:
        descriptions["network"] = descriptions["denoiser"].get("network")
        if descriptions["denoiser"].get("external"):  # which brings its network along
            descriptions["network"] = {}
        elif parts.get("network") is None:
            _described(descriptions["network"])
    elif parts.get("network") is not None:
        raise ValueError("Expected a network or a denoiser, which holds one; got both.")
    missing = {
        kind: description["class"]
        for kind, description in descriptions.items()
        if parts.get(kind) is None and description.get("external")
    }
    if missing:
        raise _not_handed_in(missing)
    built = {kind: parts.get(kind) for kind in ("denoiser", *_PARTS)}
    for kind in _PARTS:
        if built[kind] is None:
            built[kind] = build(f"{kind}s", descriptions[kind])
    if built["denoiser"] is None:
        network = parts.get("network")
        if network is None:
            network = build("networks", descriptions["network"])
        arguments = {k: v for k, v in descriptions["denoiser"].items() if k != "network"}
        built["denoiser"] = build("denoisers", arguments, network=network)
    return built


def network_shapes(description: Any, tensors: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a described network's weights by name, without memory for one of them.

    Args:
        description: of a network of pyrodiff's own.
        tensors: how many weights there are; where the network has more, nothing more is made.

    Raises:
        ValueError: what ``build`` raises; more weights than ``tensors``.
    """
    with _at_most(tensors), torch.device("meta"):
        network = build("networks", description)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


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


def _own_classes(kind: str) -> dict[str, type]:
    module = importlib.import_module(f"pyrodiff.{kind}")
    classes = {name: getattr(module, name) for name in module.__all__}
    return {n: c for n, c in classes.items() if inspect.isclass(c) and not inspect.isabstract(c)}


def _described(description: Any) -> dict[str, Any]:
    if not isinstance(description, dict) or not isinstance(description.get("class"), str):
        raise ValueError(f"Expected a description with a class name; got {short(description)}.")
    return description


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
    module = importlib.import_module(f"pyrodiff.{kind}s")
    if not isinstance(part, getattr(module, kind.capitalize())):
        raise TypeError(f"Expected {kind} to be a {kind.capitalize()}; got {short(part)}.")
    if describe(part) != description:
        raise ValueError(
            f"Expected the {kind} that the file describes, {short(description)}; "
            f"got {short(describe(part))}."
        )


def _check_sizes(name: str, arguments: dict[str, Any]) -> None:
    """Refuse integers that no model needs, before anything of that size is made."""
    for key, value in arguments.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_INTEGER:
                raise ValueError(
                    f"Expected integers of at most {MAX_INTEGER} in a description; "
                    f"got {key} = {short(number)} for {name}."
                )
