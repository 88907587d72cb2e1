"""Files that are not trusted, each kind of harm by itself; test_fuzz.py does it by the thousand."""

from __future__ import annotations

import io
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain, cli, data, serialization
from pyrodiff.checks import conforms, listed, reason, short
from pyrodiff.data import Affine, DataSet
from pyrodiff.decoders import DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.denoisers import Denoiser, NoiseDenoiser
from pyrodiff.likelihood import LogLikelihood, TermwiseBound
from pyrodiff.likelihood.termwise.pilot import Pilot
from pyrodiff.networks import ResidualMLP, UNet
from pyrodiff.runs.settings import EvaluationSettings, FitSettings, read_settings
from pyrodiff.schedules import LogSNRSchedule, Schedule
from pyrodiff.serialization import netcdf
from pyrodiff.serialization.models import build_parts
from pyrodiff.variances import FixedLarge, FixedSmall

F64 = torch.float64


# -- parts of the user's own ---------------------------------------------------------------------


class Parabola(Schedule):
    """λ falls as a parabola."""

    def __init__(self, depth: float):
        self.depth = depth

    def log_snr(self, u: Tensor) -> Tensor:
        return 5.0 - self.depth * u.double().square()

    def table(self, num_steps: int) -> Tensor:
        return self.log_snr(torch.arange(1, num_steps + 1) / num_steps)


class Doubled(FixedLarge):
    """Twice the variance of the transition."""

    def log_variance(self, step: Any, raw: Tensor | None) -> Tensor:
        return step.log_large + float(np.log(2))


class Wide(GaussianDecoder):
    """Another name for a decoder."""


class Half(Denoiser):
    """The network predicts half of the data."""

    def x0_hat(self, output: Tensor, x_t: Tensor, level: Any) -> Tensor:
        return 2 * output


