"""The stores, as a role has them: saves artifacts, and brings uploads to where the stream worker reads them.

A role on the API's host, without `[store] url`, sees the very folders. With it, every role writes there. Otherwise the
files go over the bus, part by part, to and from the API's process (`api/store.py`).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from triptych.actors import Actor, Component, Topology
from triptych.bus import BusError, Message, RemoteError
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactStore, artifact_name
from triptych.roles.media.files import DigestMismatchError, LocalFiles, StoreUnavailableError
from triptych.roles.media.formats import FORMATS
from triptych.roles.media.location import has_store, reaches_store, store_files, upload_bounds
from triptych.roles.media.uploads import UPLOADS, UploadError, UploadsFullError, UploadStore, upload_digest
from triptych.roles.messages.common import Artifact, Upload
from triptych.roles.messages.store import (
    PART_BYTES,
    STORE_ANSWER_S,
    ArtifactPartStored,
    GetUploadPart,
    PutArtifactPart,
    UploadPart,
)
from triptych.roles.worker.reporter import FencedError, is_fenced

T = TypeVar("T")
R = TypeVar("R", bound=Message)

API: Final = "api"
"""The component that has the stores."""
UPLOAD_COPIES: Final = "upload-copies"
"""Folder of uploads that were brought from elsewhere, under the state folder: one for each role process."""
PRUNE_EVERY_S: Final = 600.0


def upload_store(component: Component, topology: Topology) -> UploadStore:
    """Return the store that a role reads uploads from, on this host: that of the API, else that of its copies."""
    bounds, needed_s = upload_bounds(topology)
    if has_store(component, topology):
        return UploadStore(store_files(topology, UPLOADS), bounds, needed_s=needed_s)
    folder = topology.state_dir / UPLOAD_COPIES / component.name
    return UploadStore(LocalFiles(folder), bounds, needed_s=needed_s)


class StoreClient:
    """Saves artifacts and fetches uploads for one role process.

    Args:
        actor: Sends the messages.
        component: The role.
        topology: Says where the stores are.
    """

    def __init__(self, actor: Actor, component: Component, topology: Topology) -> None:
        self._actor = actor
        reaches = reaches_store(component, topology)
        self.artifacts = ArtifactStore(store_files(topology, ARTIFACTS)) if reaches else None
        """The artifact store; None if it is reached over the bus."""
        self.copies = None if has_store(component, topology) else upload_store(component, topology)
        """Uploads that were brought from elsewhere; None if the stream worker reads the store itself."""
        self._uploads = UploadStore(store_files(topology, UPLOADS)) if reaches else None

    @property
    def location(self) -> str:
        """Return where artifacts are saved, for a message to an operator."""
        return self.artifacts.files.location if self.artifacts is not None else f"the store of {API}"

    async def save(self, job_id: str, output_format: str, data: bytes, check: Callable[[], None]) -> Artifact:
        """Save a job's artifact; on return it is complete and on disk. Saving it again is no error.

        Args:
            job_id: Of the job, or of a preview.
            output_format: Of `FORMATS`.
            data: The file.
            check: Called between two parts; what it raises ends the saving.

        Raises:
            ArtifactError: see `artifact_name`.
            OSError: `is_transient` says whether a later call may succeed; it goes on where this one ended.
        """
        if self.artifacts is not None:
            return await asyncio.to_thread(self.artifacts.save, job_id, output_format, data)
        name = artifact_name(job_id, output_format)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        await self._undamaged(lambda: self._put(name, digest, data, check))
        return Artifact(name, FORMATS[output_format].content_type, len(data))

    async def fetch(self, upload: Upload, data: bytearray, check: Callable[[], None]) -> None:
        """Have an upload in `copies`, under the digest of its bytes.

        Args:
            upload: Its name is the digest.
            data: Where its bytes come; empty at the first call, then as the call before left it.
            check: As in `save`.

        Raises:
            UploadError: it is not kept any more, or no upload could have that name.
            OSError: as in `save`.
        """
        if self.copies is None or await asyncio.to_thread(self.copies.renew, upload):
            return
        if self._uploads is not None:
            whole = await asyncio.to_thread(self._uploads.read, upload)
        else:
            whole = await self._undamaged(lambda: self._get(upload, data, check))
        try:
            await asyncio.to_thread(self.copies.save, whole, upload.name.partition(".")[2])
        except UploadsFullError as error:
            raise OSError(errno.ENOSPC, str(error)) from error

    async def prune_copies(self) -> None:
        """Remove copies that no request can need any more, again and again, as the API does with the uploads."""
        while self.copies is not None:
            try:
                await asyncio.to_thread(self.copies.prune, now=time.time())
            except OSError as error:  # what is left is tried again the next time
                self._actor.log.warning("copies of uploads not pruned", error=str(error))
            await asyncio.sleep(PRUNE_EVERY_S)

    async def _put(self, name: str, digest: str, data: bytes, check: Callable[[], None]) -> None:
        async def put(offset: int, part: bytes) -> int:
            check()
            return (await self._ask(PutArtifactPart(name, digest, len(data), offset, part), ArtifactPartStored)).there

        there = await put(0, b"") if len(data) > PART_BYTES else 0
        while there < len(data):
            there = await put(there, data[there : there + PART_BYTES])

    async def _get(self, upload: Upload, data: bytearray, check: Callable[[], None]) -> bytes:
        while len(data) < upload.nbytes:
            check()
            part = (await self._ask(GetUploadPart(upload.name, len(data)), UploadPart)).data
            if not part:
                break
            data += part
        whole = bytes(data)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(whole).hexdigest())
        if len(whole) != upload.nbytes or digest != upload_digest(upload.name):
            data.clear()
            raise DigestMismatchError(
                f"the {len(whole)} bytes of the upload {upload.name} are not those that were sent"
            )
        return whole

    async def _undamaged(self, transfer: Callable[[], Awaitable[T]]) -> T:
        """Transfer a file, and once more if its bytes arrive damaged; raises OSError when they do so again."""
        try:
            return await transfer()
        except DigestMismatchError as error:
            self._actor.log.warning("a file was damaged on the way", error=str(error))
        try:
            return await transfer()
        except DigestMismatchError as error:
            raise OSError(errno.EBADMSG, str(error)) from error

    async def _ask(self, message: Message, reply: type[R]) -> R:
        try:
            return await self._actor.reference(API).ask(message, reply, timeout_s=STORE_ANSWER_S)
        except RemoteError as error:
            if is_fenced(error):
                raise FencedError(f"{API} has given this incarnation up ({error})") from error
            raise _of_refusal(error) from error
        except BusError as error:
            raise StoreUnavailableError(errno.EIO, f"the store of {API} does not answer: {error}") from error


def _of_refusal(error: RemoteError) -> Exception:
    match error.code:
        case "disk_full":
            return OSError(errno.ENOSPC, error.detail)
        case "digest_mismatch":
            return DigestMismatchError(error.detail)
        case "not_found":
            return UploadError(error.detail)
        case "invalid" | "not_stored" | "not_read" | "unknown_message" | "invalid_message":
            return OSError(errno.EIO, error.detail)
        case _:  # it stops, is overloaded, or has failed and is restarted
            return StoreUnavailableError(errno.EIO, f"the store of {API} does not answer: {error}")
