"""Configurations: plain values in YAML, read without trust.

Files that are read may come from anywhere: their size, depth and names are checked before anything
is made of them, and whatever is wrong with one is a ValueError that names it.
"""

from pathlib import Path
from typing import Any

from pyrodiff._version import __version__
from pyrodiff.checks import reason, short
from pyrodiff.serialization.descriptions import entry
from pyrodiff.serialization.files import write_bytes

__all__ = [
    "FORMAT",
    "MAX_CONFIG_BYTES",
    "check_is_file",
    "read_config",
    "read_plain",
    "write_config",
]

FORMAT = 1
MAX_CONFIG_BYTES = 16 * 2**20
"""The most bytes of a configuration."""

_MAX_DEPTH = 32
_MAX_SCALAR = 4096  # characters of one value


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write plain values as YAML, with the format's and the library's version."""
    import yaml

    header = {"format": FORMAT, "pyrodiff": __version__}
    text = yaml.safe_dump(header | config, sort_keys=False, allow_unicode=True)
    content = text.encode()
    _check_config_size(len(content), path)
    write_bytes(path, content)


def read_config(path: Path) -> dict[str, Any]:
    """Read YAML that ``write_config`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see ``read_plain``; or of a newer format.
    """
    config = read_plain(path)
    version = entry(config, "format")
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"Expected format {FORMAT} or older in {path}; got {short(version)}, "
            f"written by pyrodiff {short(config.get('pyrodiff'))}."
        )
    return config


def read_plain(path: Path) -> Any:
    """Read YAML of plain values that anybody may have written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML of plain values (aliases and tags are none), too large or too deep.
    """
    check_is_file(path)
    _check_config_size(path.stat().st_size, path)
    try:
        return _read_yaml(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # a hostile scalar can raise nearly anything
        message = f"Expected plain YAML in {path}; got {_yaml_reason(error)}."
        raise ValueError(message) from error


def check_is_file(path: Path) -> None:
    """Raise FileNotFoundError unless there is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file {path}; got nothing there.")


def _check_config_size(size: int, path: Path) -> None:
    if size > MAX_CONFIG_BYTES:
        raise ValueError(
            f"Expected a configuration of at most {MAX_CONFIG_BYTES // 2**20} MiB; "
            f"got {size / 2**20:.3g} MiB for {path}."
        )


def _read_yaml(text: str) -> Any:
    """The value of a YAML document that is plain: no aliases, no tags, no other keys than text."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if getattr(event, "anchor", None) is not None:  # an alias or what one refers to
            raise ValueError(f"the anchor or alias {short(event.anchor)}")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"the tag {short(event.tag)}")
        if depth > _MAX_DEPTH or len(getattr(event, "value", "")) > _MAX_SCALAR:
            raise ValueError(f"more than {_MAX_DEPTH} levels or {_MAX_SCALAR} characters in one")
    value = yaml.load(text, Loader=loader)
    _check_plain(value)
    return value


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {short(key)}, which is no text")
            _check_plain(part)
    elif isinstance(value, list):
        for part in value:
            _check_plain(part)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{short(value)} of type {type(value).__name__}")


def _yaml_reason(error: Exception) -> str:
    """What the parser says, and where, in a line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"{problem}{where}" if problem else reason(error)
