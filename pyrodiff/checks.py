"""Checks of plain values from outside, files above all, and how messages quote them.

Every message has the form "Expected …; got …".  A value from a file may be of any type, size and
depth.  A message quotes at most a line of it, and no value reaches a constructor before it is known
to be of the type that the constructor's annotations name.
"""

import difflib
import functools
import inspect
import math
import numbers
import operator
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, TypeVar, Union

__all__ = [
    "check_choice",
    "check_count",
    "check_positive",
    "check_types",
    "conforms",
    "listed",
    "reason",
    "renamed",
    "short",
]

Class = TypeVar("Class", bound=type)

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


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected {name} to be an integer >= {least}; got {short(value)}.")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"Expected {name} to be positive and finite; got {short(value)}.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of the choices; the nearest one is proposed."""
    names = tuple(choices)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"Expected {name} to be one of {names}; got {short(value)}{hint}")


def renamed(**names: str) -> Callable[[Class], Class]:
    """Let a class take parameters by their former names, and keep those as attributes.

    Args:
        names: the present name of each former one: ``renamed(evaluations="calls")``.
    """

    def decorate(cls: Class) -> Class:
        original = cls.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def initialise(self: object, *args: object, **kwargs: object) -> None:
            for former in names.keys() & kwargs.keys():
                if names[former] in kwargs:
                    raise TypeError(
                        f"Expected {names[former]} once; got it as {former}, its former name, too."
                    )
                kwargs[names[former]] = kwargs.pop(former)
            original(self, *args, **kwargs)

        setattr(cls, "__init__", initialise)  # noqa: B010  (mypy refuses the plain form)
        for former, present in names.items():
            setattr(cls, former, _former_attribute(present))
        return cls

    return decorate


def _former_attribute(present: str) -> property:
    def set_present(self: object, value: object) -> None:
        setattr(self, present, value)

    return property(operator.attrgetter(present), set_present)


def conforms(value: object, hint: Any) -> bool:
    """Whether a plain value is of the annotated type; an int is a float, a bool is neither.

    Known are ``bool``, ``int``, ``float``, ``str``, ``None``, names (``Literal``), unions, and
    sequences of these, as tuples or lists.  Floats have to be finite.  Any other type is left to
    its constructor.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(conforms(value, option) for option in arguments if _is_plain(option))
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
