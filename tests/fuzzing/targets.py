"""What is fuzzed: valid files, how they are changed, how they are read, and what is right.

A reader raises AssertionError where a file was accepted and is not right: a model that cannot be
sampled from, data that are not finite, a result that differs from the one that was written.
"""

import dataclasses
import gzip
import io
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from fuzzing import mutations
from fuzzing.worker import Files
from pyrodiff import ForwardChain, ReverseChain, serialization
from pyrodiff import data as datasets
from pyrodiff.data import files as data_files
from pyrodiff.decoders import CategoricalDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.likelihood import LogLikelihood, TermwiseBound
from pyrodiff.likelihood.pilot import Pilot
from pyrodiff.networks import ResidualConvNet, ResidualMLP
from pyrodiff.schedules import BetaSchedule, LogSNRSchedule

torch.set_num_threads(1)  # a pool of threads does not outlive a fork

Change = Callable[[dict[str, bytes], Random], dict[str, bytes]]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is read, and how.

    Args:
        valid: makes valid files, one set of them for each variant.
        change: makes others of a set.
        read: reads the folder that they lie in; returns if what it read is right.
        share: of all cases.
    """

    valid: Callable[[], list[Files]]
    change: Change
    read: Callable[[Path], object]
    share: float = 1.0


def _collect(write: Callable[[Path], object]) -> dict[str, bytes]:
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return {
            str(path.relative_to(name)): path.read_bytes()
            for path in sorted(Path(name).rglob("*"))
            if path.is_file()
        }


def _one(suffixes: dict[str, mutations.Bytes]) -> Change:
    """Change one of the files, each as its ending says."""

    def change(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
        name = random.choice(sorted(files))
        by = next((by for end, by in suffixes.items() if name.endswith(end)), mutations.blind)
        return files | {name: by(files[name], random)}

    return change


def _file(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()))


# -- data ------------------------------------------------------------------------------------------


def _check_data(source: Path, **options: Any) -> None:
    data_files.MAX_BYTES = 2**25  # what a small file may unfold to; the rest of the limit is ours
    dataset = datasets.load(source, **options)
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.dtype == torch.float32 and bool(split.isfinite().all())
        assert split.shape[1:] == dataset.event_shape and split.shape[1:].numel() > 0
    assert len(dataset.train) > 0
    assert np.isfinite(dataset.log_density_offset())


def _read_data(folder: Path) -> None:
    source = _file(folder)
    context = "y" if source.suffix == ".npz" and b"y.npy" in source.read_bytes() else None
    _check_data(source, context=context)


def _table() -> np.ndarray:
    return np.random.RandomState(0).standard_normal((12, 3)) * [1.0, 10.0, 0.1]


def _csv() -> list[Files]:
    rows = ["a,b,c", *(",".join(f"{x:.4f}" for x in row) for row in _table())]
    text = ("\n".join(rows) + "\n").encode()
    return [{"t.csv": text}, {"t.csv": text.partition(b"\n")[2]}, {"t.csv.gz": gzip.compress(text)}]


def _change_gzip(content: bytes, random: Random) -> bytes:
    kind = random.randrange(3)
    if kind == 0:
        return mutations.blind(content, random)
    if kind == 1:
        return gzip.compress(b"0.5," * random.choice([10, 2**20, 2**24]), 1)
    changed = gzip.compress(mutations.csv_file(gzip.decompress(content), random))
    return changed + random.choice([b"", b"", b"\0" * 9, changed, b"x"])


def _saved(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def _npy() -> list[Files]:
    random = np.random.RandomState(0)
    arrays = [
        _table(),
        random.randint(0, 256, (11, 4, 3)).astype(np.uint8),
        random.rand(11, 3, 4, 4),
    ]
    return [{"a.npy": _saved(np.save, array)} for array in arrays]


def _npz() -> list[Files]:
    table, label = _table(), np.arange(12) % 3
    parts = {"x_train": table, "x_test": table[:3], "y_train": label, "y_test": label[:3]}
    every = [{"a": table}, {"x": table, "y": label}, parts]
    return [{"a.npz": _saved(np.savez, **each)} for each in every]


def _parquet() -> list[Files]:
    import pandas as pd

    frame = pd.DataFrame(_table(), columns=["a", "b", "c"])
    return [{"t.parquet": frame.to_parquet(index=False)}]


def _parquet_file(content: bytes, random: Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if random.randrange(3):
        return mutations.blind(content, random)
    table = pq.read_table(io.BytesIO(content))
    column: Any = random.choice(
        [
            pa.array(["x"] * 12),
            pa.array([None] * 12),
            pa.array([[1.0]] * 12),
            pa.array([{"a": 1}] * 12),
            pa.array([True, None] * 6),
            pa.array([2**62, None] * 6),
            pa.array(["a", "b"] * 6).dictionary_encode(),
            pa.array([1.5] * 12, pa.float16()),
            pa.array([0] * 12, pa.timestamp("s")),
            pa.array([float("nan")] * 12),
        ]
    )
    table = table.append_column(random.choice(["d", "a", "", "\x00"]), column)
    buffer = io.BytesIO()
    compression = random.choice(["snappy", "gzip", "zstd", "none"])
    pq.write_table(table.slice(0, random.choice([12, 12, 0, 3])), buffer, compression=compression)
    return mutations.blind(buffer.getvalue(), random) if random.randrange(2) else buffer.getvalue()


_IMAGES = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")


def _image(kind: str, shape: tuple[int, ...]) -> bytes:
    pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    return _saved(Image.fromarray(pixels).save, format=kind)


def _images() -> list[Files]:
    def folder(kind: str, shape: tuple[int, ...]) -> Files:
        end = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
        return {f"{i:02d}.{end}": _image(kind, shape) for i in range(11)}

    every = [folder(kind, shape) for kind in _IMAGES for shape in ((8, 8), (8, 8, 3))]
    some = folder("PNG", (8, 8))
    return [*every, {f"{split}/{k}": v for split in ("train", "test") for k, v in some.items()}]


def _image_file(content: bytes, random: Random) -> bytes:
    if random.randrange(4):
        return mutations.blind(content, random)
    if random.randrange(2):
        return _image(random.choice(_IMAGES), random.choice([(8, 8), (9, 8), (8, 8, 3), (1, 1)]))
    with Image.open(io.BytesIO(content)) as image:
        mode = random.choice(["1", "P", "RGBA", "CMYK", "I;16", "F", "L"])
        buffer = io.BytesIO()
        try:
            image.convert(mode).save(buffer, random.choice(["TIFF", "PNG", "GIF"]))
        except (OSError, ValueError, KeyError):
            return content[:-1]
    return buffer.getvalue()


# -- models ----------------------------------------------------------------------------------------


def _model(images: bool = False) -> ReverseChain:
    torch.manual_seed(0)
    if images:
        network: Any = ResidualConvNet((1, 4, 4), channels=4, blocks=1, levels=3)
        chain = ForwardChain(LogSNRSchedule(), 3)
        return ReverseChain(DataDenoiser(network), chain, (1, 4, 4), decoder=CategoricalDecoder(3))
    chain = ForwardChain(BetaSchedule([0.1, 0.2, 0.5, 0.9]), 4)
    return ReverseChain(NoiseDenoiser(ResidualMLP((2,), width=8, blocks=2)), chain, (2,))


def _models() -> list[Files]:
    return [_collect(_model(images).save) for images in (False, True)]


def _read_model(folder: Path) -> None:
    reverse = ReverseChain.load(folder)
    x = reverse.sample(1, seed=0)
    assert x.shape == (1, *reverse.event_shape)


_CHANGE_MODEL = _one({".yaml": mutations.yaml_file, ".safetensors": mutations.safetensors_file})


@cache
def _pilot() -> tuple[Pilot, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    return Pilot.run(_model(), x, calls=2000), x


def _pilots() -> list[Files]:
    return [_collect(lambda folder: _pilot()[0].save(folder / "pilot.safetensors"))]


def _read_pilot(folder: Path) -> None:
    pilot = Pilot.load(_file(folder))
    result = TermwiseBound(8, pilot=pilot).estimate(_model(), _pilot()[1][:2], seed=0)
    assert result.value.shape == (2,)


# -- results ---------------------------------------------------------------------------------------


@cache
def _results() -> tuple[Files, ...]:
    torch.manual_seed(0)
    value, error = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    options: dict[str, Any] = {"calls": torch.full((6,), 8), "dimensions": 2, "estimator": "x"}
    plain = LogLikelihood(value, error, "lower bound", **options)
    terms = dataclasses.replace(
        plain,
        terms=torch.randn(6, 4),
        timesteps=torch.arange(4.0) + 1,
        degrees_of_freedom=error + 3,
        log_weights=torch.randn(6, 5),
        model="abc",
    )
    return tuple(
        _collect(lambda folder, r=result: r.save(folder / "evaluation.nc", split="test", seed=0))
        for result in (plain, terms)
    )


def _result_file(content: bytes, random: Random) -> bytes:
    from pyrodiff.netcdf import _SEAL_BYTES, seal

    inner, kind = content[:-_SEAL_BYTES], random.randrange(5)
    if kind == 0:
        return mutations.blind(content, random)
    if kind == 1:
        return seal(mutations.blind(inner, random))
    if kind == 2:
        return mutations.blind(inner, random)
    changed = _other_netcdf(inner, random)
    return seal(changed) if random.randrange(2) else changed


def _other_netcdf(content: bytes, random: Random) -> bytes:
    """The result with another variable, attribute or link."""
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        names = ["log_likelihood", "std_error", "calls", "term", "timestep", "log_weights"]
        name, kind = random.choice([n for n in names if n in file]), random.randrange(7)
        if kind == 0:
            del file[name]
        elif kind == 1:
            shape = random.choice(
                [(10**15,), (6,), (0,), (), (2**31, 2**31), (6, 1), (7,), (2**26,)]
            )
            dtype = random.choice(["f8", "f4", "i8", "i1", "S5", "?", "f2", "c16"])
            chunks = True if shape and 0 not in shape and random.randrange(2) else None
            del file[name]
            options = {"compression": "gzip"} if chunks and random.randrange(2) else {}
            file.create_dataset(name, shape, dtype, chunks=chunks, **options)
        elif kind == 2:
            del file[name]
            link = [
                h5py.SoftLink("/calls"),
                h5py.ExternalLink("/etc/passwd", "/"),
                h5py.SoftLink("/x"),
            ]
            file[name] = random.choice(link)
        elif kind == 3:
            del file[name]
            file.create_dataset(name, (6,), "f8", external=[("/etc/passwd", 0, 48)])
        elif kind == 4:
            keys = ["kind", "dimensions", "estimator", "shared_calls", "model", "seed", "split"]
            values: list[Any] = ["x", 1, -1, 2.5, np.nan, [1, 2], b"\xff", 10**18, np.zeros(0), ""]
            values += ["x" * 60_000, np.zeros(9000), True, h5py.Empty("f8")]
            file.attrs[random.choice(keys)] = random.choice(values)
        elif kind == 5:
            del file.attrs[random.choice(["kind", "dimensions", "estimator", "shared_calls"])]
        else:
            fill: list[Any] = (
                [np.nan, np.inf, -1.0, 0.0] if file[name].dtype.kind == "f" else [0, -1]
            )
            file[name][...] = random.choice(fill)
    return buffer.getvalue()


def _read_result(folder: Path) -> None:
    from pyrodiff.netcdf import _MARK

    path = folder / "evaluation.nc"
    result = LogLikelihood.load(path)
    n = len(result.value)
    assert result.std_error.shape == result.calls.shape == (n,)
    if n:
        result.bits_per_dim(), result.interval()
    content = path.read_bytes()
    for files in _results():
        whole = files["evaluation.nc"]
        # the seal of a result, and yet another content
        if content[-64:] == whole[-64:] and _MARK in content:
            assert content == whole


# -- settings --------------------------------------------------------------------------------------


def _settings() -> list[Files]:
    from pyrodiff.settings import EvaluationSettings, FitSettings

    values = (FitSettings(width=8, steps=10).to_dict(), EvaluationSettings().to_dict())
    return [{"settings.yaml": yaml.safe_dump({"format": 1} | each).encode()} for each in values]


def _read_settings(folder: Path) -> None:
    from pyrodiff.settings import EvaluationSettings, FitSettings, read_settings, recipe

    values = serialization.read_config(_file(folder))
    del values["format"]
    if "objective" in values:
        settings = recipe(read_settings(FitSettings, values), image=False, levels=None)
        assert settings.steps and settings.batch_size
    else:
        read_settings(EvaluationSettings, values)


TARGETS: dict[str, Target] = {
    "csv": Target(_csv, _one({".csv": mutations.csv_file, ".gz": _change_gzip}), _read_data),
    "npy": Target(_npy, _one({"": mutations.npy_file}), _read_data),
    "npz": Target(_npz, _one({"": mutations.npz_file}), _read_data),
    "parquet": Target(_parquet, _one({"": _parquet_file}), _read_data),
    "images": Target(_images, _one({"": _image_file}), _check_data),
    "models": Target(_models, _CHANGE_MODEL, _read_model, 2.0),
    "pilots": Target(_pilots, _one({"": mutations.safetensors_file}), _read_pilot),
    "results": Target(lambda: list(_results()), _one({"": _result_file}), _read_result, 2.0),
    "settings": Target(_settings, _one({"": mutations.yaml_file}), _read_settings),
}
