"""Checks of plain values from outside, files above all, and how messages quote them.

A value from a file may be of any type, size and depth.  A message quotes at most a line of it, and
no value reaches a constructor before it is known to be of the type that the constructor's
annotations name.
"""

import inspect
import math
import numbers
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union

__all__ = ["check_types", "conforms", "listed", "reason", "short"]

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 2, 4, 6, 6
_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 80, 80, 40
_LINE = 200


def short(value: object) -> str:
    """``repr(value)`` in at most a line, whatever the size, depth and cycles of the value."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"


def listed(names: Iterable[str]) -> str:
    """Names separated by commas, the first twenty of them."""
    every = list(names)
    return ", ".join(name[:80] for name in every[:20]) + (", …" if len(every) > 20 else "")


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    line = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"


def conforms(value: object, hint: Any) -> bool:
    """Whether a plain value is of the annotated type; an int is a float, a bool is neither.

    Known are ``bool``, ``int``, ``float``, ``str``, ``None``, names (``Literal``), unions, and
    sequences of these, as tuples or lists.  Floats have to be finite.  Any other type is left to
    its constructor.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(conforms(value, each) for each in arguments if _is_plain(each))
    if origin is tuple and Ellipsis not in arguments:
        same = isinstance(value, tuple | list) and len(value) == len(arguments)
        return same and all(map(conforms, typing.cast(Sequence[object], value), arguments))
    if origin is tuple or (inspect.isclass(origin) and issubclass(origin, Sequence)):
        return isinstance(value, tuple | list) and all(conforms(v, arguments[0]) for v in value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return _is_number(value, numbers.Real) and _is_finite(typing.cast(float, value))
    if hint is int:
        return _is_number(value, numbers.Integral)
    return isinstance(value, hint) if hint in (bool, str) else True


def _is_plain(hint: Any) -> bool:
    """Whether a file can hold a value of this type."""
    return typing.get_origin(hint) is not None or hint in (bool, int, float, str, type(None))


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def check_types(call: Callable[..., object], arguments: Mapping[str, object]) -> None:
    """Check named arguments against the annotations of a class or function.

    Raises:
        ValueError: naming the first argument that does not conform, or that does not exist.
    """
    parameters = inspect.signature(call).parameters
    function = call.__init__ if inspect.isclass(call) else call
    hints = typing.get_type_hints(function)
    for name, value in arguments.items():
        if name not in parameters:
            raise ValueError(f"Expected arguments of {call.__name__}; got unknown {short(name)}.")
        if name in hints and not conforms(value, hints[name]):
            raise ValueError(
                f"Expected {name} of {call.__name__} to be {_name(hints[name])}; "
                f"got {short(value)}."
            )


def _name(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
