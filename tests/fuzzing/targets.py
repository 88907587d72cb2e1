"""What is fuzzed: valid files, how they are changed, how they are read, and what is right.

A reader raises AssertionError where a file was accepted and is not right: a model that cannot be
sampled from, data that are not finite, a result that differs from the one that was written.
"""

import contextlib
import dataclasses
import gzip
import io
import os
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
from pyrodiff.likelihood.termwise.pilot import Pilot
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
    return Pilot.fit(_model(), x, calls=2000), x


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
    from pyrodiff.serialization.netcdf import _END, checksummed

    inner, kind = content[:-_END], random.randrange(5)
    if kind == 0:
        return mutations.blind(content, random)
    if kind == 1:
        return checksummed(mutations.blind(inner, random))
    if kind == 2:
        return mutations.blind(inner, random)
    changed = _other_netcdf(inner, random)
    return checksummed(changed) if random.randrange(2) else changed


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
                [(10**15,), (6,), (0,), (), (2**31, 2**20), (6, 1), (7,), (2**26,)]
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
    from pyrodiff.serialization.netcdf import _MARK

    path = folder / "evaluation.nc"
    result = LogLikelihood.load(path)
    n = len(result.value)
    assert result.std_error.shape == result.calls.shape == (n,)
    if n:
        result.bits_per_dim(), result.interval()
    content = path.read_bytes()
    for files in _results():
        whole = files["evaluation.nc"]
        # the checksum of a result, and yet another content
        if content[-64:] == whole[-64:] and _MARK in content:
            assert content == whole


# -- settings --------------------------------------------------------------------------------------


def _settings() -> list[Files]:
    from pyrodiff.runs.settings import EvaluationSettings, FitSettings

    values = (FitSettings(width=8, steps=10).to_dict(), EvaluationSettings().to_dict())
    return [{"settings.yaml": yaml.safe_dump({"format": 1} | each).encode()} for each in values]


def _read_settings(folder: Path) -> None:
    from pyrodiff.runs.settings import EvaluationSettings, FitSettings, read_settings, recipe

    values = serialization.read_config(_file(folder))
    del values["format"]
    if "objective" in values:
        settings = recipe(read_settings(FitSettings, values), image=False, levels=None)
        assert settings.steps and settings.batch_size
    else:
        read_settings(EvaluationSettings, values)


def _options() -> list[Files]:
    """Files for ``--config``."""
    values = {"data": "mixture", "width": 8, "learning_rate": 0.01, "objective": "hybrid"}
    return [{"options.yaml": yaml.safe_dump(each).encode()} for each in (values, {"data": "moons"})]


def _read_options(folder: Path) -> None:
    """As ``pyrodiff fit --config FILE`` does, but for the training."""
    from pyrodiff.cli import make_parser, settings_of
    from pyrodiff.runs.settings import FitSettings, recipe

    try:
        options = make_parser().parse_args(["fit", "--config", str(_file(folder))]).fit
    except SystemExit as end:
        assert end.code == 2
        raise OSError("refused by the parser, which has said why") from end
    settings = recipe(settings_of(FitSettings, options), image=False, levels=None)
    assert settings.steps and isinstance(options.data, str)


# -- runs and checkpoints --------------------------------------------------------------------------


def _write_run(folder: Path) -> None:
    """A run as ``fit`` leaves it, of data beside it."""
    from pyrodiff.runs.dataset import describe
    from pyrodiff.runs.folder import sealed
    from pyrodiff.runs.settings import FitSettings, recipe

    (folder / "t.csv").write_bytes(_csv()[0]["t.csv"])
    dataset = datasets.load(folder / "t.csv")
    torch.manual_seed(0)
    chain = ForwardChain(LogSNRSchedule(), 4)
    reverse = ReverseChain(NoiseDenoiser(ResidualMLP((3,), width=8, blocks=1)), chain, (3,))
    source = {"source": "t.csv", "seed": 0, "context": None, "key": None, "levels": None}
    settings = recipe(FitSettings(num_steps=4, calls=4), image=False, levels=None)
    config = {
        "model": reverse.config(),
        "data": source | describe(dataset),
        "fit": settings.to_dict(),
    }
    serialization.write_config(folder / "config.yaml", sealed(config))
    serialization.write_weights(folder / "model.safetensors", reverse.state_dict())


def _runs() -> list[Files]:
    return [_collect(_write_run)]


