from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.roles.media.artifacts import (
    ArtifactError,
    ArtifactMissingError,
    ArtifactStore,
    artifact_name,
)
from triptych.roles.media.files import Entry, LocalFiles
from triptych.roles.media.formats import FORMATS
from triptych.roles.media.retention import StoreBounds, surplus


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_format_has_names_of_its_own(tmp_path: Path, output_format: str) -> None:
    artifact = ArtifactStore(LocalFiles(tmp_path)).save("r/0", output_format, b"bytes")
    assert (artifact.name, artifact.content_type) == (f"r_0.{output_format}", FORMATS[output_format].content_type)
    assert ArtifactStore(LocalFiles(tmp_path)).read(artifact.name) == b"bytes"


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ArtifactError, match="bmp"):
        artifact_name("r/0", "bmp")


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    store = ArtifactStore(LocalFiles(tmp_path / "artifacts"))
    artifact = store.save("req-1/0", "png", b"bytes")
    assert (artifact.name, artifact.content_type, artifact.nbytes) == ("req-1_0.png", "image/png", 5)
    assert store.read(artifact.name) == b"bytes"
    assert [p.name for p in store.files.folder.iterdir()] == ["req-1_0.png"]
    assert store.path(artifact.name).stat().st_mode & 0o777 == 0o600


def test_a_preview_is_a_file_beside_the_image_of_its_job(tmp_path: Path) -> None:
    store = ArtifactStore(LocalFiles(tmp_path))
    names = [store.save(job_id, "png", job_id.encode()).name for job_id in ("r/0", "r/0.1", "r/0.12", "r/1")]
    assert names == ["r_0.png", "r_0.1.png", "r_0.12.png", "r_1.png"]
    store.discard("r/0.1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r_0.12.png", "r_0.png", "r_1.png"]
    store.prune(StoreBounds(0, 0, 0), now=4e9, needed={"r"})
    assert store.read("r_0.12.png") == b"r/0.12", "it stays as long as its request needs it"
    store.prune(StoreBounds(0, 0, 0), now=4e9, needed=())
    assert not list(tmp_path.iterdir())


def test_a_variant_is_a_file_beside_its_video_and_goes_with_it(tmp_path: Path) -> None:
    store = ArtifactStore(LocalFiles(tmp_path))
    for job_id, output_format in (("r/0", "mp4"), ("r/0.thumbnail", "webp"), ("r/0.spritesheet", "jpeg")):
        store.save(job_id, output_format, b"bytes")
    store.save("r/1.thumbnail", "webp", b"of another one")
    assert store.read("r_0.thumbnail.webp") == b"bytes"
    assert store.prune(StoreBounds(0, 0, 0), now=4e9, needed={"r"}) == 0
    store.discard("r/0")
    assert [path.name for path in tmp_path.iterdir()] == ["r_1.thumbnail.webp"]
    store.discard("r/1.thumbnail")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces(tmp_path: Path) -> None:
    store = ArtifactStore(LocalFiles(tmp_path))
    store.save("r/0", "png", b"old")
    assert store.read(store.save("r/0", "png", b"new").name) == b"new"


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        "r",
        "../x/0",
        "r/../0",
        "r/0/1",
        "r/x",
        "r/0.",
        "r/0.x",
        "r/0.1.2",
        "r/0.poster",
        "a b/0",
        "r/0\n",
        "é/0",
        "/0",
    ],
)
def test_only_validated_ids_make_names(job_id: str) -> None:
    with pytest.raises(ArtifactError):
        artifact_name(job_id, "png")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../journal.sqlite",
        "r_0.png/..",
        "/etc/passwd",
        "r.png",
        "r_0..png",
        "r_0.1.2.png",
        ".r_0.png.1.tmp",
        "r_0.png\0",
    ],
)
def test_only_artifact_names_can_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        ArtifactStore(LocalFiles(tmp_path)).read(name)


ids = st.builds("{}/{}".format, st.text("ab_-1", min_size=1, max_size=4), st.integers(0, 120))


@given(ids, ids)
def test_distinct_jobs_never_share_a_name(one: str, other: str) -> None:
    assert (artifact_name(one, "png") == artifact_name(other, "png")) == (one == other)


def test_one_that_was_never_written_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissingError, match="artifact r_0"):
        ArtifactStore(LocalFiles(tmp_path)).read("r_0.png")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(LocalFiles(tmp_path))
    store.save("r/0", "png", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save("r/0", "png", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["r_0.png"]
    assert store.read("r_0.png") == b"old"


entries = st.lists(
    st.builds(Entry, st.text("abc", min_size=1, max_size=3), st.floats(0, 100), st.integers(0, 9)),
    unique_by=lambda e: e.name,
)
bounds = st.builds(StoreBounds, st.floats(0, 100), st.integers(0, 5), st.integers(0, 30))


@given(entries, bounds, st.sets(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_surplus_keeps_what_is_needed_and_the_newest(found: list[Entry], bounds: StoreBounds, needed: set[str]) -> None:
    gone = set(surplus(found, bounds, now=100.0, needed=lambda entry: entry.name in needed))
    assert not gone & needed
    kept = [e for e in found if e.name not in gone]
    if not needed:
        assert len(kept) <= bounds.max_count
        assert sum(e.nbytes for e in kept) <= bounds.max_bytes
    free = [e for e in kept if e.name not in needed]
    assert all(100.0 - e.modified_at <= bounds.max_age_s for e in free)
    if len(kept) < bounds.max_count and sum(e.nbytes for e in found) <= bounds.max_bytes:
        assert {e.name for e in found if 100.0 - e.modified_at <= bounds.max_age_s} <= {e.name for e in kept}
    elif free and all(e.nbytes == 0 for e in found):
        oldest = min(e.modified_at for e in free)
        assert all(e.modified_at <= oldest for e in found if e.name in gone)


def test_prune_removes_the_old_and_what_dead_writers_left(tmp_path: Path) -> None:
    store = ArtifactStore(LocalFiles(tmp_path))
    for k in range(4):
        store.save(f"r/{k}", "png", b"x")
        os.utime(tmp_path / f"r_{k}.png", (1000.0 + k, 1000.0 + k))
    for name, at in ((".r_9.png.1-0.tmp", 0.0), (".r_9.png.2-0.tmp", 4000.0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (at, at))
    (tmp_path / "notes.txt").write_text("somebody else's")
    assert store.prune(StoreBounds(3000.0, 2, 100), now=4001.0, needed=()) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".r_9.png.2-0.tmp",
        "notes.txt",
        "r_2.png",
        "r_3.png",
    ]


def test_there_is_nothing_to_prune_before_the_first_artifact(tmp_path: Path) -> None:
    assert ArtifactStore(LocalFiles(tmp_path / "none")).prune(StoreBounds(1.0, 1, 1), now=0.0, needed=()) == 0


def test_what_somebody_is_still_to_get_is_not_pruned(tmp_path: Path) -> None:
    store = ArtifactStore(LocalFiles(tmp_path))
    for job_id, at in (("a/0", 10.0), ("b_c/0", 20.0), ("b_c/1", 30.0), ("d/0", 40.0), ("new/0", 60.0)):
        os.utime(store.path(store.save(job_id, "png", b"xx").name), (at, at))
    assert store.prune(StoreBounds(1000.0, 3, 100), now=50.0, needed={"b_c"}) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b_c_0.png", "b_c_1.png", "new_0.png"]
