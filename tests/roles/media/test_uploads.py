from __future__ import annotations

import hashlib
import io
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from triptych.roles.media.files import LocalFiles
from triptych.roles.media.retention import StoreBounds
from triptych.roles.media.uploads import UploadError, UploadsFullError, UploadStore
from triptych.roles.messages.common import Upload


def png(colour: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(LocalFiles(tmp_path / "uploads"))


def age(store: UploadStore, upload: Upload, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(store.files.folder / upload.name, (at, at))


def test_an_upload_is_named_by_its_bytes_and_read_back(store: UploadStore) -> None:
    upload = store.save(png(), "png")
    assert upload == Upload(f"{hashlib.sha256(png()).hexdigest()}.png", len(png()))
    assert store.read(upload) == png()
    assert store.open(upload).getpixel((0, 0)) == (1, 2, 3)
    assert store.save(png(), "png") == upload
    assert [path.name for path in store.files.folder.iterdir()] == [upload.name]
    assert store.files.folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "name",
    [
        "../journal.sqlite",
        "/etc/passwd",
        "",
        "x.png",
        "a" * 64,
        f"{'a' * 64}.gif",
        f"{'A' * 64}.png",
        f"{'a' * 64}.png\n",
    ],
)
def test_no_other_name_is_ever_a_path(store: UploadStore, name: str) -> None:
    with pytest.raises(UploadError, match="no name of an upload"):
        store.read(Upload(name, 1))


def test_what_is_missing_or_damaged_is_not_read(store: UploadStore) -> None:
    upload = store.save(png(), "png")
    path = store.files.folder / upload.name
    path.write_bytes(png((9, 9, 9)))
    assert len(png((9, 9, 9))) == upload.nbytes
    with pytest.raises(UploadError, match="damaged"):
        store.open(upload)
    path.write_bytes(png()[:-1])
    with pytest.raises(UploadError, match="damaged"):
        store.open(upload)
    path.unlink()
    with pytest.raises(UploadError, match="not there any more"):
        store.open(upload)
    path.write_bytes(b"damaged")
    store.save(png(), "png")
    assert store.read(upload) == png()


def test_what_is_no_image_is_not_decoded(store: UploadStore) -> None:
    with pytest.raises(UploadError, match="cannot be decoded"):
        store.open(store.save(b"GIF89a nonsense", "png"))


def test_the_old_are_pruned_and_what_is_sent_again_is_young(store: UploadStore) -> None:
    store.bounds = StoreBounds(50.0, 9, 9999)
    first, second, third = (store.save(png((k, k, k)), "png") for k in range(3))
    for upload in (first, second):
        age(store, upload, 100.0)
    store.save(png((1, 1, 1)), "png")
    (store.files.folder / f".{'b' * 64}.png.1-1.tmp").write_bytes(b"half")
    os.utime(store.files.folder / f".{'b' * 64}.png.1-1.tmp", (0, 0))
    (store.files.folder / "notes.txt").write_text("of somebody else")
    os.utime(store.files.folder / "notes.txt", (0, 0))
    assert store.prune(now=time.time()) == 2
    assert {path.name for path in store.files.folder.iterdir()} == {second.name, third.name, "notes.txt"}


def test_nothing_is_pruned_where_there_is_nothing(store: UploadStore) -> None:
    assert store.prune(now=time.time()) == 0


@pytest.mark.parametrize("bounds", [StoreBounds(1e9, 1, 9999), StoreBounds(1e9, 9, 2 * len(png()) - 1)])
def test_a_full_store_lets_go_of_what_no_request_needs_else_it_refuses(tmp_path: Path, bounds: StoreBounds) -> None:
    UploadStore(LocalFiles(tmp_path)).save(png(), "png")
    store = UploadStore(LocalFiles(tmp_path), bounds, needed_s=50.0)  # what is there already counts
    with pytest.raises(UploadsFullError, match="1 uploads"):
        store.save(png((9, 9, 9)), "png")
    known = store.save(png(), "png")
    age(store, known, 100.0)
    new = store.save(png((9, 9, 9)), "png")
    assert [path.name for path in tmp_path.iterdir()] == [new.name]