def _change_run(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    """Another configuration, with or without its checksum, or another file of the run."""
    from pyrodiff.runs.folder import sealed

    if random.randrange(4) == 0:
        other = {k: v for k, v in files.items() if k != "config.yaml"}
        return files | _one({".csv": mutations.csv_file})(other, random)
    config = yaml.safe_load(files["config.yaml"])
    del config["checksum"]
    plain = yaml.safe_dump(config, sort_keys=False).encode()
    kind = random.randrange(4)
    if kind == 0:
        return files | {"config.yaml": mutations.blind(files["config.yaml"], random)}
    if kind == 1:
        return files | {"config.yaml": mutations.yaml_file(plain, random)}
    changed = mutations.change(config, random)
    if isinstance(changed, dict) and random.randrange(2):
        changed = sealed(changed)
    return files | {"config.yaml": yaml.dump(changed, sort_keys=False).encode()}


def _read_run(folder: Path) -> None:
    from pyrodiff.runs.build import load_model
    from pyrodiff.runs.dataset import own_data
    from pyrodiff.runs.folder import read_run
    from pyrodiff.runs.groups import group
    from pyrodiff.runs.sampling import one_hot, transform

    config = read_run(folder)
    section = serialization.entry(config, "data")
    own_data(folder, section)
    group(["a", "b"], [config, config])
    reverse = load_model(folder)
    x = reverse.sample(1, seed=0, context=one_hot(None, section, 1))
    values = transform(section, reverse.event_shape).inverse(x)
    assert values.shape == x.shape and values.dtype == torch.float64


def _evaluate_run(folder: Path) -> None:
    from pyrodiff import runs

    result = runs.evaluate(".", estimator="path", particles=2, limit=2, quiet=True, resume=True)
    assert len(result.value) <= 2
    assert len(LogLikelihood.load(folder / "evaluation.nc").value) == len(result.value)


def _change_evaluation(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    if random.randrange(3) == 0:
        return _change_run(files, random)
    names = [name for name in files if "evaluation" in name]
    name = random.choice(sorted(names))
    by = mutations.yaml_file if name.endswith(".yaml") else _result_file
    return files | {name: by(files[name], random)}


def _write_evaluation(folder: Path) -> None:
    """A run of which a half of an evaluation is done."""
    from pyrodiff.runs import batches

    def stop(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    _write_run(folder)
    remove, batches.Batches.remove = batches.Batches.remove, stop  # type: ignore[method-assign]
    here = Path.cwd()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            _evaluate_run(folder)
    except KeyboardInterrupt:
        pass
    finally:
        os.chdir(here)
        batches.Batches.remove = remove  # type: ignore[method-assign]


def _evaluations() -> list[Files]:
    return [_collect(_write_evaluation)]


@cache
def _training() -> tuple[Any, Any]:
    """Tiny settings, and data to be trained on."""
    from pyrodiff.runs.settings import FitSettings, recipe

    settings = FitSettings(
        steps=4,
        validate_every=2,
        width=8,
        blocks=1,
        num_steps=8,
        calls=8,
        validation_calls=8,
        batch_size=8,
        patience=0,
    )
    return recipe(settings, image=False, levels=None), datasets.load("moons", num_samples=40)


def _train(folder: Path, resume: bool = False) -> ReverseChain:
    from pyrodiff import training
    from pyrodiff.runs.build import make_model, make_objective

    settings, dataset = _training()
    torch.manual_seed(0)
    reverse = make_model(settings, dataset.event_shape, dataset.levels)
    objective = make_objective(settings)
    options: dict[str, Any] = {"resume": resume, "progress": False}
    return training.fit(reverse, objective, dataset, settings, folder, **options)


def _checkpoints() -> list[Files]:
    files = _collect(_train)
    best = {"checkpoints/best.ckpt": files["checkpoints/best.ckpt"]}
    return [best | {"checkpoints/last.ckpt": files["checkpoints/previous.ckpt"]}]


def _checkpoint_file(content: bytes, random: Random) -> bytes:
    """Another checkpoint: other bytes, or whole with other values or shapes, or a pickle."""
    kind = random.randrange(4)
    if kind == 0:
        return mutations.blind(content, random)
    if kind == 1:
        return mutations.zip_file(content, random)
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    return _saved(
        lambda buffer, value: torch.save(value, buffer), mutations.tree(checkpoint, random)
    )


def _read_checkpoint(folder: Path) -> None:
    from pyrodiff.training import DiffusionModule
    from pyrodiff.training.checkpoints import LAST, first_sound, read_checkpoint

    path = folder / "checkpoints" / LAST
    state = read_checkpoint(path)["state_dict"]
    expected = _module().state_dict()
    assert first_sound(path.parent, (LAST,), expected) == path
    module: DiffusionModule = _module()
    module.load_state_dict(state)


def _module() -> Any:
    from pyrodiff import training
    from pyrodiff.runs.build import make_model, make_objective

    settings, dataset = _training()
    reverse = make_model(settings, dataset.event_shape, dataset.levels)
    return training.DiffusionModule(reverse, make_objective(settings), settings)


def _resume(folder: Path) -> None:
    reverse = _train(folder, resume=True)
    assert all(bool(p.isfinite().all()) for p in reverse.parameters())


TARGETS: dict[str, Target] = {
    "csv": Target(_csv, _one({".csv": mutations.csv_file, ".gz": _change_gzip}), _read_data),
    "npy": Target(_npy, _one({"": mutations.npy_file}), _read_data),
    "npz": Target(_npz, _one({"": mutations.npz_file}), _read_data),
    "parquet": Target(_parquet, _one({"": _parquet_file}), _read_data),
    "images": Target(_images, _one({"": _image_file}), _check_data),
    "models": Target(_models, _CHANGE_MODEL, _read_model, 2.0),
    "pilots": Target(_pilots, _one({"": mutations.safetensors_file}), _read_pilot),
    "results": Target(lambda: list(_results()), _one({"": _result_file}), _read_result, 2.0),
    "runs": Target(_runs, _change_run, _read_run),
    "evaluations": Target(_evaluations, _change_evaluation, _evaluate_run, 0.1),
    "checkpoints": Target(_checkpoints, _one({"": _checkpoint_file}), _read_checkpoint),
    "resumed": Target(_checkpoints, _one({"": _checkpoint_file}), _resume, 0.1),
    "settings": Target(_settings, _one({"": mutations.yaml_file}), _read_settings),
    "options": Target(_options, _one({"": mutations.yaml_file}), _read_options, 0.3),
}
