"""Handwritten digits from a file that the user names, checked before use."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kronewton.errors import DataError

ALLOWED = (
    "allowed are an .npz with an array 'images', uint8 of shape (n, 28, 28), or MNIST's original "
    "train-images-idx3-ubyte, gzipped or not"
)
SOURCE = "torchvision.datasets.MNIST(root, download=True) leaves the original in root/MNIST/raw"
IDX_NAMES = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")
IDX_IMAGES = 0x00000803  # three dimensions of unsigned bytes
DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def read_images(path: Path | None) -> Tensor:
    """The images in a file or in a folder that holds the IDX file, uint8 (n, 28, 28).

    Raises DataError if there is no such file, or if it isn't what it says.
    """
    if path is None:
        raise DataError(f"this task needs --data PATH and none was given; {ALLOWED}; {SOURCE}.")
    file = _file(path)
    try:
        images = _parse(file)
    except DAMAGED as error:
        raise DataError(
            f"{file} could not be read ({_brief(error)}); {ALLOWED}; {SOURCE}."
        ) from error
    return torch.from_numpy(images)


def _file(path: Path) -> Path:
    candidates = [path / name for name in IDX_NAMES] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    missing = f"{path} holds no images" if path.is_dir() else f"{path} does not exist"
    raise DataError(f"{missing}; {ALLOWED}; {SOURCE}.")


def _parse(file: Path) -> np.ndarray:
    # By the first bytes, not by the name: a renamed file is read, a mislabelled one refused.
    with file.open("rb") as stream:
        head = stream.read(4)
    if head[:2] == b"PK":
        return _npz(file)
    if head[:2] == b"\x1f\x8b":
        with gzip.open(file, "rb") as stream:
            return _idx(stream.read())
    if head == struct.pack(">I", IDX_IMAGES):
        return _idx(file.read_bytes())
    raise ValueError("it starts as neither an .npz nor an IDX file of images")


def _npz(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        if "images" not in arrays.files:
            raise ValueError(f"it has no array 'images' but {', '.join(arrays.files) or 'nothing'}")
        images = np.asarray(arrays["images"])
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"its images are {images.dtype} of shape {images.shape}")
    if len(images) == 0:
        raise ValueError("it has no images")
    return images


def _idx(content: bytes) -> np.ndarray:
    if len(content) < 16:
        raise ValueError(f"it ends after {len(content)} bytes, within the header")
    magic, count, rows, columns = struct.unpack(">IIII", content[:16])
    if magic != IDX_IMAGES or (rows, columns) != (28, 28) or count == 0:
        raise ValueError(f"its header says kind {magic:#x}, {count} images of {rows}×{columns}")
    if len(content) != 16 + count * 784:
        raise ValueError(
            f"it holds {len(content) - 16} bytes where {count} images take {count * 784}"
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, 28, 28).copy()


def _brief(error: Exception) -> str:
    return str(error).split("\n")[0].strip("'\" .") or type(error).__name__