class Net(nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Float[Tensor, "n 2"]:
        return self.layer(x)


def own_parts() -> dict[str, Any]:
    return {
        "schedule": Parabola(9.0),
        "variance": Doubled(),
        "decoder": Wide(0.3),
        "denoiser": Half(Net()),
    }


def chain(**parts: Any) -> ReverseChain:
    torch.manual_seed(0)
    schedule = parts.pop("schedule", None) or LogSNRSchedule(4.0, -6.0)
    denoiser = parts.pop("denoiser", None) or NoiseDenoiser(ResidualMLP((2,), width=8, blocks=1))
    return ReverseChain(denoiser, ForwardChain(schedule, 4), (2,), **parts)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    chain().save(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the configuration of ``folder`` anew, changed."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("part", ["schedule", "variance", "decoder", "denoiser"])
def test_each_custom_part_is_passed_to_load(part: str, tmp_path: Path) -> None:
    reverse = chain(**{part: own_parts()[part]})
    reverse.save(tmp_path)
    name = type(own_parts()[part]).__name__
    with pytest.raises(ValueError, match=rf"the {part} {name}, which is .*load\(path, {part}=…\)"):
        ReverseChain.load(tmp_path)
    again = ReverseChain.load(tmp_path, **{part: own_parts()[part]})
    assert torch.equal(again.sample(3, seed=0), reverse.sample(3, seed=0))


def test_all_custom_parts_are_named_at_once(tmp_path: Path) -> None:
    reverse = chain(**own_parts())
    reverse.save(tmp_path)
    message = (
        "the schedule Parabola and the variance Doubled and the decoder Wide and the denoiser "
        r"Half, which are .*load\(path, schedule=…, variance=…, decoder=…, denoiser=…\)"
    )
    with pytest.raises(ValueError, match=message):
        ReverseChain.load(tmp_path)
    again = ReverseChain.load(tmp_path, **own_parts())
    assert torch.equal(again.sample(3, seed=0), reverse.sample(3, seed=0))


def test_another_part_than_the_described_one_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match="Expected the variance that the file describes.*FixedL"):
        ReverseChain.load(saved, variance=FixedSmall())
    with pytest.raises(ValueError, match=r"schedule that .* 4\.0.*; got .*13\.3"):
        ReverseChain.load(saved, schedule=LogSNRSchedule())
    with pytest.raises(TypeError, match="Expected decoder to be a Decoder; got"):
        build_parts(chain().config(), {"decoder": FixedSmall()})
    own = tmp_path / "own"
    chain(denoiser=Half(Net())).save(own)
    with pytest.raises(ValueError, match="Expected a network or a denoiser.*got both"):
        ReverseChain.load(own, network=Net(), denoiser=Half(Net()))


# -- configurations ------------------------------------------------------------------------------


def bomb(levels: int = 30) -> str:
    """A value of a kilobyte that would be 2^30 when it is written out."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{bomb()}\nmodel: *a29\n", "plain YAML .*anchor or alias 'a0'"),
        ("model: &a [*a]\n", "anchor or alias 'a'"),
        ("model: !!binary aGVsbG8=\n", "the tag 'tag:yaml.org,2002:binary'"),
        (f"model: {'[' * 100_000}\n", "more than 32 levels"),
        (f"model: {'1:' * 100_000}1\n", "4096 characters in one"),
        ("model: 2020-01-01\n", r"datetime.date\(2020, 1, 1\) of type date"),
        ("model: 2020-99-99\n", "month must be in"),
        ("model: {1: 2}\n", "the key 1, which is no text"),
        ("model: {[1]: 2}\n", "got .*unhashable key in line"),
        ("model: [1, 2\n", r"expected ',' or ']'.* in line \d+"),
    ],
)
def test_hostile_configurations_are_refused(saved: Path, text: str, message: str) -> None:
    (saved / "config.yaml").write_text(f"format: 1\n{text}")
    with pytest.raises(ValueError, match=message) as caught:
        ReverseChain.load(saved)
    assert "config.yaml" in str(caught.value) and len(str(caught.value)) < 1000


def test_configurations_have_a_largest_size(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyrodiff.serialization.config.MAX_CONFIG_BYTES", 2**20)
    with (saved / "config.yaml").open("a") as file:
        file.write("#" * 2**20)
    with pytest.raises(ValueError, match="Expected a configuration of at most 1 MiB; got 1 MiB"):
        ReverseChain.load(saved)
    with pytest.raises(ValueError, match="at most 1 MiB"):  # rather than what cannot be read
        serialization.write_config(tmp_path / "x.yaml", {"x": "x" * 2**20})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schedule", "maximum"), "x", "maximum of LogSNRSchedule to be float; got 'x'"),
        (("schedule", "maximum"), float("nan"), "maximum of LogSNRSchedule to be float; got nan"),
        (("schedule", "maximum"), 10**400, "integers of at most 1048576 in a description"),
        (("schedule", "maximum"), True, "to be float; got True"),
        (("decoder", "scale"), [1.0], r"scale of GaussianDecoder to be float \| None"),
        (("denoiser", "time"), 7, "time of NoiseDenoiser to be str; got 7"),
        (("denoiser", "clip"), [0.0, 1.0, 2.0], "clip of NoiseDenoiser to be tuple"),
        (("denoiser", "network"), None, "a description with a class name; got None"),
        (("denoiser", "network", "width"), 2**40, "integers of at most 1048576.*width"),
        (("denoiser", "network", "width"), 2**20, "weights that fit .* differ, the first"),
        (("denoiser", "network", "blocks"), 2**20, "its description has more"),
        (("denoiser", "network", "dropout"), 7.0, "Expected 0 <= dropout < 1; got 7.0"),
        (("denoiser", "network", "event_shape"), [0] * 999, "valid description of ResidualMLP"),
        (("denoiser", "network", "fourier"), "no", "fourier of ResidualMLP to be"),
        (("num_steps",), 10**7, "num_steps to be an integer >= 1 and at most 1000000"),
        (("num_steps",), "4", "num_steps to be an integer >= 1 .*got '4'"),
        (("order",), ["noising"], r"order to be one of .*got \['noising'\]"),
        (("event_shape",), [2**20, 2**20], "events of at most 16777216 values"),
    ],
)
def test_descriptions_that_ask_for_too_much_or_nonsense(
    saved: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        part = config["model"]
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value

    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        ReverseChain.load(saved)


def test_a_large_network_is_read_as_it_was(tmp_path: Path) -> None:
    """The count of weights that is compared first is no smaller than what a U-Net registers."""
    network = UNet((1, 8, 8), channels=(16, 16), layers=1, head_size=8, norm_groups=4)
    reverse = ReverseChain(NoiseDenoiser(network), ForwardChain(LogSNRSchedule(), 2), (1, 8, 8))
    reverse.save(tmp_path)
    again = ReverseChain.load(tmp_path)
    assert serialization.fingerprint(again) == serialization.fingerprint(reverse)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_weights_of_another_type_are_refused(saved: Path, dtype: torch.dtype) -> None:
    weights = serialization.read_weights(saved / "model.safetensors")
    name = "denoiser.network.last.weight"
    serialization.write_weights(
        saved / "model.safetensors", weights | {name: weights[name].to(dtype)}
    )
    with pytest.raises(ValueError, match=f"got '{name}' of {dtype}, where the model has"):
        ReverseChain.load(saved)


def test_weights_that_declare_more_than_the_file_holds(saved: Path) -> None:
    header = b'{"x":{"dtype":"F64","shape":[1000000000000000],"data_offsets":[0,8000000000000000]}}'
    content = struct.pack("<Q", len(header)) + header + b"\0" * 8
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="Expected safetensors in .*model.safetensors; got"):
        ReverseChain.load(saved)


# -- results ---------------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path: Path) -> Path:
    value = torch.arange(5, dtype=F64)
    calls = torch.full((5,), 8)
    LogLikelihood(value, value, "lower bound", calls, 2, "x").save(tmp_path / "evaluation.nc")
    return tmp_path / "evaluation.nc"


def test_every_flipped_bit_of_a_result_is_noticed(result: Path) -> None:
    whole = result.read_bytes()
    LogLikelihood.load(result)
    for place in range(0, len(whole) - 80, 97):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        result.write_bytes(content)
        with pytest.raises(ValueError, match="evaluation.nc as it was written; got content"):
            LogLikelihood.load(result)


def test_other_programs_read_results(result: Path) -> None:
    import xarray

    with xarray.open_dataset(result, engine="h5netcdf") as dataset:
        assert dataset["log_likelihood"].values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def rewritten(result: Path, change: Callable[[h5py.File], object]) -> None:
    """Change the HDF5 file, as another program would; its checksum is lost."""
    result.write_bytes(result.read_bytes()[: -netcdf._END])
    with h5py.File(result, "r+") as file:
        change(file)


def replace_value(shape: tuple[int, ...], dtype: str = "f8", **options: Any) -> Any:
    def change(file: h5py.File) -> None:
        del file["log_likelihood"]
        file.create_dataset("log_likelihood", shape, dtype, **options)

    return change


def link_value(link: Any) -> Any:
    def change(file: h5py.File) -> None:
        del file["log_likelihood"]
        file["log_likelihood"] = link

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_value((10**15,)), "'log_likelihood' of 8000000000000000 bytes in a file of"),
        (replace_value((2**20,), compression="gzip"), "stored elsewhere or compressed"),
        (replace_value((5,), external=[("/etc/passwd", 0, 40)]), "stored elsewhere"),
        (replace_value((4,)), "got 'std_error' of shape|got 'log_likelihood' of shape"),
        (replace_value((5, 1)), r"'log_likelihood' of shape \(5, 1\)"),
        (replace_value((5,), "f2"), "type float16"),
        (replace_value((5,), "S3"), "without 'value'"),
        (link_value(h5py.ExternalLink("/etc/passwd", "/x")), "a link to elsewhere"),
        (link_value(h5py.SoftLink("/calls")), "a link to elsewhere"),
        (lambda file: file.attrs.__delitem__("kind"), "without 'kind'"),
        (lambda file: file.attrs.__setitem__("kind", "truth"), "kind of LogLikelihood to be"),
        (lambda file: file.attrs.__setitem__("dimensions", "two"), "dimensions .* to be int"),
        (lambda file: file.attrs.__setitem__("dimensions", -2), "Expected a result in"),
    ],
)
def test_inconsistent_results_are_refused(result: Path, change: Any, message: str) -> None:
    rewritten(result, change)
    with pytest.raises(ValueError, match=message):
        LogLikelihood.load(result)


def test_an_endless_heap_is_refused(result: Path) -> None:
    """HDF5 would look for the next string for ever."""
    content = bytearray(result.read_bytes()[: -netcdf._END])
    place = content.index(b"GCOL") + 16
    while content[place : place + 2] != b"\0\0":
        place += 16 + (int.from_bytes(content[place + 8 : place + 16], "little") + 7) // 8 * 8
    content[place + 8 : place + 16] = bytes(8)  # the size of what is free
    result.write_bytes(content)
    with pytest.raises(ValueError, match="a heap of strings that is damaged"):
        LogLikelihood.load(result)


def test_a_truncated_result(result: Path) -> None:
    result.write_bytes(result.read_bytes()[:3000])
    with pytest.raises(ValueError, match="Expected a whole netCDF file in .*evaluation.nc; got"):
        LogLikelihood.load(result)


# -- pilots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nodes", lambda v: v.flip(0), "steps of the pilot .* to grow from 1"),
        ("nodes", lambda v: v.double(), r"'nodes' of shape \(\d+,\) and type torch.float64"),
        ("scale", lambda v: v[1:], r"pilot in .*'(scale|baseline|nodes)' of shape"),
        ("scale", lambda v: -v, "a scale that is out of range"),
        ("spread", lambda v: v * torch.nan, "a spread that is out of range"),
        ("knots", lambda v: v[:, :-1], "Expected .* curves and .* controls"),
        ("log_snr", lambda v: v.flip(0), "log-SNRs to fall"),
        ("calls", lambda v: v.expand(2), r"'calls' of shape \(2,\)"),
    ],
)
def test_inconsistent_pilots_are_refused(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    x, path = torch.randn(16, 2), tmp_path / "pilot.safetensors"
    Pilot.fit(chain(), x, calls=1000).save(path)
    result = TermwiseBound(4, pilot=Pilot.load(path)).estimate(chain(), x[:1], seed=0)
    assert bool(result.value.isfinite())
    tensors = serialization.read_weights(path)
    serialization.write_weights(path, tensors | {name: change(tensors[name])})
    with pytest.raises(ValueError, match=message):
        Pilot.load(path)


# -- data ------------------------------------------------------------------------------------------


def test_a_broken_tiff(tmp_path: Path) -> None:
    """Its decoder raises TypeError."""
    for i in range(10):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.tif")
    content = bytearray((tmp_path / "7.tif").read_bytes())
    (start,) = struct.unpack("<I", content[4:8])
    content[start + 64] = 2  # the type of the sixth field, now text
    (tmp_path / "7.tif").write_bytes(content)
    with pytest.raises(TypeError), Image.open(tmp_path / "7.tif") as image:
        np.asarray(image)
    with pytest.raises(ValueError, match="an image that is whole; got .*7.tif"):
        data.load(tmp_path)


ATOMS = "Expected continuous values in t; got whole numbers alone in "


def table(whole: int) -> np.ndarray:
    random = np.random.RandomState(0)
    values = random.standard_normal((40, 4))
    values[:, :whole] = random.randint(0, 5, (40, whole))
    return values


@pytest.mark.parametrize("suffix", ["npy", "csv", "parquet"])
def test_columns_of_whole_numbers_are_named(tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    path, frame = tmp_path / f"t.{suffix}", pd.DataFrame(table(2), columns=["a", "b", "c", "d"])
    if suffix == "npy":
        np.save(path, table(2))
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    names = "column 0, column 1" if suffix == "npy" else "column 'a', column 'b'"
    with pytest.warns(UserWarning, match=rf"{ATOMS}{names} \(2 of 4 columns\).* no density"):
        data.load(path)


@pytest.mark.parametrize("kind", ["integers", "floats", "images"])
def test_whole_numbers_alone(tmp_path: Path, kind: str) -> None:
    values: Any = table(4).astype(np.int64) if kind == "integers" else table(4)
    if kind == "images":
        values = np.random.RandomState(0).randint(0, 9, (20, 3, 3)).astype(np.float64)
    np.save(tmp_path / "t.npy", values)
    names = "all pixels" if kind == "images" else "column 0, column 1, column 2, column 3"
    with pytest.warns(UserWarning, match=f"{ATOMS}{names}"):
        data.load(tmp_path / "t.npy")


def test_no_warning_of_fractions_levels_or_context(tmp_path: Path) -> None:
    """Warnings are errors in tests."""
    np.save(tmp_path / "fractions.npy", table(0))
    np.save(tmp_path / "levels.npy", table(4).astype(np.int64))
    np.save(tmp_path / "context.npy", table(1))
    data.load(tmp_path / "fractions.npy")
    data.load(tmp_path / "levels.npy", levels=5)
    data.load(tmp_path / "context.npy", context=0)


def test_the_command_line_shows_the_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    monkeypatch.chdir(tmp_path)
    np.save("t.npy", table(4).astype(np.int64))
    monkeypatch.setattr(
        "pyrodiff.training.fit", lambda *a, **k: (_ for _ in ()).throw(OSError("x"))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["fit", "t.npy", "--output", "run", "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"pyrodiff fit: warning: {ATOMS}column 0")


@pytest.mark.parametrize("what", ["values", "context"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_data_sets_are_finite(what: str, bad: float) -> None:
    x, context = torch.zeros(4, 2), torch.zeros(4, 3)
    (x if what == "values" else context)[2, 1] = bad
    transform = Affine(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    parts = dict.fromkeys(("train_context", "validation_context", "test_context"), context)
    with pytest.raises(ValueError, match=f"Expected finite {what}; got NaN or infinity in row 2"):
        DataSet("x", x, x, x, transform, **parts)


def test_a_single_value_is_no_context(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=table(0), y=np.array(1.0))
    with pytest.raises(ValueError, match="rows of context as of data .40.; got a single value"):
        data.load(tmp_path / "a.npz", context="y")


def test_sparse_or_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    from pyrodiff.training.checkpoints import first_sound, read_checkpoint

    state = {"weight": torch.eye(2)}
    parts: dict[str, Any] = dict.fromkeys(("averaging_state", "loops", "callbacks"), {})
    parts |= {"optimizer_states": [], "lr_schedulers": [], "running_loss": 1.0}
    for name, value in (
        ("sound.ckpt", state),
        ("sparse.ckpt", {"weight": torch.eye(2).to_sparse()}),
    ):
        checkpoint = parts | {"state_dict": value, "current_model_state": value}
        torch.save(checkpoint, tmp_path / name)
    assert first_sound(tmp_path, ("sound.ckpt",), state) == tmp_path / "sound.ckpt"
    with pytest.raises(ValueError, match=r"'weight': expected \(2, 2\); got None"):
        first_sound(tmp_path, ("sparse.ckpt",), state)
    content = (tmp_path / "sound.ckpt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "cut.ckpt", "w") as archive:
        for name, block in members.items():  # an instruction without its four bytes
            archive.writestr(name, b"\x80\x02J\x01" if name.endswith(".pkl") else block)
    with pytest.raises(ValueError, match="tensors and plain values in .*cut.ckpt"):
        read_checkpoint(tmp_path / "cut.ckpt")


def test_levels_have_a_largest_number(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(20).reshape(10, 2))
    with pytest.raises(ValueError, match="at most 65536 levels; got 1000000000000000"):
        data.load(tmp_path / "a.npy", levels=10**15)


# -- settings, and what messages quote -----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FitSettings, {"width": "8"}, r"width of FitSettings to be int \| None; got '8'"),
        (FitSettings, {"steps": 10.5}, "steps of FitSettings to be"),
        (FitSettings, {"learning_rate": float("inf")}, "learning_rate .* got inf"),
        (FitSettings, {"objective": ["vlb"]}, "objective of FitSettings to be str"),
        (FitSettings, {"wdth": 8}, "arguments of FitSettings; got unknown 'wdth'"),
        (FitSettings, [1], r"Expected settings by name; got \[1\]"),
        (EvaluationSettings, {"limit": True}, "limit of EvaluationSettings to be"),
    ],
)
def test_settings_from_files(kind: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(kind, values)


def test_quotations_are_short() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    tower: Any = [0]
    for _ in range(60):
        tower = [tower, tower]
    start = time.process_time()
    for value in (cycle, tower, "x" * 10**7, 10**5000, list(range(10**6)), {"a": tower}):
        assert len(short(value)) <= 200
    assert time.process_time() - start < 5  # 2^60 parts would take an age
    assert len(listed(["x" * 1000] * 1000)) < 2000
    assert short("a") == "'a'" and short([1, 2]) == "[1, 2]"
    assert reason(KeyError()) == "KeyError" and reason(ValueError("a\nb")) == "a"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, bool, True),
        (float("nan"), float, False),
        (10**400, float, False),
        (None, int | None, True),
        ([1, 2.5], tuple[float, float], True),
        ([1], tuple[float, float], False),
        ((1, 2), list[int], True),
        ("ab", tuple[str, ...], False),
        ([1, "a"], list[int], False),
        ("x", object, True),
    ],
)
def test_types_of_plain_values(value: Any, hint: Any, expected: bool) -> None:
    assert conforms(value, hint) is expected


def test_reading_leaves_no_files(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["config.yaml", "model.safetensors"]
    module = nn.Linear(1, 1)  # hooks that count weights are gone
    assert module.weight.device.type == "cpu"


def test_unused_decoder_widths_stay_as_they_were(tmp_path: Path) -> None:
    decoder = DiscretizedGaussianDecoder(2 / 15)
    chain(decoder=decoder).save(tmp_path)
    assert ReverseChain.load(tmp_path, decoder=decoder).decoder is decoder
