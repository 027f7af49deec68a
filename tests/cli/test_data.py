import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neurms.cli import data
from neurms.cli.data import DatasetError, hold_out, load


def tiny(seed=0):
    """Arrays in the shape of MNIST's, and the MD5 sums that make them the published ones."""
    random = np.random.default_rng(seed)
    arrays = {
        "x_train": random.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "y_train": random.integers(0, 10, 20, dtype=np.uint8),
        "x_test": random.integers(0, 256, (5, 28, 28), dtype=np.uint8),
        "y_test": random.integers(0, 10, 5, dtype=np.uint8),
    }
    return arrays, {key: data._idx_md5(array) for key, array in arrays.items()}


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A world in which tiny() is MNIST, with an empty home and no NEURMS_DATA."""
    arrays, sums = tiny()
    monkeypatch.setitem(data._MD5, "mnist", sums)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv("NEURMS_DATA", raising=False)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return arrays


def no_network(*_):
    raise AssertionError("nothing may be fetched")


def keras_with(monkeypatch, load_data):
    keras = SimpleNamespace(datasets=SimpleNamespace(mnist=SimpleNamespace(load_data=load_data)))
    monkeypatch.setitem(sys.modules, "keras", keras)


def test_digits_are_standardised() -> None:
    images = load("digits")
    assert images.test is None
    assert len(images.train) == 1797
    assert images.train.inputs.dtype == torch.float32
    assert float(images.train.inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.train.inputs.std()) == pytest.approx(1, abs=1e-5)
    assert images.train.labels.unique().tolist() == list(range(10))


def test_idx_md5_is_that_of_the_file(tmp_path) -> None:
    """A 2x3 idx file written byte by byte: magic 0, 0, ubyte, two axes, then sizes, then data."""
    import hashlib

    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    array = np.arange(1, 7, dtype=np.uint8).reshape(2, 3)
    assert data._idx_md5(array) == hashlib.md5(content).hexdigest()


def test_folder_comes_first(published, monkeypatch, tmp_path) -> None:
    keras_with(monkeypatch, no_network)
    np.savez(tmp_path / "mnist.npz", **published)
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path))
    images = load("mnist")
    assert images.source == "mnist.npz in NEURMS_DATA"
    assert images.train.inputs.shape == (20, 784)
    pixels = torch.tensor(published["x_train"]).float()
    expected = (torch.tensor(published["x_test"]).float() - pixels.mean()) / pixels.std()
    torch.testing.assert_close(images.test.inputs, expected.flatten(1))


def test_cache_comes_second(published, monkeypatch, tmp_path) -> None:
    keras_with(monkeypatch, no_network)
    cache = tmp_path / "home" / ".cache" / "neurms"
    cache.mkdir(parents=True)
    np.savez(cache / "mnist.npz", **published)
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path))
    assert load("mnist").source == "mnist.npz in ~/.cache/neurms"


def test_download_comes_last_and_is_kept(published, monkeypatch) -> None:
    parts = (published["x_train"], published["y_train"]), (published["x_test"], published["y_test"])
    keras_with(monkeypatch, lambda: parts)
    fetched = load("mnist")
    assert fetched.source == "keras.datasets (downloaded)"
    keras_with(monkeypatch, no_network)
    again = load("mnist")
    assert again.source == "mnist.npz in ~/.cache/neurms"
    assert torch.equal(again.train.inputs, fetched.train.inputs)


def test_wrong_download_is_neither_used_nor_kept(published, monkeypatch, tmp_path) -> None:
    other, _ = tiny(seed=1)
    keras_with(
        monkeypatch,
        lambda: ((other["x_train"], other["y_train"]), (other["x_test"], other["y_test"])),
    )
    with pytest.raises(DatasetError, match="x_train in the download is not mnist's"):
        load("mnist")
    assert not list(tmp_path.rglob("*.npz"))


def test_no_network(published, monkeypatch) -> None:
    def fail():
        raise OSError("URL fetch failure")

    keras_with(monkeypatch, fail)
    with pytest.raises(DatasetError, match=r"could not be downloaded \(URL fetch.*NEURMS_DATA"):
        load("mnist")


def test_no_keras(published, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r'pip install "neurms\[keras\]"'):
        load("mnist")


def test_altered_file(published, monkeypatch, tmp_path) -> None:
    published["y_test"][0] += 1
    np.savez(tmp_path / "mnist.npz", **published)
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=r"y_test in .*mnist.npz is not mnist's"):
        load("mnist")


@pytest.mark.parametrize("content", [b"", b"not a zip archive"])
def test_broken_file(published, monkeypatch, tmp_path, content) -> None:
    (tmp_path / "mnist.npz").write_bytes(content)
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match="cannot be read as mnist"):
        load("mnist")


def test_missing_folder_is_not_passed_over(published, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path / "typo"))
    with pytest.raises(DatasetError, match="is not a folder; correct it or unset it"):
        load("mnist")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name='cifar' is not known"):
        load("cifar")


def test_hold_out_partitions() -> None:
    split = load("digits").train
    rest, held = hold_out(split, 300, seed=1)
    assert len(held) == 300
    both = torch.cat([rest.inputs, held.inputs])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, split.inputs.tolist()))
    assert torch.equal(hold_out(split, 300, seed=1)[1].inputs, held.inputs)
    assert not torch.equal(hold_out(split, 300, seed=2)[1].inputs, held.inputs)


@pytest.mark.parametrize("count", [0, 1797])
def test_hold_out_refuses_empty_parts(count) -> None:
    with pytest.raises(ValueError, match=f"count={count} must lie between"):
        hold_out(load("digits").train, count, seed=0)
