"""Images, videos and tensors that clients sent, kept as files under the digest of their bytes while they are needed."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from triptych.roles.media.files import Files
from triptych.roles.media.retention import NO_BOUNDS, StoreBounds, surplus
from triptych.roles.messages.common import Upload

if TYPE_CHECKING:
    from PIL import Image

UPLOADS: Final = "uploads"
"""Folder of the upload store, under the state folder or `[store] url`."""
ENDINGS: Final[Mapping[str, str]] = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}
"""Pillow's names of the accepted formats, and the endings of their files. MPO is a JPEG with others behind it."""

TENSORS_ENDING: Final = "safetensors"
VIDEO_ENDINGS: Final = ("mp4", "webm")

_NAME: Final = re.compile(r"(?P<digest>[0-9a-f]{64})\.(?:png|jpeg|webp|safetensors|mp4|webm)")


class UploadError(ValueError):
    """An upload is missing, damaged, or no image, so that reading it elsewhere would fail as well."""


class UploadsFullError(Exception):
    """The store has no room: all that it holds may be needed by active requests."""


class UploadStore:
    """Uploads, written and pruned by one process, the API's, and read by all.

    Every method blocks on the disk or the network: call them off the event loop. They may be called from several
    threads.
    """

    def __init__(self, files: Files, bounds: StoreBounds = NO_BOUNDS, *, needed_s: float = 0.0) -> None:
        self.files = files
        self.bounds = bounds
        self.needed_s = needed_s
        """An upload as young as this stays, whatever the bounds say."""
        self._held: tuple[int, int] = (sys.maxsize, 0)  # the first `save` counts
        self._lock = threading.Lock()

    def save(self, data: bytes, ending: str) -> Upload:
        """Keep a file; on return it is complete and on disk. The age of one that is there already starts anew.

        Args:
            data: Its bytes, which have been checked.
            ending: Of its format, of `ENDINGS` or `VIDEO_ENDINGS`, or `TENSORS_ENDING`.

        Raises:
            UploadsFullError: when there is no room.
            OSError: as `Files.write`.
        """
        upload = Upload(f"{hashlib.sha256(data).hexdigest()}.{ending}", len(data))
        name = check_upload_name(upload.name)
        # Locked against `prune`, which must not remove what has just been sent again.
        with self._lock:
            known = self._is_there(name)
            if not known and not self._fits(len(data)):
                bounds = self.bounds
                room = StoreBounds(bounds.max_age_s, bounds.max_count - 1, bounds.max_bytes - len(data))
                self._prune(room, time.time())
                if not self._fits(len(data)):
                    count, nbytes = self._held
                    raise UploadsFullError(
                        f"{count} uploads, of {nbytes} bytes, are kept for requests that may be under way; [state] "
                        f"max_uploads is {bounds.max_count} and max_uploads_size {bounds.max_bytes} bytes"
                    )
            # Written even where it is there: should that one be damaged, it is whole again.
            self.files.write(name, data)
            if not known:
                self._held = (self._held[0] + 1, self._held[1] + len(data))
        return upload

    def renew(self, upload: Upload) -> bool:
        """Let the age of an upload start anew; returns False if it is not there as it was sent. Raises as `read`."""
        name = check_upload_name(upload.name)
        with self._lock:
            try:
                self.files.write(name, self.read(upload))
            except UploadError:
                return False
        return True

    def read(self, upload: Upload) -> bytes:
        """Read a whole upload, just as it was sent.

        Raises:
            UploadError: when it is not there or not as it was sent, or no upload could have that name.
            OSError: as `Files`.
        """
        name = check_upload_name(upload.name)
        try:
            data = self.files.read(name)
        except FileNotFoundError:
            raise missing_upload(name) from None
        if len(data) != upload.nbytes or hashlib.sha256(data).hexdigest() != upload_digest(name):
            raise UploadError(f"the upload {name} is damaged on the disk: send the {_what(name)} again")
        return data

    def open(self, upload: Upload) -> Image.Image:
        """Decode an upload.

        Raises:
            UploadError: as `read`; or it is no image.
            OSError: as `read`.
        """
        # Here, because the head only removes uploads.
        from PIL import Image

        data = self.read(upload)
        try:
            image = Image.open(io.BytesIO(data), formats=[name for name in ENDINGS if name != "MPO"])
            image.load()
        except Exception as error:  # Pillow raises whatever its parsers run into
            raise UploadError(f"the upload {upload.name} cannot be decoded ({error})") from error
        return image

    def discard(self, upload: Upload, *, saved_before: float) -> None:
        """Remove an upload, unless it was sent again at or after `saved_before` (unix seconds).

        Raises:
            UploadError: when no upload could have that name.
            OSError: as `Files`.
        """
        name = check_upload_name(upload.name)
        try:
            if self.files.stat(name).modified_at < saved_before:
                self.files.remove((name,))
        except FileNotFoundError:  # pruned already
            return

    def prune(self, *, now: float) -> int:
        """Remove what passes the bounds, and half-written files; returns how many."""
        with self._lock:
            return self._prune(self.bounds, now)

    def _prune(self, bounds: StoreBounds, now: float) -> int:
        present = self.files.entries()
        stored = [entry for entry in present if _NAME.fullmatch(entry.name)]
        doomed = surplus(stored, bounds, now=now, needed=lambda entry: now - entry.modified_at <= self.needed_s)
        doomed += [entry.name for entry in present if entry.abandoned(now)]
        self.files.remove(doomed)
        kept = [entry.nbytes for entry in present if entry.name not in set(doomed)]
        self._held = (len(kept), sum(kept))
        return len(doomed)

    def _fits(self, new: int) -> bool:
        count, nbytes = self._held
        return count < self.bounds.max_count and nbytes + new <= self.bounds.max_bytes

    def _is_there(self, name: str) -> bool:
        try:
            self.files.stat(name)
        except FileNotFoundError:
            return False
        return True


def check_upload_name(name: str) -> str:
    """Return a name that an upload can have; raises UploadError for any other."""
    if not _NAME.fullmatch(name):
        raise UploadError(f"{name!r} is no name of an upload")
    return name


def upload_digest(name: str) -> str:
    """Return the SHA-256, in hex, of the upload of that name."""
    return name.partition(".")[0]


def missing_upload(name: str) -> UploadError:
    """Make the error for an upload that is not kept any more."""
    return UploadError(f"the upload {name} is not there any more: send the {_what(name)} again")


def is_video(upload: Upload) -> bool:
    """Return whether an upload is a video."""
    return upload.name.endswith(VIDEO_ENDINGS)


def _what(name: str) -> str:
    if name.endswith(VIDEO_ENDINGS):
        return "video"
    return "file of tensors" if name.endswith(f".{TENSORS_ENDING}") else "image"
