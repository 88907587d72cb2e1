"""Models and runs as files: plain values in YAML, weights in safetensors, never pickle.

What the plain values mean is said in ``pyrodiff.descriptions``.  A file is made in memory and then
written as ``pyrodiff.files`` does: a reader sees the old file or the new one.  Files that are read
may come from anywhere: their size, depth and names are checked before anything is made of them, and
whatever is wrong with one is a ValueError that names it.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyrodiff
from pyrodiff.checks import reason, short
from pyrodiff.descriptions import build, describe, entry, network_shapes
from pyrodiff.files import write_atomically, write_bytes

__all__ = [
    "build",
    "check_network",
    "check_shapes",
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
MAX_CONFIG_BYTES = 16 * 2**20
"""The most bytes of a configuration."""

_CHECKSUM = "pyrodiff.sha256"
_NETWORK = "denoiser.network."  # of names in a state dict
_MAX_DEPTH = 32
_MAX_SCALAR = 4096  # characters of one value
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write plain values as YAML, with the format's and the library's version."""
    import yaml

    header = {"format": FORMAT, "pyrodiff": pyrodiff.__version__}
    text = yaml.safe_dump(header | config, sort_keys=False, allow_unicode=True)
    content = text.encode()
    _check_config_size(len(content), path)
    write_bytes(path, content)


def read_config(path: Path) -> dict[str, Any]:
    """Read YAML that ``write_config`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML of plain values (aliases and tags are none), too large or too deep, or
            of a newer format.
    """
    _check_is_file(path)
    _check_config_size(path.stat().st_size, path)
    try:
        config = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # a hostile scalar can raise nearly anything
        message = f"Expected plain YAML in {path}; got {_yaml_reason(error)}."
        raise ValueError(message) from error
    version = entry(config, "format")
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"Expected format {FORMAT} or older in {path}; got {short(version)}, "
            f"written by pyrodiff {short(config.get('pyrodiff'))}."
        )
    return config


def _check_is_file(path: Path) -> None:
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
    """Read safetensors; their header has to agree with the file's size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not safetensors (a pickle, say), or other values than were
            written; files without a checksum are read as they are.
    """
    from safetensors import safe_open

    _check_is_file(path)
    try:
        with safe_open(path, "pt") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = checksum is not None and checksum != _checksum(tensors)
    except OSError:
        raise
    except Exception as error:  # its own errors, and torch's for types and shapes that it lacks
        message = f"Expected safetensors in {path}; got {reason(error)}."
        raise ValueError(message) from error
    if damaged:
        raise ValueError(
            f"Expected {path} as it was written; got values that differ from its checksum. "
            "The file is damaged: write it anew, or take a copy."
        )
    return tensors


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Raise ValueError unless both have the same names and shapes of weights."""
    names = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
    if names:
        raise ValueError(
            f"Expected weights that fit the model in {source}; {len(names)} differ, the first "
            f"{short(names[0])}: expected {expected.get(names[0])}; got {got.get(names[0])}."
        )


def check_network(config: Any, weights: Mapping[str, Tensor], source: Path) -> None:
    """Compare a described network with its weights, before there is memory for the network.

    A few bytes of a description can ask for any number of layers of any size; a file of weights has
    what it has.

    Raises:
        ValueError: weights that do not fit; what ``descriptions.build`` raises.
    """
    denoiser = config.get("denoiser") if isinstance(config, dict) else None
    network = denoiser.get("network") if isinstance(denoiser, dict) else None
    if not isinstance(network, dict) or network.get("external"):
        return  # said by ``build_parts``, with whatever else is missing
    got = {name: shape for name, shape in _shapes(weights).items() if name.startswith(_NETWORK)}
    shapes = network_shapes(network, 2 * len(got) + 100).items()
    check_shapes({f"{_NETWORK}{name}": shape for name, shape in shapes}, got, source)


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load a state dict whole; names, shapes or kinds of numbers that differ raise a ValueError."""
    state = module.state_dict()
    check_shapes(_shapes(state), _shapes(weights), source)
    for name, value in weights.items():
        floats = state[name].is_floating_point()
        if (value.dtype not in _DTYPES) if floats else (value.dtype != state[name].dtype):
            raise ValueError(
                f"Expected weights that fit the model in {source}; got {short(name)} of "
                f"{value.dtype}, where the model has {state[name].dtype}."
            )
    with torch.no_grad():
        module.load_state_dict(weights)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
