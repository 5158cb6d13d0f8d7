"""Files that somebody else wrote: truncated, bent, bombs, code. A sentence, and little memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kronewton.errors import DataError, KronewtonError, StateError
from kronewton.lab import checkpoint, cli, files, session
from kronewton.lab.checkpoint import FILE
from kronewton.lab.images import read_images
from kronewton.lab.training import Record

TRAIN = ["train", "linear-regression", "--steps"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def train(folder: Path, *options: object) -> int:
    return run(*TRAIN, 6, "--out", folder, *options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a training after three steps, and of one of AdamW's."""
    found = {}
    for name in ("kfac", "adamw"):
        folder = tmp_path_factory.mktemp(name)
        assert run(*TRAIN, 3, "--out", folder, "--optimizer", name) == 0
        found[name] = (folder / FILE).read_bytes()
        found["lines"] = found.get("lines", (folder / session.LINES).read_bytes())
    return found


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(saved["kfac"])
    (tmp_path / session.LINES).write_bytes(saved["lines"])
    return tmp_path


def content(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / FILE, weights_only=True))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The sentence in which resuming ends."""
    capsys.readouterr()
    assert train(folder, "--resume", *options) == 2
    error = capsys.readouterr().err
    sentence = error[error.index("kronewton: ") :]
    assert sentence.count("\n") == 1
    assert sentence.rstrip().endswith(".")
    assert len(sentence) < 1000
    return sentence


def test_a_sound_checkpoint_is_resumed(folder):
    assert train(folder, "--resume") == 0


# Checkpoints that can't be read.


@pytest.mark.parametrize("part", range(8))
def test_a_truncated_checkpoint(part, folder, capsys):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) * part // 8])
    assert "damaged or is no checkpoint" in refused(folder, capsys)


def test_a_bit_that_was_flipped_anywhere(saved, tmp_path):
    """It is refused, or the bit stood where it says nothing: what is read is the same."""
    whole, draw, file = saved["kfac"], random.Random(0), tmp_path / FILE
    file.write_bytes(whole)
    wanted, outcomes = _plain(checkpoint._read(file, torch.device("cpu"))), []
    for _ in range(150):
        bent = bytearray(whole)
        bent[draw.randrange(len(bent))] ^= 1 << draw.randrange(8)
        file.write_bytes(bent)
        try:
            found = checkpoint._read(file, torch.device("cpu"))
        except DataError:
            outcomes.append("refused")
        else:
            assert _plain(found) == wanted
            outcomes.append("read")
    assert set(outcomes) == {"refused", "read"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)


class Malice:
    """What leaves a trace when a pickle is believed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "in the state"])
def test_code_in_a_checkpoint_is_not_run(form, folder, tmp_path, capsys):
    trap = tmp_path / "trap"
    if form == "pickle":
        (folder / FILE).write_bytes(pickle.dumps(Malice(trap)))
    elif form == "in the state":
        torch.save({**content(folder), "optimizer": Malice(trap)}, folder / FILE)
    else:
        torch.save(Malice(trap), folder / FILE, _use_new_zipfile_serialization=form == "torch")
    assert "damaged or is no checkpoint" in refused(folder, capsys)
    assert not trap.exists()
    if form == "pickle":
        pickle.loads((folder / FILE).read_bytes())
        assert trap.exists()  # the trap is one


def repacked(file: Path, packing: int, change: Callable[[str, bytes], bytes]) -> None:
    """The same zip file with other members."""
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", packing) as new:
        for name, data in members.items():
            new.writestr(name, change(name, data))


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(folder, capsys, monkeypatch):
    def bomb(name: str, data: bytes) -> bytes:
        return data + bytes(50_000_000) if name.endswith("data/0") else data

    repacked(folder / FILE, zipfile.ZIP_DEFLATED, bomb)
    assert (folder / FILE).stat().st_size < 200_000
    monkeypatch.setattr(torch, "load", None)  # it is not asked
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    assert "damaged or is no checkpoint" in refused(folder, capsys)


