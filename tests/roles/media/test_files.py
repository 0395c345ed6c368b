from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path
from subprocess import Popen

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.roles.media.files import (
    DigestMismatchError,
    Entry,
    Files,
    LocalFiles,
    PartialFile,
    StoreUnavailableError,
    is_transient,
)
from triptych.roles.media.s3 import S3Files

DATA = bytes(range(256)) * 4


@pytest.fixture(params=["folder", "shared", pytest.param("s3", marks=pytest.mark.s3)])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """Each kind of place; the tests that take it are what a store may expect of any."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        found: Files = S3Files(f"s3://pictures/{tmp_path.name}/artifacts")
    else:
        found = LocalFiles(tmp_path / "artifacts", shared=request.param == "shared")
    found.prepare()
    found.prepare()
    return found


def test_what_was_written_is_found_read_and_removed(files: Files) -> None:
    assert files.entries() == []
    began = time.time()
    files.write("a.png", b"first")
    files.write("a.png", DATA)
    files.write("b.png", b"x")
    assert files.read("a.png") == DATA
    with files.open("a.png") as file:
        file.seek(300)
        assert file.read(10) == DATA[300:310]
    entry = files.stat("a.png")
    assert (entry.name, entry.nbytes) == ("a.png", len(DATA))
    assert abs(entry.modified_at - began) < 60
    assert {(entry.name, entry.nbytes) for entry in files.entries()} == {("a.png", len(DATA)), ("b.png", 1)}
    files.remove(["a.png", "never.png"])
    assert [entry.name for entry in files.entries()] == ["b.png"]
    for read in (files.read, files.open, files.stat):
        with pytest.raises(FileNotFoundError):
            read("a.png")


def test_a_file_that_is_replaced_while_it_is_read_is_never_a_mixture(files: Files) -> None:
    old, new = b"a" * (9 << 20), b"b" * (9 << 20)
    files.write("a.png", old)
    with files.open("a.png") as file:
        begun = file.read(4)
        files.write("a.png", new)
        try:
            rest = file.read()
        except OSError:  # which ends the response in the middle
            return
    assert begun + rest == old


@pytest.mark.s3
def test_a_missing_bucket_and_wrong_keys_are_no_transient_errors(
    s3_server: Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="no bucket nobody") as missing:
        S3Files("s3://nobody/x").prepare()
    with pytest.raises(OSError, match="no such bucket") as unwritable:
        S3Files("s3://nobody/x").write("a.png", DATA)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError) as refused:
        S3Files("s3://pictures/x").read("a.png")
    assert not any(is_transient(error.value) for error in (missing, unwritable, refused))


@pytest.mark.s3
def test_a_server_that_does_not_answer_is_a_transient_error(
    s3_server: Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for call in (S3Files("s3://pictures/x").entries, S3Files("s3://pictures/x").prepare):
        with pytest.raises(StoreUnavailableError, match="does not answer"):
            call()


def test_nobody_writes_beside_a_file_system_that_is_not_mounted(tmp_path: Path) -> None:
    mounted = tmp_path / "mnt"
    files = LocalFiles(mounted / "artifacts", shared=True)
    with pytest.raises(StoreUnavailableError, match="mounted here"):
        files.prepare()
    mounted.mkdir()  # a bare mount point
    for call in (lambda: files.write("a", b"x"), lambda: files.read("a"), files.entries, lambda: files.stat("a")):
        with pytest.raises(StoreUnavailableError, match="mounted here"):
            call()
    assert not list(mounted.iterdir())
    files.prepare()
    files.write("a", b"x")
    assert files.read("a") == b"x"


def partial(folder: Path, data: bytes = DATA) -> PartialFile:
    return PartialFile(folder / "r_0.png", hashlib.sha256(data).hexdigest(), len(data))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=40))
def test_parts_in_any_order_never_make_another_file(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    folder, data = tmp_path_factory.mktemp("parts"), DATA[:40]
    there = 0
    for offset, size in parts:
        # A new one each time: nothing is remembered.
        after = partial(folder, data).append(offset, data[offset : offset + size])
        fits = offset == there and size
        assert after == (min(there + size, 40) if fits else there)
        there = after
        assert (folder / "r_0.png").exists() == (there == 40)
    while there < 40:
        there = partial(folder, data).append(there, data[there : there + 7])
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("r_0.png", data)]


def test_a_half_written_file_is_resumed_and_is_never_seen_under_its_name(tmp_path: Path) -> None:
    assert partial(tmp_path).append(0, DATA[:100]) == 100
    (half,) = tmp_path.iterdir()
    assert half.name.startswith(".r_0.png.")
    assert half.stat().st_mode & 0o777 == 0o600
    assert Entry(half.name, 0.0).abandoned(4000.0), "pruning removes what nobody goes on with"
    assert partial(tmp_path).append(0, b"") == 100
    assert partial(tmp_path).append(100, DATA[100:]) == len(DATA)
    assert (tmp_path / "r_0.png").read_bytes() == DATA
    assert partial(tmp_path).append(0, DATA[:100]) == len(DATA), "a repetition changes nothing"


def test_bytes_that_are_not_the_file_are_removed_and_the_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "r_0.png").write_bytes(b"of an earlier attempt")
    file = partial(tmp_path)
    file.append(0, DATA[:100])
    (half,) = tmp_path.glob(".*")
    half.write_bytes(b"\0" * 100)  # as after a loss of power
    with pytest.raises(DigestMismatchError):
        file.append(100, DATA[100:])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"of an earlier attempt"]
    assert file.append(0, DATA) == len(DATA)
    assert (tmp_path / "r_0.png").read_bytes() == DATA


def test_a_part_that_found_no_room_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        partial(tmp_path).append(0, DATA)
    assert not (tmp_path / "r_0.png").exists()
    monkeypatch.setattr(os, "fsync", fsync)
    assert partial(tmp_path).append(0, b"") == len(DATA)
    assert (tmp_path / "r_0.png").read_bytes() == DATA
