"""Models and runs as files: plain values in YAML, weights in safetensors, never pickle.

An object is described by its class name and its constructor arguments, which every class here
keeps under their own names.  Reading a description looks the name up among pyrodiff's own public
classes of that kind; a name found in a file is never imported.  A file is made in memory and then
written as ``pyrodiff.files`` does: a reader sees the old file or the new one.
"""

import hashlib
import importlib
import inspect
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyrodiff
from pyrodiff.files import write_atomically, write_bytes

__all__ = [
    "build",
    "describe",
    "entry",
    "fingerprint",
    "load_weights",
    "netcdf",
    "read_config",
    "read_weights",
    "write_atomically",
    "write_bytes",
    "write_config",
    "write_weights",
]

FORMAT = 1
_CHECKSUM = "pyrodiff.sha256"
_KINDS = ("schedules", "denoisers", "variances", "decoders", "networks")


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
    if kind.__module__ not in {f"pyrodiff.{name}" for name in _KINDS}:
        return {"class": kind.__name__, "external": True}
    parameters = inspect.signature(kind).parameters
    return {"class": kind.__name__} | {name: _plain(getattr(value, name)) for name in parameters}


def fingerprint(model: Any) -> str:
    """A checksum of a model's configuration and weights, by which it is known again.

    Of parts that are the user's own it sees the class's name, the weights, and attributes that are
    plain values.  It is empty, for unknown, where a part is the user's own and nothing was trained,
    and where a configuration or a state is not made of plain values and dense tensors.

    Args:
        model: a module with ``config()``.
    """
    try:
        config = model.config()
    except TypeError:  # such a model cannot be saved, either
        return ""
    if "'external': True" in repr(config) and not any(True for _ in model.parameters()):
        return ""
    digest = hashlib.sha256(repr(_canonical(config)).encode())
    for name, part in model.named_modules():
        digest.update(repr((name, type(part).__name__, _canonical(_attributes(part)))).encode())
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return ""
        plain = value.detach().cpu().resolve_conj().contiguous().flatten()
        digest.update(name.encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """The same for 4 and 4.0, for tuples and lists."""
    if isinstance(value, dict):
        return {key: _canonical(held) for key, held in sorted(value.items())}
    if isinstance(value, tuple | list):
        return [_canonical(held) for held in value]
    return float(value) if isinstance(value, int | float) else value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps in public attributes as plain values."""
    plain = bool | int | float | str | tuple | list
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, plain)
    }


def build(kind: str, description: Any, **given: Any) -> Any:
    """The object of ``kind`` ("schedules", "networks", …) that ``describe`` described.

    Args:
        kind: the module of pyrodiff that holds the class.
        description: from a file.
        given: arguments that the description does not hold.

    Raises:
        ValueError: an unknown class or argument, or an external class.
    """
    assert kind in _KINDS
    if not isinstance(description, dict) or not isinstance(description.get("class"), str):
        raise ValueError(f"Expected a description with a class name; got {description!r}.")
    arguments = dict(description)
    name = arguments.pop("class")
    if arguments.pop("external", False):
        raise ValueError(
            f"Expected the network {name}, which is not pyrodiff's own, to be handed in: "
            "load(path, network=…)."
        )
    module = importlib.import_module(f"pyrodiff.{kind}")
    classes = {n: c for n in module.__all__ if inspect.isclass(c := getattr(module, n))}
    if name not in classes or inspect.isabstract(classes[name]):
        known = ", ".join(n for n, c in classes.items() if not inspect.isabstract(c))
        raise ValueError(f"Expected one of pyrodiff's {kind} ({known}); got {name!r}.")
    unknown = set(arguments) - set(inspect.signature(classes[name]).parameters)
    if unknown:
        raise ValueError(
            f"Expected arguments of {name}; got unknown {sorted(unknown)}. "
            "Was the file written by a newer version?"
        )
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        return classes[name](**arguments, **given)
    except TypeError as error:
        raise ValueError(f"Expected a valid description of {name}; got {error}.") from error


def entry(config: Any, key: str) -> Any:
    """``config[key]``, or a ValueError that says what is missing."""
    if not isinstance(config, dict) or key not in config:
        held = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"Expected an entry {key!r} in the configuration; got {held}.")
    return config[key]


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write plain values as YAML, with the format's and the library's version."""
    import yaml

    header = {"format": FORMAT, "pyrodiff": pyrodiff.__version__}
    text = yaml.safe_dump(header | config, sort_keys=False, allow_unicode=True)
    write_bytes(path, text.encode())


def read_config(path: Path) -> dict[str, Any]:
    """Read YAML that ``write_config`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML of plain values, or of a newer format.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"Expected a file {path}; got nothing there.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected plain YAML in {path}; got {error}.") from error
    version = entry(config, "format")
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"Expected format {FORMAT} or older in {path}; got {version!r}, "
            f"written by pyrodiff {config.get('pyrodiff')}."
        )
    return config


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, with their checksum."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    write_bytes(path, save(tensors, {_CHECKSUM: _checksum(tensors)}))


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def netcdf(dataset: Any) -> bytes:
    """An ``xarray.Dataset`` as the content of a netCDF file.

    It is made in memory: HDF5 ends the process where a disk is full.
    """
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    content = io.BytesIO()
    with h5netcdf.File(content, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
    return content.getvalue()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not safetensors (a pickle, say), or other values than were
            written; files without a checksum are read as they are.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"Expected a file {path}; got nothing there.")
    try:
        with safe_open(path, "pt") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"Expected safetensors in {path}; got {error}.") from error
    if checksum is not None and checksum != _checksum(tensors):
        raise ValueError(
            f"Expected {path} as it was written; got values that differ from its checksum. "
            "The file is damaged: write it anew, or take a copy."
        )
    return tensors


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load a state dict whole; names or shapes that differ raise a ValueError."""

    def shapes(state: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in state}

    expected, found = shapes(module.state_dict().items()), shapes(weights.items())
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        name = wrong[0]
        raise ValueError(
            f"Expected weights that fit the model in {source}; {len(wrong)} differ, the first "
            f"{name!r}: expected {expected.get(name)}; got {found.get(name)}."
        )
    with torch.no_grad():
        module.load_state_dict(weights)
