"""Files: round trips of every combination, hostile files refused, writes that are atomic."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain, serialization
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.denoisers import DataDenoiser, MeanDenoiser, NoiseDenoiser, VelocityDenoiser
from pyrodiff.likelihood import PathBound
from pyrodiff.networks import ResidualConvNet, ResidualMLP
from pyrodiff.schedules import BetaSchedule, CosineSchedule, LinearSchedule, LogSNRSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, LearnedDiagonal, LearnedRange

DENOISERS = [NoiseDenoiser, DataDenoiser, VelocityDenoiser, MeanDenoiser]
VARIANCES = [FixedSmall(), FixedLarge(), LearnedRange(), LearnedDiagonal()]
DECODERS = [
    GaussianDecoder(),
    DiscretizedGaussianDecoder(0.1, scale=0.2),
    CategoricalDecoder(3, 0.0),
]
SCHEDULES = [
    LinearSchedule(1e-5, 0.003),
    CosineSchedule(0.01, 0.99),
    LogSNRSchedule(7.123456789012345, -4.1),
    BetaSchedule([0.1, 0.2, 1 / 3, 0.7]),
]


class External(nn.Module):
    """A user's network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(x) + 0.1 * time[:, None]


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def chain(
    denoiser: Any = NoiseDenoiser,
    variance: Any = None,
    decoder: Any = None,
    schedule: Any = None,
    order: str = "denoising",
    **options: Any,
) -> ReverseChain:
    learned = variance is not None and variance.learned
    network = shaken(ResidualMLP((2,), width=8, blocks=1, learned_variance=learned, fourier=(1, 2)))
    forward = ForwardChain(schedule or LogSNRSchedule(), 4, order=order)
    return ReverseChain(denoiser(network, **options), forward, (2,), variance, decoder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    chain().save(tmp_path)
    return tmp_path


def edit(folder: Path, *path: str, value: Any) -> None:
    """Replace one entry of the saved configuration."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(yaml.safe_dump(config))


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("variance", VARIANCES, ids=lambda v: type(v).__name__)
def test_round_trip_gives_equal_samples(denoiser: Any, variance: Any, tmp_path: Path) -> None:
    """For each decoder and schedule, with the last bit: nothing of the model is rounded."""
    for decoder, schedule in itertools.product(DECODERS, SCHEDULES):
        reverse = chain(denoiser, variance, decoder, schedule)
        reverse.save(tmp_path)
        again = ReverseChain.load(tmp_path)
        assert again.config() == reverse.config()
        assert torch.equal(again.forward_chain.log_snr, reverse.forward_chain.log_snr)
        assert torch.equal(again.sample(3, seed=1), reverse.sample(3, seed=1))


def test_options_survive(tmp_path: Path) -> None:
    reverse = chain(order="noising", time="timestep", clip=(-0.1, 0.2))
    reverse.save(tmp_path)
    again = ReverseChain.load(tmp_path)
    assert again.forward_chain.order == "noising"
    assert again.denoiser.time == "timestep" and again.denoiser.clip == (-0.1, 0.2)
    assert again.event_shape == (2,) and again.num_steps == 4
    samples = again.sample(4, seed=2, trajectory=True)
    assert torch.equal(samples, reverse.sample(4, seed=2, trajectory=True))


def test_image_network_round_trip(tmp_path: Path) -> None:
    network = shaken(ResidualConvNet((1, 4, 4), channels=4, blocks=2, levels=3))
    forward = ForwardChain(LogSNRSchedule(), 3)
    reverse = ReverseChain(DataDenoiser(network), forward, (1, 4, 4), decoder=CategoricalDecoder(3))
    reverse.save(tmp_path / "new" / "folder")
    again = ReverseChain.load(str(tmp_path / "new" / "folder"))
    assert torch.equal(again.sample(2, seed=0), reverse.sample(2, seed=0))


def test_two_loaded_chains_share_nothing(saved: Path) -> None:
    one, two = ReverseChain.load(saved), ReverseChain.load(saved)
    before = two.sample(2, seed=0)
    shaken(one)
    assert torch.equal(two.sample(2, seed=0), before)
    assert one._pyro_name != two._pyro_name


def test_external_network_must_be_handed_in(tmp_path: Path) -> None:
    reverse = ReverseChain(NoiseDenoiser(External()), ForwardChain(LogSNRSchedule(), 3), (2,))
    reverse.save(tmp_path)
    with pytest.raises(ValueError, match=r"network External.*handed in.*network="):
        ReverseChain.load(tmp_path)
    again = ReverseChain.load(tmp_path, network=External())
    assert torch.equal(again.sample(3, seed=0), reverse.sample(3, seed=0))
    with pytest.raises(ValueError, match=r"weights that fit the model.*differ"):
        ReverseChain.load(tmp_path, network=nn.Linear(2, 2))


# -- hostile and broken files --------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_pickle_in_place_of_weights_is_refused(saved: Path) -> None:
    marker = saved / "marker"
    weights = saved / "model.safetensors"
    weights.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match="Expected safetensors in .*model.safetensors"):
        ReverseChain.load(saved)
    torch.save({"a": Bomb(marker)}, weights)
    with pytest.raises(ValueError, match="Expected safetensors"):
        ReverseChain.load(saved)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))  # the bomb is a real one
    assert marker.exists()


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_weights_are_refused(saved: Path, keep: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="Expected safetensors"):
        ReverseChain.load(saved)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_one_bit_of_the_weights_is_refused(saved: Path, share: float) -> None:
    """Of a value, wherever it is; files without a checksum are read as they are."""
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")  # of the values
    content[start + int(share * (len(content) - start))] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*model\.safetensors as it was written.*"):
        ReverseChain.load(saved)
    save_file(load_file(weights), weights)
    ReverseChain.load(saved)


def test_weights_that_do_not_fit_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, file)
    with pytest.raises(ValueError, match=f"1 differ, the first '{name}'.*got None"):
        ReverseChain.load(saved)
    save_file(weights | {"extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"'extra': expected None; got \(1,\)"):
        ReverseChain.load(saved)
    save_file(weights | {name: torch.zeros(1, 77)}, file)
    with pytest.raises(ValueError, match=r"got \(1, 77\)"):
        ReverseChain.load(saved)


@pytest.mark.parametrize("tag", ["os.system", "subprocess.getoutput"])
def test_yaml_tags_are_refused(saved: Path, tag: str) -> None:
    marker, file = saved / "marker", saved / "config.yaml"
    text = f"format: 1\nmodel: !!python/object/apply:{tag} ['touch {marker}']\n"
    file.write_text(text)
    with pytest.raises(ValueError, match="Expected plain YAML in .*config.yaml"):
        ReverseChain.load(saved)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["schedule", "denoiser", "variance", "decoder"])
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "Popen",
        "__import__",
        "annotations",
        "Tensor",
        "math",
        "abstract",
    ],
)
def test_class_names_from_files_are_only_looked_up(saved: Path, kind: str, name: str) -> None:
    """Neither dotted names, nor what the module happens to import, nor abstract classes."""
    name = kind.capitalize() if name == "abstract" else name
    edit(saved, "model", kind, "class", value=name)
    with pytest.raises(ValueError, match=rf"Expected one of pyrodiff's {kind[:-1]}.*got '{name}'"):
        ReverseChain.load(saved)


@pytest.mark.parametrize("name", ["os.system", "Linear", "Sequential", "nn"])
def test_network_names_from_files_are_only_looked_up(saved: Path, name: str) -> None:
    edit(saved, "model", "denoiser", "network", value={"class": name, "args": "touch marker"})
    with pytest.raises(ValueError, match="Expected one of pyrodiff's networks"):
        ReverseChain.load(saved)


def test_named_tuples_are_no_denoisers(saved: Path) -> None:
    wrong = {"class": "Prediction", "x0_hat": 1, "raw_variance": 2}
    edit(saved, "model", "denoiser", value=wrong)
    with pytest.raises(ValueError, match="Expected"):
        ReverseChain.load(saved, network=External())


@pytest.mark.parametrize("version", [2, 999, "1; rm", None])
def test_newer_format_is_refused(saved: Path, version: Any) -> None:
    edit(saved, "format", value=version)
    with pytest.raises(ValueError, match=r"Expected format 1 or older in .*written by pyrodiff"):
        ReverseChain.load(saved)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "schedule"), {"class": "CosineSchedule", "newer": 1}, r"unknown \['newer'\]"),
        (("model", "schedule"), {"class": "BetaSchedule"}, "valid description of BetaSchedule"),
        (("model", "schedule"), {"class": "LogSNRSchedule", "maximum": -9.0}, "maximum > minimum"),
        (("model", "decoder"), "GaussianDecoder", "description with a class name"),
        (("model", "decoder"), {"class": ["GaussianDecoder"]}, "description with a class name"),
        (("model", "num_steps"), 0, "num_steps to be an integer >= 1"),
        (("model", "order"), "sideways", "order to be one of"),
        (("model",), {}, "Expected an entry 'schedule'"),
    ],
)
def test_wrong_descriptions_are_refused(
    saved: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    edit(saved, *path, value=value)
    with pytest.raises(ValueError, match=message):
        ReverseChain.load(saved)


@pytest.mark.parametrize("key", ["event_shape", "num_steps", "schedule", "denoiser", "variance"])
def test_missing_entries_are_named(saved: Path, key: str) -> None:
    file = saved / "config.yaml"
    config = yaml.safe_load(file.read_text())
    del config["model"][key]
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=f"Expected an entry '{key}'"):
        ReverseChain.load(saved)


@pytest.mark.parametrize(
    "content", [b"", b"just text", b"\xff\xfe\x00", b"a: [1, 2", b"- 1\n- 2\n"]
)
def test_files_that_are_no_configuration(saved: Path, content: bytes) -> None:
    (saved / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="Expected"):
        ReverseChain.load(saved)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_missing_files_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        ReverseChain.load(saved)


def test_what_is_not_plain_is_not_written() -> None:
    network = ResidualMLP((2,), width=8, blocks=1)
    network.width = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Expected plain values"):
        serialization.describe(network)


# -- atomic writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("old")

    def write(path: Path) -> None:
        path.write_text("half of the n")
        raise error

    with pytest.raises(type(error)):
        serialization.write_atomically(file, write)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.safetensors"]  # and nothing half-written beside it
    serialization.write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["model.safetensors"]


def test_failed_save_leaves_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ReverseChain.load(saved).sample(2, seed=0)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("pyrodiff.serialization.files._flush", fail)
    with pytest.raises(OSError, match="disk full"):
        shaken(chain()).save(saved)
    monkeypatch.undo()
    assert torch.equal(ReverseChain.load(saved).sample(2, seed=0), before)


# -- fingerprints ----------------------------------------------------------------------------------


def test_a_fingerprint_knows_a_model_again(tmp_path: Path) -> None:
    def seeded(*arguments: Any, **options: Any) -> ReverseChain:
        torch.manual_seed(0)  # the same weights
        return chain(*arguments, **options)

    model = seeded()
    first = serialization.fingerprint(model)
    model.save(tmp_path)
    assert len(first) == 16 and serialization.fingerprint(ReverseChain.load(tmp_path)) == first
    variants = [
        seeded(variance=FixedSmall()),
        seeded(decoder=DECODERS[1]),
        seeded(VelocityDenoiser),
        seeded(schedule=CosineSchedule()),
    ]
    assert len({first} | {serialization.fingerprint(other) for other in variants}) == 5
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1e-3
    assert serialization.fingerprint(model) != first


def test_a_fingerprint_sees_the_names_of_weights() -> None:
    class Model(nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(3)))

        def config(self) -> dict[str, Any]:
            return {}

    a, b = (serialization.fingerprint(Model(name)) for name in ("weight", "bias"))
    assert a and b and a != b


def test_a_fingerprint_sees_plain_attributes_and_no_types_of_numbers() -> None:
    class Guided(nn.Module):
        def __init__(self, strength: float, extra: Any = None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network, self.strength, self.extra = External(), strength, extra
            self.register_buffer("phase", torch.ones(2, dtype=torch.complex64).conj())

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return (1 + self.strength) * self.network(x, time)

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None: ...

    def model(network: nn.Module, maximum: Any = 4.0) -> ReverseChain:
        forward = ForwardChain(LogSNRSchedule(maximum, -6), 3)
        return ReverseChain(NoiseDenoiser(network), forward, (2,))

    state = torch.zeros(1)
    plain = serialization.fingerprint(model(Guided(0.0, state)))
    assert plain and plain == serialization.fingerprint(model(Guided(0.0, state), 4))
    assert plain != serialization.fingerprint(model(Guided(0.5, state)))
    odd = model(Guided(0.0, state))
    object.__setattr__(odd.forward_chain.schedule, "maximum", np.float32(4))
    for unknown in (model(Guided(0.0, {"a": 1})), odd):
        assert serialization.fingerprint(unknown) == ""
        assert PathBound().estimate(unknown, torch.zeros(1, 2)).model == ""


def test_a_fingerprint_says_nothing_of_what_it_cannot_see() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return 0 * x

    forward = ForwardChain(LogSNRSchedule(4.0, -6.0), 3)
    assert serialization.fingerprint(ReverseChain(NoiseDenoiser(Zero()), forward, (2,))) == ""
    assert serialization.fingerprint(ReverseChain(NoiseDenoiser(External()), forward, (2,)))
