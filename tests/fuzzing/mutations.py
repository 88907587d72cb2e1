"""Changes of valid files: blind ones of bytes, and ones that know the format.

Every function takes a ``random.Random`` (hypothesis' own, whose choices it can shrink) and returns
something new.
"""

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
import yaml

Bytes = Callable[[bytes, Random], bytes]

_WORDS = [
    "",
    "nan",
    "1e999",
    "-1",
    "0x1F",
    "true",
    "null",
    "a",
    "ß",
    "\u2028",
    "\x00",
    "1:2:3",
    "=",
]
_NUMBERS = [0, 1, -1, 2, 3, 7, 2**20, 2**31 - 1, 2**63, 10**15, 10**400, -(10**30), 0.5, -0.0]
_FLOATS = [math.nan, math.inf, -math.inf, 1e308, 1e-308, 1e39, 3.0]


def odd(random: Random) -> Any:
    """A plain value that is seldom the right one."""
    kind = random.randrange(9)
    if kind < 2:
        return random.choice(_NUMBERS)
    if kind == 2:
        return random.choice(_FLOATS)
    if kind == 3:
        return random.choice([None, True, False, [], {}])
    if kind == 4:
        return random.choice([*_WORDS, "x" * 5000, "../../etc/passwd", "os.system", "Identity"])
    if kind == 5:
        return [random.choice(_NUMBERS[:8] + _FLOATS[:2]) for _ in range(random.randrange(1, 5))]
    if kind == 6:
        return {random.choice(_WORDS[3:]): random.choice(_NUMBERS), "class": "UNet"}
    if kind == 7:
        return [1.0] * random.choice([100, 20_000])
    value: Any = 1
    for _ in range(random.choice([3, 20, 40, 200])):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(random.choice([1, 1, 1, 2, 8, 64])):
        place = random.randrange(len(changed))
        changed[place] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def splice(content: bytes, random: Random) -> bytes:
    """A block of the file written over, into, or out of another place of it."""
    size = random.choice([1, 4, 8, 16, 64, 512])
    source, target = (random.randrange(len(content) + 1) for _ in range(2))
    block = content[source : source + size]
    return content[:target] + block + content[target + random.choice([0, len(block), 2 * size]) :]


