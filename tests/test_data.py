"""Data sets: the laws of the map and of the exact densities, the splits, and what is refused."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyrodiff import data
from pyrodiff.data import Affine, DataSet, files, load, mixture_parameters

pd = pytest.importorskip("pandas")

# Small tables of integers serve here as any other; test_reading.py looks at the warning.
pytestmark = pytest.mark.filterwarnings("ignore:Expected continuous values in")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def table() -> np.ndarray:
    """Thirty rows of four columns of different location and scale, float64."""
    random = np.random.RandomState(1)
    return random.standard_normal((30, 4)) * [1.0, 10.0, 0.1, 3.0] + [0.0, 100.0, -5.0, 1.0]


def save_images(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")
    return folder


def as_given(dataset: DataSet) -> torch.Tensor:
    """All rows of a data set, in the units of the data as given, sorted by the first value."""
    rows = torch.cat([dataset.train, dataset.validation, dataset.test])
    rows = dataset.transform.inverse(rows).flatten(1)
    return rows[rows[:, 0].argsort()]


# The map


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 1)])
def test_affine_laws(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    event = (2, 2, 2) if len(shape) == 3 else (3,)
    transform = Affine(shift, scale)
    x = torch.randn(event, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(transform.inverse(transform.forward(x)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(transform.forward(transform.inverse(x)), x, rtol=0, atol=1e-14)
    jacobian = torch.autograd.functional.jacobian(transform.forward, x)
    expected = jacobian.reshape(x.numel(), x.numel()).slogdet().logabsdet
    assert transform.log_abs_det(event) == pytest.approx(float(expected), abs=1e-12)


def test_affine_is_float64_for_float32_input() -> None:
    transform = Affine(torch.tensor(0.1).double(), torch.tensor(0.3).double())
    assert transform.forward(torch.ones(3)).dtype == torch.float64
    assert transform.inverse(torch.ones(3)).dtype == torch.float64


def test_affine_refuses() -> None:
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected shift and scale in float64; got torch.float32"):
        Affine(one.float(), one)
    with pytest.raises(ValueError, match="Expected a positive, finite scale; got -1"):
        Affine(one, -one)
    with pytest.raises(ValueError, match="Expected a finite shift"):
        Affine(one * math.nan, one)
    with pytest.raises(ValueError, match=r"Expected an event shape that \(2,\).*got \(3,\)"):
        Affine(one, one).log_abs_det((3,))


def test_dataset_refuses_splits_that_differ() -> None:
    one = torch.ones((), dtype=torch.float64)
    rows, map_ = torch.zeros(4, 2), Affine(one, one)
    with pytest.raises(ValueError, match=r"event shape \(2,\); got torch.float32 .* \(3,\)"):
        DataSet("a", rows, rows, torch.zeros(4, 3), map_)
    with pytest.raises(ValueError, match="got torch.float64"):
        DataSet("a", rows, rows.double(), rows, map_)
    with pytest.raises(ValueError, match="Expected 4 rows of context; got 3"):
        DataSet("a", rows, rows, rows, map_, train_context=torch.zeros(3, 1))


# Named data sets


def test_digits_are_the_scikit_learn_split() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    _, test, _, labels = train_test_split(bunch.images, bunch.target, test_size=500, random_state=0)
    dataset = load("digits", context="label")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1150, 147, 500)
    assert dataset.event_shape == (1, 8, 8)
    assert dataset.is_image and dataset.dimensions == 64 and dataset.levels == 17
    given = dataset.transform.inverse(dataset.test)
    assert torch.equal(given, torch.from_numpy(test)[:, None])
    assert dataset.test_context is not None and dataset.test_context.shape == (500, 10)
    assert torch.equal(dataset.test_context.argmax(1), torch.from_numpy(labels))
    assert torch.equal(dataset.test_context.sum(1), torch.ones(500))
    every = torch.cat([dataset.train, dataset.validation, dataset.test]).flatten(1)
    images = torch.from_numpy(bunch.images.reshape(-1, 64) / 8 - 1).float()
    assert torch.equal(every.unique(dim=0), images.unique(dim=0))
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, images.tolist()))


def test_digits_lie_on_the_grid_and_need_no_jacobian() -> None:
    dataset = load("digits", seed=3)
    grid = torch.linspace(-1, 1, 17)
    assert torch.equal(dataset.train.unique(), grid)
    assert torch.equal(dataset.train, load("digits").train)
    assert dataset.log_density_offset() == 0
    assert dataset.train_context is None
    assert repr(dataset) == "DataSet('digits', 1150/147/500 of (1, 8, 8), 17 levels)"


@pytest.mark.parametrize("name", ["mixture", "moons", "checkerboard"])
def test_plane_density_integrates_to_one_and_has_the_sample_moments(name: str) -> None:
    dataset = load(name, num_samples=20_000)
    assert dataset.log_prob is not None
    # Midpoints: exact for the checkerboard, whose squares the cells divide, and spectrally
    # accurate for the smooth densities, whose standard deviations are 4 cells and more.
    width = 1 / 40
    side = torch.arange(-4 + width / 2, 4, width, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    density = dataset.log_prob(points).exp()
    assert float(density.sum() * width**2) == pytest.approx(1, abs=1e-9)
    # Mean and second moments of the draws within 5 standard errors of those of the density.
    given = as_given(dataset)
    for statistic in (lambda x: x, lambda x: x**2, lambda x: x.prod(-1, keepdim=True)):
        exact = (density[:, None] * statistic(points)).sum(0) * width**2
        values = statistic(given)
        error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - exact).abs() < 5 * error + 1e-4).all()
    # The mean of log p over the draws within 5 standard errors of minus the entropy.
    entropy = torch.special.entr(density).sum() * width**2
    values = dataset.log_prob(given)
    assert torch.isfinite(values).all()
    tolerance = 5 * values.std() / math.sqrt(len(values)) + 1e-6
    assert (values.mean() + entropy).abs() < tolerance


def test_mixture_log_prob_is_that_of_its_parameters() -> None:
    weights, means, scale = mixture_parameters()
    components = torch.distributions.Independent(torch.distributions.Normal(means, scale), 1)
    exact = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), components
    )
    dataset = load("mixture", num_samples=100)
    assert dataset.log_prob is not None
    x = 3 * torch.randn(5, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(dataset.log_prob(x), exact.log_prob(x), rtol=1e-12, atol=1e-12)
    # The same density in model units, as the docstring of mixture_parameters has it.
    transform = dataset.transform
    there = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Independent(
            torch.distributions.Normal(transform.forward(means), scale / transform.scale), 1
        ),
    )
    model_units = there.log_prob(transform.forward(x)) + dataset.log_density_offset()
    torch.testing.assert_close(model_units, exact.log_prob(x), rtol=1e-12, atol=1e-12)


def test_moons_log_prob_agrees_with_a_finer_rule() -> None:
    dataset = load("moons", num_samples=100)
    assert dataset.log_prob is not None
    random = np.random.RandomState(0)
    x = np.concatenate([random.uniform(-7, 7, (200, 2)), random.uniform(-1, 2, (200, 2))])
    nodes, weights = np.polynomial.legendre.leggauss(1500)
    angle = np.pi / 2 * (nodes + 1)
    upper = np.stack([np.cos(angle), np.sin(angle)], 1)
    centres = np.concatenate([upper, np.array([1, 0.5]) - upper])
    squared = ((x[:, None] - centres) ** 2).sum(-1)
    exact = torch.logsumexp(
        torch.from_numpy(np.log(np.tile(weights / 4, 2)) - squared / 0.02), 1
    ) - math.log(0.02 * math.pi)
    torch.testing.assert_close(dataset.log_prob(torch.from_numpy(x)), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["mixture", "moons", "checkerboard"])
def test_plane_sets_are_a_function_of_the_seed(name: str) -> None:
    first, again, other = (load(name, seed=s, num_samples=105) for s in (0, 0, 1))
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
    assert not torch.equal(first.train, other.train)
    assert (len(first.train), len(first.validation), len(first.test)) == (85, 10, 10)
    assert first.levels is None and not first.is_image and first.train.dtype == torch.float32
    with pytest.raises(ValueError, match=r"points of the plane \(\.\.\., 2\); got shape \(3,\)"):
        assert first.log_prob is not None
        first.log_prob(torch.zeros(3))


def test_density_offset_makes_likelihoods_comparable() -> None:
    raw = load("mixture", standardize=False, num_samples=1000)
    scaled = load("mixture", num_samples=1000)
    torch.testing.assert_close(scaled.transform.inverse(scaled.train).float(), raw.train)
    assert raw.log_density_offset() == 0
    z = torch.tensor([0.3, -0.7], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(scaled.transform.inverse, z)
    assert scaled.log_density_offset() == pytest.approx(-float(jacobian.logdet()), abs=1e-12)


# Options and names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, r"Expected one of .*; got 'digit'; did you mean 'digits'\?"),
        ("Moon", {}, r"did you mean 'moons'\?"),
        ("qqqq", {}, r"Expected one of checkerboard, digits, .*, or a path; got 'qqqq'[.]$"),
        ("moons", {"seed": -1}, r"Expected a seed from 0 to 2\*\*32 - 1; got -1"),
        ("moons", {"num_samples": 9}, "Expected at least 10 samples; got 9"),
        ("moons", {"levels": 3}, "Expected no levels= for 'moons'; got levels=3"),
        ("moons", {"context": "label"}, "Expected no context= for 'moons'"),
        ("digits", {"num_samples": 50}, "Expected no num_samples= for 'digits'"),
        ("digits", {"context": "y"}, "Expected context='label' or none for 'digits'; got 'y'"),
        ("digits", {"key": "y"}, "Expected no key= for 'digits'; got key='y'"),
    ],
)
def test_wrong_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **options)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a file or folder; got .*none.npy"):
        load(tmp_path / "none.npy")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load(Path("digits-that-are-not-there"))
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Expected a \.npy, \.npz, .*; got 'a\.pkl'"):
        load(tmp_path / "a.pkl")
    np.save(tmp_path / "a.npy", np.eye(20))
    with pytest.raises(ValueError, match="Expected no num_samples= for 'a file'; got"):
        load(tmp_path / "a.npy", num_samples=10)
    with pytest.raises(ValueError, match="Expected no key= for 'a.npy'"):
        load(tmp_path / "a.npy", key="x")


# Arrays


def test_continuous_table_is_split_and_standardised(tmp_path: Path, table: np.ndarray) -> None:
    np.save(tmp_path / "t.npy", table)
    dataset = load(tmp_path / "t.npy", seed=5)
    assert dataset.name == "t" and dataset.levels is None
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (24, 3, 3)
    torch.testing.assert_close(dataset.train.mean(0), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(dataset.train.std(0, correction=0), torch.ones(4))
    # Every row once: the splits are disjoint and lose nothing.
    expected = torch.from_numpy(table[table[:, 0].argsort()])
    torch.testing.assert_close(as_given(dataset), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(dataset.train, load(tmp_path / "t.npy", seed=5).train)
    assert not torch.equal(dataset.train, load(tmp_path / "t.npy", seed=6).train)


def test_standardize_off_leaves_the_data(tmp_path: Path, table: np.ndarray) -> None:
    np.save(tmp_path / "t.npy", table)
    dataset = load(tmp_path / "t.npy", standardize=False)
    rows = torch.cat([dataset.train, dataset.validation, dataset.test])
    expected = torch.from_numpy(table).float()
    assert torch.equal(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize(
    ("shape", "event"),
    [
        ((20,), (1,)),
        ((20, 3), (3,)),
        ((20, 4, 5), (1, 4, 5)),
        ((20, 4, 5, 3), (3, 4, 5)),
        ((20, 4, 5, 1), (1, 4, 5)),
        ((20, 3, 4, 5), (3, 4, 5)),
    ],
)
@pytest.mark.parametrize("kind", ["<f4", ">f8", "<i8", ">i2", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_layouts_and_dtypes(
    tmp_path: Path, shape: tuple[int, ...], event: tuple[int, ...], kind: str, order: Any
) -> None:
    array = np.random.RandomState(0).randint(0, 200, shape).astype(kind, order=order)
    np.save(tmp_path / "a.npy", array)
    dataset = load(tmp_path / "a.npy")
    discrete = len(shape) >= 3 and "f" not in kind
    assert dataset.event_shape == event
    assert dataset.levels == (256 if discrete else None)
    assert dataset.is_image == (len(event) == 3)
    given = torch.cat([dataset.train, dataset.validation, dataset.test])
    given = dataset.transform.inverse(given).round()
    channels_last = len(shape) == 4 and shape[3] in (1, 3)
    events = (np.moveaxis(array, 3, 1) if channels_last else array).reshape(20, -1)
    assert sorted(given.flatten(1).tolist()) == sorted(events.astype(float).tolist())


@pytest.mark.parametrize("levels", [2, 5, 17, 256])
def test_discrete_grid_is_exact(tmp_path: Path, levels: int) -> None:
    array = np.arange(levels * 100).reshape(-1, 10) % levels
    np.save(tmp_path / "a.npy", array.astype(np.float32))
    dataset = load(tmp_path / "a.npy", levels=levels)
    rows = torch.cat([dataset.train, dataset.validation, dataset.test])
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
    assert dataset.levels == levels
    assert torch.equal(rows.unique(), grid.float())
    values = torch.arange(levels, dtype=torch.float64)
    torch.testing.assert_close(dataset.transform.forward(values), grid, rtol=0, atol=1e-15)
    assert torch.equal(dataset.transform.inverse(grid.float()).round(), values)
    assert dataset.log_density_offset() == 0


def test_boolean_images_have_two_levels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.RandomState(0).rand(20, 4, 4) < 0.5)
    dataset = load(tmp_path / "a.npy")
    assert dataset.levels == 2
    assert dataset.train.unique().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.full((20, 2), 256).reshape(20, 1, 2), {}, "Expected integers 0 to 255.*from 256 to"),
        (np.arange(-1, 19), {"levels": 5}, "Expected integers 0 to 4 .*got values from -1 to 18"),
        (np.arange(20) / 5, {"levels": 5}, "Expected integers 0 to 4 for levels=5; got 0.2"),
        (np.arange(20), {"levels": 1}, "Expected at least 2 levels; got 1"),
        (np.arange(9.0), {}, "Expected at least 10 rows; got 9"),
        (np.empty((0, 3)), {}, "Expected at least 10 rows; got 0"),
        (np.empty((20, 0)), {}, r"none of it empty; got \(0,\)"),
        (np.array(3.0), {}, r"Expected an array \(N,\).*; got shape \(\)"),
        (np.zeros((20, 5, 5, 5)), {}, r"1 or 3 channels C; got shape \(20, 5, 5, 5\)"),
        (np.zeros((20, 1, 1, 1, 1)), {}, r"got shape \(20, 1, 1, 1, 1\)"),
        (np.zeros(20, dtype=complex), {}, "Expected an array of numbers; got dtype complex128"),
        (np.zeros(20, dtype="U3"), {}, "Expected an array of numbers; got dtype <U3"),
        (np.zeros(20, dtype="f8,i4"), {}, "Expected an array of numbers; got dtype"),
        (np.arange(40.0).reshape(20, 2) % 2, {}, r"got a constant column 0 \(0 in all of train\)"),
        (np.zeros((20, 2, 3)), {}, r"constant pixel \(0, 0, 0\) .*or levels= if the data are disc"),
        (np.logspace(-300, 307, 20), {"standardize": False}, "Expected values that fit float32"),
        (np.logspace(-300, 307, 20), {}, "Expected a mean and a variance that fit float64"),
    ],
)
def test_wrong_arrays(
    tmp_path: Path, array: np.ndarray, options: dict[str, Any], message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npy", **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(tmp_path: Path, table: np.ndarray, bad: float) -> None:
    table[7, 2] = table[9, 0] = bad
    np.save(tmp_path / "a.npy", table)
    with pytest.raises(ValueError, match=rf"got 2 NaN or infinite, .*{bad}\) at index \(7, 2\)"):
        load(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", train=np.ones((20, 4)), test=table)
    with pytest.raises(ValueError, match=r"2 NaN or infinite in test, the first .* \(7, 2\)"):
        load(tmp_path / "a.npz")


def test_npz_splits_and_context(tmp_path: Path) -> None:
    x = np.random.RandomState(0).randint(0, 256, (60, 4, 4)).astype(np.uint8)
    y = np.arange(60) % 3
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x_train=x[:40], x_test=x[40:], y_train=y[:40], y_test=y[40:])
    dataset = load(path, context="y")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (36, 4, 20)
    assert torch.equal(
        dataset.transform.inverse(dataset.test).round()[:, 0], torch.from_numpy(x[40:]).double()
    )
    # Context rows follow their data rows through the random split, and labels become one-hot.
    contexts = (dataset.train_context, dataset.validation_context, dataset.test_context)
    for split, context in zip(
        (dataset.train, dataset.validation, dataset.test), contexts, strict=True
    ):
        assert context is not None
        for event, row in zip(dataset.transform.inverse(split).round(), context, strict=True):
            index = int((torch.from_numpy(x).double() == event).flatten(1).all(1).nonzero())
            assert row.tolist() == [float(y[index] == c) for c in range(3)]
    with pytest.raises(ValueError, match="Expected the context 'z' beside x_train, x_test; got th"):
        load(path, context="z")
    np.savez(path, train=x[:40], val=x[40:50], test=x[50:])
    dataset = load(path)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (40, 10, 10)


def test_npz_keys(tmp_path: Path, table: np.ndarray) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, table)
    assert load(path).event_shape == (4,)
    np.savez(path, red=table, white=table[:, :3])
    with pytest.raises(ValueError, match="x_train and x_test; got the keys red, white: choose"):
        load(path)
    assert load(path, key="white").event_shape == (3,)
    assert load(path, key="white").name == "a:white"
    with pytest.raises(ValueError, match=r"among red, white; got 'rad'; did you mean 'red'\?"):
        load(path, key="rad")
    np.savez(path, x=table, y=np.linspace(0, 1, 30))
    dataset = load(path, context="y")
    assert dataset.event_shape == (4,)
    assert dataset.train_context is not None and dataset.train_context.shape == (24, 1)
    np.savez(path, x=table, y=np.arange(29.0))
    with pytest.raises(ValueError, match=r"rows of context as of data \(30\); got 29"):
        load(path, context="y")
    np.savez(path, x=table, y=np.arange(30) - 1)
    with pytest.raises(ValueError, match="Expected labels 0 to at most 999; got -1 to 28"):
        load(path, context="y")
    np.savez(path, train=table, test=table[:, :3])
    with pytest.raises(ValueError, match=r"one event shape, .* got \(4,\) and \(3,\)"):
        load(path)
    np.savez(path, train=table[:5], test=table)
    with pytest.raises(ValueError, match="Expected at least 10 rows in train; got 5"):
        load(path)
    np.savez(path)
    with pytest.raises(ValueError, match="got the keys none"):
        load(path)


def test_context_columns(tmp_path: Path, table: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", table)
    by_position = load(tmp_path / "a.npy", context=[1, 3])
    assert by_position.event_shape == (2,)
    pd.DataFrame(table, columns=list("abcd")).to_csv(tmp_path / "a.csv", index=False)
    by_name = load(tmp_path / "a.csv", context=["b", "d"])
    assert torch.equal(by_position.train, by_name.train)
    assert by_position.train_context is not None and by_name.train_context is not None
    assert torch.equal(by_position.train_context, by_name.train_context)
    given = by_name.transform.inverse(by_name.train)
    for row, context in zip(given, by_name.train_context, strict=True):
        index = int(np.abs(table[:, 0] - float(row[0])).argmin())
        np.testing.assert_allclose(context, table[index, [1, 3]], rtol=1e-6)
    with pytest.raises(ValueError, match="Expected a column among a, b, c, d; got 'e'"):
        load(tmp_path / "a.csv", context="e")
    with pytest.raises(ValueError, match="Expected a column among 0, 1, 2, 3; got 4"):
        load(tmp_path / "a.npy", context=4)
    with pytest.raises(ValueError, match="some columns as context and some as data"):
        load(tmp_path / "a.npy", context=[0, 1, 2, 3])
    np.save(tmp_path / "b.npy", np.zeros((20, 3, 3)))
    with pytest.raises(ValueError, match=r"Expected a table \(N, d\).*got shape \(N, \*\(3, 3\)"):
        load(tmp_path / "b.npy", context=0)


# Hostile and broken arrays


class Marker:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def object_array(marker: Path) -> bytes:
    array = np.empty(20, dtype=object)
    array[:] = [Marker(marker)] * 20
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("suffix", [".npy", ".npz-member", ".npz"])
def test_pickles_are_refused_and_never_executed(tmp_path: Path, bare: bool, suffix: str) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps(Marker(marker)) if bare else object_array(marker)
    path = tmp_path / ("a" + suffix.removesuffix("-member"))
    if suffix == ".npz-member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.npy", content)
            archive.writestr("test.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="never loaded|which cannot be read"):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize("bare", [False, True])
def test_the_refused_pickles_would_run_code(tmp_path: Path, bare: bool) -> None:
    """The marker appears where a file is trusted, so its absence above means something."""
    marker = tmp_path / "marker"
    content = pickle.dumps(Marker(marker)) if bare else object_array(marker)
    (tmp_path / "a.npy").write_bytes(content)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert marker.exists()


def npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    """A .npy file with any header."""
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + content


FLOATS = "{'descr': '<f8', 'fortran_order': False, 'shape': %s}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expected a NumPy array with a header"),
        (b"\x93NUMPY", "Expected a NumPy array with a header"),
        (npy(FLOATS % "(20,)", version=9), "format version"),
        (npy(FLOATS % "(20,)" + " " * 20_000), "header of at most 10000 bytes; got .*a.npy"),
        (npy(FLOATS % "(20,)" + " " * 70_000, version=2), "header of at most 10000 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "header of at most 10000 bytes"),
        (npy("__import__('os').system('true')\n"), "which has none or a broken one"),
        (npy("(" * 5000), "which has none or a broken one"),
        (npy(FLOATS % "(10**12,)"), "which has none or a broken one"),
        (npy(FLOATS % "(1000000000000,)"), "Expected at most 16 GiB; got .* declares 7.45e"),
        (npy(FLOATS % "(-20,)"), "Expected -160 bytes of data"),
        (npy(FLOATS % "(20,)", bytes(100)), r"Expected 160 bytes of data .*got 100 in .*truncat"),
        (npy(FLOATS % "(20,)", bytes(170)), "Expected 160 bytes of data .*got 170 in"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
def test_broken_array_headers(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / ("a" + suffix)
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_headers_just_within_the_limit_are_read(tmp_path: Path) -> None:
    values = np.arange(20.0)
    header = (FLOATS % "(20,)").strip().ljust(9_999) + "\n"
    for version in (1, 2):
        (tmp_path / "a.npy").write_bytes(npy(header, values.tobytes(), version))
        assert as_given(load(tmp_path / "a.npy")).flatten().round().tolist() == values.tolist()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv.gz", ".parquet"])
def test_truncated_files(tmp_path: Path, suffix: str, keep: float) -> None:
    values = np.random.RandomState(0).rand(400, 3)
    path = tmp_path / ("a" + suffix)
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".npz":
        np.savez(path, values)
    elif suffix == ".csv.gz":
        pd.DataFrame(values, columns=list("abc")).to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow")
        pd.DataFrame(values, columns=list("abc")).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"^Expected .*got .*"):
        load(path)


def test_corrupted_npz_member_fails_its_checksum(tmp_path: Path) -> None:
    values = np.random.RandomState(0).rand(100, 3)
    np.savez(tmp_path / "a.npz", values)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="a .npz file that is whole; got .*Bad CRC-32"):
        load(tmp_path / "a.npz")


def test_zip_bombs_are_refused_by_their_declared_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", np.zeros((20, 10_000)))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    monkeypatch.setattr(files, "MAX_BYTES", 1_000_000)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the member was opened")

    monkeypatch.setattr(zipfile.ZipFile, "open", refuse)
    with pytest.raises(ValueError, match="Expected at most .* GiB; got .*a.npz, which declares"):
        load(tmp_path / "a.npz")


def test_zip_members_with_false_sizes_or_foreign_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.zeros((200, 100)))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, entry + 24, 300)  # the declared size, in the directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read .Bad CRC-32"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", npy(FLOATS % "(20,)", bytes(160)))
    with pytest.raises(ValueError, match="Expected members stored or deflated.*got a.npy of"):
        load(path)


# Tables


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("header", [True, False, "counted"])
def test_csv_is_read_to_the_last_bit(
    tmp_path: Path, table: np.ndarray, header: bool | str, compressed: bool
) -> None:
    path = tmp_path / ("a.csv.gz" if compressed else "a.csv")
    names = list("abcd") if header is True else range(4)
    pd.DataFrame(table, columns=names).to_csv(path, index=False, header=bool(header))
    np.save(tmp_path / "a.npy", table)
    dataset, expected = load(path), load(tmp_path / "a.npy")
    assert dataset.name == "a"
    assert torch.equal(dataset.transform.shift, expected.transform.shift)
    assert torch.equal(dataset.train, expected.train)
    assert torch.equal(dataset.test, expected.test)


ROWS = "".join(f"{i},{i * i},{-i}\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected rows of numbers; got none"),
        ("\n\n", "Expected rows of numbers; got none"),
        ("a,b,c\n", "Expected at least 10 rows; got 0"),
        ("a,b,c\n" + ROWS + "1,x,2\n", "got 'x' in row 12, column 'b'"),
        (ROWS + "1,x,2\n", "got 'x' in row 12, column '1'"),
        ("a,b,c\n" + ROWS + "1,,2\n", "got '' in row 12, column 'b'"),
        ("a,b,c\n" + ROWS + "1,NA,2\n", "got 'NA' in row 12, column 'b'"),
        ("a,b,c\n" + ROWS + "1,2\n", "Expected 3 fields in every row .*got 2 in row 12"),
        ("a,b,c\n" + ROWS + "1,2,3,4\n", "Expected 3 fields in every row .*got 4 in row 12"),
        (ROWS + "1,2,3,4\n", "Expected 3 fields in every row .*got 4 in row 12"),
        ("a,b\n" + ROWS, "Expected 2 fields in every row .*got 3 in row 0"),
        ("a,b,c,d\n" + ROWS, "Expected 4 fields in every row .*got 3 in row 0"),
        ("a,b,c\n1,2,3,\n" + ROWS, "Expected 3 fields in every row .*got 4 in row 0"),
        ("a,b,c\n" + ROWS + "1,nan,2\n", r"1 NaN or infinite, .*\(nan\) at row 12, column 'b'"),
        ("a,b,c\n" + ROWS + "1,2,-inf\n", r"\(-inf\) at row 12, column 'c'"),
        ("a,b,c\n" + ROWS + '1,"2\n', r"(row 12|which cannot be read)"),
        ("a,2,c\n" + ROWS, "names alone or of numbers alone in .*got 'a' in column 0 beside.* 2"),
        (",a,b\n" + ROWS, "got '' for column 0 .*index=False"),
        ("a,b,a\n" + ROWS, "Expected a name of its own .*got 'a' for column 2"),
        ("a;b;c\n" + ROWS.replace(",", ";"), "got '0;0;0' in row 0, column 'a;b;c'"),
        ("a,b,c\n" + ROWS.replace(",-", ",7 #"), "got '7 #1' in row 1, column 'c'"),
    ],
)
def test_wrong_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.csv")
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.csv.gz")


def test_csv_quirks_that_are_accepted(tmp_path: Path) -> None:
    text = "\ufeff\n\"a\", 'b,c'\r\n".replace("'", '"').replace(', "', ',"')
    text += "".join(f" {i}, 1e{i}\r\n\r\n" for i in range(12))
    (tmp_path / "a.csv").write_bytes(text.encode())
    dataset = load(tmp_path / "a.csv", standardize=False)
    assert sorted(as_given(dataset)[:, 0].tolist()) == list(range(12))
    with pytest.raises(ValueError, match="a, b,c; got 'x'"):
        load(tmp_path / "a.csv", context="x")


def test_csv_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="a .csv file that is whole; got .*a.csv, which cannot"):
        load(tmp_path / "a.csv")
    (tmp_path / "a.csv.gz").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(ValueError, match="got .*a.csv.gz, which cannot be read .*Not a gzip"):
        load(tmp_path / "a.csv.gz")
    (tmp_path / "b.csv").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    with pytest.raises(ValueError, match="Expected"):
        load(tmp_path / "b.csv")
    assert not (tmp_path / "marker").exists()


def test_gzip_bombs_stop_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write("1,2\n" * 1_000_000)
    monkeypatch.setattr(files, "MAX_BYTES", 1_000_000)
    with pytest.raises(ValueError, match="Expected at most .* GiB; got .*a.csv.gz"):
        load(tmp_path / "a.csv.gz")


def test_constant_columns_are_named(tmp_path: Path, table: np.ndarray) -> None:
    table[:, 2] = 0.1
    frame = pd.DataFrame(table, columns=["a", "b", "unit", "d"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ValueError, match=r"got a constant column 'unit' \(0.1 in all of train\)"):
        load(tmp_path / "a.csv")
    assert load(tmp_path / "a.csv", standardize=False).event_shape == (4,)
    assert load(tmp_path / "a.csv", context="unit").event_shape == (3,)


def test_parquet(tmp_path: Path, table: np.ndarray) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(table, columns=list("abcd"))
    frame["n"] = np.arange(30)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert torch.equal(load(tmp_path / "a.parquet").train, load(tmp_path / "a.csv").train)
    frame["n"] = pd.array([1, None, *range(28)], dtype="Int64")
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"1 NaN or infinite, .* at row 1, column 'n'"):
        load(tmp_path / "a.parquet")
    frame["n"] = "x"
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="Expected numeric columns in .*; got column 'n' of type"):
        load(tmp_path / "a.parquet")


def test_parquet_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    pd.DataFrame({"a": np.zeros(100_000)}).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(files, "MAX_BYTES", 100_000)
    with pytest.raises(ValueError, match="Expected at most .* GiB; got .*a.parquet, which decl"):
        load(tmp_path / "a.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pyrodiff[parquet]'")):
        load(tmp_path / "a.parquet")


# Folders of images


@pytest.mark.parametrize("shape", [(20, 4, 5), (20, 4, 5, 3)])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_image_folder(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    folder = save_images(tmp_path / "pictures", images, suffix)
    (folder / "README.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image")
    np.save(tmp_path / "a.npy", images)
    dataset, expected = load(folder), load(tmp_path / "a.npy")
    assert dataset.name == "pictures" and dataset.levels == 256
    assert dataset.event_shape == ((3, 4, 5) if len(shape) == 4 else (1, 4, 5))
    assert torch.equal(dataset.train, expected.train)
    assert torch.isin(dataset.train, torch.linspace(-1, 1, 256, dtype=torch.float64).float()).all()


def test_image_folder_with_splits(tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 4, (30, 3, 3)).astype(np.uint8)
    save_images(tmp_path / "set" / "train", images[:20])
    save_images(tmp_path / "set" / "test", images[20:])
    dataset = load(tmp_path / "set", levels=4)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (18, 2, 10)
    given = dataset.transform.inverse(dataset.test).round()[:, 0]
    assert torch.equal(given, torch.from_numpy(images[20:]).double())
    save_images(tmp_path / "set" / "val", images[:5])
    assert len(load(tmp_path / "set", levels=4).validation) == 5
    with pytest.raises(ValueError, match="Expected integers 0 to 2 for levels=3; got values from"):
        load(tmp_path / "set", levels=3)
    with pytest.raises(ValueError, match="Expected no context= for 'set'"):
        load(tmp_path / "set", context="label")


def test_wrong_image_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Expected images \(\.png, .*\) in .*empty; got none"):
        load(tmp_path / "empty")
    images = np.random.RandomState(0).randint(0, 256, (12, 40, 40)).astype(np.uint8)
    folder = save_images(tmp_path / "a", images)
    size = Image.fromarray(images[0, :20])
    size.save(folder / "005.png")
    size.save(folder / "007.png")
    with pytest.raises(ValueError, match=r"\(40, 40\) L as 000.png; got \(40, 20\) L in .*005.png"):
        load(folder)
    Image.fromarray(np.stack([images[0]] * 3, -1)).save(folder / "005.png")
    with pytest.raises(ValueError, match=r"got \(40, 40\) RGB in .*005.png"):
        load(folder)
    Image.fromarray(np.stack([images[0]] * 4, -1)).save(folder / "005.png")
    with pytest.raises(
        ValueError, match="Expected one frame of mode L .*got 1 of mode RGBA in .*5"
    ):
        load(folder)
    (folder / "007.png").unlink()
    whole = (folder / "004.png").read_bytes()
    for content in (b"", b"no image", whole[:20], whole[: len(whole) // 2]):
        (folder / "005.png").write_bytes(content)
        with pytest.raises(ValueError, match="an image that is whole; got .*005.png"):
            load(folder)
    (folder / "005.png").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    with pytest.raises(ValueError, match="an image that is whole; got .*005.png"):
        load(folder)
    assert not (tmp_path / "marker").exists()


def test_images_of_several_frames_or_too_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.RandomState(0).randint(0, 256, (12, 8, 8)).astype(np.uint8)
    folder = save_images(tmp_path / "a", images, ".tif")
    frames = [Image.fromarray(image) for image in images[:2]]
    frames[0].save(folder / "003.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="got 2 of mode L in .*003.tif"):
        load(folder)
    frames[0].save(folder / "003.tif")
    monkeypatch.setattr(files, "MAX_BYTES", 12 * 64 - 1)
    with pytest.raises(ValueError, match="Expected at most .* GiB; got .*a, which declares"):
        load(folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="an image that is whole; got .*decompression bomb"):
        load(folder)


def test_public_names() -> None:
    assert set(data.__all__) == {
        "MAX_BYTES",
        "NAMES",
        "Affine",
        "DataSet",
        "MixtureParameters",
        "load",
        "mixture_parameters",
    }
