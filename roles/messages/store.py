"""Messages between roles on other hosts and the stores of the API's host: files, in parts.

A file goes part by part: the answer to each says from where the next begins, so that either side may restart in
between. All of them may be sent again.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from triptych.bus import Message
from triptych.roles.messages.common import Name, Natural

PART_BYTES: Final = (1 << 20) - 4096
"""Most bytes of a file in one message, so that the message is within the bus's limit."""
STORE_ANSWER_S: Final = 5.0
"""Seconds to wait for the store. The last part of a very large file may take longer, since all of it is read and
written to the disk then; the sender asks again, and finds it done."""

Part = Annotated[bytes, Meta(max_length=PART_BYTES)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hex."""
FileSize = Annotated[int, Meta(ge=1, le=1 << 40)]


class PutArtifactPart(Message):
    """Keep a part of an artifact. Asks for ArtifactPartStored.

    Refused with `invalid` for a name that no artifact can have, `digest_mismatch` when all parts are there and are not
    the file (they are removed: begin again), `disk_full`, and `not_stored` for another trouble of the disk.
    """

    name: Name
    """Of the artifact, as `roles.media.artifacts.artifact_name` makes it."""
    digest: Digest
    """Of the whole file."""
    nbytes: FileSize
    """Of the whole file."""
    offset: Natural
    """Where this part begins."""
    data: Part
    """Empty to ask how much is there."""


class ArtifactPartStored(Message):
    """How much of the artifact is there."""

    there: Natural
    """Where the next part begins. Once this is the size of the file, it is complete, checked and on disk."""


class GetUploadPart(Message):
    """Read a part of an upload. Asks for UploadPart.

    Refused with `invalid` for a name that no upload can have, `not_found` when it is not kept any more, and
    `not_read` for a trouble of the disk.
    """

    name: Name
    """Of the upload: its SHA-256 and the ending of its format."""
    offset: Natural


class UploadPart(Message):
    """A part of an upload; empty from the end of the file on."""

    data: Part
