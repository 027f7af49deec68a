"""Handwritten digits and clothes: the real data of the demo and the benchmarks.

``digits`` comes inside scikit-learn. ``mnist`` and ``fashion_mnist`` are looked for in the folder
that ``NEURMS_DATA`` names, then in ``~/.cache/neurms``, and are fetched through ``keras.datasets``
otherwise. Wherever a set came from, its content is checked against the published files' MD5 sums,
and the result says where that was.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.errors import NeurmsError, check_choice

__all__ = ["DATASETS", "DatasetError", "ImageData", "Split", "hold_out", "load"]

DATASETS = ("digits", "mnist", "fashion_mnist")

# MD5 of the unpacked idx files as their authors publish them, so that any container can be checked.
_MD5 = {
    "mnist": {
        "x_train": "6bbc9ace898e44ae57da46a324031adb",
        "y_train": "a25bea736e30d166cdddb491f175f624",
        "x_test": "2646ac647ad5339dbf082846283269ea",
        "y_test": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "x_train": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "y_train": "9018921c3c673c538a1fc5bad174d6f9",
        "x_test": "8181f5470baa50b63fa0f6fddb340f0a",
        "y_test": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


class DatasetError(NeurmsError, RuntimeError):
    """A data set could not be found, fetched or trusted."""


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Args:
        inputs: Shape (count, pixels), float32.
        labels: Shape (count,), int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set and where it came from.

    Args:
        name: One of :data:`DATASETS`.
        source: Where it was found, for the reader of a result.
        train: What may be trained on, standardised by its own mean and standard deviation.
        test: The set's own test part, standardised by the same two numbers; None where it has none.
    """

    name: str
    source: str
    train: Split
    test: Split | None = None


def load(name: str) -> ImageData:
    """Load a data set by name.

    Args:
        name: ``"digits"`` (1,797 images of 8x8, no download), ``"mnist"`` or ``"fashion_mnist"``
            (60,000 + 10,000 images of 28x28).

    Returns:
        The data, all in memory.

    Raises:
        ValueError: No set has that name.
        ImportError: The package that holds or fetches it is not installed.
        DatasetError: It was not found and could not be fetched, or a file holds something else.

    Example:
        >>> data = load("digits")
        >>> data.train.inputs.shape, data.source
        (torch.Size([1797, 64]), 'scikit-learn (bundled)')
    """
    check_choice("name", name, DATASETS)
    if name == "digits":
        return _digits()
    arrays, source = _found(name)
    return _standardized(
        name, source, (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
    )


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off ``count`` examples drawn at random: (the rest, the held out).

    Raises:
        ValueError: ``count`` leaves one of the two parts empty.

    Example:
        >>> train, validation = hold_out(load("digits").train, 360, seed=0)
        >>> len(train), len(validation)
        (1437, 360)
    """
    if not 0 < count < len(split):
        raise ValueError(f"count={count!r} must lie between 1 and {len(split) - 1}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count], order[count:]
    return (
        Split(split.inputs[rest], split.labels[rest]),
        Split(split.inputs[held], split.labels[held]),
    )


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            'the digits data set comes with scikit-learn: pip install "neurms[demo]"'
        ) from None
    images, labels = load_digits(return_X_y=True)
    return _standardized("digits", "scikit-learn (bundled)", (images, labels))


def _found(name: str) -> tuple[Mapping[str, Any], str]:
    """Return the four arrays of a set and where they were."""
    folder = os.environ.get("NEURMS_DATA")
    if folder and not Path(folder).expanduser().is_dir():
        raise DatasetError(
            f"NEURMS_DATA={folder!r} is not a folder; correct it or unset it to download {name}"
        )
    cache = Path.home() / ".cache" / "neurms"
    if folder and (path := Path(folder).expanduser() / f"{name}.npz").is_file():
        return _read(path, name), f"{name}.npz in NEURMS_DATA"
    if (path := cache / f"{name}.npz").is_file():
        return _read(path, name), f"{name}.npz in ~/.cache/neurms"
    arrays = _fetched(name)
    _store(arrays, path)
    return arrays, "keras.datasets (downloaded)"


def _read(path: Path, name: str) -> Mapping[str, Any]:
    import numpy as np

    try:
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in _MD5[name]}
    except Exception as error:
        raise DatasetError(
            f"{path} cannot be read as {name} ({error}); it must be an .npz file with "
            f"{', '.join(_MD5[name])}. Delete it to have {name} fetched anew"
        ) from error
    _verify(arrays, name, str(path))
    return arrays


def _fetched(name: str) -> Mapping[str, Any]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras
    except ImportError:
        raise ImportError(
            f'{name} is fetched through keras.datasets: pip install "neurms[keras]", or set '
            f"NEURMS_DATA to a folder that holds {name}.npz"
        ) from None
    try:
        train, test = getattr(keras.datasets, name).load_data()
    except Exception as error:
        raise DatasetError(
            f"{name} is in neither NEURMS_DATA nor ~/.cache/neurms and could not be downloaded "
            f"({error}). With a network, run this again; without one, set NEURMS_DATA to a folder "
            f"that holds {name}.npz, or use digits, which needs no download"
        ) from error
    arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True))
    _verify(arrays, name, "the download")
    return arrays


def _store(arrays: Mapping[str, Any], path: Path) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: an interrupted run must not leave half a file to be found later.
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


def _verify(arrays: Mapping[str, Any], name: str, where: str) -> None:
    for key, expected in _MD5[name].items():
        if _idx_md5(arrays[key]) != expected:
            raise DatasetError(
                f"{key} in {where} is not {name}'s: its content does not have the published MD5 "
                f"{expected}. Delete the file, or point NEURMS_DATA at another folder"
            )


def _idx_md5(array: Any) -> str:
    """Return the MD5 that an array of bytes would have as an idx file."""
    import numpy as np

    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = np.ascontiguousarray(array, dtype=np.uint8).tobytes()
    return hashlib.md5(header + content, usedforsecurity=False).hexdigest()


def _standardized(
    name: str, source: str, train: tuple[Any, Any], test: tuple[Any, Any] | None = None
) -> ImageData:
    images = torch.as_tensor(train[0], dtype=torch.float32)
    mean, deviation = images.mean(), images.std()

    def split(part: tuple[Any, Any]) -> Split:
        pixels = torch.as_tensor(part[0], dtype=torch.float32).flatten(1)
        return Split(
            (pixels - mean) / deviation, torch.as_tensor(part[1]).to(torch.int64, copy=True)
        )

    return ImageData(name, source, split(train), None if test is None else split(test))
