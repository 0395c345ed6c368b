"""Finished media files: written whole or not at all, read by name."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from triptych.roles.media.files import Entry, Files
from triptych.roles.media.formats import FORMATS
from triptych.roles.media.retention import StoreBounds, surplus
from triptych.roles.messages.common import Artifact

ARTIFACTS: Final = "artifacts"
"""Folder of the artifact store, under the state folder or `[store] url`."""

VARIANTS: Final[Mapping[str, str]] = {"thumbnail": "webp", "spritesheet": "jpeg"}
"""What is made of a finished video, and the output format of it."""

# After the index, a preview has the step that it was made after, and a variant its name.
_SUFFIX: Final = rf"(?:\.(?:[0-9]{{1,10}}|{'|'.join(VARIANTS)}))?"
_JOB_ID = re.compile(rf"[A-Za-z0-9_-]{{1,100}}/[0-9]{{1,6}}{_SUFFIX}")
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,100}}_[0-9]{{1,6}}{_SUFFIX}\.(?:{'|'.join(FORMATS)})")


class ArtifactError(Exception):
    """A name, an id or a format that the store does not take."""


class ArtifactMissingError(ArtifactError):
    """No artifact of that name: never written, or pruned."""


def artifact_name(job_id: str, output_format: str) -> str:
    """Return the file name of a job's artifact, such as `req-1_0.png` for `req-1/0`.

    A preview of that job, `req-1/0.12`, has the name `req-1_0.12.png`, and a variant, `req-1/0.thumbnail`, the name
    `req-1_0.thumbnail.webp`. Distinct jobs give distinct names, since the part after the last `_` is the index, with
    the step of a preview or the name of a variant.

    Raises:
        ArtifactError: when the id is not `REQUEST_ID/INDEX`, `REQUEST_ID/INDEX.STEP` or `REQUEST_ID/INDEX.VARIANT` in
            letters, digits, `_` and `-`, or the format is not one of `FORMATS`.

    """
    if not _JOB_ID.fullmatch(job_id):
        raise ArtifactError(f"{job_id!r} is no job id: want REQUEST_ID/INDEX of letters, digits, '_' and '-'")
    if output_format not in FORMATS:
        raise ArtifactError(f"output format {output_format!r} is none of {', '.join(FORMATS)}")
    return f"{job_id.replace('/', '_')}.{output_format}"


def variant_id(job_id: str, variant: str) -> str:
    """Return the id under which a variant of a job's video is saved."""
    return f"{job_id}.{variant}"


class ArtifactStore:
    """Finished media. Every method blocks on the disk or the network: call them off the event loop."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def save(self, job_id: str, output_format: str, data: bytes) -> Artifact:
        """Write a job's artifact; on return it is complete and on disk. Writing it again replaces it.

        Raises:
            ArtifactError: see `artifact_name`.
            OSError: as `Files.write`.

        """
        name = artifact_name(job_id, output_format)
        self.files.write(name, data)
        return Artifact(name, FORMATS[output_format].content_type, len(data))

    def path(self, name: str) -> Path | None:
        """Return the path of the artifact of that name, whether or not it exists; None if no path leads to it.

        Raises:
            ArtifactError: when no artifact could have that name.

        """
        return self.files.path(check_artifact_name(name))

    def stat(self, name: str) -> Entry:
        """Return size and age of an artifact; raises as `read`."""
        try:
            return self.files.stat(check_artifact_name(name))
        except FileNotFoundError:
            raise _missing(name) from None

    def open(self, name: str) -> BinaryIO:
        """Open an artifact to read parts of it; raises as `read`."""
        try:
            return self.files.open(check_artifact_name(name))
        except FileNotFoundError:
            raise _missing(name) from None

    def read(self, name: str) -> bytes:
        """Read a whole artifact.

        Raises:
            ArtifactMissingError: when there is none of that name.
            ArtifactError: when no artifact could have that name.
            OSError: as `Files`.

        """
        try:
            return self.files.read(check_artifact_name(name))
        except FileNotFoundError:
            raise _missing(name) from None

    def discard(self, job_id: str) -> None:
        """Remove a job's artifact, of whatever format, and its variants; nothing where there is none.

        Raises:
            ArtifactError: see `artifact_name`.
            OSError: as `Files`.

        """
        names = [artifact_name(job_id, output_format) for output_format in FORMATS]
        if "." not in job_id:
            names += [artifact_name(variant_id(job_id, name), VARIANTS[name]) for name in VARIANTS]
        self.files.remove(names)

    def prune(self, bounds: StoreBounds, *, now: float, needed: Container[str]) -> int:
        """Remove what passes the bounds, and half-written files that a dead process left.

        Args:
            bounds: Of the store.
            now: Unix seconds, from before `needed` was made.
            needed: Ids of requests whose artifacts stay. Those written after `now` stay as well.

        Returns:
            How many files were removed.

        Raises:
            OSError: as `Files`.

        """

        def stays(entry: Entry) -> bool:
            return entry.modified_at > now or entry.name.rpartition("_")[0] in needed

        present = self.files.entries()
        finished = [e for e in present if _NAME.fullmatch(e.name)]
        doomed = surplus(finished, bounds, now=now, needed=stays)
        doomed += [e.name for e in present if e.abandoned(now)]
        self.files.remove(doomed)
        return len(doomed)


def check_artifact_name(name: str) -> str:
    """Return a name that an artifact can have; raises ArtifactError for any other."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} is no artifact name")
    return name


def _missing(name: str) -> ArtifactMissingError:
    return ArtifactMissingError(f"there is no artifact {name}")
