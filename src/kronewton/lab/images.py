"""Handwritten digits from a file that the user names, checked before use."""

from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path
from typing import IO

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
HEADER = 16  # bytes of an IDX file
PIXELS = 28 * 28
PACKED = 100  # times its size that a file may unpack to; pictures of digits take 5 to 20
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENTRY = "images.npy"
LONGEST = 200  # letters of a reason


def read_images(path: Path | None) -> Tensor:
    """The images in a file or in a folder that holds the IDX file, uint8 (n, 28, 28).

    Raises DataError if there is no such file, or if it isn't what it says.
    """
    if path is None:
        raise DataError(f"this task needs --data PATH and none was given; {ALLOWED}; {SOURCE}.")
    file = _file(path)
    try:
        images = _parse(file)
    except Exception as error:  # whatever zip, gzip and numpy make of a file that is none of theirs
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
    most = PACKED * file.stat().st_size
    if head[:2] == b"PK":
        return _npz(file, most)
    if head[:2] == b"\x1f\x8b":
        with gzip.open(file, "rb") as packed:
            return _idx(packed, most)
    if head == struct.pack(">I", IDX_IMAGES):
        with file.open("rb") as stream:
            return _idx(stream, most)
    raise ValueError("it starts as neither an .npz nor an IDX file of images")


def _npz(file: Path, most: int) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        if ENTRY not in archive.namelist():
            names = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:9])
            raise ValueError(f"it has no array 'images' but {names or 'nothing'}")
        entry = archive.getinfo(ENTRY)
        if entry.compress_type not in PACKINGS or entry.file_size > most:
            raise ValueError(f"it would unpack to {entry.file_size} bytes")
        with archive.open(entry) as stream:
            header = _require_images(stream)
        if entry.file_size != header:
            raise ValueError(f"it holds {entry.file_size} bytes where its images take {header}")
        with archive.open(entry) as stream:
            images: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return np.ascontiguousarray(images)


def _require_images(stream: IO[bytes]) -> int:
    """How many bytes an array of images takes by its header. Raises ValueError if it has others."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"its images are in version {version} of numpy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.uint8 or len(shape) != 3 or shape[1:] != (28, 28):
        raise ValueError(f"its images are {dtype} of shape {shape}")
    if shape[0] < 1:
        raise ValueError("it has no images")
    return stream.tell() + shape[0] * PIXELS


def _idx(stream: IO[bytes] | gzip.GzipFile, most: int) -> np.ndarray:
    head = stream.read(HEADER)
    if len(head) < HEADER:
        raise ValueError(f"it ends after {len(head)} bytes, within the header")
    magic, count, rows, columns = struct.unpack(">IIII", head)
    if magic != IDX_IMAGES or (rows, columns) != (28, 28) or count == 0:
        raise ValueError(f"its header says kind {magic:#x}, {count} images of {rows}×{columns}")
    if count * PIXELS > most:
        raise ValueError(f"it would unpack to {count * PIXELS} bytes")
    content = stream.read(count * PIXELS + 1)
    if len(content) != count * PIXELS:
        more = "more" if len(content) > count * PIXELS else f"{len(content)} bytes"
        raise ValueError(f"it holds {more} where {count} images take {count * PIXELS}")
    return np.frombuffer(content, np.uint8).reshape(count, 28, 28).copy()


def _brief(error: Exception) -> str:
    return str(error).split("\n")[0].strip("'\" .")[:LONGEST] or type(error).__name__