def test_a_member_that_declares_more_than_there_is(folder, capsys, monkeypatch):
    whole = bytearray((folder / FILE).read_bytes())
    at = whole.rindex(b"PK\x01\x02")
    whole[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (folder / FILE).write_bytes(whole)
    monkeypatch.setattr(torch, "load", None)
    assert "damaged or is no checkpoint" in refused(folder, capsys)


def laughs() -> list[Any]:
    """A thousand times a thousand times … the same word, in a few hundred bytes."""
    nest: list[Any] = ["ha"] * 30
    for _ in range(12):
        nest = [nest] * 30
    return nest


def deep() -> list[Any]:
    nest: list[Any] = []
    for _ in range(400):
        nest = [nest]
    return nest


LARGE = 2**44
STRANGE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "word": lambda: "word",
    "number": lambda: 3,
    "list": lambda: [1, 2],
    "table": dict,
    "table of numbers": lambda: {0: 1},
    "nan": lambda: float("nan"),
    "tensor": lambda: torch.zeros(3),
    "a number as a large tensor": lambda: torch.zeros(1).expand(LARGE),
    "no number as a large tensor": lambda: torch.zeros(0, LARGE),
    "meta tensor": lambda: torch.empty(LARGE, device="meta"),
    "sparse tensor": lambda: torch.sparse_coo_tensor([[0]], [1.0], (LARGE,)),
    "one tensor a thousand times": lambda: [torch.zeros(100_000)] * 1000,
    "bytes": lambda: bytearray(10),
    "laughs": laughs,
    "deep": deep,
}
TOO_MUCH = (
    "a number as a large tensor",
    "meta tensor",
    "sparse tensor",
    "one tensor a thousand times",
    "bytes",
    "laughs",
)
PARTS = sorted(checkpoint.KEYS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", STRANGE)
def test_something_else_in_any_part(what, part, folder, capsys):
    torch.save({**content(folder), part: STRANGE[what]()}, folder / FILE)
    said = refused(folder, capsys)
    if what in TOO_MUCH:  # it is not handed on
        assert "damaged or is no checkpoint" in said
    assert (
        "damaged or is no checkpoint" in said
        or "does not fit this run" in said
        or (part == "run" and "where this run has" in said)
    )


def places(optimizer: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every table of an optimizer's state, with each of its keys."""
    found = [(optimizer, key) for key in optimizer]
    found += [(group, key) for group in optimizer["param_groups"] for key in group]
    return found + [(entries, key) for entries in optimizer["state"].values() for key in entries]


@pytest.mark.parametrize("name", ["kfac", "adamw"])
def test_something_else_anywhere_in_an_optimizers_state(name, folder, saved, capsys):
    """A sentence; or the training goes on, where what was there is not needed."""
    (folder / FILE).write_bytes(saved[name])
    whole, draw, ends = content(folder), random.Random(1), set()
    for i in range(len(places(whole["optimizer"]))):
        changed = content_of(saved[name])
        table, key = places(changed["optimizer"])[i]
        for what in draw.sample(sorted(STRANGE), 1):
            table[key] = STRANGE[what]()
            torch.save(changed, folder / FILE)
            (folder / session.LINES).write_bytes(saved["lines"])
            capsys.readouterr()
            code = train(folder, "--resume", "--optimizer", name)
            error = capsys.readouterr().err
            assert code in (0, 1, 2), (key, what, error)
            if code == 2:
                assert "Traceback" not in error
            ends.add(code)
    assert 2 in ends  # mostly; what is not needed is not missed


def content_of(data: bytes) -> dict[str, Any]:
    return dict(torch.load(io.BytesIO(data), weights_only=True))


def test_a_number_of_a_state_that_is_none(folder, capsys):
    whole = content(folder)
    whole["optimizer"]["state"][0]["kfac_scalars"][1] = -1
    torch.save(whole, folder / FILE)
    assert "does not fit this run (the state_dict has -1 for 'steps'" in refused(folder, capsys)


def test_a_sentence_is_short_whatever_it_shows(folder, capsys):
    run_of = {**content(folder)["run"], "task": "x" * 10_000}
    torch.save({**content(folder), "run": run_of}, folder / FILE)
    assert "has task 'xxx" in refused(folder, capsys)


# Lines of JSON.


LINES = {
    "nothing": "",
    "word": '"word"\n',
    "deep": "[" * 100_000 + "\n",
    "no JSON": "{\n",
    "no text": "\udcff\n",
    "a list": "[1]\n",
    "a step of words": '{"step": "3"}\n',
    "a long number": "9" * 10_000 + "\n",
}
RECORD = {"step": 1, "seconds": 0.1, "loss": 1.0, "settings": {"lr": 0.1}, "train_loss": None,
          "test_loss": None, "metric": None, "diverged": False}  # fmt: skip


@pytest.mark.parametrize("what", LINES)
def test_lines_that_are_no_records(what, folder, capsys):
    (folder / session.LINES).write_text(LINES[what], errors="surrogateescape")
    said = refused(folder, capsys)
    assert "is missing or damaged" in said or "ends before the checkpoint" in said


@pytest.mark.parametrize("field", RECORD)
@pytest.mark.parametrize("value", ["1", [1], {"a": "b"}, {"a": True}, True, 1e400])
def test_a_record_with_something_else_in_a_field(field, value, tmp_path):
    allowed = {("diverged", True), ("metric", 1e400), ("loss", 1e400), ("train_loss", 1e400),
               ("test_loss", 1e400), ("seconds", 1e400)}  # fmt: skip
    assert files.record_of(RECORD) == Record(**RECORD)
    if not isinstance(value, list | dict) and (field, value) in allowed:
        return
    (tmp_path / "x").write_text(json.dumps({**RECORD, field: value}) + "\n")
    with pytest.raises(DataError, match="is missing or damaged"):
        files.read_records(tmp_path / "x", 9)


def test_a_record_has_the_fields_of_a_record():
    assert list(files.FIELDS) == list(Record.__dataclass_fields__)
    for line in ({**RECORD, "more": 1}, {"step": 1}, {**RECORD, "step": 0}):
        with pytest.raises((TypeError, ValueError)):
            files.record_of(line)


# Data.


def npz(path: Path, header: bytes, body: bytes, name: str = "images.npy") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, header + body)


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


DATA: dict[str, Callable[[Path], Any]] = {
    "objects": lambda p: np.savez(p, images=np.array([object()], dtype=object)),
    "code": lambda p: np.savez(p, images=np.array([Malice(p.parent / "trap")], dtype=object)),
    "absurd shape": lambda p: npz(p, header((10**12, 28, 28)), bytes(784)),
    "negative shape": lambda p: npz(p, header((-1, 28, 28)), bytes(784)),
    "short": lambda p: npz(p, header((2, 28, 28)), bytes(784)),
    "long": lambda p: npz(p, header((1, 28, 28)), bytes(785)),
    "bomb": lambda p: npz(p, header((20_000, 28, 28)), bytes(20_000 * 784)),
    "long header": lambda p: npz(p, b"\x93NUMPY\x01\x00\xff\xff", b"(" * 65535),
    "no header": lambda p: npz(p, b"", b"words"),
    "another name": lambda p: npz(p, header((1, 28, 28)), bytes(784), "other.npy"),
    "gzip bomb": lambda p: p.write_bytes(
        gzip.compress(struct.pack(">IIII", 0x803, 20_000, 28, 28) + bytes(20_000 * 784))
    ),
    "absurd count": lambda p: p.write_bytes(struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28)),
    "gzip of nothing": lambda p: p.write_bytes(gzip.compress(b"")),
}


