"""The stores, as roles on other hosts reach them: takes artifacts from decoders, gives uploads to encoders.

A decoder sends the file part by part before it reports its stage as finished; an encoder asks for an upload that it
does not have. Where `[store] url` names a place that all hosts reach, nobody asks. The client of this is
`roles/worker/store_client.py`; the messages, which `ApiServer` passes on, are those of `roles/messages/store.py`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog

from triptych.bus import RefusedError
from triptych.roles.media.artifacts import ArtifactError, check_artifact_name
from triptych.roles.media.files import DigestMismatchError, PartialFile, is_disk_full
from triptych.roles.media.uploads import UploadError, check_upload_name, missing_upload
from triptych.roles.messages.store import PART_BYTES, ArtifactPartStored, GetUploadPart, PutArtifactPart, UploadPart

T = TypeVar("T")
log = structlog.stdlib.get_logger("api")


class StoreService:
    """Writes parts of artifacts and reads parts of uploads, on threads.

    It remembers nothing of a file between two parts: what is there is on the disk.

    Args:
        artifacts: Folder of the artifact store.
        uploads: Folder of the upload store.
    """

    def __init__(self, artifacts: Path, uploads: Path) -> None:
        self.artifacts = artifacts
        self.uploads = uploads
        self.received_bytes = 0
        self.sent_bytes = 0
        self._writing: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def put(self, message: PutArtifactPart) -> ArtifactPartStored:
        """Write a part of an artifact. Raises RefusedError: see `PutArtifactPart`."""
        try:
            name = check_artifact_name(message.name)
        except ArtifactError as error:
            raise RefusedError("invalid", str(error)) from error
        # Two attempts may send the same file, and a sender whose answer is late sends its part again.
        key = (name, message.digest)
        lock = self._writing.setdefault(key, asyncio.Lock())
        async with lock:
            file = PartialFile(self.artifacts / name, message.digest, message.nbytes)
            try:
                there = await asyncio.to_thread(file.append, message.offset, message.data)
            except DigestMismatchError as error:
                log.warning("an artifact arrived damaged", artifact=name, error=str(error))
                raise RefusedError("digest_mismatch", str(error)) from error
            except OSError as error:
                log.warning("an artifact cannot be kept", artifact=name, error=str(error))
                code = "disk_full" if is_disk_full(error) else "not_stored"
                raise RefusedError(code, f"{self.artifacts}: {error.strerror}") from error
        self.received_bytes += len(message.data)
        return ArtifactPartStored(there)

    async def get(self, message: GetUploadPart) -> UploadPart:
        """Read a part of an upload. Raises RefusedError: see `GetUploadPart`."""
        try:
            name = check_upload_name(message.name)
        except UploadError as error:
            raise RefusedError("invalid", str(error)) from error
        try:
            data = await asyncio.to_thread(_read_part, self.uploads / name, message.offset)
        except FileNotFoundError:
            raise RefusedError("not_found", str(missing_upload(name))) from None
        except OSError as error:
            log.warning("an upload cannot be read", upload=name, error=str(error))
            raise RefusedError("not_read", f"{self.uploads}: {error.strerror}") from error
        self.sent_bytes += len(data)
        return UploadPart(data)


def _read_part(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(PART_BYTES)