def overwrite(content: bytes, random: Random) -> bytes:
    """An integer somewhere that is extreme."""
    place = random.randrange(len(content) + 1)
    number = random.choice([0, 1, 0x7F, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
    order = random.choice(["little", "big"])
    size = random.choice([s for s in (1, 2, 4, 8) if number < 256**s])
    block = number.to_bytes(size, order)  # type: ignore[arg-type]
    return content[:place] + block + content[place + size :]


def insert(content: bytes, random: Random) -> bytes:
    place = random.randrange(len(content) + 1)
    block = random.choice(
        [b"\0", b"\xff\xfe", b"\xc3\x28", b"\n" * 40, b"\0" * 4096, content[:2000]]
    )
    return content[:place] + block + content[place:]


BLIND: tuple[Bytes, ...] = (flip, truncate, splice, overwrite, insert)


def blind(content: bytes, random: Random) -> bytes:
    """A change that knows nothing of the format."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        content = random.choice(BLIND)(content, random)
    return content


# -- plain values ----------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a value."""
    found = [path] if path else []
    if isinstance(value, dict):
        parts: list[tuple[Any, Any]] = list(value.items())
    else:
        parts = list(enumerate(value)) if isinstance(value, list) else []
    for key, part in parts:
        found += places(part, (*path, key))
    return found


def change(value: Any, random: Random) -> Any:
    """A copy in which some values are replaced, dropped, renamed, or put elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        paths = places(value)
        if not paths:
            return odd(random)
        *parents, key = random.choice(paths)
        parent = value
        for part in parents:
            parent = parent[part]
        kind = random.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[random.choice(_WORDS)] = parent.pop(key)
        elif kind == 2:
            other = value
            for part in random.choice(paths):
                other = other[part] if _has(other, part) else other
            parent[key] = json.loads(json.dumps(other))
        elif kind == 3 and isinstance(parent[key], int | float):
            parent[key] = random.choice([str(parent[key]), -parent[key], parent[key] * 10**6, 0])
        elif kind == 4 and isinstance(parent[key], list):
            parent[key] = parent[key] * random.choice([0, 2, 1000])
        else:
            parent[key] = odd(random)
    return value


def _has(value: Any, key: Any) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and key < len(value)


def _bomb(width: int, depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, depth):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]")
    return "\n".join(lines)


_HOSTILE_YAML = (
    lambda text: f"{text}\n{_bomb(9, 12)}\nmodel: *a11\n",
    lambda text: f"{text}\nfit: &loop [*loop]\n",
    lambda text: f"{text}\nx: !!python/object/apply:os.getcwd []\n",
    lambda text: f"{text}\nx: !!binary aGVsbG8=\n",
    lambda text: f"{text}\nx: !!set {{a, b}}\n",
    lambda text: f"{text}\nx: 2020-01-01\n",
    lambda text: f"{text}\nx: 2020-99-99\n",
    lambda text: f"{text}\nx: {'1:' * 100_000}1\n",
    lambda text: f"{text}\nx: {'1' * 10_000}\n",
    lambda text: f"{text}\nx: {'[' * 50_000}\n",
    lambda text: f"{text}\nx: {'{a: ' * 5_000}\n",
    lambda text: f"{text}\nx: {'[' * 500}{']' * 500}\n",
    lambda text: f"{text}\n? [a, b]\n: c\n",
    lambda text: f"{text}\n1: 2\n",
    lambda text: f"{text}\n<<: {{format: 7}}\n",
    lambda text: f"{text}\n---\nformat: 1\n",
    lambda text: f"{text}{'- ' * 3000}\n",
    lambda text: f"{text}{'#' * 2**20}\n",
    lambda text: text.replace(": ", ": &a ", 2),
    lambda text: text.replace("\n", "\r\n\t"),
    lambda text: f"%YAML 9.9\n---\n{text}",
    lambda text: "",
    lambda text: "null",
    lambda text: "x" * (17 * 2**20),
)


def yaml_file(content: bytes, random: Random) -> bytes:
    """A configuration that says something else, or that is hostile as YAML."""
    kind = random.randrange(8)
    if kind == 0:
        return blind(content, random)
    text = content.decode()
    if kind == 1:
        return random.choice(_HOSTILE_YAML)(text).encode()
    changed = yaml.dump(change(yaml.safe_load(text), random), sort_keys=False)
    encoding = random.choice(["utf-8"] * 9 + ["utf-16", "latin-1"])
    return changed.encode(encoding, errors="replace")


# -- safetensors -----------------------------------------------------------------------------------


def safetensors_file(content: bytes, random: Random) -> bytes:
    """A file whose header says something else, or other tensors."""
    kind = random.randrange(4)
    if kind == 0:
        return blind(content, random)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if kind == 1:
        header = change(header, random)
    else:
        return _other_tensors(header, data, random)
    text = json.dumps(header).encode()
    length = random.choice([len(text)] * 8 + [0, 1, 2**40, 2**64 - 1])
    return struct.pack("<Q", length) + text + data


_TYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "I128"]
_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "C64": 8}


def _other_tensors(header: Any, data: bytes, random: Random) -> bytes:
    """Tensors of another type, shape, name or value, in a file that is whole."""
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    blocks = {k: data[slice(*v["data_offsets"])] for k, v in tensors.items()}
    name = random.choice(sorted(tensors))
    kind = random.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[random.choice(["", "é" * 200, "denoiser.network.x", "a.b"])] = tensors[name]
    elif kind == 2:
        dtype = random.choice(_TYPES)
        shape = [len(blocks[name]) // _ITEM.get(dtype, 1)]
        tensors[name] = tensors[name] | {"dtype": dtype, "shape": shape}
    elif kind == 3:
        shape = [random.choice([0, 1, 2, 3, 7]) for _ in range(random.randrange(4))]
        tensors[name] = tensors[name] | {"shape": shape}
        blocks[name] = bytes(math.prod(shape) * _ITEM.get(tensors[name]["dtype"], 1))
    elif kind == 4:
        fill = random.choice([b"\xff", b"\x7f", b"\0", b"\xf0"])
        blocks[name] = fill * len(blocks[name])
    else:
        blocks[name] = blind(blocks[name], random)
    parts, start, new = [], 0, {}
    for key, value in tensors.items():
        block = blocks.get(key, blocks[name] if name in blocks else b"")
        new[key] = value | {"data_offsets": [start, start + len(block)]}
        parts.append(block)
        start += len(block)
    text = json.dumps(new).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


# -- arrays ----------------------------------------------------------------------------------------

_DESCRIPTIONS = [
    "<f8",
    "<i4",
    "|b1",
    "|O",
    "<U8",
    "<c16",
    "<M8[s]",
    "<f2",
    "|V8",
    "f8,i4",
    ">u2",
    "x",
]


def npy_file(content: bytes, random: Random) -> bytes:
    """An array whose header says something else, or of other values."""
    kind = random.randrange(4)
    if kind == 0:
        return blind(content, random)
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if kind == 1:
        return _header(array, random)
    flat = array.reshape(-1)
    if kind == 2:
        with np.errstate(all="ignore"):
            flat = flat.astype(random.choice(["f2", "f4", "f8", "i1", "i8", "u4", "?", "c8"]))
            if flat.dtype.kind == "f":
                flat[random.randrange(flat.size)] = random.choice([*_FLOATS, 1e5])
        array = flat.reshape(array.shape)
    else:
        shape = [random.choice([0, 1, 2, 3, 10, 12]) for _ in range(random.randrange(6))]
        array = np.resize(array, shape)
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _header(array: np.ndarray, random: Random) -> bytes:
    dimensions = [random.choice([0, 1, 12, -1, 2**31, 2**62, 10**15]) for _ in range(3)]
    header: dict[str, Any] = {
        "descr": random.choice(["<f8", *_DESCRIPTIONS]),
        "fortran_order": random.choice([False, True, 1, "x"]),
        "shape": random.choice(
            [array.shape, tuple(dimensions), tuple(dimensions[:1]), (), "x", None]
        ),
    }
    text = repr(header)
    text = random.choice(
        [text] * 6 + ["(" * 3000, "[" * 9000 + "]" * 9000, text[:-1], "{}", "1" * 9000]
    )
    line = (text + "\n").encode()
    version = random.choice([b"\x01\x00"] * 4 + [b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    size = struct.pack("<H" if version[0] == 1 else "<I", len(line))
    return b"\x93NUMPY" + version + size + line + array.tobytes()


def zip_file(content: bytes, random: Random) -> bytes:
    """An archive in which one member is changed, with checksums that are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(sorted(members))
    if random.randrange(3) == 0:
        name = next(key for key in sorted(members) if key.endswith(".pkl"))
    members[name] = blind(members[name], random)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice([0, 0, 0, 8])) as archive:
        for key, block in members.items():
            archive.writestr(key, block)
    return buffer.getvalue()


def tree(value: Any, random: Random) -> Any:
    """Tensors and plain values within dictionaries and lists, one of them changed."""
    if isinstance(value, dict) and value and random.randrange(12):
        key = random.choice(list(value))
        if random.randrange(10) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: tree(value[key], random)}
    if isinstance(value, list) and value and random.randrange(8):
        place = random.randrange(len(value))
        return [*value[:place], tree(value[place], random), *value[place + 1 :]]
    if isinstance(value, torch.Tensor) and random.randrange(6):
        changed: list[torch.Tensor] = [
            torch.full_like(value, random.choice([0, 1, -1])),
            value.flatten()[:1],
            value[None],
            value.double(),
            value.to(torch.int32),
            value.new_zeros(0),
            value.to_sparse() if value.dim() else value.bool(),
        ]
        if value.is_floating_point():
            changed.append(torch.full_like(value, random.choice(_FLOATS[:3])))
        return random.choice(changed)
    return odd(random)