@pytest.mark.parametrize("what", DATA)
def test_hostile_data_end_in_a_sentence(what, tmp_path):
    path = tmp_path / "data.npz"
    DATA[what](path)
    with pytest.raises(DataError, match=r"could not be read \(.+\); allowed are"):
        read_images(path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
def test_truncated_and_bent_data(packed, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    packed(tmp_path / "data.npz", images=pixels)
    whole, draw = (tmp_path / "data.npz").read_bytes(), random.Random(0)
    assert read_images(tmp_path / "data.npz").equal(torch.from_numpy(pixels))
    for i in range(100):
        bent = bytearray(whole)
        if i % 2:
            bent = bent[: draw.randrange(len(bent))]
        else:
            bent[draw.randrange(len(bent))] ^= 1 << draw.randrange(8)
        (tmp_path / "data.npz").write_bytes(bent)
        with contextlib.suppress(DataError):
            assert read_images(tmp_path / "data.npz").equal(torch.from_numpy(pixels))


# Memory: in a process of its own, whose peak is measured.

PEAK = """
import resource, sys
from pathlib import Path
import torch
from kronewton.errors import DataError
from kronewton.lab import checkpoint, images
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    before = peak()
    try:
        images.read_images(path) if path.suffix == ".npz" else checkpoint._read(path, "cpu")
    except DataError:
        print(path.name, peak() - before)
"""
BOMB = 200_000_000  # bytes


def bomb_of_data(path: Path) -> None:
    count = BOMB // 784_000 * 1000
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(header((count, 28, 28)))
        for _ in range(count // 1000):
            stream.write(bytes(784_000))


def bomb_of_a_checkpoint(path: Path) -> None:
    torch.save({"model": torch.zeros(1000)}, path)
    repacked(path, zipfile.ZIP_DEFLATED, lambda name, data: bytes(BOMB) if "/0" in name else data)


def many_views(path: Path) -> None:
    numbers = torch.zeros(100_000)
    torch.save({key: dict.fromkeys(range(1000), numbers) for key in checkpoint.KEYS}, path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KB on Linux")
def test_bombs_take_little_memory(tmp_path):
    bombs = {"a.npz": bomb_of_data, "b.pt": bomb_of_a_checkpoint, "c.pt": many_views}
    for name, make in bombs.items():
        make(tmp_path / name)
    line = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in bombs)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    grown = {name: int(kb) for name, kb in map(str.split, done.stdout.splitlines())}
    assert list(grown) == list(bombs), done.stderr
    assert max(grown.values()) < 60_000, "KB more than before"


def test_errors_are_of_the_package():
    assert issubclass(DataError, KronewtonError)
    assert issubclass(StateError, KronewtonError)
