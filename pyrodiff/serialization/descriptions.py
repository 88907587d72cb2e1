"""Objects as plain values and back: a class name and the constructor's arguments.

Every class that is described keeps its constructor's arguments as attributes of the same names.
Reading a description looks the class up by name among pyrodiff's public classes of that kind; a
name in a file is never imported.  A class of the user's is described by its name alone, and the
object has to be passed in again.

Descriptions come from files, which may hold anything: arguments must have the types of the
constructor's annotations, and integers a size that a model may need.
"""

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from pyrodiff.checks import check_types, reason, short

__all__ = ["build", "describe", "described", "entry", "external_class", "own_classes"]

_ROOMS = ("schedules", "denoisers", "variances", "decoders", "networks")
_MESSAGE = 500  # characters of an error that is passed on whole
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

    A class from outside pyrodiff is described by its name alone and marked ``external``.
    """
    kind = type(value)
    package, *names = kind.__module__.split(".")
    if package != "pyrodiff" or not names or names[0] not in _ROOMS:
        return {"class": kind.__name__, "external": True}
    parameters = inspect.signature(kind).parameters
    return {"class": kind.__name__} | {name: _plain(getattr(value, name)) for name in parameters}


def external_class(description: Mapping[str, Any]) -> str | None:
    """The class of the user's that a description names, or that one of a network within; or None.

    ``VarianceHead(Mine)`` for a network within another.
    """
    name = str(description.get("class"))
    if description.get("external"):
        return name
    inner = description.get("network")
    within = external_class(inner) if isinstance(inner, dict) else None
    return None if within is None else f"{name}({within})"


def entry(config: Any, key: str) -> Any:
    """``config[key]``, or a ValueError that says what is missing."""
    if not isinstance(config, dict) or key not in config:
        got = short(sorted(map(str, config))) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"Expected an entry {key!r} in the configuration; got {got}.")
    return config[key]


def own_classes(module: ModuleType, base: type) -> dict[str, type]:
    """The public subclasses of ``base`` in a module of pyrodiff that can be made, by name."""
    classes = {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in classes.items()
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)
    }


def build(kind: str, classes: Mapping[str, type], description: Any, **arguments: Any) -> Any:
    """The object that ``describe`` described.

    Args:
        kind: what it is: "schedule", say.
        classes: those that a description may name.
        description: from a file, of a class that is not external.
        arguments: which the description does not hold.

    Raises:
        ValueError: an unknown class or argument, an argument of a wrong type.
    """
    values = dict(described(description))
    name = values.pop("class")
    if name not in classes:
        choices = ", ".join(classes)
        raise ValueError(f"Expected one of pyrodiff's {kind}s ({choices}); got {short(name)}.")
    unknown = set(values) - set(inspect.signature(classes[name]).parameters)
    if unknown:
        raise ValueError(
            f"Expected arguments of {name}; got unknown {short(sorted(unknown))}. "
            "Was the file written by a newer version?"
        )
    if isinstance(values.get("network"), dict):  # a network around another, not around
        others = {key: value for key, value in classes.items() if key != name}  # one of its kind
        arguments["network"] = build(kind, others, values.pop("network"))
    _check_sizes(name, values)
    check_types(classes[name], values)
    values = {name: _as_tuples(value) for name, value in values.items()}
    try:
        return classes[name](**values, **arguments)
    except Exception as error:  # values from a file can make a constructor raise nearly anything
        ours = isinstance(error, ValueError) and str(error).startswith("Expected")
        if ours and len(str(error)) < _MESSAGE:
            raise
        message = f"Expected a valid description of {name}; got {reason(error)}."
        raise ValueError(message) from error


def described(description: Any) -> dict[str, Any]:
    """A description as a dictionary with a class name, or ValueError."""
    if not isinstance(description, dict) or not isinstance(description.get("class"), str):
        raise ValueError(f"Expected a description with a class name; got {short(description)}.")
    return description


def _as_tuples(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _check_sizes(name: str, arguments: dict[str, Any]) -> None:
    """Refuse integers that no model needs, before anything of that size is made."""
    for key, value in arguments.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_INTEGER:
                raise ValueError(
                    f"Expected integers of at most {MAX_INTEGER} in a description; "
                    f"got {key} = {short(number)} for {name}."
                )