def npz_file(content: bytes, random: Random) -> bytes:
    """An archive of other members, other names, or with a broken directory."""
    if random.randrange(3) == 0:
        return blind(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(sorted(members))
    kind = random.randrange(5)
    if kind == 0:
        members[random.choice(["a.npy", "x.txt", "../x.npy", "train.npy", "ß.npy"])] = members[name]
    elif kind == 1:
        del members[name]
    elif kind == 2:
        members[name] = blind(members[name], random)
    else:
        members[name] = npy_file(members[name], random)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice([0, 0, 8, 12, 14])) as archive:
        for key, block in members.items():
            archive.writestr(key, block)
    return buffer.getvalue()


# -- text ------------------------------------------------------------------------------------------

_CELLS = [
    *(
        "",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e39",
        "abc",
        '"',
        '"1"',
        "0x10",
        "1_000",
        "1,2",
        "٣",
        " 1 ",
    ),
    *(
        "1" * 400,
        "x" * 200_000,
        "\x00",
        "\ufeff",
        "1;2",
        "True",
        "1e-400",
        "#",
        "'1'",
        "NA",
        "-",
        "١",
    ),
]


def csv_file(content: bytes, random: Random) -> bytes:
    """A table with other cells, rows of other lengths, another header, or other bytes."""
    if random.randrange(4) == 0:
        return blind(content, random)
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(random.choice([1, 1, 2, 5])):
        row = random.choice(rows)
        kind = random.randrange(7)
        if kind == 0:
            row.append(random.choice(_CELLS))
        elif kind == 1 and row:
            row.pop()
        elif kind == 2:
            rows.insert(random.randrange(len(rows) + 1), [random.choice(_CELLS)])
        elif kind == 3:
            rows[:] = rows[: random.randrange(len(rows)) + 1]
        elif row:
            row[random.randrange(len(row))] = random.choice(_CELLS)
    end = random.choice(["\n"] * 6 + ["\r\n", "\r", "\n\n"])
    text = end.join(",".join(row) for row in rows) + end
    return text.encode(random.choice(["utf-8"] * 8 + ["utf-16", "latin-1"]), errors="replace")
