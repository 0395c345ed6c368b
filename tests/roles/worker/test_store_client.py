"""Files between a role and the stores of the API's process, over real mailboxes."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from tests.roles.transfer_harness import FAR, W
from triptych.actors import Actor, Topology
from triptych.actors.topology.sections import StoreSection
from triptych.api.server import ApiServer
from triptych.bus import RemoteError
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactStore
from triptych.roles.media.files import LocalFiles, is_transient
from triptych.roles.media.uploads import UPLOADS, UploadError, UploadStore
from triptych.roles.messages.common import Output, Upload
from triptych.roles.messages.stages import StageFailed, StageFinished
from triptych.roles.messages.store import PART_BYTES, ArtifactPartStored, GetUploadPart, PutArtifactPart, UploadPart
from triptych.roles.messages.worker import FetchUploads, RunStage, SaveArtifact
from triptych.roles.worker import store_client
from triptych.roles.worker.reporter import FencedError
from triptych.roles.worker.store_client import UPLOAD_COPIES, StoreClient

DATA = os.urandom(2 * PART_BYTES + 5)


class StoreOnly(ApiServer):
    """The API's process without HTTP, which needs a head."""

    async def started(self) -> None:
        pass


class Role(Actor):
    """Sends the messages of a store client."""


class KilledError(Exception):
    """Raised where a sender dies."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """An API that is not there is asked again soon."""
    monkeypatch.setattr(store_client, "STORE_ANSWER_S", 0.5)


def no_check() -> None:
    pass


def elsewhere(topology: Topology, name: str, folder: Path) -> Any:
    """A component of another host, and the topology as that host has it."""
    component = msgspec.structs.replace(topology.component(name), host="b")
    return component, msgspec.structs.replace(topology, state_dir=folder)


async def open_client(h: Any, folder: Path, name: str = "decoder-0", generation: int = 1) -> StoreClient:
    role = Role(name)
    await h.start(role, generation=generation)
    return StoreClient(role, *elsewhere(h.topology, name, folder))


def test_a_decoder_on_another_host_sends_its_image_before_it_reports_it(run_transfers: Any, tmp_path: Path) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        decoder = await open_transfer("decoder-0", host="b", state_dir=tmp_path / "b")
        decoder.begin(W, images=[Image.new("RGB", (8, 8), "red")])
        decoder.fake_instance.tell(SaveArtifact(W, Output("png"), FAR))
        while not decoder.context.trouble:  # noqa: ASYNC110  facts are looked at, not sent
            await asyncio.sleep(0.01)
        assert "the store of api does not answer" in decoder.context.trouble
        await h.start(StoreOnly("api", h.topology))
        artifact = (await decoder.fake_instance.inbox.next(StageFinished)).artifact
        assert not decoder.context.trouble
        folder = h.topology.state_dir / ARTIFACTS
        assert [path.name for path in folder.iterdir()] == [artifact.name]
        assert Image.open(folder / artifact.name).getpixel((0, 0)) == (255, 0, 0)
        assert artifact.nbytes == (folder / artifact.name).stat().st_size
        assert not (tmp_path / "b" / ARTIFACTS).exists()

    run_transfers(body)


def test_a_file_is_gone_on_with_after_either_side_has_restarted(
    run: Any, make_topology: Any, local_cluster: Any, tmp_path: Path
) -> None:
    async def body() -> None:
        topology = make_topology()
        async with local_cluster(topology) as h:
            folder = topology.state_dir / ARTIFACTS
            await h.start(StoreOnly("api", topology))
            first = await open_client(h, tmp_path / "b")
            asked = 0

            def die() -> None:
                nonlocal asked
                asked += 1
                if asked == 3:
                    raise KilledError

            with pytest.raises(KilledError):
                await first.save("r/0", "png", DATA, die)
            (half,) = folder.iterdir()
            assert (half.name[0], half.stat().st_size) == (".", PART_BYTES)
            await h.kill("api")
            await h.kill("decoder-0")
            await h.start(again := StoreOnly("api", topology), generation=2)
            second = await open_client(h, tmp_path / "b", generation=2)
            artifact = await second.save("r/0", "png", DATA, no_check)
            assert again.stats()["received_bytes"] == len(DATA) - PART_BYTES
            assert ArtifactStore(LocalFiles(folder)).read(artifact.name) == DATA
            before = (folder / artifact.name).stat()
            assert await second.save("r/0", "png", DATA, no_check) == artifact
            assert (folder / artifact.name).stat() == before, "sent again, it is not written again"
            others = [second.save("r/1", "png", DATA, no_check) for _ in range(3)]
            assert len({artifact.name for artifact in await asyncio.gather(*others)}) == 1
            assert sorted(path.name for path in folder.iterdir()) == ["r_0.png", "r_1.png"]
            await h.kill("decoder-0")
            stale = await open_client(h, tmp_path / "b", generation=1)
            with pytest.raises(FencedError):
                await stale.save("r/2", "png", DATA, no_check)

    run(body())


def test_damage_on_the_way_or_on_the_disk_never_becomes_an_artifact(
    run: Any, make_topology: Any, local_cluster: Any, tmp_path: Path
) -> None:
    async def body() -> None:
        topology = make_topology()
        async with local_cluster(topology) as h:
            folder = topology.state_dir / ARTIFACTS
            folder.mkdir(parents=True)
            await h.start(StoreOnly("api", topology))
            client = await open_client(h, tmp_path / "b")
            digest = hashlib.sha256(DATA).hexdigest()
            (folder / f".r_0.png.{digest}.tmp").write_bytes(b"\0" * PART_BYTES)
            artifact = await client.save("r/0", "png", DATA, no_check)
            assert (folder / artifact.name).read_bytes() == DATA
            api = client._actor.reference("api")
            wrong = PutArtifactPart("r_1.png", digest, 3, 0, b"abc")
            with pytest.raises(RemoteError, match="digest_mismatch"):
                await api.ask(wrong, ArtifactPartStored, timeout_s=10)
            assert [path.name for path in folder.iterdir()] == [artifact.name]

    run(body())


def test_a_full_disk_is_transient_and_another_trouble_is_not(
    run: Any, make_topology: Any, local_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        topology = make_topology()
        async with local_cluster(topology) as h:
            await h.start(StoreOnly("api", topology))
            client = await open_client(h, tmp_path / "b")
            fsync = os.fsync

            def full(_: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left") as found:
                await client.save("r/0", "png", DATA, no_check)
            assert is_transient(found.value)
            monkeypatch.setattr(os, "fsync", fsync)
            await client.save("r/0", "png", DATA, no_check)
            assert (topology.state_dir / ARTIFACTS / "r_0.png").read_bytes() == DATA
            (topology.state_dir / ARTIFACTS / "r_0.png").unlink()
            (topology.state_dir / ARTIFACTS).rmdir()
            (topology.state_dir / ARTIFACTS).write_text("no folder")
            with pytest.raises(OSError, match="Not a directory") as found:
                await client.save("r/0", "png", DATA, no_check)
            assert not is_transient(found.value)

    run(body())


@pytest.mark.parametrize("name", ["../journal.sqlite", "/etc/passwd", "", ".r_0.png.tmp", "r_0.png/../x", "r_0.png\0"])
def test_no_name_from_the_wire_is_a_path(run: Any, make_topology: Any, local_cluster: Any, name: str) -> None:
    async def body() -> None:
        topology = make_topology()
        async with local_cluster(topology) as h:
            await h.start(StoreOnly("api", topology))
            await h.start(role := Role("decoder-0"))
            before = sorted(topology.state_dir.rglob("*"))
            messages = [
                (PutArtifactPart(name, "0" * 64, 3, 0, b"abc"), ArtifactPartStored, "invalid"),
                (PutArtifactPart("r_0.png", "../" + "0" * 61, 3, 0, b"abc"), ArtifactPartStored, "invalid_message"),
                (GetUploadPart(name, 0), UploadPart, "invalid"),
                (GetUploadPart(f"{'0' * 64}.png", 0), UploadPart, "not_found"),
                (GetUploadPart(f"{'0' * 64}.png/../../x", 0), UploadPart, "invalid"),
            ]
            for message, reply, code in messages:
                with pytest.raises(RemoteError, match=f"^{code}:"):
                    await role.reference("api").ask(message, reply, timeout_s=10)
            assert sorted(topology.state_dir.rglob("*")) == before

    run(body())


def test_an_encoder_on_another_host_fetches_what_it_lacks_and_keeps_it(run_transfers: Any, tmp_path: Path) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        sent = UploadStore(LocalFiles(h.topology.state_dir / UPLOADS)).save(DATA, "png")
        await h.start(api := StoreOnly("api", h.topology))
        encoder = await open_transfer("encoder-0", host="b", state_dir=tmp_path / "b")

        async def fetch(upload: Upload) -> Any:
            encoder.begin(W)
            encoder.fake_instance.tell(FetchUploads(W, (upload,), FAR))
            return await encoder.fake_instance.inbox.next((RunStage, StageFailed))

        assert isinstance(await fetch(sent), RunStage)
        copies = encoder.transfer.stores.copies
        assert copies.read(sent) == DATA
        assert copies.files.folder == tmp_path / "b" / UPLOAD_COPIES / "encoder-0"
        assert isinstance(await fetch(sent), RunStage)
        assert api.stats()["sent_bytes"] == len(DATA), "it is fetched once"
        copies.files.path(sent.name).write_bytes(DATA[:-1] + b"x")
        assert isinstance(await fetch(sent), RunStage)
        assert copies.read(sent) == DATA
        missing = await fetch(Upload(f"{'0' * 64}.png", 5))
        assert (missing.invalid_request, missing.retryable) == (True, False)
        assert "not there any more: send the image again" in missing.error
        h.topology.state_dir.joinpath(UPLOADS, sent.name).write_bytes(b"x" * len(DATA))  # by a disk that fails
        copies.files.remove([sent.name])
        damaged = await fetch(sent)
        assert (damaged.invalid_request, damaged.retryable) == (False, True)
        assert not list(copies.files.entries())

    run_transfers(body)


def test_a_fetch_goes_on_where_the_connection_was_lost(
    run: Any, make_topology: Any, local_cluster: Any, tmp_path: Path
) -> None:
    async def body() -> None:
        topology = make_topology()
        async with local_cluster(topology) as h:
            sent = UploadStore(LocalFiles(topology.state_dir / UPLOADS)).save(DATA, "png")
            await h.start(StoreOnly("api", topology))
            client, data, asked = await open_client(h, tmp_path / "b", "encoder-0"), bytearray(), 0

            def lose() -> None:
                nonlocal asked
                asked += 1
                if asked == 2:
                    raise KilledError

            with pytest.raises(KilledError):
                await client.fetch(sent, data, lose)
            await h.kill("api")
            with pytest.raises(OSError, match="does not answer") as found:
                await client.fetch(sent, data, no_check)
            assert is_transient(found.value)
            await h.start(again := StoreOnly("api", topology), generation=2)
            await client.fetch(sent, data, no_check)
            assert again.stats()["sent_bytes"] == len(DATA) - PART_BYTES
            assert client.copies.read(sent) == DATA
            with pytest.raises(UploadError, match="no name of an upload"):
                await client.fetch(Upload("../x", 1), bytearray(), no_check)

    run(body())


def test_with_a_shared_folder_nobody_asks_and_a_lost_mount_is_waited_for(
    run_transfers: Any, make_topology: Any, tmp_path: Path
) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        shared = tmp_path / "shared"
        shared.mkdir()
        h.topology = msgspec.structs.replace(h.topology, store=StoreSection(url=f"file://{shared}"))
        for name in (ARTIFACTS, UPLOADS):
            LocalFiles(shared / name, shared=True).prepare()
        uploads = UploadStore(LocalFiles(shared / UPLOADS, shared=True))
        sent = uploads.save(DATA, "png")
        decoder = await open_transfer("decoder-0", host="b", state_dir=tmp_path / "b")
        shared.rename(tmp_path / "away")
        decoder.begin(W, images=[Image.new("RGB", (8, 8), "red")])
        decoder.fake_instance.tell(SaveArtifact(W, Output("png"), FAR))
        while not decoder.context.trouble:  # noqa: ASYNC110  facts are looked at, not sent
            await asyncio.sleep(0.01)
        assert "mounted here" in decoder.context.trouble
        assert not shared.exists()
        (tmp_path / "away").rename(shared)
        artifact = (await decoder.fake_instance.inbox.next(StageFinished)).artifact
        assert [path.name for path in (shared / ARTIFACTS).iterdir()] == [artifact.name]
        encoder = await open_transfer("encoder-0", host="b", state_dir=tmp_path / "b")
        encoder.begin(W)
        encoder.fake_instance.tell(FetchUploads(W, (sent,), FAR))
        await encoder.fake_instance.inbox.next(RunStage)
        assert encoder.transfer.stores.copies.read(sent) == DATA

    run_transfers(body)
